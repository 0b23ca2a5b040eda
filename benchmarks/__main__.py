"""Every benchmark by its name: `python -m benchmarks` lists them, `python -m benchmarks NAME --help` explains one."""

import importlib
import sys

import typer

NAMES = (
    "training",
    "feeding",
    "checkpoints",
    "workers",
    "scale",
    "growth",
    "many_runs",
    "prepare",
    "batch_size",
    "bucket_cache",
    "large_batch",
    "learning_rates",
    "development_sets",
    "accuracy",
    "architectures",
    "trainer_start",
    "classes",
    "pictures",
    "gpu",
)

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def describe() -> None:
    """Measure this project: each benchmark prints what it is compared with beside it, and where it was measured."""


# Only the one that is asked for: others import TensorFlow, or packages that it does without.
for name in [name for name in sys.argv[1:2] if name in NAMES] or NAMES:
    module = importlib.import_module(f"benchmarks.{name}")
    app.command(name, help=module.__doc__)(module.main)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
