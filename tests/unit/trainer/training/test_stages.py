"""The stages of simulated runs: a test gives the validation of each epoch by stage and augmentation."""

import math
from collections import Counter
from collections.abc import Callable

import pytest

from trainer.record.epoch_row import main_path
from trainer.training.stages import (
    EpochPlan,
    choose_augmentation,
    full_augmentation,
    list_candidates,
    needed_epochs,
    plan_epoch,
)

STEPS = 100
PARTS = {"augment_rotation": 10.0, "augment_translation": 0.1, "augment_zoom": 0.1}
ALL = "rotation+zoom+translation"


@pytest.fixture
def make(make_config):
    """Return a function that makes the config of a run with stages."""
    return lambda **values: make_config(
        **{"schedule": "plateau", "epochs": 40, "patience": 3, "augment": "auto", **PARTS, **values}
    )


def simulate(config, loss: Callable[[EpochPlan, list], float], steps_per_epoch: int = STEPS, history=None) -> list:
    """Return the history of a run whose validation losses are given, and whose accuracies follow from them."""
    history = list(history or [])
    while plan := plan_epoch(history, config, steps_per_epoch):
        value = loss(plan, history)
        row = {"epoch": len(history) + 1, "val_loss": value, "val_accuracy": 1 / (1 + value), **vars(plan)}
        history.append(row)
    return history


def stages(history: list) -> list[tuple[str, int]]:
    """Return each stage and how many epochs it took, in order."""
    taken: list[tuple[str, int]] = []
    for row in history:
        if taken and taken[-1][0] == row["stage"]:
            taken[-1] = (row["stage"], taken[-1][1] + 1)
        else:
            taken.append((row["stage"], 1))
    return taken


def of_best(losses: dict[str, float], until: int = 8) -> Callable[[EpochPlan, list], float]:
    """Return losses that fall for some epochs, towards one for each augmentation."""
    return lambda plan, history: losses[plan.augmentation] + max(0, until - len(history)) * 0.1


LOSSES = {"none": 0.5, "rotation+zoom": 0.3, ALL: 0.2, "flip": 2.0}


def test_a_run_takes_the_augmentation_with_the_lowest_validation_loss(make):
    history = simulate(make(), of_best(LOSSES, until=0))
    assert stages(history) == [("plain", 3), ("trial", 6), ("train", 4), ("decay", 2), ("clean", 1)]
    assert {row["augmentation"] for row in history if row["stage"] in ("train", "decay")} == {ALL}
    assert history[-1]["augmentation"] == "none"


@pytest.mark.parametrize("best", list(LOSSES))
def test_each_candidate_can_win_and_training_goes_on_from_its_weights(make, best):
    history = simulate(make(), of_best({**dict.fromkeys(LOSSES, 0.5), best: 0.1}, until=0))
    first = next(row for row in history if row["stage"] == "train")
    assert first["augmentation"] == best
    source = history[first["started_from"] - 1]
    assert (source["stage"], source["augmentation"]) == ("trial", best)
    # All from the same plain weights, none and the best of the others for one more epoch.
    trials = [row for row in history if row["stage"] == "trial"]
    assert [row["started_from"] for row in trials[:4]] == [1] * 4
    assert len(trials) == 6
    assert all(history[row["started_from"] - 1]["augmentation"] == row["augmentation"] for row in trials[4:])


def test_a_flip_is_added_where_it_and_something_else_help_alone(make):
    losses = {**LOSSES, "flip": 0.4, f"{ALL}+flip": 0.1}
    history = simulate(make(), of_best(losses, until=0))
    trials = [(row["augmentation"], row["started_from"]) for row in history if row["stage"] == "trial"]
    plain = [row["epoch"] for row in history if row["stage"] == "plain"]
    last = len(plain) + 4
    assert trials == [
        *((name, 1) for name in ("none", "rotation+zoom", ALL, "flip")),
        *(("none", last - 3), (f"{ALL}+flip", last - 1)),
    ]
    first = next(row for row in history if row["stage"] == "train")
    assert (first["augmentation"], first["started_from"]) == (f"{ALL}+flip", last + 2)


@pytest.mark.parametrize("losses", [{"flip": 0.3, ALL: 0.6}, {"flip": 0.4, ALL: 0.5}])
def test_a_flip_alone_is_tried_once_more_where_nothing_else_helps(make, losses):
    history = simulate(make(), of_best({**LOSSES, "rotation+zoom": 0.7, **losses}, until=0))
    assert [row["augmentation"] for row in history if row["stage"] == "trial"][4:] == ["none", "flip"]
    assert {row["augmentation"] for row in history if row["stage"] == "train"} == {"flip"}


