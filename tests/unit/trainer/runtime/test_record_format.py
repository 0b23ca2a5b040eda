"""Records of other versions: one of each past form lies in tests/unit/past_records."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

from data_prep.manifest import Manifest
from trainer.config.batch_table import BatchTable
from trainer.config.config import TrainConfig
from trainer.inference import PredictionSummary
from trainer.record.checkpoint import Checkpoint
from trainer.record.evaluation_result import EvaluationResult
from trainer.record.incident import Incident
from trainer.record.run_folder import Attempt, RunInterruption, RunRecord, RunResult, SplitRead
from trainer.runtime.errors import RecordError
from trainer.runtime.record_format import Record
from trainer.study.file import Study
from trainer.study.folder import Trial

PAST = Path(__file__).parents[2] / "past_records"
RECORDS: dict[str, type[Record]] = {
    "attempt": Attempt,
    "batch_table": BatchTable,
    "checkpoint": Checkpoint,
    "config": RunRecord,
    "evaluation": EvaluationResult,
    "incident": Incident,
    "interruption": RunInterruption,
    "manifest": Manifest,
    "result": RunResult,
    "split_read": SplitRead,
    "study": Study,
    "summary": PredictionSummary,
    "trial": Trial,
}
FILES = sorted(path for path in PAST.glob("*/*.json") if path.stem in RECORDS)


def parse_past(name: str) -> Any:
    path = PAST / name
    return RECORDS[path.stem].parse(path.read_bytes(), name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_past_form_is_read_and_written_in_the_present_one(path):
    kind = RECORDS[path.stem]
    record = kind.parse(path.read_bytes(), path.name)
    written = json.loads(record.to_json())
    assert written["format"] == kind.FORMAT
    assert written.keys() == {*kind.model_fields, "format"}
    assert kind.parse(record.to_json(), "").to_json() == record.to_json()


def test_every_record_has_a_past_form():
    assert {path.stem for path in FILES} == RECORDS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_field_that_is_not_known_is_passed_over_at_any_depth(path):
    def add(value: Any) -> Any:
        match value:
            case dict():
                # The keys of these are names of the user, not fields.
                free = {"values", "base", "scientific", "nuisance", "packages", "measurements", "failed", "sha256"}
                free |= {"splits", "rejected", "arch_arguments", "taken_for"}
                of_model = {key: one if key in free else add(one) for key, one in value.items()}
                return of_model if "epoch_seconds" in value else {**of_model, "surprise": {"deep": 1}}
            case list():
                return [add(one) for one in value]
        return value

    kind, content = RECORDS[path.stem], path.read_bytes()
    more = json.dumps(add(json.loads(content))).encode()
    assert b"surprise" in more
    assert kind.parse(more, "").to_json() == kind.parse(content, "").to_json()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_newer_format_is_refused_in_one_line_with_both_numbers(path):
    newer = json.dumps({**json.loads(path.read_bytes()), "format": 9})
    kind = RECORDS[path.stem]
    message = rf"^s3://b/x\.json .* is of format 9: update .* reads format {kind.FORMAT} and older"
    with pytest.raises(RecordError, match=message) as e:
        kind.parse(newer, "s3://b/x.json")
    assert "\n" not in str(e.value)


def test_what_a_field_that_was_not_there_meant():
    config = parse_past("a9db2b2/config.json")
    assert (config.config.ema_momentum, config.config.checkpoint_every, config.batch) == (0.0, 0, None)
    result = parse_past("a9db2b2/result.json")
    assert (result.weights_crc32, result.layers, result.findings) == ((), "", [])
    assert (result.val.top_k, result.val.top_k_correct) == (1, result.val.correct)
    assert math.isnan(result.val.calibration_error)
    checkpoint = parse_past("a9db2b2/checkpoint.json")
    assert (checkpoint.epoch_rows, checkpoint.is_evaluated, checkpoint.global_batch_size) == (0, True, 0)
    assert (checkpoint.attempt, checkpoint.lineage, checkpoint.name) == (0, (), "step-00000009")
    assert parse_past("a9db2b2/manifest.json").rejected == {"unknown": 3}
    assert parse_past("e9cf8f1/interruption.json").ended.day == 25


def test_the_arguments_of_the_optimizer_were_options_of_their_own():
    assert parse_past("a9db2b2/config.json").config.optimizer_arguments == {"nesterov": True}
    adam = parse_past("f4e7dc3/config.json").config.optimizer_arguments
    assert adam == {"beta_1": 0.5, "beta_2": 0.999, "epsilon": 1e-7}


def test_a_word_that_was_spelled_otherwise_is_read_as_the_one_of_now():
    for form in ("a9db2b2", "e7b8c87", "fa806e9"):
        assert b'"standardise"' in (PAST / form / "config.json").read_bytes()
        assert parse_past(f"{form}/config.json").config.input_scaling == "standardize"


def test_recoveries_and_lost_attempts_became_incidents():
    damage, lost = parse_past("09e67bc/result.json").incidents
    assert damage.kind == "files damaged"
    assert damage.what.startswith("step-00000030/model.safetensors is damaged")
    assert (lost.kind, lost.attempt, lost.log) == ("workers lost", 2, "losses/0001.log")
    assert parse_past("09e67bc/incident.json") == lost
    assert parse_past("0202448/incident.json").what == damage.what
    assert parse_past("a9db2b2/result.json").incidents == ()


def test_no_option_is_forgotten_that_runs_began_without():
    """A new option needs the value that means what runs did before: RunRecord.ADDED, with a record of today's form."""
    first = json.loads((PAST / "a9db2b2" / "config.json").read_bytes())["config"].keys()
    added = {name.removeprefix("config.") for name in RunRecord.ADDED if name.startswith("config.")}
    assert added == TrainConfig.model_fields.keys() - first


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int
    shape: str = "not what it meant"


