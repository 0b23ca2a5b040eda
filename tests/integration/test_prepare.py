import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_prep.index
import data_prep.prepare
import data_prep.staging
from data_prep.decode import ImageOptions
from data_prep.images import decode_file
from data_prep.isolation import decode_guarded
from data_prep.manifest import SPLITS
from data_prep.prepare import PrepareConfig, check_places, prepare
from tests.conftest import read_split, write_stripes
from trainer.runtime import storage
from trainer.runtime.errors import InputError, JobError
from trainer.runtime.events import StageProgressed
from trainer.training.dataset import load_manifest, open_split

pytestmark = pytest.mark.usefixtures("resources")
CONFIG = PrepareConfig(image_size=20, max_bad_fraction=0.1)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = write_stripes(tmp_path_factory.mktemp("source"), images_per_class=20)
    (folder / "down" / "page.jpg").write_bytes(b"<html>not found</html>")
    (folder / "down" / "empty.png").write_bytes(b"")
    (folder / "LICENSE").write_text("free")
    twin = Image.open(folder / "across" / "000.png")
    twin.save(folder / "across" / "twin.bmp")
    return folder


@pytest.fixture(scope="module")
def dataset(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(str(source), str(folder), CONFIG)
    return folder


def test_every_image_is_in_one_split_with_its_pixels(source, dataset):
    rows = pd.concat(read_split(dataset, split) for split in SPLITS).set_index("path")
    assert sorted(rows.index) == sorted(
        path.relative_to(source).as_posix()
        for path in source.rglob("*.*")
        if path.name not in ("page.jpg", "empty.png")
    )
    original = Image.open(source / "slanted" / "007.png").resize((20, 20), Image.Resampling.BOX)
    stored = np.asarray(rows.loc["slanted/007.png", "image"], np.int16).reshape(20, 20)
    assert np.abs(stored - np.asarray(original, np.int16)).max() <= 1
    assert rows.loc["slanted/007.png", "label"] == 2
    assert rows.loc["slanted/007.png", "sha256"] == hashlib.sha256((source / "slanted/007.png").read_bytes()).digest()


def test_manifest_counts_and_checksums_are_those_of_the_files(dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert manifest["class_names"] == ["across", "down", "slanted"]
    assert [shard["path"] for shard in manifest["shards"]] == sorted(
        path.relative_to(dataset).as_posix() for path in (dataset / "shards").iterdir()
    )
    sizes = {shard["path"]: shard["bytes"] for shard in manifest["shards"]}
    assert sizes == {path: (dataset / path).stat().st_size for path in sizes}
    digests = {shard["path"]: shard["sha256"] for shard in manifest["shards"]} | manifest["tables"]
    assert digests == {path: hashlib.sha256((dataset / path).read_bytes()).hexdigest() for path in digests}
    assert {"index.parquet", "rejected.parquet", "duplicates.parquet"} < digests.keys()
    for split in SPLITS:
        labels = read_split(dataset, split)["label"]
        assert manifest["splits"][split]["rows_per_class"] == np.bincount(labels, minlength=3).tolist()
    train = np.stack(read_split(dataset, "train")["image"]).astype(np.float64)
    np.testing.assert_allclose(manifest["pixel_mean"], [train.mean()])
    np.testing.assert_allclose(manifest["pixel_std"], [train.std()])


def test_splits_are_stratified_and_twins_stay_together(dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert manifest["splits"]["val"]["rows_per_class"] == [3, 3, 3]
    assert manifest["splits"]["test"]["rows_per_class"] == [3, 3, 3]
    split_of = {path: split for split in SPLITS for path in read_split(dataset, split)["path"]}
    assert split_of["across/000.png"] == split_of["across/twin.bmp"]
    duplicates = pq.read_table(dataset / "duplicates.parquet").to_pydict()
    assert duplicates["path"] == ["across/000.png", "across/twin.bmp"]
    assert duplicates["leaks"] == [False, False]


def test_unused_files_are_listed_with_their_reasons(dataset):
    rejected = pq.read_table(dataset / "rejected.parquet").to_pydict()
    assert dict(zip(rejected["path"], rejected["reason"], strict=True)) == {
        "LICENSE": "not_in_a_class_folder",
        "down/empty.png": "empty",
        "down/page.jpg": "not_an_image",
    }


def test_nothing_of_the_work_is_left(dataset):
    assert {path.name for path in dataset.iterdir()} == {
        "shards",
        "index.parquet",
        "rejected.parquet",
        "duplicates.parquet",
        "README.md",
        "contact_sheet.png",
        "manifest.json",
    }


def bytes_of(dataset: Path) -> dict[str, bytes]:
    return {path.relative_to(dataset).as_posix(): path.read_bytes() for path in dataset.rglob("*") if path.is_file()}


@pytest.fixture
def many_shards(monkeypatch):
    """Makes each shard one of 7 images."""
    monkeypatch.setattr(data_prep.staging, "_LEAST_SHARD_IMAGES", 7)


def test_the_number_of_tasks_changes_nothing(source, tmp_path, many_shards, monkeypatch):
    prepare(str(source), str(tmp_path / "one"), CONFIG)
    monkeypatch.setattr(data_prep.staging, "_LEAST_TASKS_PER_CORE", 0)
    prepare(str(source), str(tmp_path / "two"), CONFIG)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert len(list((tmp_path / "one" / "shards").iterdir())) == 9


class Interrupt:
    """Interrupts a preparation at its second event of decoding, and counts what was done at each."""

    def __init__(self, at: int = 2) -> None:
        self.events, self._at = [], at

    def __call__(self, event):
        self.events.append(event)
        if len(self.events) == self._at:
            raise KeyboardInterrupt


def test_an_interrupted_preparation_keeps_its_finished_shards(source, tmp_path, many_shards):
    target = tmp_path / "dataset"
    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), str(target), CONFIG, on_event=Interrupt())
    assert not (target / "manifest.json").exists()
    # That of another attempt, or damaged since.
    kept = sorted((target / "shards").glob("*.arrow"))
    assert kept
    again = Interrupt(at=0)
    prepare(str(source), str(target), CONFIG, on_event=again)
    assert 0 < again.events[0].done <= again.events[0].total == 63
    prepare(str(source), str(tmp_path / "whole"), CONFIG)
    assert bytes_of(target) == bytes_of(tmp_path / "whole")


def test_a_recorded_shard_that_is_gone_is_decoded_again(source, tmp_path, many_shards):
    target = tmp_path / "dataset"
    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), str(target), CONFIG, on_event=Interrupt())
    lost = next(iter((target / "shards").glob("*.arrow")))
    lost.write_bytes(b"")
    with pytest.raises(InputError, match=f"{lost.name} is missing or incomplete, .*run the same command again"):
        prepare(str(source), str(target), CONFIG)
    prepare(str(source), str(target), CONFIG)
    assert lost.stat().st_size > 7 * 400


