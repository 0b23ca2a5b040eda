import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from data_prep.manifest import INDEX_SCHEMA, SPLITS, Manifest, Split
from data_prep.shards import write_shard
from trainer.config.config import TrainConfig
from trainer.record.evaluation_result import EvaluationResult, LateEpochs, summarise
from trainer.record.predictions import PREDICTIONS_NAME
from trainer.record.run_folder import RunFolder, RunResult, describe_run
from trainer.runtime import storage

CLASS_NAMES = ["cat", "dog", "eel"]


@dataclass
class WrittenDataset:
    uri: str
    manifest: Manifest
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


@pytest.fixture
def write_dataset(tmp_path):
    """Return a function that writes a prepared dataset of random images as `prepare` does, but without Ray."""

    def write(rows=(7, 4, 3), image_size=5, channels=1, rows_per_shard=3, seed=0) -> WrittenDataset:
        uri, random = str(tmp_path / "dataset"), np.random.default_rng(seed)
        images, labels = {}, {}
        for split, count in zip(SPLITS, rows, strict=True):
            images[split] = random.integers(0, 256, (count, image_size, image_size, channels), np.uint8)
            labels[split] = random.integers(0, len(CLASS_NAMES), count).astype(np.int32)
        paths = [f"{split}/{row}.png" for split in SPLITS for row in range(len(labels[split]))]
        pixels, shards = np.concatenate(list(images.values())), []
        for start in range(0, len(pixels), rows_per_shard):
            path = f"shards/{len(shards):05d}-{seed:08x}.arrow"
            with write_shard(storage.join(uri, path), pixels.shape[1:]) as shard:
                for image in pixels[start : start + rows_per_shard]:
                    shard.add(image)
            shards.append(shard.describe(path))
        index = {
            "shard": np.arange(len(pixels)) // rows_per_shard,
            "row": np.arange(len(pixels)) % rows_per_shard,
            "split": [path.split("/")[0] for path in paths],
            "label": np.concatenate(list(labels.values())),
            "path": paths,
            "sha256": [hashlib.sha256(path.encode()).digest() for path in paths],
            "pixels_sha256": [hashlib.sha256(image.tobytes()).digest() for image in pixels],
            "perceptual_hash": [hashlib.sha256(image.tobytes()).digest() for image in pixels],
            "given_split": [None] * len(pixels),
            "pixel_sums": [[int(image.sum())] * channels for image in pixels],
            "pixel_squares": [[int((image.astype(int) ** 2).sum())] * channels for image in pixels],
        }
        tables = {"index.parquet": pa.table(index, schema=INDEX_SCHEMA)}
        tables["rejected.parquet"] = pa.table({"path": ["a"], "reason": ["damaged"]})
        digests = {}
        for name, table in tables.items():
            content = storage.parquet_bytes(table)
            storage.write_bytes(storage.join(uri, name), content)
            digests[name] = hashlib.sha256(content).hexdigest()
        counts = {split: np.bincount(labels[split], minlength=len(CLASS_NAMES)).tolist() for split in SPLITS}
        manifest = Manifest(
            image_size=image_size,
            channels=channels,
            resize="fit",
            background=255,
            value_range=None,
            value_range_given=False,
            class_names=CLASS_NAMES,
            splits={split: Split(rows_per_class=count) for split, count in counts.items()},
            shards=shards,
            tables=digests,
            rejected={"empty": 2, "damaged": 1},
            duplicates="near",
            duplicate_images=0,
            leaked_images=0,
            pixel_mean=[100.0] * channels,
            pixel_std=[50.0] * channels,
            value_counts=[1] * 256,
            seed=0,
            val_fraction=0.15,
            test_fraction=0.15,
            source="/photos",
            fingerprint=hashlib.sha256(repr((rows, image_size, channels, seed)).encode()).hexdigest(),
        )
        storage.write_bytes(storage.join(uri, "manifest.json"), manifest.model_dump_json().encode())
        return WrittenDataset(uri, manifest, images, labels)

    return write


@pytest.fixture
def write_files(tmp_path):
    """Return a function that writes files, each holding its own path, and return their folder."""

    def write(*paths: str) -> str:
        for path in paths:
            target = tmp_path / "source" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path)
        return str(tmp_path / "source")

    return write


@pytest.fixture
def write_table(tmp_path):
    """Return a function that writes one text file and return its path."""

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def make_config():
    """Return a function that makes the config of a run from the fields that a test is about."""

    def make(**values) -> TrainConfig:
        required = {
            "arch": "cnn_softmax",
            "dataset": "/datasets/animals",
            "dataset_fingerprint": "f00d",
            "num_workers": 1,
            "global_batch_size": 64,
            "base_learning_rate": 0.1,
        }
        return TrainConfig(**{**required, **values})

    return make


