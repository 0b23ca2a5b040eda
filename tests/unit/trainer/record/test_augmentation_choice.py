from datetime import UTC, datetime

import pytest

from trainer.record.augmentation_choice import AugmentationChoice, describe_trials, read_choice, write_choice
from trainer.runtime import storage

CHOICE = AugmentationChoice(
    augmentation="rotation+zoom", figures="rotation+zoom 0.061 after 2 epochs", run="first", chosen=datetime.now(UTC)
)


@pytest.fixture
def make(make_config):
    return lambda **values: make_config(**{"augment": "auto", "augment_rotation": 10.0, **values})


def test_a_later_run_finds_what_an_earlier_one_chose(make, tmp_path):
    write_choice(str(tmp_path), make(), CHOICE)
    later = make(seed=3, global_batch_size=8, base_learning_rate=0.5, epochs=7)
    assert read_choice(str(tmp_path), later) == CHOICE


@pytest.mark.parametrize(
    "values",
    [
        {"dataset_fingerprint": "other"},
        {"arch": "alexnet"},
        {"augment_rotation": 20.0},
        {"augment_translation": 0.1},
        {"input_scaling": "unit"},
    ],
)
def test_another_dataset_network_or_candidate_is_tried_again(make, tmp_path, values):
    write_choice(str(tmp_path), make(), CHOICE)
    assert read_choice(str(tmp_path), make(**values)) is None


def test_a_damaged_choice_is_tried_again(make, tmp_path):
    write_choice(str(tmp_path), make(), CHOICE)
    (name,) = storage.find_files(str(tmp_path / "augmentations"))
    (tmp_path / "augmentations" / name).write_text("{")
    assert read_choice(str(tmp_path), make()) is None


def test_trials_are_reported_with_their_last_losses_the_longest_tried_first():
    rows = [("plain", "none", 0.9, 0), ("trial", "none", 0.5, 1), ("trial", "rotation", 0.4, 1)]
    rows += [("trial", "flip", 0.2, 1), ("trial", "none", 0.3, 2), ("trial", "rotation+flip", 0.25, 3)]
    rows += [("train", "rotation+flip", 0.1, 6)]
    names = "stage", "augmentation", "val_loss", "started_from"
    history = [{"epoch": number, **dict(zip(names, row, strict=True))} for number, row in enumerate(rows, 1)]
    # The epoch with a flip went on from the one without.
    assert describe_trials(history) == (
        "rotation+flip 0.250, none 0.300 after 2 epochs; flip 0.200, rotation 0.400 after 1 epoch"
    )
    assert describe_trials(history[:1]) == ""
