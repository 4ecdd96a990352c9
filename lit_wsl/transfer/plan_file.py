"""Plans as files: JSON or YAML that a person reads, edits and commits; loading checks everything.

The format, version 1::

    {
      "format": "lit_wsl.plan", "version": 1,
      "source": {"label": "old.ckpt", "parameters": 148, ..., "fingerprint": "sha256 of names and shapes"},
      "target": {...},
      "proof": "not tested", "options": {...}, "notes": [...],
      "order": {"entries": "tree"},
      "defaults": {"kind": "parameter", "score": 1.0, "margin": 1.0, "reason": "same name and shape"},
      "entries": [
        {"map": "layers.{0..11}.attn.q.weight -> blocks.{0..11}.attn.wq.weight", "shape": [768, 768]},
        {"map": "layers.{0..11}.qkv.weight -> blocks.{0..11}.[q,k,v].weight", "shape": [2304, 768],
         "ops": [{"split": {"dim": 0, "sizes": [768, 768, 768]}}], "score": 0.93, "margin": 0.4}
      ],
      "ambiguous": [...], "unmatched_source": [...], "unmatched_target": [...]
    }

The notation of names is that of :mod:`lit_wsl.transfer.patterns`. ``order`` says how the entries of all lines come
together: by modules (``tree``), by name (``sorted``) or line by line (``listed``). A value that is not the same for all
entries of a line is a list of ``[count, value]`` pairs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_wsl.errors import CheckpointError, PlanError
from lit_wsl.transfer.plan import TransferPlan
from lit_wsl.transfer.plan_writing import FORMAT, SECTIONS, VERSION, plan_to_document
from lit_wsl.transfer.reverse import reverse_entry, reverse_plan

__all__ = [
    "FORMAT",
    "SECTIONS",
    "VERSION",
    "load_plan",
    "plan_from_text",
    "plan_to_document",
    "plan_to_text",
    "reverse_entry",
    "reverse_plan",
    "save_plan",
]

_LINE_BREAKS = re.compile("[\x7f-\xa0\u2028\u2029\ufeff]")


def save_plan(plan: TransferPlan, path: str | Path) -> None:
    """Write a plan as JSON, or as YAML where the suffix is ``.yaml`` or ``.yml``; atomically.

    The same plan always gives the same bytes.

    Raises:
        PlanError: If the plan cannot be written as data (NaN scores, foreign objects in its options).
        CheckpointError: If the file cannot be written.
    """
    from lit_wsl.checkpoint import atomic_write_text

    atomic_write_text(path, plan_to_text(plan, yaml=Path(path).suffix.lower() in (".yaml", ".yml")))


def load_plan(path: str | Path) -> TransferPlan:
    """Read a plan from JSON or YAML, and check everything in it.

    Raises:
        PlanError: If the file is not a valid plan; the message names the entry, the field and what is allowed.
        CheckpointError: If the file cannot be read.
    """
    from lit_wsl.transfer.plan_parsing import MAX_BYTES

    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise PlanError(f"{path}: {size:,} bytes are too many for a plan (at most {MAX_BYTES:,}).")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CheckpointError(f"Cannot read the plan {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is not a plan: it is not UTF-8 text (byte {error.start}).") from error
    try:
        return plan_from_text(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def plan_from_text(text: str) -> TransferPlan:
    """Read a plan from the text of a JSON or YAML file.

    Raises:
        PlanError: If it is not a valid plan.
    """
    from lit_wsl.transfer.plan_parsing import parse_plan

    return parse_plan(text)


def plan_to_text(plan: TransferPlan, *, yaml: bool = False) -> str:
    """A plan as the text of its file.

    Raises:
        PlanError: If it holds something that is not plain data.
    """
    try:
        document = plan_to_document(plan)
        if yaml:
            import yaml as pyyaml

            plain = json.dumps(document, allow_nan=False, ensure_ascii=False)
            readable = not _LINE_BREAKS.search(plain)  # PyYAML folds these into spaces unless it escapes them
            return pyyaml.safe_dump(
                document, sort_keys=False, width=120, allow_unicode=readable, default_flow_style=None
            )
        return _json(document)
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"the plan cannot be written as plain data: {error}.") from error


def _json(document: Mapping[str, Any]) -> str:
    """JSON with one line per entry, so that changes are easy to read in a diff."""

    def one_line(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    fields = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"    {one_line(row)}" for row in value)
            fields.append(f"  {one_line(key)}: [\n{rows}\n  ]")
        else:
            fields.append(f"  {one_line(key)}: {one_line(value)}")
    text = "{\n" + ",\n".join(fields) + "\n}\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair in a name; JSON can escape it
        return json.dumps(document, allow_nan=False, indent=1) + "\n"
    return text
