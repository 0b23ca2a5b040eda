"""The core of every record: a JSON file with a format number, which other versions of this program can read."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, computed_field, model_validator
from pydantic_core import PydanticCustomError

from trainer.runtime.errors import NewerFormatError, RecordError

# The type of the error of pydantic.
_NEWER = "newer_format"

# One line for the result of a class and the few that it was taken for.
_JSON_WIDTH = 160


class Record(BaseModel):
    """A frozen model that is kept as JSON.

    Read from JSON, fields that it does not know are passed over, at any depth; a field that it has gained since the
    record was written gets the value that its absence meant; and a format number larger than its own is refused.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    FORMAT: ClassVar[int] = 1
    """Raised by a change that a program which passes over unknown fields would misread; not by a new field."""
    RENAMED: ClassVar[Mapping[str, str]] = {}
    """The present name of a field by an earlier one."""
    ADDED: ClassVar[Mapping[str, Any]] = {}
    """What a record without a field means: a value, or a function of the record that returns it.

    By name; ``config.seed`` is the field of a model within.
    """

    @computed_field  # type: ignore[prop-decorator]
    @property
    def format(self) -> int:
        """The format number that the record is written with."""
        return self.FORMAT

    @classmethod
    def parse(cls, content: str | bytes, source: str) -> Self:
        """Parse JSON into the record that it holds.

        Args:
            content: JSON.
            source: what it was read from, for the message.

        Raises:
            NewerFormatError: it is of a newer format.
            RecordError: it is not such a record; says the first field that is wrong.
        """
        try:
            # At any depth: models that refuse unknown fields do so for what a user types.
            return cls.model_validate_json(content, extra="ignore")
        except ValidationError as error:
            first = error.errors()[0]
            field = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
            kind = NewerFormatError if first["type"] == _NEWER else RecordError
            raise kind(
                f"{source} cannot be read: {field}{first['msg']} (this program reads format {cls.FORMAT} and older "
                "ones)"
            ) from error
        except (LookupError, TypeError, AttributeError) as error:
            # A migration met something else than what it knows.
            raise RecordError(f"{source} cannot be read: it is damaged ({error!r})") from error

    def to_json(self) -> bytes:
        """Write the record as JSON text for people too: what fits into a line is on one, however many rows it has."""
        return f"{_format_json(self.model_dump(mode='json'), 0)}\n".encode()

    @model_validator(mode="before")
    @classmethod
    def _migrate(cls, values: Any, info: ValidationInfo) -> Any:
        """Bring what was read from JSON to the present format; what the program itself makes is left as it is."""
        if info.mode != "json" or not isinstance(values, dict):
            return values
        values = {cls.RENAMED.get(name, name): value for name, value in values.items()}
        number = values.get("format", 1)
        if not isinstance(number, int) or number > cls.FORMAT:
            raise PydanticCustomError(
                _NEWER, "it is of format {number}: update this program to read it", {"number": str(number)}
            )
        for path, value in cls.ADDED.items():
            *models, name = path.split(".")
            within = _find_model(values, models)
            if within is not None and name not in within:
                within[name] = value(values) if callable(value) else value
        return values


def _find_model(values: dict[str, Any], path: list[str]) -> dict[str, Any] | None:
    """Find the model of a path within a record; None where there is none."""
    found: Any = values
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def _format_json(value: Any, indent: int) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if indent + len(text) <= _JSON_WIDTH or not isinstance(value, (dict, list)):
        return text
    indent += 2
    if isinstance(value, dict):
        lines = [f"{json.dumps(key, ensure_ascii=False)}: {_format_json(one, indent)}" for key, one in value.items()]
        return _enclose("{}", lines, indent)
    if any(isinstance(one, (dict, list)) for one in value):
        return _enclose("[]", [_format_json(one, indent) for one in value], indent)
    lines = [""]
    for one in value:
        item = json.dumps(one, ensure_ascii=False)
        if lines[-1] and indent + len(f"{lines[-1]}, {item},") > _JSON_WIDTH:
            lines.append("")
        lines[-1] += f", {item}" if lines[-1] else item
    return _enclose("[]", lines, indent)


def _enclose(brackets: str, lines: list[str], indent: int) -> str:
    margin = "\n" + " " * indent
    return brackets[0] + margin + ("," + margin).join(lines) + margin[:-2] + brackets[1]
