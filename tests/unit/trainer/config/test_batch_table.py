import math
from datetime import UTC, datetime

import pytest

from trainer.config.batch_table import (
    BatchTable,
    choose_precision,
    decide,
    describe_time,
    find_bottlenecks,
    find_contradiction,
    find_noise_surprise,
    given_batch,
    is_far_slower,
    largest_for_rows,
    next_size,
    round_size,
    usable_gib,
)
from trainer.config.config import BatchRequest
from trainer.runtime.events import SizeMeasured


def size(images: int, gib: float = 1.0, seconds: float = 1.0, replicas: int = 1, **values) -> SizeMeasured:
    numbers = {"seconds_per_step": seconds, "seconds_spread": 0.0, "synthetic_seconds_per_step": seconds}
    return SizeMeasured(
        precision="float32", size=images, num_replicas=replicas, peak_memory_gib=gib, **numbers | values
    )


def make_table(rows, limit_gib: float = 10.0, replicas: int = 1, failed=None) -> BatchTable:
    return BatchTable(
        num_replicas=replicas,
        memory_limit_gib=limit_gib,
        node_memory_gib=16.0,
        precision="float32",
        precision_reason="float32 as given",
        measurements={"float32": tuple(rows)},
        failed={"float32": failed} if failed else {},
        trials=1,
        measured=datetime.now(UTC),
    )


# Saturates at 32: half as much time again from there on for each doubling would still be faster.
STEPS = {8: 0.1, 16: 0.12, 32: 0.16, 64: 0.32, 128: 0.64}
SATURATING = [size(images, 1 + images / 100, seconds) for images, seconds in STEPS.items()]


def test_a_size_is_rounded_down_to_what_a_device_likes_by_at_most_a_twentieth():
    for images in (*range(1, 400), 1000, 4099):
        rounded = round_size(images)
        assert 0.95 * images <= rounded <= images
        assert rounded % 8 == 0 or images < 160


def test_an_epoch_keeps_its_least_steps():
    assert largest_for_rows(rows=1442, num_replicas=1, min_steps_per_epoch=10) == 144
    assert largest_for_rows(rows=1442, num_replicas=4, min_steps_per_epoch=10) == 36
    assert largest_for_rows(rows=5, num_replicas=2, min_steps_per_epoch=10) == 1


def search(memory, most: int, limit_gib: float, first=(8, 16)) -> tuple[int, int]:
    """Search as the finder does; return the largest size that fits and the number of trials."""
    measured = {images: size(images, memory(images)) for images in first if memory(images) is not None}
    failed = next((images for images in first if memory(images) is None), None)
    trials = 1
    while True:
        rows = [measured[one] for one in sorted(measured)]
        candidate = next_size(rows, failed, most, limit_gib)
        if candidate is None:
            target_gib = usable_gib(rows, failed, limit_gib)
            return max((one.size for one in rows if one.peak_memory_gib <= target_gib), default=0), trials
        trials += 1
        gib = memory(candidate)
        if gib is None:
            failed = min(candidate, failed or candidate)
        else:
            measured[candidate] = size(candidate, gib)
        assert trials < 20


@pytest.mark.parametrize("per_image", [0.001, 0.01, 0.1, 0.3])
@pytest.mark.parametrize("curve", [1.0, 0.97, 1.03])
@pytest.mark.parametrize("killed_beyond", [math.inf, 10.0])
def test_the_largest_size_that_fits_is_found_within_a_twentieth_in_few_trials(per_image, curve, killed_beyond):
    def memory(images: int) -> float | None:
        gib = 1 + per_image * images**curve
        return gib if gib <= killed_beyond else None

    largest = max(images for images in range(1, 20_000) if 1 + per_image * images**curve <= 9.0)
    found, trials = search(memory, most=100_000, limit_gib=10.0)
    assert 0.95 * largest - 1 < found <= largest
    assert trials <= 7