def test_other_options_do_not_use_old_shards(source, tmp_path, many_shards):
    target = tmp_path / "dataset"
    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), str(target), CONFIG, on_event=Interrupt())
    (target / "shards" / "mine.txt").write_text("keep")
    config = CONFIG.model_copy(update={"image_size": 24})
    manifest = prepare(str(source), str(target), config)
    assert manifest.image_size == 24
    (target / "shards" / "mine.txt").unlink()
    prepare(str(source), str(tmp_path / "whole"), config)
    assert bytes_of(target) == bytes_of(tmp_path / "whole")


def test_a_finished_dataset_is_not_made_again_and_not_replaced_unasked(source, dataset):
    before = (dataset / "manifest.json").stat().st_mtime_ns
    prepare(str(source), str(dataset), CONFIG)
    assert (dataset / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"channels is 1, not 3.*--overwrite"):
        prepare(str(source), str(dataset), CONFIG.model_copy(update={"channels": 3}))


def test_other_splits_are_drawn_from_the_index_alone(source, dataset, tmp_path):
    target, config = tmp_path / "dataset", CONFIG.model_copy(update={"seed": 1, "test_fraction": 0.3})
    shutil.copytree(dataset, target)
    events = []
    assert check_places(str(source), str(target), config) == "draw"
    # Without its source, and whatever became of the pixels.
    manifest = prepare(str(source), str(target), config, on_event=events.append)
    assert events == []
    prepare(str(source), str(tmp_path / "new"), config)
    assert bytes_of(target) == bytes_of(tmp_path / "new")
    assert manifest.splits["test"].rows_per_class == [6, 6, 6]
    prepare(str(source), str(target), CONFIG)
    assert bytes_of(target) == bytes_of(dataset)
    # The twins may be apart only if they are not identical.
    exact = prepare(str(source), str(target), CONFIG.model_copy(update={"duplicates": "exact"}))
    assert (exact.duplicates, exact.duplicate_images) == ("exact", 2)


