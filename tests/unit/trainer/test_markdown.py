from trainer.markdown import format_table


def test_a_table_has_a_header_a_rule_and_its_rows():
    assert format_table(("class", "right"), [("cat", 22), ("dog", 20)]) == [
        "| class | right |",
        "|---|---|",
        "| cat | 22 |",
        "| dog | 20 |",
    ]


def test_a_cell_cannot_break_the_table():
    assert format_table(("class",), [("a|b\nc",)])[2:] == [r"| a\|b c |"]