class Example(Record):
    FORMAT: ClassVar[int] = 3
    RENAMED: ClassVar[Mapping[str, str]] = {"old": "new"}
    ADDED: ClassVar[Mapping[str, Any]] = {"double": lambda old: 2 * old["new"], "inner.shape": "round"}

    new: int
    double: int
    inner: Inner | None = None


def test_older_names_and_missing_fields_get_their_meaning():
    expected = Example(new=4, double=8, inner=Inner(size=1, shape="round"))
    assert Example.parse('{"old": 4, "inner": {"size": 1}}', "") == expected
    assert Example.parse('{"format": 2, "new": 4, "inner": {"size": 1, "shape": "round"}}', "") == expected
    assert Example.parse('{"new": 1, "double": 5}', "") == Example(new=1, double=5)
    assert json.loads(expected.to_json())["format"] == 3


def test_what_the_program_itself_makes_is_not_completed():
    with pytest.raises(ValueError, match="double"):
        Example(new=4)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "Invalid JSON"),
        ("[]", "Input should be an object"),
        ("{}", "it is damaged (KeyError('new'))"),
        ('{"double": 2}', "new: Field required"),
        ('{"new": "x"}', "new: Input should be a valid integer"),
        ('{"new": 1, "inner": {}}', "inner.size: Field required"),
        ('{"new": 1, "inner": 3}', "inner: Input should be"),
        ('{"new": 1, "format": 4}', "it is of format 4: update this program"),
        ('{"new": 1, "format": "new"}', "it is of format new: update this program"),
        (b"\xff\xfe", "Invalid JSON"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_field(content, problem):
    with pytest.raises(RecordError) as error:
        Example.parse(content, "the file")
    assert str(error.value).startswith(f"the file cannot be read: {problem}")
    assert "\n" not in str(error.value)


class Long(Record):
    name: str
    loss: float
    rows: list[dict[str, Any]]
    counts: list[int]


def test_a_record_has_a_line_for_each_row_and_full_lines_of_numbers():
    rows = [{"class": f"the class of number {label}", "right": [label, 9]} for label in range(50)]
    record = Long(name="Ж", loss=math.inf, rows=rows, counts=range(1000))
    assert Long.parse(record.to_json(), "") == record
    lines = record.to_json().decode().splitlines()
    assert lines[:4] == ["{", '  "name": "Ж",', '  "loss": Infinity,', '  "rows": [']
    assert '    {"class": "the class of number 7", "right": [7, 9]},' in lines
    assert max(map(len, lines)) <= 160
    # 1,000 numbers of five characters each.
    assert len(lines) < 110
