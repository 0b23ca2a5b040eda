"""Searches on machines that are functions: the time, the memory and the fate of every size are known."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from trainer.batch.search import BUDGET_SHARE, Known, Probe, Search, count_probes, next_probe, settle_precision
from trainer.config.batch_table import result_seconds, usable_gib
from trainer.runtime.events import LossesMeasured, SizeMeasured

LONG = 10**9


@dataclass
class Machine:
    """A machine, and what was measured on it."""

    seconds: Callable[[int], float]
    gib: Callable[[int], float] = lambda size: 1.0
    factors: dict[str, float] = field(default_factory=lambda: {"float32": 1.0})
    """Seconds of a precision relative to float32."""
    limit_gib: float = 10.0
    killed_beyond: float = math.inf
    probes: list[Probe] = field(default_factory=list)
    groups: int = 0

    def search(self, search: Search) -> Known:
        """Search as the finder and the workers do."""
        known = Known().limit(self.limit_gib)
        while self.groups < 8:
            self.groups += 1
            built, largest, died = set(), 0, False
            while not died:
                known = settle_precision(search, known)
                probe = next_probe(search, known)
                if probe is None:
                    return known
                is_alone = len(probe.precisions) == 1 and built <= set(probe.precisions) and probe.size > largest
                if probe.alone and not is_alone:
                    break
                self.probes.append(probe)
                assert len(self.probes) < 40
                for name in probe.precisions:
                    # What the process held before stays there.
                    gib = self.gib(probe.size) + (0 if is_alone else 0.5)
                    if gib > self.killed_beyond:
                        known, died = known.add_failure(name, probe.size), True
                        break
                    seconds = self.seconds(probe.size) * self.factors[name]
                    if name not in known.losses:
                        known = known.add(LossesMeasured(name, (2.3, 2.2, 2.1, 2.0)))
                    cost = 2.0 + max(1.0, 4 * seconds)
                    row = SizeMeasured(name, probe.size, 1, seconds, 0.0, seconds, gib, cost, is_alone)
                    known = known.add(row)
                    built.add(name)
                largest = max(largest, probe.size)
        return settle_precision(search, known)


def ask(goal: str = "auto", **values) -> Search:
    asked = {"precisions": ("float32",), "start": 32, "most": 272, "noise_scale": 100.0, "images": LONG}
    return Search(goal=goal, **{**asked, **values})


def best_size(known: Known, noise_scale: float) -> int:
    rows = known.rows(known.precision[0])
    target = usable_gib(rows, known.failed.get(known.precision[0]), known.memory_limit_gib)
    fitting = [one for one in rows if one.peak_memory_gib <= target]
    return min(fitting, key=lambda one: result_seconds(one, noise_scale)).size


def on_cpu(overhead_images: float) -> Callable[[int], float]:
    """A step takes as long as its images and so many more."""
    return lambda size: (size + overhead_images) / 900


def on_gpu(size: int) -> float:
    """A step takes as long for any size up to 344."""
    return 0.007 * max(1.0, size / 344)


@pytest.mark.parametrize(
    ("seconds", "noise_scale", "most", "size"),
    [
        # The shortest way is at the square root of noise scale times overhead.
        (on_cpu(8), 100.0, 272, 32),
        (on_cpu(1), 100.0, 272, 8),
        (on_cpu(8), 2000.0, 272, 128),
        (on_cpu(8), 10.0, 272, 8),
        (on_cpu(8), math.inf, 272, 272),
        (on_gpu, 100.0, 272, 272),
        (on_gpu, 100.0, 5000, 256),
        (on_gpu, 5000.0, 5000, 512),
        (on_gpu, 100.0, 1, 1),
        (on_cpu(8), 100.0, 20, 20),
    ],
)
def test_the_size_with_the_shortest_way_to_a_result_is_found(seconds, noise_scale, most, size):
    machine = Machine(seconds)
    known = machine.search(ask(noise_scale=noise_scale, most=most, start=min(32, most)))
    assert best_size(known, noise_scale) == size
    # A size above it was tried, unless none is of use, and one below.
    sizes = [one.size for one in known.rows("float32")]
    assert sizes[-1] > size or size == most
    assert sizes[0] < size or size == 1
    assert machine.groups == 1
    assert len(machine.probes) <= 2 + abs(math.log2(size / 32)) + 1


@pytest.mark.parametrize("per_image", [0.05, 0.01])
@pytest.mark.parametrize("killed_beyond", [math.inf, 9.8])
def test_where_throughput_rises_with_the_batch_it_is_what_memory_holds(per_image, killed_beyond):
    machine = Machine(lambda size: 0.01, lambda size: 1 + per_image * size, killed_beyond=killed_beyond)
    known = machine.search(ask(most=100_000))
    largest = (9.0 - 1) / per_image
    assert largest / 1.2 <= best_size(known, 100.0) <= largest


@pytest.mark.parametrize("goal", ["auto", "knee", "given", "every"])
@pytest.mark.parametrize("precisions", [("float32",), ("float32", "mixed_bfloat16")])
def test_how_many_sizes_may_be_measured_is_known_beforehand(goal, precisions):
    # Each size in each precision is told as one.
    search = ask(goal, precisions=precisions, start=8, most=8 if goal == "given" else 64, noise_scale=math.inf)
    machine = Machine(on_gpu, factors={"float32": 1.0, "mixed_bfloat16": 0.5})
    machine.search(search)
    told = sum(len(probe.precisions) for probe in machine.probes)
    assert told <= count_probes(search) <= told + 4


def test_the_first_size_may_be_too_large():
    machine = Machine(on_gpu, lambda size: 1 + 0.5 * size, killed_beyond=10.0)
    known = machine.search(ask(start=128))
    assert known.failed["float32"] == 32
    assert best_size(known, 100.0) in (8, 14, 15, 16)
    machine = Machine(on_gpu, lambda size: 20.0, killed_beyond=10.0)
    known = machine.search(ask())
    assert known.rows("float32") == ()
    assert machine.groups <= 5


BOTH = ("float32", "mixed_bfloat16")


@pytest.mark.parametrize("run_seconds", [30, 60, 120, 400, 4000])
def test_a_search_takes_at_most_a_tenth_of_the_run_beyond_the_first_size(run_seconds):
    images = int(run_seconds * 900)
    machine = Machine(on_cpu(8), factors={"float32": 1.0, "mixed_bfloat16": 0.7})
    known = machine.search(ask(images=images, precisions=BOTH))
    first = known.rows("float32")[0].seconds
    assert known.seconds <= max(first, BUDGET_SHARE * images / 720)
    assert known.precision[0] == ("mixed_bfloat16" if run_seconds >= 120 else "float32")
    if run_seconds == 30:
        assert [one.size for one in machine.probes] == [32]
        assert known.precision[1] == "float32: the run is too short to measure others"


GPU = ("float32", "mixed_bfloat16", "mixed_float16")


@pytest.mark.parametrize("run_seconds", [14, 100, 600, 36_000])
def test_a_search_on_a_gpu_takes_a_tenth_of_the_run_or_20_seconds(run_seconds):
    # 344 images in 7 ms: a search that begins with the first size in float32.
    images = int(run_seconds * 344 / 0.007)
    machine = Machine(on_gpu, factors=dict.fromkeys(GPU, 1.0), limit_gib=70.0)
    known = machine.search(ask(images=images, precisions=GPU, start=128, most=5000))
    assert known.seconds <= max(20.0, BUDGET_SHARE * run_seconds)
    # Of each precision two sizes, of the chosen one those above.
    assert len(machine.probes) <= 5


@pytest.mark.parametrize("card_gib", [8, 16, 80, 140])
@pytest.mark.parametrize("per_image", [0.01, 0.05])
def test_the_largest_size_that_fits_is_found_on_small_and_on_large_cards(card_gib, per_image):
    # CUDA's own, and what TensorFlow leaves to its libraries; the weights and the optimizer take 1.5 GiB.
    limit = card_gib - 0.5 - 1.5
    machine = Machine(lambda size: 0.01, lambda size: 1.5 + per_image * size, limit_gib=limit, killed_beyond=limit)
    known = machine.search(ask("max", start=128, most=100_000))
    exhaustive = int((0.9 * limit - 1.5) / per_image)
    assert 0.95 * exhaustive - 1 < best_size(known, math.inf) <= exhaustive
    assert machine.groups <= 5


def test_a_precision_is_chosen_from_measurements_by_turns_at_two_sizes():
    machine = Machine(on_cpu(8), factors={"float32": 1.0, "mixed_bfloat16": 0.6})
    known = machine.search(ask(precisions=BOTH))
    compared = [one.size for one in machine.probes if one.precisions == BOTH]
    assert compared == [32, 64]
    assert known.precision[0] == "mixed_bfloat16"
    assert known.precision[1].startswith("mixed_bfloat16 1200 and 1333 images/s at 32 and 64 and loss")
    assert {one.precisions for one in machine.probes[3:]} == {("mixed_bfloat16",)}
    assert machine.groups == 1


def test_an_emulated_precision_is_measured_at_one_size():
    machine = Machine(on_cpu(8), factors={"float32": 1.0, "mixed_bfloat16": 8.0})
    known = machine.search(ask(precisions=BOTH))
    assert [one.size for one in known.rows("mixed_bfloat16")] == [32]
    assert known.precision[0] == "float32"


def test_a_precision_that_is_faster_at_one_size_only_is_not_taken():
    class Uneven(dict):
        sizes = iter([1.0, 1.0, 0.5, 1.0, 1.1])

        def __getitem__(self, name):
            return next(self.sizes, 1.0)

    known = Machine(on_cpu(8), factors=Uneven()).search(ask(precisions=BOTH))
    assert known.precision[0] == "float32"


def test_where_float32_does_not_fit_the_other_one_is_taken():
    known = Known().limit(10.0).add_failure("float32", 32)
    assert next_probe(ask("given", precisions=BOTH, most=32), known) == Probe(32, ("mixed_bfloat16",))
    row = SizeMeasured("mixed_bfloat16", 32, 1, 0.1, 0.0, 0.1, 1.0)
    known = settle_precision(ask("given", precisions=BOTH, most=32), known.add(row))
    assert known.precision == ("mixed_bfloat16", "mixed_bfloat16, the only precision that fits")


def test_a_given_size_is_measured_where_the_precision_is_open_and_no_other():
    machine = Machine(on_cpu(8), factors={"float32": 1.0, "mixed_bfloat16": 0.6})
    known = machine.search(ask("given", start=50, most=50, precisions=BOTH))
    assert {one.size for one in machine.probes} == {50}
    assert known.precision[0] == "mixed_bfloat16"


@pytest.mark.parametrize("per_image", [0.001, 0.01, 0.1, 0.3])
@pytest.mark.parametrize("curve", [1.0, 0.97, 1.03])
@pytest.mark.parametrize("killed_beyond", [math.inf, 10.0])
@pytest.mark.parametrize("precisions", [("float32",), BOTH])
def test_max_is_what_an_exhaustive_search_finds(per_image, curve, killed_beyond, precisions):
    def gib(size: int) -> float:
        return 1 + per_image * size**curve

    machine = Machine(lambda size: 0.01, gib, {"float32": 1.0, "mixed_bfloat16": 0.9}, killed_beyond=killed_beyond)
    known = machine.search(ask("max", precisions=precisions, most=100_000, start=8))
    exhaustive = max(size for size in range(1, 20_000) if gib(size) <= 9.0)
    assert 0.95 * exhaustive - 1 < best_size(known, math.inf) <= exhaustive
    assert machine.groups <= 8


def test_max_measures_the_largest_size_of_use_next_where_two_promise_that_it_fits():
    machine = Machine(on_cpu(8), lambda size: 1 + size / 1000)
    known = machine.search(ask("max"))
    assert [one.size for one in machine.probes] == [32, 64, 272]
    assert known.rows("float32")[-1].alone
    assert machine.groups == 1


def test_knee_is_looked_for_until_throughput_stops_rising():
    machine = Machine(lambda size: 0.01 * max(1, size / 64))
    known = machine.search(ask("knee", most=5000))
    assert [one.size for one in known.rows("float32")] == [32, 64, 128, 256]
    machine = Machine(lambda size: 0.01 * size)
    known = machine.search(ask("knee", most=5000))
    assert known.rows("float32")[0].size == 1


def test_the_complete_table_has_all_powers_of_two_alone_in_each_precision_of_use():
    factors = {"float32": 1.0, "mixed_bfloat16": 0.9, "mixed_float16": 9.0}
    machine = Machine(on_cpu(8), lambda size: 1 + size / 100, factors)
    known = machine.search(ask("every", precisions=tuple(factors), most=272, images=1))
    for name in BOTH:
        assert [one.size for one in known.rows(name) if one.alone] == [8, 16, 32, 64, 128, 256, 272]
    assert [one.size for one in known.rows("mixed_float16")] == [32]


def test_a_table_with_all_that_is_needed_ends_the_search_at_once():
    search = ask()
    known = Machine(on_cpu(8)).search(search)
    assert next_probe(search, known) is None
    # Another noise scale may need more.
    assert next_probe(ask(noise_scale=5000.0), known) == Probe(128, ("float32",))