def test_a_flip_is_added_only_where_it_helps_by_more_than_the_noise(make):
    # Plain training rises by 0.04 at its third epoch, before it ends.
    def loss(flip: float) -> Callable[[EpochPlan, list], float]:
        noisy = {0: 0.5, 1: 0.54, 2: 0.5}
        losses = {**LOSSES, "flip": flip, f"{ALL}+flip": 0.1}
        return lambda plan, history: noisy[len(history)] if plan.stage == "plain" else losses[plan.augmentation]

    for flip, finalist in ((0.475, f"{ALL}+flip"), (0.485, ALL)):
        trials = [row["augmentation"] for row in simulate(make(), loss(flip)) if row["stage"] == "trial"]
        assert trials[4:] == ["none", finalist]


def test_what_a_flip_makes_worse_goes_on_without_it(make):
    history = simulate(make(), of_best({**LOSSES, "flip": 0.4, f"{ALL}+flip": 0.25}, until=0))
    assert [row["augmentation"] for row in history if row["stage"] == "trial"][4:] == ["none", f"{ALL}+flip"]
    first = next(row for row in history if row["stage"] == "train")
    assert first["augmentation"] == ALL
    assert history[first["started_from"] - 1]["augmentation"] == ALL


MIXED = {"augment_mixup": 0.2, "augment_cutmix": 1.0}


@pytest.mark.parametrize(
    ("flip", "mixes", "finalist"),
    [(0.4, 0.4, f"{ALL}+flip+mixup+cutmix"), (0.6, 0.4, f"{ALL}+mixup+cutmix"), (0.4, 0.6, f"{ALL}+flip")],
)
def test_mixtures_are_added_as_a_flip_is(make, flip, mixes, finalist):
    losses = {**LOSSES, "flip": flip, "mixup+cutmix": mixes}
    for loss, winner in ((0.1, finalist), (0.3, ALL)):
        history = simulate(make(**MIXED), of_best({**losses, finalist: loss}, until=0))
        trials = [row["augmentation"] for row in history if row["stage"] == "trial"]
        assert trials == ["none", "rotation+zoom", ALL, "flip", "mixup+cutmix", "none", finalist]
        assert {row["augmentation"] for row in history if row["stage"] == "train"} == {winner}


def test_mixtures_are_left_out_where_a_run_has_too_few_epochs_for_them(make):
    history = simulate(make(**MIXED, epochs=24), of_best(LOSSES, until=0))
    trials = [row["augmentation"] for row in history if row["stage"] == "trial"]
    assert trials == ["none", "rotation+zoom", ALL, "flip", "none", ALL]


def test_a_run_with_more_epochs_tries_no_mixtures_after_its_trials_were_judged(make):
    values = {**MIXED, "patience": 0}
    for trials in (5, 6):
        short = simulate(make(epochs=24, **values), of_best(LOSSES, until=0))[: 3 + trials]
        assert [row["stage"] for row in short].count("trial") == trials
        longer = simulate(make(epochs=40, **values), of_best(LOSSES, until=0), history=short)
        assert [row["augmentation"] for row in longer if row["stage"] == "trial"][4:] == ["none", ALL]
        assert {row["augmentation"] for row in longer if row["stage"] == "train"} == {ALL}


def test_mixtures_alone_win_where_nothing_else_helps(make):
    losses = {**dict.fromkeys(LOSSES, 0.5), "none": 0.4, "mixup": 0.2}
    history = simulate(make(augment_mixup=0.2), of_best(losses, until=0))
    assert [row["augmentation"] for row in history if row["stage"] == "trial"][5:] == ["none", "mixup"]
    assert {row["augmentation"] for row in history if row["stage"] == "train"} == {"mixup"}


def test_a_trial_is_the_first_steps_of_an_epoch_and_other_epochs_are_whole(make):
    history = simulate(make(), of_best(LOSSES, until=0))
    assert {row["stage"] for row in history if row["most_steps"] is None} == {"plain", "train", "decay", "clean"}
    assert {row["stage"] for row in history if row["most_steps"]} == {"trial"}


def choose(plain: list[float], none: list[float], candidate: list[float], unit: int = 1) -> str:
    trials = [{"augmentation": "none", "val_loss": loss} for loss in none]
    trials += [{"augmentation": "flip", "val_loss": loss} for loss in candidate]
    return choose_augmentation([{"val_loss": loss} for loss in plain], trials, unit)


