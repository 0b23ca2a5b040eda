"""Every command of the documents is one that the jobs accept, and every link leads somewhere."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

from tests.conftest import REPOSITORY

DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]
# Those that say where to look in the code of now.
MAPS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
EXAMPLES = [*DOCUMENTS, REPOSITORY / "cluster.yaml", *sorted((REPOSITORY / "docs" / "cluster").iterdir())]
EXAMPLES += sorted((REPOSITORY / "jobs" / "schedule").iterdir())


def job_commands() -> list[tuple[str, str]]:
    """The name of a job and its options, as they stand in code: after ``python``, up to a comment or a quote."""
    found = {
        match.groups()
        for path in EXAMPLES
        for match in re.finditer(r"python jobs/(\w+\.py)((?: [^\n#`|>&;)]+)?)", path.read_text())
    }
    # Help ends a job as it is parsed; three dots stand for anything.
    return sorted(
        (job, words.strip()) for job, words in found if words.strip() and not re.search(r"--help|\.\.\.", words)
    )


@pytest.mark.parametrize(("job", "options"), job_commands())
def test_a_job_accepts_the_command(job, options):
    app = runpy.run_path(str(REPOSITORY / "jobs" / job))["app"]
    typer.main.get_command(app).make_context(job, shlex.split(options))


def benchmark_commands() -> list[str]:
    return sorted(
        {one for path in DOCUMENTS for one in re.findall(r"python -m benchmarks (\w+[^`\n]*)`", path.read_text())}
    )


@pytest.mark.parametrize("words", benchmark_commands())
def test_a_benchmark_accepts_the_command(words):
    name, *options = words.split()
    command = typer.main.get_command(runpy.run_module("benchmarks.__main__")["app"]).commands[name]
    # Some documents name the benchmark alone.
    if options:
        command.make_context(name, options)


def test_the_commands_are_found():
    assert len({job for job, _ in job_commands()}) == len(list((REPOSITORY / "jobs").glob("[!_]*.py")))
    assert benchmark_commands()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text()):
        if "://" not in target:
            assert Path(document.parent, target).exists(), target


@pytest.mark.parametrize("document", MAPS, ids=lambda path: path.name)
def test_paths_in_the_repository_are_there(document):
    named = re.findall(r"`((?:data_prep|trainer|jobs|tests|docs|benchmarks)/[\w./-]+)`(?! \(new)", document.read_text())
    # A name in capitals, as in FAMILY.py, stands for any.
    paths = {path for path in named if not re.search(r"/(test_)?[A-Z]+\.py$", path)}
    assert paths
    assert [path for path in sorted(paths) if not (REPOSITORY / path).exists()] == []


def test_the_tests_that_reliability_names_are_there():
    named = set(
        re.findall(r"`((?:unit|integration|faults)/[\w/]+\.py)`", (REPOSITORY / "docs/reliability.md").read_text())
    )
    assert named
    assert [path for path in sorted(named) if not (REPOSITORY / "tests" / path).is_file()] == []
