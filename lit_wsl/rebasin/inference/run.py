"""One pass over a trace, as the rules see it: labels of tensors, units of parameters, notes for later.

A *rule* says what one ATen operation does to labels: it is called with the :class:`Run` and the node, and returns the
labels of what the node returns. It asks the run for the labels of its arguments, unifies and freezes units through
``run.algebra``, and may ask for a further pass with finer labels of a parameter (a :class:`Joint`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from lit_wsl.rebasin.inference.labels import Algebra, Label
from lit_wsl.rebasin.inference.trace import Node, Ref, Trace, flat_refs, tensor_args
from lit_wsl.rebasin.inference.units import Array

Rule: TypeAlias = Callable[["Run", Node], "Label | Sequence[Label]"]


@dataclass(frozen=True)
class Joint:
    """An axis whose units are different for each place on other axes of its parameter."""

    outer: tuple[int, ...]  # these axes; each one's units are in turn different for each place on those before it
    blocks: int | None = None  # with one outer axis, the number of blocks that its places form, one for each by default
    # whether units stay in the block of their place on the last outer axis; where that axis does not move, there is
    # nothing to be bound to
    bound: bool = True


@dataclass(frozen=True)
class Move:
    """A node that only put positions elsewhere, and the labels that entered it."""

    rule: Rule
    node: Node
    labels: dict[int, Label]


@dataclass
class Run:
    """One pass over a trace: the labels that its tensors have so far, and what the rules left as notes on the way."""

    trace: Trace  # the recorded forward pass
    # (parameter, axis) -> how its units are different for each place on other axes; from earlier passes
    joints: dict[tuple[int, int], Joint] = field(default_factory=dict)
    algebra: Algebra = field(default_factory=Algebra)  # the units, and what computing does to them
    labels: dict[int, Label] = field(default_factory=dict)  # labels of tensors by their numbers
    # (parameter, axis) -> the units that were made for it
    axes: dict[tuple[int, int], Array] = field(default_factory=dict)
    # (parameter, axis) and the joint that a rule needs in a further pass
    requests: list[tuple[tuple[int, int], Joint]] = field(default_factory=list)
    # the same for joints that a rule can do without, at the cost of freedom
    wishes: list[tuple[tuple[int, int], Joint]] = field(default_factory=list)
    # (parameter, axis) whose order stays, so that no finer units are of use there
    ordered: set[tuple[int, int]] = field(default_factory=set)
    used: set[int] = field(default_factory=set)  # tensors that entered an operation
    looked: set[int] = field(default_factory=set)  # tensors whose label was asked for since this was last emptied
    moves: list[Move] = field(default_factory=list)  # what only put positions elsewhere, with the labels before
    # tensor -> the node that made it a view of another one, and that one
    views: dict[int, tuple[Node, int]] = field(default_factory=dict)
    stale: set[int] = field(default_factory=set)  # views of a tensor that was written into since they were labelled

    def __post_init__(self) -> None:
        self._starts: list[int] = []
        self._owners: list[tuple[int, int]] = []
        self._by_storage: dict[int, list[int]] = {}
        for number in self.trace.parameters:
            self._label_parameter(number)

    def _label_parameter(self, number: int) -> None:
        shape = self.trace.tensors[number].shape
        depth = {axis: len(joint.outer) for (of, axis), joint in self.joints.items() if of == number}
        for axis in sorted(range(len(shape)), key=lambda axis: (depth.get(axis, 0), axis)):
            if shape[axis] > 1:
                self._starts.append(len(self.algebra.units))
                self._owners.append((number, axis))
                self.axes[number, axis] = self._units_of(number, axis, shape)
        factors = tuple(self.axes[number, axis] for axis in range(len(shape)) if shape[axis] > 1)
        self.assign(number, Label(shape, factors, origin=number))

    def _units_of(self, number: int, axis: int, shape: Sequence[int]) -> Array:
        joint, units = self.joints.get((number, axis)), self.algebra.units
        outer = () if joint is None else joint.outer
        sizes = [n if a in outer or a == axis else 1 for a, n in enumerate(shape)]
        if joint is not None and joint.blocks is not None:
            fresh = units.fresh(joint.blocks * shape[axis]).reshape(joint.blocks, shape[axis])
            units.bind(fresh, units.fresh(joint.blocks)[:, None])
            rows = np.repeat(fresh, shape[outer[0]] // joint.blocks, axis=0)
            return (rows if outer[0] < axis else rows.T).reshape(sizes)
        made = units.fresh(int(np.prod(sizes))).reshape(sizes)
        if joint is not None and outer and joint.bound:
            units.bind(made, self.axes[number, outer[-1]])
        return made

    def owner(self, factor: Array) -> tuple[int, int] | None:
        """Parameter and axis that all units of a factor were made for, None if they come from several."""
        return self.maker(self.algebra.units.find(factor))

    def maker(self, factor: Array) -> tuple[int, int] | None:
        """Parameter and axis that the units of a factor were made for, whatever they were unified with since."""
        low, high = int(factor.min()), int(factor.max())
        place = int(np.searchsorted(self._starts, low, side="right")) - 1
        if low == 0 or place < 0 or place != int(np.searchsorted(self._starts, high, side="right")) - 1:
            return None
        return self._owners[place]

    def label(self, value: Any) -> Label:
        """Label of a tensor; constants and example inputs are not moved by anything."""
        if not isinstance(value, Ref):
            return Label(())
        self.looked.add(value.number)
        if value.number in self.stale:
            self._refresh(value.number)
        found = self.labels.get(value.number)
        if found is None:
            info, tainted = self.trace.tensors[value.number], value.number in self.trace.inputs
            found = Label(info.shape, tainted=tainted, varies=() if tainted else info.varies or ())
            self.assign(value.number, found)
        return found

    def _refresh(self, number: int) -> None:
        """Label a view anew, from what it is a view of."""
        node, _ = self.views[number]
        looked, function = set(self.looked), find_rule(node)
        assert function is not None, node.name  # it was labelled by this rule before
        labels = function(self, node)
        for out, label in zip(flat_refs(node.outs), [labels] if isinstance(labels, Label) else labels, strict=True):
            if out.number in self.stale:
                self.assign(out.number, label)
        self.looked = looked

    def assign(self, number: int, label: Label) -> None:
        """Label a tensor."""
        self.stale.discard(number)
        if number not in self.labels:
            self._by_storage.setdefault(self.trace.tensors[number].storage, []).append(number)
        self.labels[number] = label

    def integers(self, node: Node, value: Any) -> torch.Tensor | None:
        """The values of an integer tensor when the node ran, None if it was too large to keep."""
        return self.trace.integers.get((node.number, value.number)) if isinstance(value, Ref) else None

    def aliases(self, value: Any) -> list[int]:
        """Other tensors with the same storage."""
        if not isinstance(value, Ref):
            return []
        same = self._by_storage.get(self.trace.tensors[value.number].storage, [])
        return [number for number in same if number != value.number]

    def is_read(self, value: Ref) -> bool:
        """Whether anything is computed from a tensor, or it is returned."""
        readers = (ref.number for node in self.trace.nodes for ref in tensor_args(node))
        return value in self.trace.outputs or value.number in readers

    def storage(self, value: Ref) -> int:
        """Number of the storage of a tensor of the trace."""
        return self.trace.tensors[value.number].storage

    def shape(self, value: Any) -> tuple[int, ...]:
        """Shape of a tensor of the trace."""
        return self.trace.tensors[value.number].shape if isinstance(value, Ref) else ()

    def shape_of(self, number: int) -> tuple[int, ...]:
        """Shape of a tensor by its number."""
        return self.trace.tensors[number].shape

    def request(self, number: int, axis: int, joint: Joint) -> None:
        """Ask for a further pass in which an axis has other units for each place on another axis."""
        if (number, axis) not in self.joints:
            self.requests.append(((number, axis), joint))

    def wish(self, inner: tuple[int, int] | None, outer: tuple[int, int] | None) -> None:
        """Wish for other units on an axis for each place on another axis of the same parameter."""
        if inner is None or outer is None or inner[0] != outer[0] or inner == outer:
            return
        known = self.joints.get(inner)
        if known is None or (known.blocks is None and outer[1] not in known.outer):
            self.wishes.append((inner, Joint((outer[1],))))

    def replica(self) -> Run:
        """The same trace without labels, with units of its own: to apply a rule once more and see what it does."""
        other = copy(self)
        other.algebra, other.labels, other.requests, other.wishes = Algebra(), {}, [], []
        other.views, other.stale, other.moves = {}, set(), []
        return other


RULES: dict[str, Rule] = {}
SEGMENT_RULES: set[str] = set()
"""Operations that take routed rows whose label has one place for each expert, see ``Label.segmented``."""
ROUTING_RULES: set[str] = set()
"""Operations that know what to do with indices that name units, see ``Label.values``."""
READING = {f"aten.{name}" for name in ("_local_scalar_dense", "item", "equal", "is_nonzero", "allclose")}
"""Operations that hand values to Python, where they are out of sight."""
MOVING_RULES: set[Rule] = set()
"""Rules that only put positions elsewhere, see :mod:`~lit_wsl.rebasin.inference.groups`."""
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
    random = torch.Tag.nondeterministic_seeded in node.func.tags
    why = "which draws other random numbers for each position" if random else "which has no rule"
    for label in [run.label(ref) for ref in tensor_args(node)]:
        run.algebra.freeze(label, f"operation {node.name}, {why}")
    return [Label(run.trace.tensors[out.number].shape, tainted=True) for out in flat_refs(node.outs)]
