"""Base class of every record: a JSON file with a format number that other versions of this program can read."""

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, computed_field, model_validator
from pydantic_core import PydanticCustomError

from trainer.runtime.errors import NewerFormatError, RecordError

# Type of the pydantic error.
_NEWER = "newer_format"

# Wide enough for one line with the result of a class and the classes that it was mistaken for.
_JSON_WIDTH = 160


class Record(BaseModel):
    """A frozen model that is stored as JSON.

    When it is read, unknown fields are ignored at any depth, fields that were added after the record was written get
    the value that their absence meant, and a format number greater than `FORMAT` is refused.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    FORMAT: ClassVar[int] = 1
    """Increased by a change that older programs, which ignore unknown fields, would misread; not by a new field."""
    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Current names of fields, by their former names."""
    ADDED: ClassVar[Mapping[str, Any]] = {}
    """Values for fields that older records lack: a value, or a function of the record that returns it.

    The keys are field names; ``config.seed`` is a field of a nested model.
    """
    CHANGED: ClassVar[Mapping[str, Callable[[dict[str, Any]], Any]]] = {}
    """For fields whose meaning changed, by the same keys: a function of a record of any format, with all of today's
    fields, that returns the value with its meaning of today."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def format(self) -> int:
        """Format number that is written to the record."""
        return self.FORMAT

    @classmethod
    def parse(cls, content: str | bytes, source: str) -> Self:
        """Parse a record from JSON.

        Args:
            content: the JSON text.
            source: where it was read from, for messages.

        Raises:
            NewerFormatError: the record has a newer format.
            RecordError: the text is not such a record; the message names the first wrong field.
        """
        try:
            # Ignore unknown fields at any depth, also in models that refuse them in what a user types.
            return cls.model_validate_json(content, extra="ignore")
        except ValidationError as error:
            first = error.errors()[0]
            field = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
            kind = NewerFormatError if first["type"] == _NEWER else RecordError
            raise kind(
                f"{source} cannot be read: {field}{first['msg']} (this program reads format {cls.FORMAT} and older "
                "ones)"
            ) from error
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            # A migration found something that it does not expect.
            raise RecordError(f"{source} cannot be read: it is damaged ({error!r})") from error

    def to_json(self) -> bytes:
        """Return the record as JSON text that people can read: what fits on one line is on one line."""
        return f"{_format_json(self.model_dump(mode='json'), 0)}\n".encode()

    @model_validator(mode="before")
    @classmethod
    def _migrate(cls, values: Any, info: ValidationInfo) -> Any:
        """Convert what was read from JSON to the current format; instances made by the program are not changed."""
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
        for path, convert in cls.CHANGED.items():
            *models, name = path.split(".")
            within = _find_model(values, models)
            if within is not None:
                within[name] = convert(values)
        return values


def _find_model(values: dict[str, Any], path: list[str]) -> dict[str, Any] | None:
    """Return the nested model at a path within a record, or None if there is none."""
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
