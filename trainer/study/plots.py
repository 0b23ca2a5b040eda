"""The pictures of a study (tuning playbook, extracting insight from experimental results)."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.config.options import format_value
from trainer.notes.plots import COLOURS, GUIDE_COLOUR, set_loss_scale
from trainer.record.epoch_row import Metrics, find_curve
from trainer.record.evaluation_result import accuracy_interval
from trainer.study.analysis import BestOf, Importance, best_of_k, find_best
from trainer.study.file import Choice, Parameter, Range, Study
from trainer.study.folder import Trial

_IN_A_ROW = 3
_MARGIN = 0.05
_PLOT_WIDTH, _PLOT_HEIGHT = 4.0, 3.2


def draw_axes(study: Study, trials: Sequence[Trial]) -> Figure:
    """Draw the objective against each parameter, one point per trial; trials without a result are red crosses.

    Bars are the 95% intervals of accuracies.
    """
    parameters = study.parameters
    ended = [one for one in trials if one.kind == "search" and one.ended]
    best = find_best(study, trials)
    figure, places = _grid(len(parameters))
    for axes, parameter in zip(places, parameters, strict=False):
        of_parameter = [one for one in ended if parameter.name in one.values and parameter.applies(one.values)]
        completed = [one for one in of_parameter if one.status == "completed"]
        places_of = [_place(parameter, one) for one in completed]
        _draw_points(axes, study, places_of, completed, markersize=4)
        if best is not None and best in completed:
            axes.plot(
                [_place(parameter, best)],
                np.array([best.objective], np.float64),
                marker="*",
                markersize=13,
                color=COLOURS[1],
            )
        bad = [_place(parameter, one) for one in of_parameter if one.status != "completed"]
        if bad:
            bottom = axes.get_xaxis_transform()
            axes.plot(
                bad, [0.02] * len(bad), transform=bottom, linestyle="none", marker="x", color="red", clip_on=False
            )
        axes.set(xlabel=parameter.label, ylabel=study.objective)
        if isinstance(parameter.domain, Choice):
            names = [format_value(value) for value in parameter.domain.values]
            axes.set_xticks(range(len(names)), names, parse_math=False)
            axes.set_xlim(-0.5, len(names) - 0.5)
        else:
            _set_range(axes, parameter.domain)
    return figure


def draw_isolation(study: Study, groups: Mapping[str, Sequence[BestOf]]) -> Figure:
    """Draw the best objective for each value of the scientific parameters."""
    figure, places = _grid(len(groups))
    for axes, (label, of_parameter) in zip(places, groups.items(), strict=False):
        known = [(index, one.best) for index, one in enumerate(of_parameter) if one.best]
        _draw_points(axes, study, [index for index, _ in known], [best for _, best in known], markersize=9)
        names = [f"{one.label}\n({one.trials})" for one in of_parameter]
        axes.set_xticks(range(len(names)), names, fontsize=8, parse_math=False)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set(xlabel=f"{label} (trials)", ylabel=f"best {study.objective}")
        axes.grid(axis="y", color=GUIDE_COLOUR)
    return figure


def _draw_points(axes: Axes, study: Study, places: Sequence[float], trials: Sequence[Trial], markersize: float) -> None:
    """Draw the objectives of some trials, with the 95% intervals of accuracies."""
    values = np.array([one.objective for one in trials], np.float64)
    if study.maximises and all(one.total for one in trials):
        low, high = np.array([accuracy_interval(one.correct, one.total) for one in trials]).reshape(-1, 2).T
        spread = np.clip([values - low, high - values], 0, None)
        axes.errorbar(places, values, spread, fmt="none", ecolor=COLOURS[0], elinewidth=0.8, alpha=0.5)
    axes.plot(places, values, linestyle="none", marker="o", markersize=markersize, color=COLOURS[0])


def draw_importance(parameters: Sequence[Importance]) -> Figure:
    """Draw how much of the differences between trials each parameter explains, the most important on top."""
    figure = Figure(figsize=(6.4, 0.9 + 0.4 * len(parameters)), layout="constrained")
    axes = figure.subplots()
    shown = parameters[::-1]
    axes.barh(range(len(shown)), [one.share for one in shown], color=COLOURS[0])
    axes.set_yticks(range(len(shown)), [one.label for one in shown], parse_math=False)
    for row, one in enumerate(shown):
        axes.text(one.share + 0.01, row, f"{one.share:.0%}, p = {one.p_value:.2g}", va="center", fontsize=8)
    axes.set(xlabel="share of the differences between trials", xlim=(0, 1.25), xticks=np.linspace(0, 1, 6))
    return figure


def draw_best_of_k(study: Study, trials: Sequence[Trial]) -> Figure:
    """Draw the expected best of k trials: flat at its end if there were enough."""
    k, means, band = best_of_k(study, trials)
    figure, (axes, *_) = _grid(1, width=1.6)
    axes.fill_between(k, *band, color=COLOURS[0], alpha=0.2, label="5% to 95%")
    axes.plot(k, means, color=COLOURS[0], marker=".", label="mean")
    axes.set(xlabel="trials", ylabel=f"best {study.objective}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def draw_curves(histories: Mapping[str, Sequence[Metrics]]) -> Figure:
    """Draw the training curves of some trials: loss and accuracy of both splits by epoch."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    curves = {run: find_curve(history) for run, history in histories.items()}
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for (run, history), colour in zip(curves.items(), COLOURS, strict=False):
            epochs = [row["epoch"] for row in history]
            axes.plot(epochs, [row[name] for row in history], color=colour, linestyle="--", linewidth=0.9)
            axes.plot(epochs, [row[f"val_{name}"] for row in history], color=colour, marker=".", label=run)
        if name == "loss":
            set_loss_scale(axes, [row for history in curves.values() for row in history])
        axes.set(xlabel="epoch", ylabel=f"{name} (dashed: train)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    return figure


def _set_range(axes: Axes, domain: Range) -> None:
    """Show the complete range with its ends, however few of its values were tried."""
    if domain.scale == "log":
        margin = (domain.high / domain.low) ** _MARGIN
        axes.set_xscale("log")
        axes.set_xlim(domain.low / margin, domain.high * margin)
    else:
        margin = (domain.high - domain.low) * _MARGIN
        axes.set_xlim(domain.low - margin, domain.high + margin)
        if isinstance(domain.low, int) and isinstance(domain.high, int):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for end in (domain.low, domain.high):
        axes.axvline(end, color=GUIDE_COLOUR, linestyle=":")


def _place(parameter: Parameter, trial: Trial) -> float:
    value = trial.values[parameter.name]
    if isinstance(parameter.domain, Choice):
        return parameter.domain.values.index(value)
    return float(value)


def _grid(count: int, width: float = 1.0) -> tuple[Figure, list[Axes]]:
    columns = min(count, _IN_A_ROW)
    rows = -(-count // _IN_A_ROW)
    size = (_PLOT_WIDTH * columns * width, _PLOT_HEIGHT * rows)
    figure = Figure(figsize=size, layout="constrained")
    places = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for axes in places[count:]:
        axes.set_axis_off()
    return figure, places