def test_a_draw_that_was_killed_before_the_manifest_is_finished_by_the_next(source, dataset, tmp_path, monkeypatch):
    target = tmp_path / "dataset"
    shutil.copytree(dataset, target)
    with monkeypatch.context() as killed:
        killed.setattr(data_prep.index, "write_card", lambda *_: Interrupt(at=1)(None))
        with pytest.raises(KeyboardInterrupt):
            prepare(str(source), str(target), CONFIG.model_copy(update={"seed": 1}))
    manifest = load_manifest(str(target))
    with pytest.raises(InputError, match=r"index.parquet has sha256 .*run its jobs/prepare.py again"):
        open_split(str(target), manifest, "train")
    prepare(str(source), str(target), CONFIG)
    assert bytes_of(target) == bytes_of(dataset)


def test_new_images_are_appended_and_the_others_keep_their_splits(tmp_path):
    source, target = write_stripes(tmp_path / "source", images_per_class=20), tmp_path / "dataset"
    for path in (source / "slanted").iterdir():
        path.rename(tmp_path / path.name)
    first = prepare(str(source), str(target), CONFIG)
    before = {split: set(read_split(target, split)["path"]) for split in SPLITS}
    old_shards = bytes_of(target / "shards")
    assert prepare(str(source), str(target), CONFIG, append=True) == first
    # A class that sorts between the two, and a copy of an image of val.
    (source / "below").mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(source / "below" / path.name)
    of_val = sorted(before["val"])[0]
    Image.open(source / of_val).save(source / "down" / "copy.bmp")
    (source / "down" / "page.jpg").write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match=r"seed is 0, not 1.*--append.*give the same options"):
        prepare(str(source), str(target), CONFIG.model_copy(update={"seed": 1}), append=True)
    manifest = prepare(str(source), str(target), CONFIG, append=True)
    assert manifest.class_names == ["across", "down", "below"]
    rows = {split: read_split(target, split) for split in SPLITS}
    for split in SPLITS:
        assert before[split] <= set(rows[split]["path"])
        assert manifest.splits[split].rows_per_class == np.bincount(rows[split]["label"], minlength=3).tolist()
    assert manifest.splits["val"].rows_per_class[2] == 3
    assert "down/copy.bmp" in set(rows["val"]["path"])
    appended = rows["train"].set_index("path").loc[:, ["label"]].filter(like="below", axis=0)
    assert set(appended["label"]) == {2}
    assert {name: bytes_of(target / "shards")[name] for name in old_shards} == old_shards
    assert manifest.rejected == {"not_an_image": 1}
    assert manifest.fingerprint != first.fingerprint
    train = np.stack(rows["train"]["image"]).astype(np.float64)
    np.testing.assert_allclose(manifest.pixel_mean, [train.mean()])
    (source / "down" / "page.jpg").unlink()
    again = prepare(str(source), str(target), CONFIG, append=True)
    assert again == manifest