@pytest.mark.parametrize("per_image", [0.01, 0.1, 0.25])
@pytest.mark.parametrize("killed_beyond", [5.2, 7.5, 9.5])
def test_a_kernel_that_kills_earlier_than_was_said_is_left_a_margin_too(per_image, killed_beyond):
    def memory(images: int) -> float | None:
        gib = 1 + per_image * images
        return gib if gib <= killed_beyond else None

    found, trials = search(memory, most=160, limit_gib=20.0)
    assert 0.65 * killed_beyond < memory(found) <= 0.9 * killed_beyond or found == 160
    assert trials <= 7


def test_nothing_beyond_what_is_of_use_is_tried():
    assert search(lambda images: 1 + images / 1000, most=100, limit_gib=10.0) == (100, 2)


def test_where_nothing_fits_smaller_sizes_are_tried_down_to_one():
    assert search(lambda images: None, most=64, limit_gib=10.0)[0] == 0
    assert search(lambda images: None if images > 1 else 2.0, most=64, limit_gib=10.0)[0] == 1


def test_memory_that_does_not_grow_ends_the_search():
    assert search(lambda images: 1.0, most=512, limit_gib=10.0) == (512, 2)


def test_the_knee_is_the_smallest_size_that_is_about_as_fast_as_the_fastest():
    assert make_table(SATURATING).knee.size == 32


@pytest.mark.parametrize(
    ("asked", "rows", "limit_gib", "batch", "limit"),
    [
        ("max", 1280, 10.0, 128, "rows"),
        ("max", 640, 10.0, 64, "rows"),
        ("max", 100_000, 2.6, 128, "memory"),
        ("knee", 1280, 10.0, 32, "throughput"),
        ("knee", 160, 10.0, 16, "rows"),
    ],
)
def test_rows_or_memory_or_throughput_set_the_batch_and_it_is_said_which(asked, rows, limit_gib, batch, limit):
    choice = decide(BatchRequest(global_batch_size=asked), make_table(SATURATING, limit_gib), rows)
    assert (choice.global_batch_size, choice.limit) == (batch, limit)
    assert f"global batch {batch} = 1 x {batch} ({asked}), set by {limit if limit != 'rows' else 'the rows'}" in (
        choice.explanation
    )
    assert "throughput stops rising at 1 x 32 (200 images/s)" in choice.explanation


def test_throughput_is_not_said_to_stop_rising_where_nothing_larger_was_measured():
    rising = make_table(SATURATING[:3])
    choice = decide(BatchRequest(global_batch_size="max"), rising, 320)
    assert "stops rising" not in choice.explanation
    assert rising.verdict(rising.rows[-1]) == "fits"


# Rates in images/s: a CPU's stop rising at once, a GPU's never; both from 8 images on.
CPU = [size(images, seconds=(images + 8) / 900) for images in (8, 16, 32, 64, 128)]
GPU = [size(images, seconds=0.01) for images in (8, 16, 32, 64, 128)]


@pytest.mark.parametrize(
    ("rows", "noise_scale", "batch", "limit"),
    [
        (CPU, 100.0, 32, "time"),
        (CPU, 10.0, 8, "time"),
        (CPU, 2000.0, 128, "rows"),
        (CPU, math.inf, 128, "rows"),
        (GPU, 100.0, 128, "rows"),
        (GPU, 0.0, 8, "time"),
    ],
)
def test_auto_takes_the_size_with_the_shortest_time_to_a_result(rows, noise_scale, batch, limit):
    choice = decide(BatchRequest(), make_table(rows), rows=1280, noise_scale=noise_scale)
    assert (choice.global_batch_size, choice.limit, choice.noise_scale) == (batch, limit, noise_scale)
    assert (
        f"global batch {batch} = 1 x {batch} (auto), set by the {'rows' if limit == 'rows' else 'time to a result'}"
        in (choice.explanation)
    )


def test_auto_is_set_by_memory_where_a_larger_size_would_be_faster_and_does_not_fit():
    table = make_table([size(images, images / 16, 0.01) for images in (32, 64, 128)], limit_gib=10.0)
    choice = decide(BatchRequest(), table, rows=100_000)
    assert (choice.global_batch_size, choice.limit) == (128, "memory")


