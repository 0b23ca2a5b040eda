"""Training with 1, 2 and 4 workers on this machine, which share its cores: steady rate, start and end.

The same global batch; all take turns. More workers than cores bring nothing but what several cost. Mark: two workers
reach 0.90 of the rate of one.

Run: python -m benchmarks workers DATASET [--arch cnn_tapered] [--workers 1 --workers 2] [--rounds 3] [--json]
"""

import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.table import Mark, format_ratio, format_spread, ratio_of, report
from benchmarks.training import Outcome, measure_project


def main(
    dataset: Annotated[str, typer.Argument(help="Prepared.")],
    arch: Annotated[str, typer.Option()] = "cnn_tapered",
    workers: Annotated[list[int], typer.Option()] = [1, 2, 4],  # noqa: B006
    precision: Annotated[str, typer.Option()] = "float32",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    outcomes: dict[int, list[Outcome]] = {count: [] for count in workers}
    for _ in range(rounds):
        for count, found in outcomes.items():
            found.append(measure_project(dataset, arch, precision, num_workers=count))
            print(f"{count} workers: {found[-1]}", file=sys.stderr, flush=True)
    table = Table(f"{arch}, workers", "images/s", "ratio", "first step, s", "last epoch to prompt, s", "GiB per worker")
    first = [one.images_per_second for one in outcomes[workers[0]]]
    for count, found in outcomes.items():
        rates = [one.images_per_second for one in found]
        table.add_row(
            str(count),
            format_spread(rates),
            format_ratio(rates, first),
            format_spread([one.first_step_seconds for one in found], 1),
            format_spread([one.end_seconds for one in found], 1),
            format_spread([one.peak_gib for one in found], 2),
        )
    rates = {count: [one.images_per_second for one in found] for count, found in outcomes.items()}
    marks = [Mark("images/s of 2 workers, to 1", ratio_of(rates[2], rates[1]), 0.90)] if {1, 2} <= rates.keys() else []
    records = {count: [asdict(one) for one in found] for count, found in outcomes.items()}
    report(table, records, marks, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