def test_a_candidate_wins_by_more_than_plain_training_rises_from_epoch_to_epoch():
    # In its last six moves it rises by 0.1, 0.2 and 0.3: 0.1 on average.
    plain = [1.0, 9.0, 5.0, 5.1, 2.0, 2.3, 1.0, 1.2]
    assert choose(plain, [2.0, 0.7], [3.0, 0.59]) == "flip"
    assert choose(plain, [0.1, 0.7], [0.1, 0.61]) == "none"
    # The last epochs of a trial count, on average.
    assert choose(plain, [9.0, 9.0, 0.6, 0.8], [0.0, 0.0, 0.5, 0.6], unit=2) == "flip"
    assert choose(plain, [9.0, 9.0, 0.6, 0.8], [0.0, 0.0, 0.5, 0.8], unit=2) == "none"
    # One epoch tells of no move.
    assert choose([1.0], [0.5, 0.5], [0.5, 0.49]) == "flip"
    # Nor do epochs of which each is better than the one before.
    assert choose([1.0, 0.5, 0.3], [0.5, 0.5], [0.5, 0.49]) == "flip"


def test_a_candidate_that_diverges_is_not_tried_further_and_loses(make):
    losses = {**LOSSES, "rotation+zoom": math.inf, ALL: math.inf, "flip": 0.4}
    history = simulate(make(epochs=100), lambda plan, rows: losses[plan.augmentation], steps_per_epoch=20)
    tried = Counter(row["augmentation"] for row in history if row["stage"] == "trial")
    assert tried == {"none": 4, "rotation+zoom": 1, ALL: 1, "flip": 4}
    assert {row["augmentation"] for row in history if row["stage"] == "train"} == {"flip"}


def test_plain_training_lasts_while_validation_improves_up_to_a_limit(make):
    assert stages(simulate(make(), of_best(LOSSES, until=3)))[0] == ("plain", 6)
    assert stages(simulate(make(epochs=60), of_best(LOSSES, until=40)))[0] == ("plain", 9)
    assert stages(simulate(make(epochs=60), of_best(LOSSES, until=4)))[0] == ("plain", 7)


def test_plain_training_ends_by_the_loss_even_if_the_accuracy_improves(make):
    rising = [
        {"epoch": epoch, "stage": "plain", "augmentation": "none", "val_loss": loss, "val_accuracy": 0.1 * epoch}
        for epoch, loss in enumerate([1.0, 0.5, 0.6, 0.7], start=1)
    ]
    assert [plan_epoch(rising[:epochs], make(), STEPS).stage for epochs in (3, 4)] == ["plain", "trial"]


def test_training_ends_when_neither_loss_nor_accuracy_improves(make):
    config = make(augment="none")
    history = simulate(config, lambda plan, rows: 1.0 - 0.1 * min(len(rows), 6))
    assert stages(history) == [("train", 10), ("decay", 2)]
    # The rate falls to zero, from the best weights.
    decay = [row for row in history if row["stage"] == "decay"]
    assert [row["started_from"] for row in decay] == [7, 11]
    assert [(row["first_rate"], row["last_rate"]) for row in decay] == [(1.0, 0.5), (0.5, 0.0)]


def test_no_run_is_longer_than_its_epochs(make):
    for epochs in range(1, 50):
        history = simulate(make(epochs=epochs), lambda plan, rows: 1.0 / (1 + len(rows)))
        assert len(history) == epochs
        assert history[-1]["stage"] in ("decay", "clean")
        assert history[-1]["last_rate"] == 0


def test_without_patience_all_epochs_are_trained(make):
    history = simulate(make(patience=0, augment="all"), lambda plan, rows: 1.0)
    assert stages(history) == [("train", 33), ("decay", 6), ("clean", 1)]


def test_what_an_earlier_run_found_is_not_tried_again(make):
    history = simulate(make(known_augmentation=ALL), lambda plan, rows: 1.0)
    assert stages(history) == [("train", 4), ("decay", 1), ("clean", 1)]
    assert history[0]["augmentation"] == ALL


def test_a_run_of_few_epochs_tries_nothing(make):
    history = simulate(make(epochs=8), of_best(LOSSES))
    assert stages(history) == [("train", 7), ("decay", 1)]
    assert {row["augmentation"] for row in history} == {"none"}


@pytest.mark.parametrize("augment", ["none", "all"])
@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 11])
def test_the_rate_of_a_short_run_falls_to_zero_however_few_steps_an_epoch_has(make, augment, epochs):
    config = make(augment=augment, patience=0, epochs=epochs)
    history = simulate(config, lambda plan, rows: 1.0, steps_per_epoch=4)
    decay = [row for row in history if row["stage"] == "decay"]
    assert len(history) == epochs
    assert (decay[0]["first_rate"], decay[-1]["last_rate"], history[-1]["last_rate"]) == (1, 0, 0)
    assert [row["first_rate"] for row in decay[1:]] == [row["last_rate"] for row in decay[:-1]]
    assert history[-1]["stage"] == ("clean" if augment == "all" and epochs > 1 else "decay")