def test_the_time_of_half_and_double_is_that_to_the_same_result():
    choice = decide(BatchRequest(), make_table(CPU), rows=1280, noise_scale=100.0)
    # 900 steps of 40 / 900 s; 1 + 100 / B is 4.125 at 32, 7.25 at 16 and 2.5625 at 64.
    assert describe_time(choice, 1350) == (
        "about 1.0 minutes of steps, to the same result 1.1 with half the batch, 1.1 with double the batch "
        "(time of a step x (1 + 100 / batch))"
    )
    assert describe_time(choice, 1350, may_end_early=True).startswith("at most 1.0 minutes of steps")
    assert describe_time(decide(BatchRequest(global_batch_size="max"), make_table(CPU), 1280), 1350) == ""
    most = decide(BatchRequest(), make_table(GPU), rows=1280)
    assert "double" not in describe_time(most, 1350)


def history(*rates: float, batch: int = 32) -> list[dict[str, float]]:
    return [{"images_per_second": rate, "global_batch_size": batch} for rate in rates]


@pytest.mark.parametrize(
    ("rates", "contradicts"),
    [
        # 720 images/s were measured at 32.
        ((100.0, 700.0, 740.0, 760.0), False),
        ((700.0, 500.0, 510.0, 520.0), True),
        ((700.0, 1000.0, 990.0), True),
        ((500.0,), False),
    ],
)
def test_training_that_is_far_faster_or_slower_than_its_size_was_measured_contradicts_the_table(rates, contradicts):
    choice = decide(BatchRequest(), make_table(CPU), rows=1280)
    line = find_contradiction(choice, history(*rates))
    assert bool(line) == contradicts
    if contradicts:
        assert "measured were 720 at a batch of 32; the next run measures again" in line
    # Fewer workers may have had another batch.
    assert find_contradiction(choice, history(*rates, batch=24)) == ""
    assert find_contradiction(given_batch(BatchRequest(), 32, "float32"), history(*rates)) == ""


@pytest.mark.parametrize(
    ("noise_scale", "line"),
    [
        (100.0, ""),
        (180.0, ""),
        (None, ""),
        (2000.0, "noise scale: 2000 images, 100 were assumed; with it the batch of the next run is 128 instead of 32"),
        (9.0, "noise scale: 9 images, 100 were assumed; with it the batch of the next run is 8 instead of 32"),
        (
            math.inf,
            "noise scale: more images than can be measured, 100 were assumed; with it the batch of the next run is 128 "
            "instead of 32",
        ),
    ],
)
def test_a_noise_scale_far_from_the_assumed_one_says_what_the_next_batch_is(noise_scale, line):
    choice = decide(BatchRequest(), make_table(CPU), rows=1280, noise_scale=100.0)
    assert find_noise_surprise(choice, noise_scale, 1280).removesuffix(", as far as sizes were measured") == line


@pytest.mark.parametrize(
    ("rows", "largest"),
    [
        # 10 GiB, of which 9 are for use; 1 GiB and 1/32 per image.
        ([size(images, 1 + images / 32) for images in (32, 64)], 256),
        ([size(images, 1 + images / 32) for images in (32, 256, 512)], 256),
        ([size(32, 2.0)], None),
        ([size(images, 2.0) for images in (32, 64)], None),
    ],
)
def test_what_a_worker_holds_is_known_or_predicted(rows, largest):
    assert make_table(rows).largest_per_replica == largest


def test_a_size_over_the_safety_margin_is_not_used():
    table = make_table([size(8, 5.0), size(16, 8.9), size(32, 9.1)])
    assert [one.size for one in table.fitting] == [8, 16]
    assert table.verdict(table.rows[2]) == "over the margin"
    # 18 images would have needed 6.5 of 10 GiB and died: only 6 are known to be there.
    table = make_table([size(8, 4.0), size(13, 5.3), size(16, 6.0)], failed=18)
    assert [one.size for one in table.fitting] == [8, 13]


def test_the_batch_is_that_of_all_replicas():
    rows = [size(images, 1.0, 1.0, replicas=4) for images in (8, 16)]
    choice = decide(BatchRequest(global_batch_size="max"), make_table(rows, replicas=4), rows=640)
    assert choice.global_batch_size == 64


def by_precision(**seconds: float) -> dict[str, tuple[SizeMeasured, ...]]:
    return {name: (size(32, 1.0, value),) for name, value in seconds.items()}


