from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from trainer.runtime.commands import JobCommand, JobGroup


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(name="tool", cls=JobGroup, no_args_is_help=True, rich_markup_mode=None)

    @app.command("paint", cls=JobCommand)
    def paint(
        color: Annotated[Literal["red", "blue"], typer.Option()],
        coats: Annotated[int, typer.Option(min=1)] = 1,
    ) -> None:
        print(f"{coats} x {color}")

    @app.callback()
    def describe() -> None:
        """A tool."""

    return app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "paint --coats 2",
            "Missing option '--color'. Choose from: red, blue; tool paint --help lists what is allowed",
        ),
        ("paint --color green", "'green' is not one of 'red', 'blue'; tool paint --help"),
        ("paint --color red --coats 0", "'--coats': Input should be greater than or equal to 1; tool paint"),
        ("paint --colr red", "--colr"),
        ("polish", "No such command 'polish'; tool --help"),
        ("--quiet paint", "--quiet"),
    ],
)
def test_wrong_options_are_one_line_on_stderr(app, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        typer.main.get_command(app)(arguments.split(), prog_name="tool")
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert message in err


def test_right_options_and_help_are_as_ever(app):
    assert CliRunner().invoke(app, ["paint", "--color", "red"]).output == "1 x red\n"
    for arguments in (["--help"], ["paint", "--help"], []):
        assert "Usage: " in CliRunner().invoke(app, arguments).output
