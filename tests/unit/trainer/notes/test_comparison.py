import pyarrow as pa
import pytest

from trainer.notes.comparison import compare_predictions


def predictions(right: list[bool]) -> pa.Table:
    return pa.table({"label": [1] * len(right), "predicted": [1 if one else 0 for one in right]})


def compare(both: int, first_only: int, second_only: int, neither: int = 0):
    first = [True] * both + [True] * first_only + [False] * second_only + [False] * neither
    second = [True] * both + [False] * first_only + [True] * second_only + [False] * neither
    return compare_predictions(predictions(first), predictions(second))


# Two-sided binomial probabilities at one half, by hand: 2 x (1 + 10) / 2^10, 2 / 2^6, and more than one is one.
@pytest.mark.parametrize(
    ("first_only", "second_only", "p"), [(1, 9, 22 / 1024), (6, 0, 2 / 64), (3, 3, 1.0), (0, 0, 1.0)]
)
def test_the_test_is_exact_and_counts_only_images_on_which_they_differ(first_only, second_only, p):
    comparison = compare(50, first_only, second_only, 6)
    assert comparison.p_value == pytest.approx(p)
    assert (comparison.first_only, comparison.second_only) == (first_only, second_only)
    assert comparison.total == 56 + first_only + second_only


def test_a_difference_names_the_better_run():
    assert compare(50, 1, 9).describe("old", "new") == (
        "new is better than old on 60 images (correct only in old: 1, only in new: 9; p = 0.021)"
    )
    assert compare(50, 6, 0).describe("old", "new").startswith("old is better than new on 56 images")


def test_a_few_images_do_not_tell_runs_apart():
    assert compare(60, 2, 4).describe("old", "new") == (
        "old and new are not distinguishable on 66 images (correct only in old: 2, only in new: 4; p = 0.69)"
    )


@pytest.mark.parametrize(("first_only", "is_better"), [(5, False), (6, True)])
def test_one_chance_in_twenty_is_where_a_difference_begins(first_only, is_better):
    """p is 0.0625 and 0.03125."""
    assert compare(50, first_only, 0).describe("old", "new").startswith("old is better") is is_better