SAME_LOSSES = {"float32": (2.3, 2.2, 2.1, 2.0), "mixed_bfloat16": (2.3, 2.2, 2.1, 2.01)}


@pytest.mark.parametrize(
    ("bfloat16_seconds", "losses", "chosen"),
    [
        (0.5, SAME_LOSSES, "mixed_bfloat16"),
        (0.98, SAME_LOSSES, "float32"),
        (2.0, SAME_LOSSES, "float32"),
        (0.5, {**SAME_LOSSES, "mixed_bfloat16": (2.3, 2.5, 2.9, 3.5)}, "float32"),
        (0.5, {**SAME_LOSSES, "mixed_bfloat16": (2.3, float("nan"), float("nan"), float("nan"))}, "float32"),
    ],
)
def test_the_fastest_precision_with_sane_losses_is_taken_and_named(bfloat16_seconds, losses, chosen):
    precision, reason = choose_precision(by_precision(float32=1.0, mixed_bfloat16=bfloat16_seconds), losses)
    assert precision == chosen
    assert reason.startswith(f"{chosen} ")
    assert "32 images/s at 32 and loss" in reason


def test_another_precision_must_be_faster_at_both_sizes():
    def rows(*seconds: float) -> tuple[SizeMeasured, ...]:
        return tuple(size(images, 1.0, value) for images, value in zip((32, 64), seconds, strict=True))

    measured = {"float32": rows(1.0, 2.0), "mixed_bfloat16": rows(0.9, 1.0)}
    assert choose_precision(measured, SAME_LOSSES)[0] == "mixed_bfloat16"
    measured = {"float32": rows(1.0, 2.0), "mixed_bfloat16": rows(1.1, 1.0)}
    precision, reason = choose_precision(measured, SAME_LOSSES)
    assert precision == "float32"
    assert reason.startswith("float32 32 and 32 images/s at 32 and 64 and loss 2.150 against mixed_bfloat16 29 and 64")


def test_where_float32_does_not_fit_the_others_are_compared():
    halves = by_precision(mixed_bfloat16=1.0, mixed_float16=0.5)
    losses = {"mixed_bfloat16": (2.3, 2.2, 2.1, 2.0), "mixed_float16": (2.3, 2.2, 2.1, 2.01)}
    assert choose_precision(halves, losses)[0] == "mixed_float16"
    alone = choose_precision(by_precision(mixed_bfloat16=1.0), losses)
    assert alone == ("mixed_bfloat16", "mixed_bfloat16, the only precision that fits")


@pytest.mark.parametrize(("seconds", "slower"), [(1.0, False), (1.4, False), (1.6, True)])
def test_a_precision_that_is_emulated_shows_at_its_first_size(seconds, slower):
    assert is_far_slower(size(8, seconds=seconds), [size(8), size(16)]) == slower
    # Nothing to compare with.
    assert not is_far_slower(size(32, seconds=100), [size(8), size(16)])


def test_throughput_that_does_not_double_is_attributed():
    (what, why) = find_bottlenecks(make_table(SATURATING), None)
    assert what == "from 8 to 16 images per replica throughput grows 1.67 times, not about 2"
    assert why.startswith("computation: synthetic images are no faster")


def test_waiting_for_input_is_reported():
    rows = [size(8, 1.0, 1.0, synthetic_seconds_per_step=0.4), size(16, 1.0, 1.9, synthetic_seconds_per_step=0.8)]
    assert "input: at 8 a step waits 60% of its time for images" in find_bottlenecks(make_table(rows), None)


def test_waiting_for_other_workers_is_reported():
    rows = [size(8, 1.0, 1.0, replicas=4), size(16, 1.0, 1.9, replicas=4)]
    lines = find_bottlenecks(make_table(rows, replicas=4), alone=size(8, 1.0, 0.6))
    assert "synchronization: at 8 a step of one worker alone takes 60% of a step of all 4" in lines


def test_throughput_that_doubles_needs_no_explanation():
    assert find_bottlenecks(make_table([size(8, 1.0, 1.0), size(16, 1.0, 1.05)]), None) == []
