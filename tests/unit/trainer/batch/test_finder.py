from dataclasses import replace
from datetime import UTC, datetime

import pytest

from trainer.batch.finder import _plan_search, recall_batch, table_uri
from trainer.config.batch_table import ASSUMED_NOISE_SCALE, BatchTable
from trainer.config.config import Settings
from trainer.config.request import RunRequest, parse_request
from trainer.record.noise_scale import remember_noise_scale
from trainer.runtime import storage
from trainer.runtime.cluster import Resources
from trainer.runtime.errors import InputError
from trainer.runtime.events import SizeMeasured

ONE_MACHINE = Resources(num_nodes=1, num_cpus=4, num_gpus=0, free_gpus=0, devices="4 cores", node_memory_gib=16)


def ask(**options) -> RunRequest:
    return parse_request({"arch": "cnn_softmax", "dataset": "/data", **options})


@pytest.fixture
def manifest(write_dataset):
    """Manifest of a dataset with 100 images to train on."""
    return write_dataset(rows=(100, 10, 0), image_size=24, rows_per_shard=100).manifest


@pytest.mark.parametrize(
    ("options", "num_workers", "gpus", "start", "most"),
    [
        ({"min_steps_per_epoch": 2}, 1, 0, 32, 50),
        ({"min_steps_per_epoch": 2}, 2, 0, 16, 25),
        ({"min_steps_per_epoch": 2}, 64, 0, 1, 1),
        ({"min_steps_per_epoch": 2}, 1, 1, 50, 50),
        ({"min_steps_per_epoch": 100}, 1, 0, 1, 1),
        ({"global_batch_size": "30"}, 2, 1, 15, 15),
    ],
)
def test_a_search_starts_at_32_images_on_cpus_and_ends_where_the_rows_do(
    manifest, options, num_workers, gpus, start, most
):
    resources = replace(ONE_MACHINE, num_gpus=gpus)
    search = _plan_search(ask(**options), manifest, num_workers, resources, 100.0, "auto")
    assert (search.start, search.most) == (start, most)
    assert search.precisions == ("float32", "mixed_bfloat16", *(["mixed_float16"] if gpus else []))


def test_the_budget_is_that_of_the_images_that_the_run_sees(manifest):
    for patience, share in ((0, 1.0), (2, 0.5)):
        request = ask(epochs=7, min_steps_per_epoch=3, patience=patience)
        search = _plan_search(request, manifest, 1, ONE_MACHINE, 100.0, "auto")
        # 100 images in steps of 32: three an epoch. With patience a run may end before.
        assert search.images == 7 * 3 * 32 * share


def test_the_noise_scale_of_the_last_run_of_the_kind_is_taken(manifest, tmp_path):
    rows = [SizeMeasured("float32", size, 1, (size + 8) / 900, 0.0, 0.1, 1.0) for size in (4, 8, 16, 32, 50)]
    request = ask(min_steps_per_epoch=2, steps=300, precision="float32")
    uri = table_uri(request.settings, request.arch, request.batch, manifest, 1, str(tmp_path), ONE_MACHINE)
    storage.write_bytes(uri, make_table(rows).to_json())
    choice = recall(request, manifest, tmp_path)
    assert (choice.global_batch_size, choice.limit, choice.noise_scale) == (32, "time", ASSUMED_NOISE_SCALE)
    assert "noise scale assumed" in choice.explanation
    # 300 steps of 40 / 900 s; at half 24 / 900 s and 7.25 / 4.125 as many.
    assert "about 0.2 minutes of steps, to the same result 0.2 with half the batch (time" in choice.explanation
    kind = (request.arch, request.settings.model_copy(update={"seed": 5}), manifest.fingerprint, str(tmp_path))
    remember_noise_scale(*kind, run="first", noise_scale=12.0, global_batch_size=32)
    choice = recall(request, manifest, tmp_path)
    assert (choice.global_batch_size, choice.noise_scale) == (8, 12.0)
    assert "noise scale measured by first" in choice.explanation
    # Not that of other settings.
    assert (
        recall(
            ask(min_steps_per_epoch=2, weight_decay=0.5, steps=300, precision="float32"), manifest, tmp_path
        ).global_batch_size
        == 32
    )
    # With a larger one larger sizes would have to be measured first.
    remember_noise_scale(*kind, run="second", noise_scale=9000.0, global_batch_size=32)
    assert recall(request, manifest, tmp_path).global_batch_size == 50


@pytest.mark.parametrize(("steps", "is_enough"), [(20, True), (100_000, False)])
def test_a_longer_run_measures_the_precisions_that_a_short_one_had_no_time_for(manifest, tmp_path, steps, is_enough):
    rows = [SizeMeasured("float32", size, 1, (size + 8) / 900, 0.0, 0.1, 1.0, seconds=2.0) for size in (16, 32, 50)]
    request = ask(min_steps_per_epoch=2, steps=steps)
    uri = table_uri(request.settings, request.arch, request.batch, manifest, 1, str(tmp_path), ONE_MACHINE)
    storage.write_bytes(uri, make_table(rows).to_json())
    choice = recall(request, manifest, tmp_path)
    assert (choice is not None) == is_enough


