import pytest

from trainer.runtime.markdown import format_count, format_loss, format_table, shorten_digest


def test_a_table_has_a_header_a_rule_and_its_rows():
    assert format_table(("class", "right"), [("cat", 22), ("dog", 20)]) == [
        "| class | right |",
        "|---|---|",
        "| cat | 22 |",
        "| dog | 20 |",
    ]


def test_a_cell_cannot_break_the_table():
    assert format_table(("class",), [("a|b\nc",)])[2:] == [r"| a\|b c |"]


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "run", "1 run"),
        (0, "run", "0 runs"),
        (1, "class", "1 class"),
        (3, "class", "3 classes"),
        (2, "batch", "2 batches"),
        (1.0, "CPU", "1 CPU"),
        (1.5, "CPU", "1.5 CPUs"),
    ],
)
def test_one_of_a_thing_is_singular(number, noun, text):
    assert format_count(number, noun) == text


def test_a_digest_in_a_sentence_has_its_first_digits():
    assert shorten_digest("0123456789abcdef" * 4) == "0123456789ab"


@pytest.mark.parametrize(
    ("loss", "text"),
    [(0.12345, "0.1235"), (99999.0, "99999.0000"), (5.413337e27, "5.413e+27"), (float("nan"), "nan")],
)
def test_the_loss_of_a_run_that_diverges_is_not_thirty_digits_long(loss, text):
    assert format_loss(loss) == text
