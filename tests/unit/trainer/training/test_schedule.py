import pytest

from trainer.training.schedule import build_schedule


@pytest.fixture
def rates(make_config):
    """Return a function that gives the learning rate of every step, and of the one after the last."""

    def rates(steps_per_epoch: int = 20, **values) -> list[float]:
        config = make_config(**{"epochs": 10, "base_learning_rate": 2.0, "global_batch_size": 64, **values})
        schedule = build_schedule(config, steps_per_epoch)
        return [float(schedule(step)) for step in range(config.epochs * steps_per_epoch + 1)]

    return rates


PEAK = 1.0  # 2.0 for a batch of 256, so half of it for 64


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_rate_rises_linearly_to_its_peak_over_the_warmup(rates, schedule):
    warmup = rates(schedule=schedule, warmup_epochs=1)[:21]
    assert warmup == pytest.approx([PEAK * (step + 1) / 21 for step in range(21)])


def test_the_rate_falls_along_a_cosine_to_zero(rates):
    after = rates(schedule="cosine", warmup_epochs=1)[20:]
    assert after == sorted(after, reverse=True)
    assert after[90] == pytest.approx(PEAK / 2)
    assert after[-1] == pytest.approx(0, abs=1e-6)
    assert 0 < after[-2] < 0.001 * PEAK


def test_the_peak_is_never_passed(rates):
    for values in ({}, {"warmup_epochs": 0}, {"schedule": "constant"}):
        assert max(rates(**values)) == pytest.approx(PEAK)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(("warmup_epochs", "peak_step"), [(0, 0), (0.5, 10), (1, 20), (5, 20), (100, 20)])
def test_the_warmup_is_at_most_a_tenth_of_the_steps(rates, schedule, warmup_epochs, peak_step):
    of_steps = rates(schedule=schedule, warmup_epochs=warmup_epochs)
    assert of_steps[peak_step] == pytest.approx(PEAK)
    assert all(rate < 0.999 * PEAK for rate in of_steps[:peak_step])


def test_a_constant_rate_stays(rates):
    assert rates(schedule="constant", warmup_epochs=1)[20:] == pytest.approx([PEAK] * 181)
    assert rates(schedule="constant", warmup_epochs=0) == pytest.approx([PEAK] * 201)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_run_of_few_steps_starts_at_its_peak(rates, schedule):
    assert rates(steps_per_epoch=1, epochs=3, schedule=schedule, warmup_epochs=1)[0] == pytest.approx(PEAK)


def test_a_plateau_stays_at_its_peak_until_an_epoch_says_otherwise(rates, make_config):
    assert rates(schedule="plateau", warmup_epochs=1) == rates(schedule="constant", warmup_epochs=1)
    config = make_config(schedule="plateau", epochs=10, base_learning_rate=2.0, global_batch_size=64)
    schedule = build_schedule(config, steps_per_epoch=20)
    schedule.start_epoch(first_step=40, num_steps=20, first_factor=0.5, last_factor=0.1)
    assert [float(schedule(step)) for step in (40, 50, 60)] == pytest.approx([0.5 * PEAK, 0.3 * PEAK, 0.1 * PEAK])
    schedule.start_epoch(first_step=0, num_steps=20, first_factor=1.0, last_factor=1.0)
    assert float(schedule(0)) == pytest.approx(PEAK / 21)
