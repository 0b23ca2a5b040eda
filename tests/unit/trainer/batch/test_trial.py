"""Training steps of a trial of batch sizes, on one replica in this process."""

import numpy as np
import pytest

from trainer.batch.trial import _promises_to_fit, _Trial
from trainer.runtime.events import SizeMeasured
from trainer.training.dataset import open_split
from trainer.training.job import TrialJob


@pytest.fixture
def make_trial(write_dataset, make_config):
    """Return a function that makes a trial of a tiny network on 16 images."""
    written = write_dataset(rows=(16, 1, 1), image_size=22)
    config = make_config(
        dataset=written.uri, arch_arguments={"first_filters": 3, "later_filters": [4], "dense_units": 8}
    )
    split = open_split(written.uri, written.manifest, "train")

    def make(*sizes: int) -> _Trial:
        job = TrialJob(config, written.manifest, sizes, None, memory_share=0.9, compare_losses=True, reference=())
        return _Trial(job, split, rank=0, num_workers=1)

    return make


def test_the_first_losses_are_those_of_the_seeded_weights(make_trial):
    losses = make_trial(4).first_losses(4)
    assert len(losses) == 8
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 8
    assert make_trial(4).first_losses(4) == pytest.approx(losses, rel=1e-5)


def test_a_size_is_measured_with_real_and_with_synthetic_input(make_trial):
    measured = make_trial(4, 16).measure(16)
    assert (measured.size, measured.num_replicas, measured.precision) == (16, 1, "float32")
    assert min(measured.seconds_per_step, measured.synthetic_seconds_per_step, measured.peak_memory_gib) > 0
    assert measured.seconds_spread >= 0
    assert measured.images_per_second == pytest.approx(16 / measured.seconds_per_step)


def test_memory_counts_the_copies_that_a_checkpoint_holds(make_trial):
    trial = make_trial(4)
    arrays, files = trial._checkpoint_copy()
    for copied, written, variables in zip(
        arrays, files, (trial._network.model.variables, trial._network.optimizer_variables), strict=True
    ):
        size = sum(np.asarray(variable).nbytes for variable in variables)
        assert sum(array.nbytes for array in copied.values()) == size
        assert len(written) >= size


@pytest.mark.parametrize(
    ("sizes", "target_gib", "fits"),
    [
        # A line needs two sizes.
        ((), 0.0, True),
        ((8,), 0.0, True),
        # 1 GiB and 0.1 GiB per image: 4.2 GiB for 32.
        ((8, 16), 4.3, True),
        ((8, 16), 4.1, False),
    ],
)
def test_a_size_is_tried_where_the_line_through_the_last_two_fits(sizes, target_gib, fits):
    measured = [SizeMeasured("float32", size, 1, 0.1, 0.0, 0.1, 1 + size / 10) for size in sizes]
    assert _promises_to_fit(measured, 32, target_gib) is fits
