import json

import pytest

from data_prep.manifest import Manifest, read_manifest
from trainer.runtime.errors import RecordError


@pytest.fixture
def values(write_dataset) -> dict:
    return json.loads(write_dataset().manifest.model_dump_json())


def test_a_manifest_survives_being_written(write_dataset):
    written = write_dataset()
    assert read_manifest(written.uri) == written.manifest


def test_rows_and_classes_are_counted(write_dataset):
    manifest = write_dataset(rows=(7, 4, 0)).manifest
    assert [manifest.splits[split].rows for split in ("train", "val", "test")] == [7, 4, 0]
    assert manifest.num_classes == 3


def test_a_dataset_without_a_manifest_is_not_committed(tmp_path):
    assert read_manifest(str(tmp_path)) is None


def test_a_missing_field_is_refused_by_name(values):
    del values["class_names"]
    with pytest.raises(RecordError, match="class_names: Field required"):
        Manifest.parse(json.dumps(values), "manifest.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '"manifest"'])
def test_other_text_is_refused(text):
    with pytest.raises(RecordError, match=r"manifest\.json cannot be read: "):
        Manifest.parse(text, "manifest.json")


@pytest.mark.parametrize("name", ["format", "format_version"])
def test_a_dataset_of_a_newer_format_is_refused_with_what_to_do(values, name, tmp_path):
    del values["format"]
    (tmp_path / "manifest.json").write_text(json.dumps({**values, name: 2}))
    with pytest.raises(RecordError, match=r"manifest.json cannot be read: it is of format 2: .*--overwrite"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("path", ["../else.parquet", "/etc/passwd", "train/../../else.parquet", "else.parquet"])
def test_a_data_file_outside_the_dataset_is_refused(values, path):
    values["splits"]["train"]["files"][0]["path"] = path
    with pytest.raises(RecordError, match="path"):
        Manifest.parse(json.dumps(values), "manifest.json")


def test_a_manifest_cannot_be_changed(write_dataset):
    manifest: Manifest = write_dataset().manifest
    with pytest.raises(ValueError, match="frozen"):
        manifest.seed = 1