def test_overwrite_replaces_the_dataset_and_nothing_else(source, tmp_path):
    target = tmp_path / "dataset"
    prepare(str(source), str(target), CONFIG)
    (target / "mine.txt").write_text("keep")
    (target / "train" / "cat").mkdir(parents=True)
    for name in ("mine.png", "part-1.parquet", "cat/part-00000.parquet"):
        (target / "train" / name).write_text("keep")
    (target / "train" / "part-00007.parquet").write_text("of format 1")
    (target / "shards" / "mine.arrow").write_text("keep")
    (target / "manifest.json").write_text("of another format")
    manifest = prepare(str(source), str(target), CONFIG.model_copy(update={"channels": 3}), overwrite=True)
    assert manifest.channels == 3
    assert (target / "mine.txt").read_text() == "keep"
    assert {path.relative_to(target / "train").as_posix() for path in (target / "train").rglob("*.p*")} == {
        "mine.png",
        "part-1.parquet",
        "cat/part-00000.parquet",
    }
    names = {path.name for path in (target / "shards").iterdir()}
    assert names == {"mine.arrow", storage.basename(manifest.shards[0].path)}


def test_too_many_bad_files_are_refused_before_anything_is_committed(source, tmp_path):
    with pytest.raises(InputError, match=r"2 of 63 images were rejected .*down/empty.png \(empty\)"):
        prepare(str(source), str(tmp_path / "dataset"), CONFIG.model_copy(update={"max_bad_fraction": 0.01}))
    assert not (tmp_path / "dataset" / "manifest.json").exists()


def test_a_file_that_was_repaired_after_a_refusal_is_used(source, tmp_path):
    table = write_as_table(source, tmp_path, ".csv")
    config = CONFIG.model_copy(update={"max_bad_fraction": 0.04})
    with pytest.raises(InputError, match=r"3 of 64 images were rejected"):
        prepare(str(table), str(tmp_path / "dataset"), config)
    Image.new("L", (20, 20), 77).save(tmp_path / "pictures" / "missing.png")
    assert prepare(str(table), str(tmp_path / "dataset"), config).rejected == {"empty": 1, "not_an_image": 1}


def test_a_given_split_is_kept_and_its_leaks_are_listed(tmp_path):
    source = tmp_path / "source"
    for split, seed in (("train", 1), ("validation", 2)):
        write_stripes(source / split, images_per_class=6, seed=seed)
    copied = Image.open(source / "train" / "down" / "003.png").convert("RGB")
    copied.resize((60, 60), Image.Resampling.BICUBIC).save(source / "validation" / "down" / "copy.jpg", quality=80)
    (source / "train" / "down" / "Thumbs.db").touch()
    events = []
    manifest = prepare(str(source), str(tmp_path / "dataset"), CONFIG, on_event=events.append)
    assert str(events[0]) == "37 files to read, 3 classes; ignored: 1 Thumbs.db"
    assert [manifest.splits[split].rows for split in SPLITS] == [18, 19, 0]
    duplicates = pq.read_table(tmp_path / "dataset" / "duplicates.parquet").to_pydict()
    leaked = [path for path, leaks in zip(duplicates["path"], duplicates["leaks"], strict=True) if leaks]
    assert leaked == ["train/down/003.png", "validation/down/copy.jpg"]
    assert manifest.leaked_images == 2


def test_a_second_preparation_of_the_same_dataset_is_refused(source, tmp_path):
    target = tmp_path / "dataset"

    def prepare_again(event):
        with pytest.raises(InputError, match=r"DATASET .* is in use by process \d+ on"):
            prepare(str(source), str(target), CONFIG)

    prepare(str(source), str(target), CONFIG, on_event=prepare_again)
    assert (target / "manifest.json").exists()


