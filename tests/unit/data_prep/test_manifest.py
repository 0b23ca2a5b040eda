import json

import pytest

from data_prep.manifest import Manifest, parse_manifest, read_manifest
from trainer.errors import InputError


@pytest.fixture
def values(write_dataset) -> dict:
    return json.loads(write_dataset().manifest.model_dump_json())


def test_a_manifest_survives_being_written(write_dataset):
    written = write_dataset()
    assert read_manifest(written.uri) == written.manifest
    assert parse_manifest(written.manifest.model_dump_json()) == written.manifest


def test_rows_and_classes_are_counted(write_dataset):
    manifest = write_dataset(rows=(7, 4, 0)).manifest
    assert [manifest.splits[split].rows for split in ("train", "val", "test")] == [7, 4, 0]
    assert manifest.num_classes == 3


def test_a_dataset_without_a_manifest_is_not_committed(tmp_path):
    assert read_manifest(str(tmp_path)) is None


def test_a_newer_format_is_refused_with_the_version_that_is_read(values):
    values["format_version"] = 2
    with pytest.raises(ValueError, match=r"format_version: .*\(this program reads format version 1\)"):
        parse_manifest(json.dumps(values))


@pytest.mark.parametrize("where", ["", "splits.train", "splits.train.files.0"])
def test_an_unknown_field_is_refused_by_name(values, where):
    part = values
    for key in where.split(".") if where else []:
        part = part[int(key) if key.isdecimal() else key]
    part["surprise"] = 1
    with pytest.raises(ValueError, match=f"{where}.*surprise: Extra inputs are not permitted"):
        parse_manifest(json.dumps(values))


def test_a_missing_field_is_refused_by_name(values):
    del values["class_names"]
    with pytest.raises(ValueError, match="class_names: Field required"):
        parse_manifest(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[]", '"manifest"'])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="this program reads format version 1"):
        parse_manifest(text)


def test_a_dataset_of_a_newer_format_is_refused_with_what_to_do(values, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({**values, "format_version": 2}))
    with pytest.raises(InputError, match=r"manifest.json: format_version: .*--overwrite"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("path", ["../else.parquet", "/etc/passwd", "train/../../else.parquet", "else.parquet"])
def test_a_data_file_outside_the_dataset_is_refused(values, path):
    values["splits"]["train"]["files"][0]["path"] = path
    with pytest.raises(ValueError, match="path"):
        parse_manifest(json.dumps(values))


def test_a_manifest_cannot_be_changed(write_dataset):
    manifest: Manifest = write_dataset().manifest
    with pytest.raises(ValueError, match="frozen"):
        manifest.seed = 1