def test_where_an_epoch_has_few_steps_several_count_as_one(make):
    history = simulate(make(epochs=80), of_best(LOSSES, until=0), steps_per_epoch=25)
    assert stages(history) == [("plain", 5), ("trial", 12), ("train", 7), ("decay", 4), ("clean", 2)]


def test_a_finished_run_is_trained_on_from_before_its_decay(make):
    first = simulate(make(patience=0, augment="all", epochs=20), lambda plan, rows: 1.0)
    history = simulate(make(patience=0, augment="all"), lambda plan, rows: 1.0, history=first)
    assert stages(history) == [("train", 16), ("decay", 3), ("clean", 1), ("train", 13), ("decay", 6), ("clean", 1)]
    assert history[20]["started_from"] == 16
    # The decay of the first run led nowhere.
    assert not {17, 18, 19, 20} & {row["epoch"] for row in main_path(history)}


@pytest.mark.parametrize("augment", ["none", "all"])
def test_a_finished_run_is_trained_on_for_all_epochs_asked_for_however_few(make, augment):
    for epochs in range(1, 40):
        first = simulate(make(patience=0, augment=augment, epochs=epochs), lambda plan, rows: 1.0)
        for more in range(1, 9):
            config = make(patience=0, augment=augment, epochs=epochs + more)
            history = simulate(config, lambda plan, rows: 1.0, history=first)
            assert len(history) == epochs + more
            # One epoch alone has no time to come down.
            assert more == 1 or history[-1]["last_rate"] == 0


def test_what_later_epochs_start_from_is_kept(make):
    config = make()
    loss = of_best(LOSSES, until=4)
    history: list = []
    kept: set[int] = set()
    while plan := plan_epoch(history, config, STEPS):
        if plan.started_from:
            assert plan.started_from in kept
        value = loss(plan, history)
        history.append({"epoch": len(history) + 1, "val_loss": value, "val_accuracy": 1 / (1 + value), **vars(plan)})
        # What was deleted once does not come back.
        kept = (kept | {len(history)}) & needed_epochs(history)
        assert len(kept) <= 9


def test_other_schedules_have_one_stage(make):
    cosine = simulate(make(schedule="cosine", augment="all", patience=0, epochs=5), lambda plan, rows: 1.0)
    assert stages(cosine) == [("train", 5)]
    assert {row["augmentation"] for row in cosine} == {ALL}


@pytest.mark.parametrize(("known", "used"), [("", "none"), ("rotation+zoom", "rotation+zoom")])
def test_a_schedule_without_trials_varies_nothing_that_no_run_has_tried(make, known, used):
    cosine = simulate(make(schedule="cosine", patience=0, known_augmentation=known), lambda plan, rows: 1.0)
    assert {row["augmentation"] for row in cosine} == {used}
    constant = simulate(make(schedule="constant", augment="none"), lambda plan, rows: 1.0)
    assert stages(constant) == [("train", 4)]


def test_the_main_path_leaves_out_what_lost(make):
    history = simulate(make(), of_best(LOSSES, until=0))
    path = main_path(history)
    assert [row["stage"] for row in path].count("trial") == 2
    assert {row["augmentation"] for row in path if row["stage"] == "trial"} == {ALL}


def test_candidates_are_what_the_config_allows(make_config):
    auto = make_config(augment="auto", **PARTS)
    assert list_candidates(auto) == ["none", "rotation+zoom", ALL, "flip"]
    assert list_candidates(make_config(augment="auto", augment_translation=0.1)) == ["none", "translation", "flip"]
    assert list_candidates(make_config(augment="auto")) == ["none", "flip"]
    assert list_candidates(make_config(augment="auto", augment_cutmix=1.0)) == ["none", "flip", "cutmix"]
    assert full_augmentation(make_config(augment="all", **PARTS, augment_flip=True)) == f"{ALL}+flip"
    assert full_augmentation(make_config(augment="all", augment_translation=0.1)) == "translation"
    assert full_augmentation(make_config(augment="all", augment_zoom=0.1, **MIXED)) == "zoom+mixup+cutmix"
    assert full_augmentation(make_config(augment="all")) == "none"
    assert full_augmentation(make_config(augment="none", **PARTS)) == "none"