def test_a_dataset_that_another_job_finished_meanwhile_is_not_made_again(source, tmp_path, monkeypatch):
    target = tmp_path / "dataset"

    def prepare_meanwhile(uri):
        monkeypatch.undo()
        prepare(str(source), str(target), CONFIG)

    monkeypatch.setattr(data_prep.prepare.storage, "check_access", prepare_meanwhile)
    events = []
    prepare(str(source), str(target), CONFIG, on_event=events.append)
    assert events == []


def write_as_table(source: Path, folder: Path, suffix: str) -> Path:
    shutil.copytree(source, folder / "pictures", ignore=shutil.ignore_patterns("LICENSE", "*.html"))
    rows = [
        {"file_name": path.relative_to(folder).as_posix(), "label": path.parent.name}
        for path in sorted((folder / "pictures").rglob("*.*"))
    ]
    table = pd.DataFrame([*rows, {"file_name": "pictures/missing.png", "label": "down"}])
    path = folder / f"table{suffix}"
    match suffix:
        case ".csv":
            table.to_csv(path, index=False)
        case ".jsonl":
            table.to_json(path, orient="records", lines=True)
        case ".parquet":
            table.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_gives_the_same_images_as_folders(source, dataset, tmp_path, suffix):
    table = write_as_table(source, tmp_path, suffix)
    manifest = prepare(str(table), str(tmp_path / "dataset"), CONFIG)
    assert manifest.rejected == {"empty": 1, "not_an_image": 1, "unreadable": 1}
    of_folder = json.loads((dataset / "manifest.json").read_text())
    assert manifest.class_names == of_folder["class_names"]
    assert manifest.splits["train"].rows_per_class == of_folder["splits"]["train"]["rows_per_class"]
    same, found = (
        {row.tobytes() for row in read_split(place, "train")["image"]} for place in (dataset, tmp_path / "dataset")
    )
    assert found == same


def test_parquet_with_image_bytes_is_read(source, tmp_path):
    paths = sorted(path for path in source.rglob("*.png") if path.stat().st_size)
    (tmp_path / "hub").mkdir()
    for split, chosen in (("train", paths[::2]), ("test", paths[1::2])):
        rows = [
            {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": path.parent.name} for path in chosen
        ]
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, tmp_path / "hub" / f"{split}-00000-of-00001.parquet", row_group_size=7)
    manifest = prepare(str(tmp_path / "hub"), str(tmp_path / "dataset"), CONFIG)
    assert manifest.splits["test"].rows_per_class == [10, 10, 10]
    first = read_split(tmp_path / "dataset", "test").iloc[0]
    assert first["sha256"] == hashlib.sha256(paths[1].read_bytes()).digest()


def test_a_webdataset_tar_is_read(source, tmp_path):
    paths = sorted(path for path in source.rglob("*.png") if path.stat().st_size)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, path in enumerate(paths):
            tar.add(path, f"{number:04d}.png")
            label = path.parent.name.encode()
            member = tarfile.TarInfo(f"{number:04d}.cls")
            member.size = len(label)
            tar.addfile(member, io.BytesIO(label))
    manifest = prepare(str(tmp_path / "shard.tar"), str(tmp_path / "dataset"), CONFIG)
    assert manifest.class_names == ["across", "down", "slanted"]
    rows = pd.concat(read_split(tmp_path / "dataset", split) for split in SPLITS)
    assert sorted(rows["sha256"]) == sorted(hashlib.sha256(path.read_bytes()).digest() for path in paths)


def test_a_table_cannot_name_files_outside_its_folder(tmp_path):
    (tmp_path / "inside").mkdir()
    table = tmp_path / "inside" / "table.csv"
    table.write_text("path,label\n../secret.png,a\nb.png,b\n")
    with pytest.raises(InputError, match=r"row 1: '../secret.png' is outside the table's folder"):
        prepare(str(table), str(tmp_path / "dataset"), CONFIG)


def refuse(item):
    raise InputError("what the task said")


