from dataclasses import replace
from datetime import UTC, datetime

import pytest

from trainer.batch.finder import recall_batch, table_uri, trial_sizes
from trainer.config.batch_table import BatchTable
from trainer.config.config import Settings
from trainer.config.request import RunRequest, parse_request
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
    return write_dataset(rows=(100, 10, 0), image_size=24, rows_per_file=100).manifest


@pytest.mark.parametrize(
    ("options", "num_workers", "sizes"),
    [
        ({"min_steps_per_epoch": 2}, 1, (8, 16, 32, 50)),
        ({"min_steps_per_epoch": 2}, 2, (8, 16, 25)),
        ({"min_steps_per_epoch": 100}, 1, (1,)),
        ({"global_batch_size": "30"}, 2, (15,)),
    ],
)
def test_sizes_are_doubled_up_to_what_the_rows_allow(manifest, options, num_workers, sizes):
    assert trial_sizes(ask(**options), manifest, num_workers) == sizes


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
    return table_uri(request, manifest, num_workers, "/runs", resources)


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
        {"ema_momentum": 0.9},
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
        mixup: float = 0.0

    plain = ask().settings.model_dump()
    with_mixup = place(manifest, Wider(**plain, mixup=0.2))
    assert with_mixup != place(manifest, Wider(**plain))
    assert with_mixup == place(manifest, Wider(**plain, mixup=0.4))


@pytest.mark.parametrize(("batch", "limit"), [("max", "rows"), ("50", "given")])
def test_a_table_in_the_storage_is_recalled(manifest, tmp_path, batch, limit):
    request = ask(global_batch_size=batch, min_steps_per_epoch=2)
    rows = [SizeMeasured("float32", size, 1, 0.1, 0.0, 0.1, 1.0) for size in (8, 50)]
    table = BatchTable(
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
    storage.write_bytes(table_uri(request, manifest, 1, str(tmp_path), ONE_MACHINE), table.to_json())
    choice = recall(request, manifest, tmp_path)
    assert (choice.global_batch_size, choice.precision, choice.limit) == (50, "float32", limit)
    other_node = replace(ONE_MACHINE, node_memory_gib=32)
    assert recall_batch(request, manifest, 1, str(tmp_path), other_node) is None
