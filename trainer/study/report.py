"""The report of a study: the answer and its evidence, as Markdown and as one HTML page."""

import contextlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from trainer.config.options import format_value
from trainer.notes.comparison import Comparison, compare_predictions
from trainer.notes.plots import to_png, to_svg
from trainer.notes.report import REPORT_NAME
from trainer.notes.run_page import PAGES_FOLDER, view_run, write_run_page
from trainer.record.evaluation_result import describe_accuracy
from trainer.record.run_folder import RunRecord, StartedRun
from trainer.runtime import storage
from trainer.runtime.errors import DamagedError, InputError
from trainer.runtime.events import GlyphsMissing
from trainer.runtime.fonts import fonts_for
from trainer.runtime.html import Section, Table, find_links, link, render_sections
from trainer.runtime.markdown import format_count, format_table
from trainer.study.analysis import (
    BestOf,
    check_boundaries,
    check_infeasible,
    check_points_of_each,
    check_steps,
    decide_adoption,
    find_rivals,
    is_above_chance,
    is_as_good,
    isolate,
    rank_parameters,
    rank_trials,
)
from trainer.study.file import Study
from trainer.study.folder import StudyFolder, Trial
from trainer.study.plots import draw_axes, draw_best_of_k, draw_curves, draw_importance, draw_isolation

_CURVES_OF = 3


def write_study_report(folder: StudyFolder, study: Study, trials: Sequence[Trial]) -> None:
    """Write ``study.md``, ``study.html`` and their plots of a round, finished or not.

    Args:
        folder: folder of the round.
        study: study of the round.
        trials: all trials that have started.
    """
    # Values such as the path of --init-from label the axes.
    with fonts_for("".join(format_value(value) for one in trials for value in one.values.values())) as missing:
        figures = _draw(folder, study, trials)
        plots = {name: to_png(figure) for name, figure in figures.items()}
        drawings = {name: to_svg(figure) for name, figure in figures.items()}
    for name, content in plots.items():
        storage.write_bytes(folder.path("plots", f"{name}.png"), content)
    sections = [one for one in _describe(folder, study, trials) if not one.picture or one.picture in plots]
    if missing and plots:
        sections.append(Section("Pictures", [str(GlyphsMissing(missing))]))
    ended = sum(one.ended and one.kind == "search" for one in trials)
    of_all = f"{ended} of {format_count(study.trials, 'trial')}"
    subtitle = f"{of_all}, {study.algorithm}, seed {study.seed}; objective: {study.objective}"
    overview = storage.join(storage.parent(storage.parent(folder.uri)), REPORT_NAME)
    links = find_links(folder.uri, {"all runs": overview})
    page = render_sections(study.goal, subtitle, sections, {}, drawings, links)
    markdown = _format_markdown(study.goal, subtitle, sections)
    for name, text in (("study.md", markdown), ("study.html", page)):
        storage.write_bytes(folder.path(name), text.encode())


def _draw(folder: StudyFolder, study: Study, trials: Sequence[Trial]) -> dict[str, Figure]:
    ranked = rank_trials(study, trials)
    if not ranked:
        return {}
    scientific = {one.label: isolate(study, one, trials) for one in study.parameters if one.role == "scientific"}
    histories = {one.run_name: folder.run(one).read_metrics() for one in ranked[:_CURVES_OF]}
    figures = {
        "axes": draw_axes(study, trials),
        "best_of_k": draw_best_of_k(study, trials),
        "curves": draw_curves(histories),
    }
    if scientific:
        figures["isolation"] = draw_isolation(study, scientific)
    if parameters := rank_parameters(study, trials):
        figures["importance"] = draw_importance(parameters)
    return figures


