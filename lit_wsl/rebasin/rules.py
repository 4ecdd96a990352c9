"""The registry of rules: which rule says what an ATen operation does to labels.

The rules themselves are in the modules ``rules_*.py``, sorted by what the operations do; what a rule is says the module
:mod:`~lit_wsl.rebasin.run`. An operation without a rule freezes all that enters it, so that what is found is safe.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from lit_wsl.rebasin.labels import Label
from lit_wsl.rebasin.run import Rule, Run
from lit_wsl.rebasin.tracing import Node, flat_refs, tensor_args

RULES: dict[str, Rule] = {}
SEGMENT_RULES: set[str] = set()
"""Operations that take routed rows whose label has one place for each expert, see ``Label.segmented``."""
ROUTING_RULES: set[str] = set()
"""Operations that know what to do with indices that name units, see ``Label.values``."""
READING = {f"aten.{name}" for name in ("_local_scalar_dense", "item", "equal", "is_nonzero", "allclose")}
"""Operations that hand values to Python, where they are out of sight."""
MOVING_RULES: set[Rule] = set()
"""Rules that only put positions elsewhere, see :mod:`~lit_wsl.rebasin.slots`."""
PATTERNS: list[tuple[re.Pattern[str], Rule]] = []


def rule(*names: str, moves: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations by name; ``moves``: it only puts positions elsewhere."""

    def register(function: Rule) -> Rule:
        if moves:
            MOVING_RULES.add(function)
        for name in names:
            RULES[f"aten.{name}" if "." not in name else name] = function
        return function

    return register


def pattern(expression: str) -> Callable[[Rule], Rule]:
    """Register a rule for all operations whose name matches."""

    def register(function: Rule) -> Rule:
        PATTERNS.append((re.compile(expression), function))
        return function

    return register


def find_rule(node: Node) -> Rule | None:
    """The rule for a node: by name, by name without the in-place mark, by pattern, or because it is pointwise."""
    name = node.name
    if name in RULES:
        return RULES[name]
    if name.endswith("_") and name[:-1] in RULES:
        return RULES[name[:-1]]
    for expression, function in PATTERNS:
        if expression.fullmatch(name):
            return function
    if _pointwise(node):
        SEGMENT_RULES.add(name)
        return RULES["aten.pointwise"]
    if not any(True for _ in tensor_args(node)):
        return RULES["aten.constant"]
    return None


def _pointwise(node: Node) -> bool:
    """Whether torch tags the operation, or its form that does not write in place, as pointwise."""
    if torch.Tag.pointwise in node.func.tags:
        return True
    packet = getattr(torch.ops.aten, node.name.removeprefix("aten.").removesuffix("_"), None)
    overloads = packet.overloads() if packet is not None and node.name.startswith("aten.") else []
    return any(torch.Tag.pointwise in getattr(packet, name).tags for name in overloads)


def unknown(run: Run, node: Node) -> list[Label]:
    """Freeze all that enters an operation without a rule."""
    moved = [label for ref in tensor_args(node) if _moves(label := run.label(ref))]
    if moved:
        run.unknown[node.name] = run.unknown.get(node.name, 0) + 1
    for label in moved:
        run.algebra.freeze(label, f"operation {node.name}, which has no rule")
    return [Label(run.trace.tensors[out.number].shape, tainted=True) for out in flat_refs(node.outs)]


def _moves(label: Label) -> bool:
    return bool(label.factors) or label.values is not None or label.segments is not None
