"""Commands of typer whose errors about wrong options are one line, as all other errors of a job are."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from trainer.runtime import console

# typer.BadParameter is public; what it derives from, the error for any misuse of a command, is not.
_UsageError: Any = typer.BadParameter.__base__


class JobCommand(TyperCommand):
    """The command of a job."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments; wrong ones end the process with exit code 2 and one line on stderr."""
        with _one_line():
            return super().make_context(info_name, args, parent, **extra)


class JobGroup(TyperGroup):
    """A command that has every job as a subcommand."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments before the subcommand as `JobCommand` does."""
        with _one_line():
            return super().make_context(info_name, args, parent, **extra)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the subcommand; an unknown one ends the process as wrong options do."""
        with _one_line():
            return super().resolve_command(ctx, args)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        message = " ".join(error.format_message().split()).rstrip(".")
        where = f"; {error.ctx.command_path} --help lists what is allowed" if error.ctx else ""
        console.stderr.print(f"error: {message}{where}", markup=False)
        sys.exit(error.exit_code)