def refuse_odd_rows(item):
    return refuse(item) if item["row"] % 2 else item


def fail(item):
    raise KeyError("what went wrong")


@pytest.mark.parametrize(("task", "error"), [(refuse, "^what the task said$"), (fail, "KeyError: 'what went wrong'")])
def test_the_error_of_a_task_is_the_error_of_the_job(task, error):
    with pytest.raises((InputError, JobError), match=error):
        list(data_prep.staging.run_tasks(task, [{"row": 1}, {"row": 2}]))


def test_what_a_task_refuses_is_reported_where_it_did_other_items_before():
    with pytest.raises(InputError, match=r"^what the task said$"):
        list(data_prep.staging.run_tasks(refuse_odd_rows, [{"row": row} for row in range(64)]))


def decode_or_die(content, options):
    if content == b"crash":
        os.abort()
    return np.full((4, 4, 1), content[0], np.uint8)


def decode_for_real(item, marker):
    contents = [b"a", b"crash", b"b"] if item["row"] == 1 else [b"c"]
    marker = Path(f"{marker}-{item['row']}")
    (outcomes,) = decode_guarded([contents], ImageOptions(image_size=4), marker, decode_or_die)
    return {"row": item["row"], "outcomes": [o if isinstance(o, str) else chr(o[0, 0, 0]) for o in outcomes]}


def test_an_image_that_kills_its_task_costs_that_image(tmp_path):
    results = data_prep.staging.run_tasks(decode_for_real, [{"row": 1}, {"row": 2}], marker=str(tmp_path / "marker"))
    outcomes = {result["row"]: list(result["outcomes"]) for result in results}
    assert outcomes == {1: ["a", "decoder_crashed", "b"], 2: ["c"]}
    assert list(tmp_path.iterdir()) == []


def test_images_of_12_bits_are_decoded_when_their_range_is_known_and_resumed(tmp_path, many_shards):
    folder = write_stripes(tmp_path / "source", images_per_class=8)
    prepare(str(folder), str(tmp_path / "of 8 bits"), CONFIG)
    for path in (folder / "down").iterdir():
        # The same pictures as a converter of medical images writes them.
        Image.fromarray(np.asarray(Image.open(path), np.uint16) * 16).save(path)
    target, events = tmp_path / "dataset", []

    def interrupt_the_second_pass(event):
        events.append(str(event))
        if isinstance(event, StageProgressed) and event.stage == "decode again" and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(folder), str(target), CONFIG, on_event=interrupt_the_second_pass)
    assert any("8 images with" in event and "0 to 4095 becomes gray levels 0 to 255" in event for event in events)
    again = []
    manifest = prepare(str(folder), str(target), CONFIG, on_event=again.append)
    first_of_stage = {event.stage: event for event in reversed(again) if isinstance(event, StageProgressed)}
    assert first_of_stage["decode"].done == first_of_stage["decode"].total == 24
    # Shards without such an image are decoded once.
    assert first_of_stage["decode again"].total == 14
    assert first_of_stage["decode again"].done > 0
    assert (manifest.value_range, manifest.value_range_given) == ((0, 4095), False)
    stored = {}
    for name in (target.name, "of 8 bits"):
        rows = pd.concat(read_split(tmp_path / name, split) for split in SPLITS)
        stored[name] = {row.path: row.image.tolist() for row in rows.itertuples()}
    assert stored[target.name] == stored["of 8 bits"]
    assert prepare(str(folder), str(target), CONFIG) == manifest
    with pytest.raises(InputError, match=r"value_range is None, not \(0.0, 255.0\)"):
        prepare(str(folder), str(target), CONFIG.model_copy(update={"value_range": (0.0, 255.0)}))
    # What is predicted is decoded as the run's dataset was.
    pixels = decode_file(str(folder / "down" / "000.png"), ImageOptions.of(manifest))
    assert pixels.tolist() == stored[target.name]["down/000.png"]
