import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from trainer.record import predictions as records
from trainer.record.predictions import find_suspects, make_thumbnails, name_predictions, select_shown

OUTCOMES = pa.table({"label": [2, 0], "predicted": [1, 0], "confidence": [0.75, 0.5], "loss": [1.5, 0.7]})


def table_of(wrong: list[bool], losses: list[float], mean_losses: list[float]) -> pa.Table:
    columns = {"label": ["cat"] * len(wrong), "predicted": ["dog" if one else "cat" for one in wrong]}
    cats = pa.table({**columns, "loss": losses, "mean_loss": mean_losses})
    # As many images of another class, without a mistake.
    dogs = {"label": ["dog"] * len(wrong), "predicted": ["dog"] * len(wrong)}
    return pa.concat_tables([cats, pa.table({**dogs, "loss": [0.1] * len(wrong), "mean_loss": [0.1] * len(wrong)})])


def test_each_prediction_has_its_file_and_the_names_of_its_classes():
    sources = pa.table({"path": ["a/1.png", "b/2.png"], "sha256": ["aa", "bb"]})
    first, second = name_predictions(OUTCOMES, sources, ["cat", "dog", "eel"]).to_pylist()
    assert first == {
        **{"path": "a/1.png", "sha256": "aa", "label": "eel", "predicted": "dog"},
        **{"confidence": 0.75, "loss": 1.5},
    }
    assert (second["path"], second["label"], second["predicted"]) == ("b/2.png", "cat", "cat")
    assert "path" not in name_predictions(OUTCOMES, None, ["cat", "dog", "eel"]).column_names


def test_the_likeliest_wrong_labels_are_the_mistakes_with_the_highest_loss_over_the_epochs():
    # Row 3 has the highest mean of all, and the network has come to agree with its label.
    table = table_of([True, True, False, False, True], [9.0, 1.0, 0.1, 0.1, 2.0], [1.0, 3.0, 0.5, 7.0, 2.0])
    assert find_suspects(table).tolist() == [1, 4, 0]
    assert find_suspects(table.drop_columns("mean_loss")).tolist() == []


def test_a_label_that_the_network_held_likelier_than_a_guess_would_is_no_suspect():
    table = table_of([True, True, False], [2.0, 2.0, 0.1], [0.69, 0.7, 0.1])
    assert find_suspects(table).tolist() == [1]


def test_a_network_that_is_no_better_than_the_most_frequent_class_suspects_nobody():
    assert find_suspects(table_of([True, True], [9.0, 9.0], [9.0, 9.0])).tolist() == []


def test_of_very_many_mistakes_those_with_the_highest_loss_are_shown_and_the_suspects(monkeypatch):
    monkeypatch.setattr(records, "_MOST_MISTAKES", 2)
    monkeypatch.setattr(records, "_MOST_SUSPECTS", 1)
    table = table_of([True] * 4 + [False], [1.0, 4.0, 3.0, 2.0, 9.0], [5.0, 1.0, 1.0, 1.0, 9.0])
    assert select_shown(table).tolist() == [0, 1, 2]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_thumbnail_is_a_small_picture_of_its_row(channels):
    levels = np.array([0, 80, 200], np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (3, 250, 250, channels))
    table = make_thumbnails(images[[2, 1]], np.array([2, 1]))
    assert table["row"].to_pylist() == [2, 1]
    for content, level in zip(table["image"].to_pylist(), (200, 80), strict=True):
        picture = Image.open(io.BytesIO(content))
        assert (picture.format, max(picture.size)) == ("WEBP", 56)
        assert np.asarray(picture).mean() == pytest.approx(level, abs=3)
        assert len(content) < 2000
