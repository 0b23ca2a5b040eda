import pytest

from trainer.batch.finder import recall_batch
from trainer.config.request import parse_request, read_options, resolve
from trainer.dry_run import preview_run
from trainer.runtime.cluster import Resources
from trainer.runtime.errors import InputError

ONE_MACHINE = Resources(num_nodes=1, num_cpus=4, num_gpus=0, free_gpus=0, devices="4 cores", node_memory_gib=16)


@pytest.fixture
def dataset(write_dataset):
    return write_dataset(rows=(100, 10, 0), image_size=24, rows_per_shard=100)


def test_a_run_with_nothing_to_measure_is_described_as_its_config_and_arithmetic(dataset, tmp_path):
    options = {"arch": "cnn_softmax", "dataset": dataset.uri, "global_batch_size": 30, "precision": "float32"}
    request = parse_request(options)
    text = preview_run(request, str(tmp_path), ONE_MACHINE)
    assert "# global batch 30 = 1 replica x 30; 100 images: 3 steps per epoch" in text
    (tmp_path / "run.toml").write_text(text)
    again = parse_request(read_options(str(tmp_path / "run.toml")))
    batch = recall_batch(request, dataset.manifest, 1, str(tmp_path), ONE_MACHINE)
    config = resolve(request, dataset.manifest, 1, batch)
    assert resolve(again, dataset.manifest, 1, batch) == config
    # 2,000 steps of the recipe, three an epoch.
    assert "epochs = 667\n" in text


def test_what_would_be_measured_stands_in_comments(dataset, tmp_path):
    request = parse_request({"arch": "cnn_softmax", "dataset": dataset.uri, "min_steps_per_epoch": 5, "seed": 4})
    text = preview_run(request, str(tmp_path), ONE_MACHINE)
    assert "# global_batch_size: auto, measured on the workers from 20 images per replica" in text
    assert "in at most a tenth of the run; at most 20" in text
    assert "# precision: " in text
    (tmp_path / "run.toml").write_text(text)
    assert parse_request(read_options(str(tmp_path / "run.toml"))) == request


def test_a_run_that_would_be_refused_is_refused(dataset, tmp_path):
    request = parse_request({"arch": "cnn_softmax", "dataset": dataset.uri, "global_batch_size": 101})
    with pytest.raises(InputError, match="is more than the 100 train images"):
        preview_run(request, str(tmp_path), ONE_MACHINE)


def test_the_embedded_dataset_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = preview_run(parse_request({"arch": "alexnet"}), str(tmp_path), ONE_MACHINE)
    assert "# dataset: 5,000 MNIST images, prepared when the first run starts" in text
    assert 'arch = "alexnet"' in text