def test_a_table_of_another_search_is_not_enough_where_more_is_needed(manifest, tmp_path):
    rows = [SizeMeasured("float32", size, 1, (size + 8) / 900, 0.0, 0.1, 1.0) for size in (4, 8, 16, 32)]
    for goal, needs_more in (("auto", False), ("max", True)):
        request = ask(min_steps_per_epoch=2, global_batch_size=goal, precision="float32")
        uri = table_uri(request.settings, request.arch, request.batch, manifest, 1, str(tmp_path), ONE_MACHINE)
        storage.write_bytes(uri, make_table(rows).to_json())
        remember_noise_scale(
            *(request.arch, request.settings, manifest.fingerprint, str(tmp_path)),
            **{"run": "first", "noise_scale": 12.0, "global_batch_size": 32},
        )
        assert (recall(request, manifest, tmp_path) is None) == needs_more


def make_table(rows) -> BatchTable:
    return BatchTable(
        num_replicas=1,
        memory_limit_gib=4.0,
        node_memory_gib=16.0,
        precision="float32",
        precision_reason="float32, the only precision that fits",
        measurements={"float32": tuple(rows)},
        failed={},
        trials=1,
        measured=datetime.now(UTC),
    )


def recall(request: RunRequest, manifest, folder, num_workers=1):
    return recall_batch(request, manifest, num_workers, str(folder), ONE_MACHINE)


def test_a_given_batch_needs_no_table_where_the_precision_is_given_too(manifest, tmp_path):
    choice = recall(ask(global_batch_size="30", precision="float32"), manifest, tmp_path)
    assert (choice.global_batch_size, choice.precision, choice.limit) == (30, "float32", "given")
    assert recall(ask(global_batch_size="30"), manifest, tmp_path) is None


def test_a_given_batch_must_be_shared_evenly(manifest, tmp_path):
    with pytest.raises(InputError, match="--global-batch-size 31 cannot be divided over 2 workers"):
        recall(ask(global_batch_size="31"), manifest, tmp_path, num_workers=2)


def place(manifest, settings: Settings | None = None, num_workers=1, resources=ONE_MACHINE, **options) -> str:
    request = ask(**options)
    if settings is not None:
        request = request.model_copy(update={"settings": settings})
    return table_uri(request.settings, request.arch, request.batch, manifest, num_workers, "/runs", resources)


@pytest.mark.parametrize(
    "options",
    [{"base_learning_rate": 0.5}, {"weight_decay": 0.3}, {"seed": 7}, {"augment_rotation": 20.0}, {"keep_best": 3}],
)
def test_a_table_is_used_again_where_a_step_takes_as_long(manifest, options):
    assert place(manifest, **options) == place(manifest)


@pytest.mark.parametrize(
    "options",
    [
        {"arch": "cnn_deep"},
        {"arch_arguments": {"dense_units": 8}},
        {"optimizer": "sgd"},
        {"weight_decay": 0.0},
        {"augment_rotation": 0.0},
        {"augment_flip": True},
        {"ema_momentum": 0.0},
        {"freeze_trunk": True},
        {"precision": "float32"},
        {"memory_limit_gib": 2.0},
        {"num_workers": 2},
        {"resources": replace(ONE_MACHINE, devices="8 cores")},
    ],
)
def test_another_step_has_a_table_of_its_own(manifest, options):
    assert place(manifest, **options) != place(manifest)


def test_a_new_option_has_a_table_of_its_own_without_being_named_there(manifest):
    class Wider(Settings):
        erasing: float = 0.0

    plain = ask().settings.model_dump()
    with_erasing = place(manifest, Wider(**plain, erasing=0.2))
    assert with_erasing != place(manifest, Wider(**plain))
    assert with_erasing == place(manifest, Wider(**plain, erasing=0.4))


@pytest.mark.parametrize(("batch", "limit"), [("max", "rows"), ("50", "given")])
def test_a_table_in_the_storage_is_recalled(manifest, tmp_path, batch, limit):
    request = ask(global_batch_size=batch, min_steps_per_epoch=2)
    rows = [SizeMeasured("float32", size, 1, 0.1, 0.0, 0.1, 1.0) for size in (8, 50)]
    uri = table_uri(request.settings, request.arch, request.batch, manifest, 1, str(tmp_path), ONE_MACHINE)
    table = make_table(rows).model_copy(update={"failed": {"mixed_bfloat16": 8}})
    storage.write_bytes(uri, table.to_json())
    choice = recall(request, manifest, tmp_path)
    assert (choice.global_batch_size, choice.precision, choice.limit) == (50, "float32", limit)
    other_node = replace(ONE_MACHINE, node_memory_gib=32)
    assert recall_batch(request, manifest, 1, str(tmp_path), other_node) is None
