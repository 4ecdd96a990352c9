"""What a plan file holds before it means anything: JSON or YAML parsed within bounds, and fields that check their type.

Every message names the line, the entry and the field, and says what is allowed.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from lit_wsl.errors import PlanError

T = TypeVar("T")
_MISSING: Any = object()


def shown(value: object) -> str:
    """A value in a message, cut to a readable length."""
    if isinstance(value, (list, tuple, dict)) and len(value) > 20:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def reject(message: str) -> PlanError:
    """An error whose message ends with one full stop."""
    return PlanError(message.rstrip(".") + ".")


class Fields:
    """A mapping of the document and where it stands.

    Args:
        value: What should be a mapping with text as keys.
        where: What to call it in messages; converted to text only when a message is made.
    """

    def __init__(self, value: Any, where: object) -> None:
        self.where = where
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise reject(f"{where} must be a mapping with text as keys, got {shown(value)}")
        self.value = value

    def __contains__(self, key: str) -> bool:
        return key in self.value

    def error(self, key: str, message: str) -> PlanError:
        """An error about one field."""
        return reject(f"{self.where}: field {key!r} {message}")

    def allow(self, *keys: str) -> None:
        """Refuse all other keys."""
        for key in self.value:
            if key not in keys:
                near = difflib.get_close_matches(key[:100], keys, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise reject(f"{self.where}: unknown field {shown(key)}{hint} Allowed are {', '.join(keys)}")

    def get(self, key: str, default: Any, kinds: tuple[type, ...], wanted: str) -> Any:
        """A field of one of the given types."""
        value = self.value.get(key, default)
        if value is _MISSING:
            raise self.error(key, f"is missing; it must be {wanted}")
        if value is not default and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise self.error(key, f"must be {wanted}, got {shown(value)}")
        return value

    def string(self, key: str, default: str = _MISSING) -> str:
        """Text."""
        return self.get(key, default, (str,), "text")

    def integer(self, key: str, default: int = _MISSING) -> int:
        """A count."""
        value = self.get(key, default, (int,), "a whole number")
        if value < 0:
            raise self.error(key, f"must not be negative, got {value}")
        return value

    def share(self, key: str, default: float = _MISSING) -> float:
        """A number from 0 to 1; the last digits may be off, as scores are sums."""
        value = self.get(key, default, (int, float), "a number from 0 to 1")
        if not (math.isfinite(value) and -1e-6 <= value <= 1 + 1e-6):
            raise self.error(key, f"must be a number from 0 to 1, got {shown(value)}")
        return float(value)

    def choice(self, key: str, allowed: Sequence[str], default: Any = _MISSING) -> Any:
        """One of the allowed words."""
        wanted = f"one of {', '.join(map(repr, allowed))}"
        value = self.get(key, default, (str,), wanted)
        if value not in allowed:
            raise self.error(key, f"must be {wanted}, got {shown(value)}")
        return value

    def sequence(self, key: str, default: list[Any] | None = None) -> list[Any]:
        """A list."""
        return self.get(key, _MISSING if default is None else default, (list,), "a list")

    def strings(self, key: str, default: list[Any] | None = None) -> list[str]:
        """A list of text."""
        values = self.sequence(key, default)
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, f"must be a list of text, got {shown(values)}")
        return values

    def names(self, key: str) -> str | tuple[str, ...]:
        """A pattern, or a list of exact names."""
        value = self.get(key, _MISSING, (str, list), "a pattern, or a list of exact names")
        if isinstance(value, str):
            return value
        if not value:
            raise self.error(key, "must give at least one name")
        return tuple(self.strings(key))

    def mapping(self, key: str, default: dict[str, Any] = _MISSING) -> Fields:
        """A mapping."""
        return Fields(self.get(key, default, (dict,), "a mapping"), f"{self.where}, {key}")

    def plain_mapping(self, key: str, default: dict[str, Any] = _MISSING) -> dict[str, Any]:
        """A mapping of plain data: text, numbers, lists and mappings."""
        value = self.get(key, default, (dict,), "a mapping")
        todo: list[Any] = [value]
        while todo:
            item = todo.pop()
            if isinstance(item, dict):
                if not all(isinstance(k, str) for k in item):
                    raise self.error(key, "must have text as keys")
                todo += item.values()
            elif isinstance(item, list):
                todo += item
            elif not (
                item is None or isinstance(item, (str, int)) or (isinstance(item, float) and math.isfinite(item))
            ):
                raise self.error(key, f"must be plain data, got {shown(item)}")
        return value

    def runs(self, key: str, count: int, read: Callable[[Fields, str], T], default: T) -> list[T]:
        """One value for all entries of a line, or ``[count, value]`` pairs; read by a method of this class."""
        value = self.value.get(key, _MISSING)
        if value is _MISSING:
            return [default] * count
        if not isinstance(value, list):
            return [read(self, key)] * count
        values: list[T] = []
        for pair in value:
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int or pair[0] < 1:
                raise self.error(key, f"takes a value, or [count, value] pairs; got {shown(pair)}")
            if len(values) + pair[0] > count:
                raise self.error(key, f"gives more than {count} values, one for each entry of the line")
            values += [read(Fields({key: pair[1]}, self.where), key)] * pair[0]
        if len(values) != count:
            raise self.error(key, f"gives {len(values)} values, but the line stands for {count} entries")
        return values

    def named(self, work: Callable[[], T]) -> T:
        """Do some work, and say where it was if it fails."""
        try:
            return work()
        except PlanError as error:
            text = str(error)
            raise error if text.startswith(str(self.where)) else reject(f"{self.where}: {text}") from error


MAX_YAML_BYTES = 8 * 2**20  # PyYAML needs about a second per MiB
MAX_YAML_DEPTH = 64


def parse_json(text: str) -> Any:
    """Parse JSON; keys that stand twice and numbers that are none are refused."""

    def constant(name: str) -> Any:
        raise PlanError(f"{name} is not allowed in a plan.")

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) != len(found):
            _refuse_twice([key for key, _ in found])
        return made

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise PlanError(f"it is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno}).") from error
    except RecursionError as error:
        raise PlanError("it is nested too deeply for a plan.") from error
    except PlanError:
        raise
    except ValueError as error:  # integers of thousands of digits
        raise PlanError(f"it is not valid JSON: {error}.") from error


def _refuse_twice(keys: list[str]) -> NoReturn:
    twice = next(key for key in keys if keys.count(key) > 1)
    raise PlanError(f"the key {shown(twice)} stands twice in one mapping; keep one.")


def _line(event: Any) -> int:
    return event.start_mark.line + 1


def parse_yaml(text: str) -> Any:
    """Parse YAML with the safe loader; aliases and deep nesting are refused before anything is built."""
    import yaml

    if len(text) > MAX_YAML_BYTES:
        raise PlanError(f"it is too large for YAML (at most {MAX_YAML_BYTES:,} characters); save it as JSON.")
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):
        """The safe loader, without keys that stand twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
            if len(set(keys)) != len(keys):
                _refuse_twice(keys)
            return super().construct_mapping(node, deep=deep)

    try:
        depth = 0
        for event in yaml.parse(text, Loader=base):  # flat, so nesting cannot exhaust the stack here
            if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                depth += 1
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                depth -= 1
            elif isinstance(event, yaml.AliasEvent):  # a few of them can stand for billions of values
                raise PlanError(f"line {_line(event)}: aliases (*name) are not allowed in a plan.")
            if depth > MAX_YAML_DEPTH:
                raise PlanError("it is nested too deeply for a plan.")
        return yaml.load(text, Loader=Loader)  # a subclass of the safe loader
    except yaml.YAMLError as error:
        raise PlanError(f"it is not valid YAML: {' '.join(str(error).split())[:300]}.") from error
    except RecursionError as error:
        raise PlanError("it is nested too deeply for a plan.") from error
    except PlanError:
        raise
    except ValueError as error:  # dates that don't exist, numbers of thousands of digits
        raise reject(f"it is not valid YAML: {error}") from error
