import json

import pyarrow as pa
import pytest

from data_prep.manifest import Manifest, binary_array, read_index, read_manifest
from trainer.runtime import storage
from trainer.runtime.errors import InputError, RecordError


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
    (tmp_path / "manifest.json").write_text(json.dumps({**values, name: 3}))
    with pytest.raises(RecordError, match=r"manifest.json cannot be read: it is of format 3: .*--overwrite"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("path", ["../else.arrow", "/etc/passwd", "shards/../../00000-00000000.arrow", "else.arrow"])
def test_a_shard_outside_the_dataset_is_refused(values, path):
    values["shards"][0]["path"] = path
    with pytest.raises(RecordError, match="path"):
        Manifest.parse(json.dumps(values), "manifest.json")


def test_a_dataset_of_format_1_is_refused_with_the_command_that_prepares_it_again(values, tmp_path):
    former = {name: value for name, value in values.items() if name not in ("shards", "tables", "value_counts")}
    former |= {"format": 1, "gray_levels": [0, 255], "value_range": [0, 4095], "value_range_given": True, "seed": 3}
    for split in former["splits"].values():
        split["files"] = [{"path": "train/part-00000.parquet", "rows": 7}]
    (tmp_path / "manifest.json").write_text(json.dumps(former))
    with pytest.raises(RecordError, match="is of format 1") as refused:
        read_manifest(str(tmp_path))
    command = f"prepare.py /photos {tmp_path} --image-size 5 --channels 1 --resize fit --background 255 --val-fraction"
    assert command in str(refused.value)
    assert str(refused.value).endswith("--seed 3 --value-range 0:4095 --overwrite")
    # Runs that were trained on it keep its manifest.
    assert Manifest.parse(json.dumps(former), "dataset.json").splits["train"].rows == 7


@pytest.mark.parametrize(
    ("counts", "levels"),
    [
        (None, None),
        ([1] * 256, (1, 254)),
        ([0] * 10 + [99] + [0] * 245, (10, 10)),
        ([0] * 10 + [4] + [0] * 9 + [992] + [0] * 9 + [4] + [0] * 225, (20, 20)),
        ([0] * 10 + [6] + [0] * 9 + [988] + [0] * 9 + [6] + [0] * 225, (10, 30)),
    ],
)
def test_gray_levels_are_those_of_99_percent_of_the_values(write_dataset, counts, levels):
    assert write_dataset().manifest.model_copy(update={"value_counts": counts}).gray_levels == levels


def test_the_index_is_compared_with_its_checksum(write_dataset):
    written = write_dataset(rows=(7, 4, 3))
    assert read_index(written.uri, written.manifest, ["path"])["path"].to_pylist()[7] == "val/0.png"
    uri = storage.join(written.uri, "index.parquet")
    content = storage.read_bytes(uri)
    storage.write_bytes(uri, content[:100] + bytes([content[100] ^ 1]) + content[101:])
    with pytest.raises(InputError, match=r"index.parquet has sha256 .*, the manifest says .*jobs/prepare.py again"):
        read_index(written.uri, written.manifest)
    storage.delete_file(uri)
    with pytest.raises(InputError, match=r"index.parquet: not found, though the manifest names it"):
        read_index(written.uri, written.manifest)


def test_a_manifest_cannot_be_changed(write_dataset):
    manifest: Manifest = write_dataset().manifest
    with pytest.raises(ValueError, match="frozen"):
        manifest.seed = 1


def test_a_binary_column_is_an_array_wherever_it_is_cut():
    values = [bytes([number] * 4) for number in range(6)]
    column = pa.chunked_array([pa.array(values[:3], pa.binary(4)), pa.array(values[3:], pa.binary(4))])
    assert [one.tobytes() for one in binary_array(column.slice(1, 4))] == values[1:5]
    assert [one.tobytes() for one in binary_array(column.slice(4))] == values[4:]