@pytest.fixture
def evaluation() -> EvaluationResult:
    """51 of 66 correct, as in the last note of the user's own: cat 22 of 22, dog 20 of 22, eel 9 of 22."""
    labels = np.repeat([0, 1, 2], 22)
    predicted = np.array([0] * 22 + [1] * 20 + [0] * 2 + [2] * 9 + [1] * 13)
    table = {"label": labels, "predicted": predicted, "loss": np.full(66, 0.9315)}
    table |= {"confidence": np.full(66, 0.7), "likelier": np.int32(labels != predicted)}
    return summarise("val", pa.table(table), CLASS_NAMES)


@pytest.fixture
def make_result(evaluation):
    """Return a function that makes the result of a run."""

    def make(**values) -> RunResult:
        required = {
            "status": "completed",
            "parameters": 27_734_190,
            "best_epoch": 7,
            "best_checkpoint": "step-00000070",
            "val": evaluation,
            "late": LateEpochs(epochs=3, loss=0.9512, accuracy=0.75, accuracy_interval=(0.634, 0.838)),
            "comparison": "",
            "epochs": 10,
            "steps": 100,
            "attempts": 1,
            "incidents": (),
            "layers": "model = Sequential([\n    Input((250, 250, 1)),\n    layers.Dense(3),\n])",
            "findings": [],
            "weights_crc32": (12, 12),
            "train_seconds": 61.4,
        }
        return RunResult(**{**required, **values})

    return make


@pytest.fixture
def trained_run(tmp_path, write_dataset, make_config, make_result) -> RunFolder:
    """A finished run of a tiny network with its checkpoint, on a dataset of 22 x 22 pixels."""
    from trainer.record import checkpoint as checkpoints
    from trainer.training.network import build_network_for_evaluation

    written = write_dataset(rows=(6, 5, 3), image_size=22)
    arguments = {"first_filters": 3, "later_filters": [4], "dense_units": 8}
    config = make_config(
        dataset=written.uri, dataset_fingerprint=written.manifest.fingerprint, arch_arguments=arguments
    )
    run = RunFolder(str(tmp_path / "runs" / "first"))
    run.write_manifest(written.manifest)
    run.write_record(describe_run(config, "1 node"))
    network = build_network_for_evaluation(written.manifest, config)
    weights = checkpoints.to_safetensors(checkpoints.read_variables(network.model.variables))
    columns = {"label": written.labels["val"], "predicted": [0] * 5, "loss": [0.2, 0.9, 0.1, 0.7, 0.3]}
    predictions = storage.parquet_bytes(pa.table({**columns, "confidence": pa.array([0.5] * 5, pa.float32())}))
    row = {"epoch": 7, "val_accuracy": 1.0, "val_loss": 0.1}
    position = checkpoints.Position(epoch=7, epoch_rows=0, step=70, global_batch_size=4, history=[row])
    files = {checkpoints.MODEL_NAME: weights, checkpoints.PREDICTIONS_NAME: predictions}
    checkpoints.save_checkpoint(run.checkpoints, position, files)
    run.write_ending(make_result())
    return run


@pytest.fixture
def write_run(tmp_path, make_config, make_result, write_dataset):
    """Return a function that writes a finished run, or one that has only begun."""
    manifest = write_dataset().manifest

    def write(name: str, right: int = 51, finished: bool = True, **values) -> RunFolder:
        run = RunFolder(str(tmp_path / "runs" / name))
        run.write_manifest(manifest)
        run.write_record(describe_run(make_config(clip_norm=1.0, **values), "1 node"))
        if finished:
            columns = {"epoch": (1.0, 2.0, 3.0), "loss": (3.0, 2.0, 1.0), "val_loss": (5.0, 2.5, 2.0)}
            columns |= {"accuracy": (0.2, 0.4, 0.8), "val_accuracy": (0.1, 0.3, 0.6), "images_per_second": (90.0,) * 3}
            history = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            predicted = ["cat"] * right + ["dog"] * (66 - right)
            table = pa.table({"label": ["cat"] * 66, "predicted": predicted})
            storage.write_bytes(run.path(PREDICTIONS_NAME), storage.parquet_bytes(table))
            run.write_metrics(history)
            run.write_steps(pa.table({"step": range(1, 13), "grad_norm": np.geomspace(0.1, 9, 12)}))
            run.write_ending(make_result(findings=["overfitting: <b>less</b>"], best_epoch=3))
        return run

    return write