def _describe(folder: StudyFolder, study: Study, trials: Sequence[Trial]) -> list[Section]:
    ranked = rank_trials(study, trials)
    chance = _read_chance(folder, ranked)
    sections = [_describe_answer(folder, study, trials, chance)]
    for one in study.parameters:
        if one.role == "scientific":
            sections.append(_describe_isolation(folder, study, one.label, isolate(study, one, trials), ranked))
    sections += [
        Section("Adopt it?", [decide_adoption(study, trials)]),
        Section(
            "Ranges",
            check_boundaries(study, trials, chance) or ["the best values lie inside their ranges"],
            picture="axes",
        ),
        _describe_importance(study, trials),
        Section("Enough trials?", check_points_of_each(study, trials, chance), picture="best_of_k"),
        Section("Trials without result", check_infeasible(study, trials)),
        Section("Steps", [check_steps(study, trials), *_describe_symptoms(folder, ranked)], picture="curves"),
        Section("These conclusions hold only for", study.caveats),
        Section("All trials", [], _list_trials(folder, study, trials)),
    ]
    return sections


def _read_chance(folder: StudyFolder, ranked: Sequence[Trial]) -> float:
    """Return the accuracy of always predicting the most frequent class of the validation split; 0 if unknown."""
    with contextlib.suppress(InputError):
        if ranked and (result := folder.run(ranked[0]).read_result()):
            return result.val.chance
    return 0.0


def _describe_answer(folder: StudyFolder, study: Study, trials: Sequence[Trial], chance: float) -> Section:
    """Describe the best trial; or why it is not an answer, and what to do."""
    ranked = rank_trials(study, trials)
    if not ranked:
        return Section("No answer", ["no trial has completed yet"])
    best = ranked[0]
    if not is_above_chance(best, chance):
        lines = [
            f"no trial is above chance: the best, {_describe_trial(study, best)}, against {chance:.2f} for always "
            "predicting the most frequent class",
            "look at the findings under Steps; then start another round (--new-round) with lower and higher "
            'base_learning_rate, more epochs, or a base that is known to train, such as recipe = "modern"',
        ]
        return Section("No answer", lines)
    tied = [one for one in find_rivals(study, trials) if _is_tied(folder, study, best, one)]
    if tied:
        cheapest = min([best, *tied], key=lambda one: one.seconds)
        lines = [
            "the best trials are tied; the validation images cannot tell them apart:",
            *(f"{_describe_trial(study, one)}; {_format_values(one)}" for one in (best, *tied)),
            f"prepare the dataset with more validation images, or choose by cost: {cheapest.run_name} took the least "
            f"time ({cheapest.seconds:.0f} s); --characterize 5 shows how far seeds alone move the best",
        ]
        return Section("No answer", lines, command=_read_command(folder, cheapest))
    lines = [
        _describe_trial(study, best),
        *(f"{name} = {format_value(value)}" for name, value in best.values.items()),
    ]
    return Section("Answer", lines, command=_read_command(folder, best))


def _describe_trial(study: Study, trial: Trial) -> str:
    return f"{trial.run_name}: {study.objective} {trial.objective:.4f}; {describe_accuracy(trial.correct, trial.total)}"


def _format_values(trial: Trial) -> str:
    return "; ".join(f"{name} = {format_value(value)}" for name, value in trial.values.items())


def _read_command(folder: StudyFolder, trial: Trial) -> str:
    record = folder.run(trial).read_record()
    return record.command if record else ""


def _is_tied(folder: StudyFolder, study: Study, best: Trial, other: Trial) -> bool:
    comparison = _read_comparison(folder, best, other)
    return is_as_good(study, other, best) if isinstance(comparison, str) else not comparison.is_distinguishable


def _describe_isolation(
    folder: StudyFolder, study: Study, label: str, groups: Sequence[BestOf], ranked: Sequence[Trial]
) -> Section:
    """Describe the best trial for each scientific value, and which of them differ by more than chance."""
    rows, lines = [], []
    for group in groups:
        if group.best is None:
            rows.append((group.label, str(group.trials), "", "none completed", ""))
            continue
        best = group.best
        accuracy = describe_accuracy(best.correct, best.total).removeprefix("accuracy: ")
        rows.append((group.label, str(group.trials), best.run_name, f"{best.objective:.4f}", accuracy))
        if best.index != ranked[0].index:
            lines.append(f"{label} {group.label}: {_compare(folder, ranked[0], best)}")
    table = Table((label, "trials", "best trial", study.objective, "accuracy"), rows)
    return Section(f"Best for each {label}", lines, table, picture="isolation")


