"""A plan as the plain data that a person reads: families folded, what is usual said once (format: see plan_file)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from lit_wsl.errors import PlanError
from lit_wsl.structure.info import Shape
from lit_wsl.transfer.folding import Line, Order, fold_rows
from lit_wsl.transfer.operations import Operation, run_shapes
from lit_wsl.transfer.plan import SideSummary, TransferPlan

FORMAT = "lit_wsl.plan"
VERSION = 1
SECTIONS = ("entries", "ambiguous", "unmatched_source", "unmatched_target")


def plan_to_document(plan: TransferPlan) -> dict[str, Any]:
    """A plan as plain data."""
    defaults: dict[str, Any] = {
        "kind": _most_common((e.kind for e in plan.entries), "parameter"),
        "score": _most_common((float(e.score) for e in plan.entries), 1.0),
        "margin": _most_common((float(e.margin) for e in plan.entries), 1.0),
        "reason": _most_common((e.reason for e in plan.entries), ""),
    }
    sections: dict[str, list[dict[str, Any]]] = {}
    order: dict[str, Order] = {}
    sections["entries"], order["entries"] = _entries(plan, defaults)
    sections["ambiguous"], order["ambiguous"] = _ambiguous(plan)
    for side in ("source", "target"):
        name = f"unmatched_{side}"
        sections[name], order[name] = _unmatched(plan, name)
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": _summary(plan.source),
        "target": _summary(plan.target),
        "proof": plan.proof,
        "options": _sorted_keys(plan.options),
        "notes": list(plan.notes),
        "order": {key: value for key, value in order.items() if value != "tree"},
        "defaults": defaults,
        **sections,
    }


def _most_common(values: Any, otherwise: Any) -> Any:
    counts = Counter(values)  # keeps the order of appearance, so ties are always decided alike
    return max(counts, key=counts.__getitem__) if counts else otherwise


def _summary(side: SideSummary) -> dict[str, Any]:
    return {
        "label": side.label,
        "parameters": side.parameters,
        "parameter_elements": side.parameter_elements,
        "buffers": side.buffers,
        "buffer_elements": side.buffer_elements,
        "fingerprint": side.fingerprint,
    }


def _sorted_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted_keys(value[key]) for key in sorted(value)}
    return [_sorted_keys(v) for v in value] if isinstance(value, (list, tuple)) else value


def _entries(plan: TransferPlan, defaults: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Order]:
    rows = [(entry.sources, entry.targets) for entry in plan.entries]
    keys: list[Hashable] = [(e.operations, e.source_shapes, e.target_shapes, e.kind) for e in plan.entries]
    lines, order = fold_rows(rows, keys)
    documents = []
    for line in lines:
        members = [plan.entries[m] for m in line.members]
        first = members[0]
        document = _arrow(line)
        if first.source_shapes:
            document |= _shapes(first.source_shapes)
        if first.operations:
            document["ops"] = [compact_operation(operation) for operation in first.operations]
        if first.target_shapes != derived_shapes(first.operations, first.source_shapes, len(first.targets)):
            document["target_shapes"] = [list(shape) for shape in first.target_shapes]
        document |= {
            key: value
            for key, value in (
                ("kind", first.kind),
                ("score", _runs([float(member.score) for member in members])),
                ("margin", _runs([float(member.margin) for member in members])),
                ("reason", _runs([member.reason for member in members])),
            )
            if value != defaults[key]
        }
        documents.append(document)
    return documents, order


def _ambiguous(plan: TransferPlan) -> tuple[list[dict[str, Any]], Order]:
    rows = [(*(c.sources for c in a.candidates), a.targets) for a in plan.ambiguous]
    keys: list[Hashable] = [
        (a.shape, a.reason, tuple((float(c.score), c.operations) for c in a.candidates)) for a in plan.ambiguous
    ]
    lines, order = fold_rows(rows, keys)
    documents = []
    for line in lines:
        first = plan.ambiguous[line.members[0]]
        candidates = []
        for side, candidate in zip(line.sides, first.candidates):
            entry: dict[str, Any] = {"sources": _side(side), "score": float(candidate.score)}
            if candidate.operations:
                entry["ops"] = [compact_operation(operation) for operation in candidate.operations]
            candidates.append(entry)
        documents.append(
            {
                "targets": _side(line.sides[-1]),
                "shape": list(first.shape),
                "reason": first.reason,
                "candidates": candidates,
            }
        )
    return documents, order


def _unmatched(plan: TransferPlan, section: str) -> tuple[list[dict[str, Any]], Order]:
    items = getattr(plan, section)
    lines, order = fold_rows([((u.name,),) for u in items], [(u.shape, u.kind, u.reason) for u in items])
    documents = []
    for line in lines:
        first = items[line.members[0]]
        documents.append(
            {"name": _side(line.sides[0]), "shape": list(first.shape), "kind": first.kind, "reason": first.reason}
        )
    return documents, order


def _arrow(line: Line) -> dict[str, Any]:
    source, target = line.sides
    if isinstance(source, str) and isinstance(target, str):
        return {"map": f"{source} -> {target}"}
    return {"sources": _side(source), "targets": _side(target)}


def _side(side: str | tuple[str, ...]) -> str | list[str]:
    """A pattern, or the exact names where they cannot be one."""
    return side if isinstance(side, str) else list(side)


def _shapes(shapes: Sequence[Shape]) -> dict[str, Any]:
    """One shape for all sources, or one for each."""
    if len(set(shapes)) == 1:
        return {"shape": list(shapes[0])}
    return {"shapes": [list(shape) for shape in shapes]}


def _runs(values: Sequence[Any]) -> Any:
    """The value, or ``[count, value]`` pairs where it changes."""
    runs: list[list[Any]] = []
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1][0] += 1
        else:
            runs.append([1, value])
    return runs[0][1] if len(runs) == 1 else runs


def compact_operation(operation: Operation) -> str | dict[str, Any]:
    """An operation as people write it: its name, or its name with the arguments that differ from the defaults.

    >>> from lit_wsl.transfer.operations import Split, Transpose
    >>> compact_operation(Transpose()), compact_operation(Split(0, (2, 2)))
    ('transpose', {'split': {'dim': 0, 'sizes': [2, 2]}})
    """
    arguments = operation.to_dict()
    name = arguments.pop("op")
    for key, field in type(operation).__dataclass_fields__.items():
        if arguments.get(key) == field.default:
            del arguments[key]
    return {name: arguments} if arguments else name


def derived_shapes(operations: Sequence[Operation], shapes: Sequence[Shape], targets: int) -> tuple[Shape, ...] | None:
    """The shapes of the targets as they follow from those of the sources; ``None`` if they don't."""
    if not shapes:
        return ()
    try:
        derived = tuple(run_shapes(operations, shapes))
    except (PlanError, IndexError, ValueError):
        return None
    return derived if len(derived) == targets else None
