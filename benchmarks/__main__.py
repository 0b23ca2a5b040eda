"""Every benchmark by its name: `python -m benchmarks` lists them, `python -m benchmarks NAME --help` explains one."""

import typer

from benchmarks import (
    accuracy,
    architectures,
    batch_size,
    bucket_cache,
    checkpoints,
    classes,
    development_sets,
    feeding,
    gpu,
    growth,
    large_batch,
    learning_rates,
    many_runs,
    pictures,
    prepare,
    scale,
    trainer_start,
    training,
    workers,
)

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)
for module in (
    training,
    feeding,
    checkpoints,
    workers,
    scale,
    growth,
    prepare,
    batch_size,
    bucket_cache,
    large_batch,
    learning_rates,
    development_sets,
    accuracy,
    architectures,
    trainer_start,
    classes,
    many_runs,
    pictures,
    gpu,
):
    app.command(module.__name__.rpartition(".")[2], help=module.__doc__)(module.main)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