def _compare(folder: StudyFolder, one: Trial, other: Trial) -> str:
    comparison = _read_comparison(folder, one, other)
    return comparison if isinstance(comparison, str) else comparison.describe(one.run_name, other.run_name)


def _read_comparison(folder: StudyFolder, one: Trial, other: Trial) -> Comparison | str:
    """Return the test of two trials' predictions, or why they cannot be compared."""
    try:
        tables = [folder.run(trial).read_predictions() for trial in (one, other)]
    except DamagedError as error:
        return str(error)
    if tables[0] is None or tables[1] is None:
        return "its predictions are gone"
    return compare_predictions(tables[0], tables[1])


def _describe_symptoms(folder: StudyFolder, ranked: Sequence[Trial]) -> list[str]:
    """Return the findings about the training curves of the best trials."""
    results = [(one.run_name, folder.run(one).read_result()) for one in ranked[:_CURVES_OF]]
    return [f"{name}: {finding}" for name, result in results if result for finding in result.findings]


def _describe_importance(study: Study, trials: Sequence[Trial]) -> Section:
    parameters = rank_parameters(study, trials)
    if not parameters:
        return Section("Which parameters matter?", ["too few trials have ended to tell"])
    lines = [str(one) for one in parameters]
    judged = {one.label for one in parameters}
    if others := [one.label for one in study.parameters if one.label not in judged]:
        lines.append(f"not judged, for too few trials or no differences between them: {', '.join(others)}")
    return Section("Which parameters matter?", lines, picture="importance")


def _write_pages(folder: StudyFolder, trials: Sequence[Trial]) -> dict[str, str]:
    """Write the page of each trial that has ended, and return the addresses from the page of the study."""
    records = {one.run_name: _read_record(folder, one) for one in trials if one.ended}
    runs = [StartedRun(folder.run(one), record) for one in trials if (record := records.get(one.run_name))]
    runs.sort(key=lambda run: run.record.started)
    pages, overview = folder.path(PAGES_FOLDER), ("study", folder.path("study.html"))
    return {run.folder.name: link(folder.uri, write_run_page(view_run(run, runs), pages, overview)) for run in runs}


def _read_record(folder: StudyFolder, trial: Trial) -> RunRecord | None:
    with contextlib.suppress(InputError):
        return folder.run(trial).read_record()
    return None


def _list_trials(folder: StudyFolder, study: Study, trials: Sequence[Trial]) -> Table:
    names = list(dict.fromkeys(name for one in trials for name in one.values))
    rows = [
        (
            one.run_name,
            one.status,
            "" if one.objective is None else f"{one.objective:.4f}",
            f"{one.correct} of {one.total}" if one.total else "",
            *(_shorten(one.values[name]) if name in one.values else "" for name in names),
            f"{one.steps}" if one.steps else "",
            f"{one.seconds:.0f}",
        )
        for one in trials
    ]
    header = ("trial", "status", study.objective, "k of n", *names, "steps", "seconds")
    return Table(header, rows, _write_pages(folder, trials))


def _shorten(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else format_value(value)


def _format_markdown(goal: str, subtitle: str, sections: Sequence[Section]) -> str:
    lines = [f"# {goal}", "", subtitle]
    for one in sections:
        lines += ["", f"## {one.title}", ""]
        lines += [f"- {line}" for line in one.lines]
        if one.command:
            lines += ["", "```sh", one.command, "```"]
        if one.table:
            lines += ["", *format_table(one.table.header, one.table.rows)]
        if one.picture:
            lines += ["", f"![{one.title}](plots/{one.picture}.png)"]
    return "\n".join(lines) + "\n"
