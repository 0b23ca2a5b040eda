"""The gradient noise scale: how many images a batch can have before more of them stop saving steps.

McCandlish et al. 2018 (arXiv:1812.06162), appendix A.1: the gradient of a batch of B images has the expected squared
length G^2 + S / B, where G is the true gradient and S, the noise, the sum of the variances of one image's gradient. The
scale is S / G^2; with it, reaching a result takes steps in proportion to 1 + scale / B.
"""

import math
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.config.batch_table import ASSUMED_NOISE_SCALE
from trainer.config.config import Settings
from trainer.runtime import storage
from trainer.runtime.errors import RecordError
from trainer.runtime.record_format import Record

# Settings that do not change what a run learns.
_NOT_IN_TRAINING = {
    *("seed", "checkpoint_every", "keep_best", "evaluate_test", "save_probabilities", "export"),
    *("shuffle_window_gib", "cache_gib"),
}


class NoiseRecord(Record):
    """The noise scale of a finished run, which determines the batch of the next similar run."""

    run: str
    """Name of the run."""
    noise_scale: float
    """Gradient noise scale in images."""
    global_batch_size: int
    """Global batch size at which it was measured."""
    measured: datetime


def find_noise_scale(
    noises: npt.NDArray[np.floating], norms: npt.NDArray[np.floating], global_batch_size: int
) -> float:
    """Return the noise scale over some steps, in images: the ratio of two means, which vary less than their ratio.

    NaN where no step measured the noise, infinite where the gradients are no longer than their noise.

    Args:
        noises: ``[steps]``: S, as a training step measured it; NaN where it did not.
        norms: ``[steps]``: L2 norms of the gradients of the batches.
        global_batch_size: images of a batch.
    """
    measured, finite = noises[np.isfinite(noises)], norms[np.isfinite(norms)]
    if not len(measured) or not len(finite):
        return float("nan")
    noise = float(measured.mean(dtype=np.float64))
    signal = float(np.mean(finite.astype(np.float64) ** 2)) - noise / global_batch_size
    return noise / signal if signal > 0 else float("inf")


def summarize_noise(steps: pa.Table, global_batch_size: int) -> float | None:
    """Return the noise scale over the second half of a run; None where it was not measured.

    Most of a run's steps are like those of its second half, and few of them measure the noise: together they are more
    precise than by epoch.

    Args:
        steps: ``steps.parquet`` of the run.
        global_batch_size: images of a batch.
    """
    if "grad_noise" not in steps.column_names:
        return None
    noises, norms = (steps[name].to_numpy() for name in ("grad_noise", "grad_norm"))
    for first in (len(steps) // 2, 0):
        scale = find_noise_scale(noises[first:], norms[first:], global_batch_size)
        if not math.isnan(scale):
            return scale
    return None


def noise_uri(arch: str, settings: Settings, dataset_fingerprint: str, storage_uri: str) -> str:
    """Return the URI of the noise scale of all runs that train alike, whatever their batch and precision."""
    values = {name: getattr(settings, name) for name in Settings.model_fields if name not in _NOT_IN_TRAINING}
    return storage.keyed_uri(storage_uri, "noise_scales", {"arch": arch, "dataset": dataset_fingerprint, **values})


def recall_noise_scale(arch: str, settings: Settings, dataset_fingerprint: str, storage_uri: str) -> tuple[float, str]:
    """Return the noise scale that the last run of a kind measured, or the assumed one, and which of them it is."""
    uri = noise_uri(arch, settings, dataset_fingerprint, storage_uri)
    try:
        record = NoiseRecord.parse(storage.read_bytes(uri), uri)
    except (FileNotFoundError, RecordError):
        return ASSUMED_NOISE_SCALE, "assumed"
    return record.noise_scale, f"measured by {record.run}"


def remember_noise_scale(
    arch: str,
    settings: Settings,
    dataset_fingerprint: str,
    storage_uri: str,
    *,
    run: str,
    noise_scale: float,
    global_batch_size: int,
) -> None:
    """Write the noise scale that a run measured."""
    record = NoiseRecord(
        run=run, noise_scale=noise_scale, global_batch_size=global_batch_size, measured=datetime.now(UTC)
    )
    storage.write_bytes(noise_uri(arch, settings, dataset_fingerprint, storage_uri), record.to_json())
