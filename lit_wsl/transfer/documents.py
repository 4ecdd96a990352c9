"""Parse JSON and YAML that may be hostile: nothing is built but plain data, and all work is bounded."""

from __future__ import annotations

import json
from typing import Any

from lit_wsl.errors import PlanError
from lit_wsl.transfer.fields import reject, shown

MAX_YAML_BYTES = 8 * 2**20  # PyYAML needs about a second per MiB
MAX_YAML_DEPTH = 64


def parse_json(text: str) -> Any:
    """Parse JSON; keys that stand twice and numbers that are none are refused.

    Raises:
        PlanError: If it is not valid JSON.
    """

    def constant(name: str) -> Any:
        raise PlanError(f"{name} is not allowed in a plan.")

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) != len(found):
            keys = [key for key, _ in found]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise PlanError(f"the key {shown(twice)} stands twice in one mapping; keep one.")
        return made

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise PlanError(f"it is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno}).") from error
    except RecursionError as error:
        raise PlanError("it is nested too deeply for a plan.") from error
    except ValueError as error:  # integers of thousands of digits
        raise PlanError(f"it is not valid JSON: {error}.") from error


def _line(event: Any) -> int:
    return event.start_mark.line + 1


def parse_yaml(text: str) -> Any:
    """Parse YAML with the safe loader; aliases and deep nesting are refused before anything is built.

    Raises:
        PlanError: If it is not valid YAML.
    """
    import yaml

    if len(text) > MAX_YAML_BYTES:
        raise PlanError(f"it is too large for YAML (at most {MAX_YAML_BYTES:,} characters); save it as JSON.")
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):
        """The safe loader, without keys that stand twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
            if len(set(keys)) != len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                raise PlanError(f"the key {shown(twice)} stands twice in one mapping; keep one.")
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
    except ValueError as error:  # dates that don't exist, numbers of thousands of digits
        raise reject(f"it is not valid YAML: {error}") from error
