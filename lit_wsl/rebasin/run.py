"""One pass over a trace, as the rules see it: labels of tensors, units of parameters, notes for later.

A *rule* says what one ATen operation does to labels: it is called with the :class:`Run` and the node, and returns the
labels of what the node returns. It asks the run for the labels of its arguments, unifies and freezes units through
``run.algebra``, and may ask for a further pass with finer labels of a parameter (a :class:`Joint`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from lit_wsl.rebasin.algebra import Algebra
from lit_wsl.rebasin.labels import Label
from lit_wsl.rebasin.tracing import Node, Ref, Trace
from lit_wsl.rebasin.units import Array

Rule: TypeAlias = Callable[["Run", Node], "Label | Sequence[Label]"]


@dataclass(frozen=True)
class Joint:
    """An axis whose units are different for each place on another axis: ``(outer axis, number of outer blocks)``."""

    outer_axis: int
    blocks: int


@dataclass(frozen=True)
class Move:
    """A node that only put positions elsewhere, and the labels that entered it."""

    rule: Rule
    node: Node
    labels: dict[int, Label]


@dataclass
class Run:
    """One pass over a trace: the labels that its tensors have so far, and what the rules left as notes on the way.

    Attributes:
        trace: The recorded forward pass.
        joints: (parameter, axis) -> how its units are different for each place on another axis; from earlier passes.
        algebra: The units, and what computing does to them.
        labels: Labels of tensors by their numbers.
        axes: (parameter, axis) -> the units that were made for it.
        requests: Joints that a rule asks for, for a further pass.
        unknown: Operations without a rule that something moved has entered, and how often.
        used: Tensors that entered an operation.
        looked: Tensors whose label was asked for since this was last emptied.
        moves: What only put positions elsewhere, with the labels before.
    """

    trace: Trace
    joints: dict[tuple[int, int], Joint] = field(default_factory=dict)
    algebra: Algebra = field(default_factory=Algebra)
    labels: dict[int, Label] = field(default_factory=dict)
    axes: dict[tuple[int, int], Array] = field(default_factory=dict)
    requests: dict[tuple[int, int], Joint] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    looked: set[int] = field(default_factory=set)
    moves: list[Move] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._starts: list[int] = []
        self._owners: list[tuple[int, int]] = []
        self._by_storage: dict[int, list[int]] = {}
        for number in self.trace.parameters:
            self._label_parameter(number)

    def _label_parameter(self, number: int) -> None:
        shape = self.trace.tensors[number].shape
        factors = []
        for axis, size in enumerate(shape):
            if size < 2:
                continue
            joint = self.joints.get((number, axis))
            view = [1] * len(shape)
            view[axis] = size
            self._starts.append(len(self.algebra.units))
            self._owners.append((number, axis))
            if joint is None:
                units = self.algebra.units.fresh(size)
                factor = units.reshape(view)
            else:
                outer = shape[joint.outer_axis]
                fresh = self.algebra.units.fresh(joint.blocks * size).reshape(joint.blocks, size)
                if joint.blocks == outer and (number, joint.outer_axis) in self.axes:
                    blocks = self.axes[(number, joint.outer_axis)].ravel()
                else:
                    blocks = self.algebra.units.fresh(joint.blocks)
                self.algebra.units.bind(fresh, blocks[:, None])
                rows = np.repeat(fresh, outer // joint.blocks, axis=0)
                view[joint.outer_axis] = outer
                factor = (rows if joint.outer_axis < axis else rows.T).reshape(view)
            self.axes[(number, axis)] = factor
            factors.append(factor)
        self.assign(number, Label(shape, tuple(factors), origin=number))

    def owner(self, factor: Array) -> tuple[int, int] | None:
        """Parameter and axis that all units of a factor were made for, None if they come from several."""
        found = self.algebra.units.find(factor)
        low, high = int(found.min()), int(found.max())
        place = int(np.searchsorted(self._starts, low, side="right")) - 1
        same = int(np.searchsorted(self._starts, high, side="right")) - 1
        if low == 0 or place < 0 or place != same:
            return None
        return self._owners[place]

    def label(self, value: Any) -> Label:
        """Label of a tensor; constants and example inputs are not moved by anything."""
        if not isinstance(value, Ref):
            return Label(())
        self.looked.add(value.number)
        found = self.labels.get(value.number)
        if found is None:
            info, tainted = self.trace.tensors[value.number], value.number in self.trace.inputs
            found = Label(info.shape, tainted=tainted, varies=() if tainted else info.varies or ())
            self.assign(value.number, found)
        return found

    def assign(self, number: int, label: Label) -> None:
        """Label a tensor."""
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

    def shape(self, value: Any) -> tuple[int, ...]:
        """Shape of a tensor of the trace."""
        return self.trace.tensors[value.number].shape if isinstance(value, Ref) else ()

    def shape_of(self, number: int) -> tuple[int, ...]:
        """Shape of a tensor by its number."""
        return self.trace.tensors[number].shape

    def request(self, number: int, axis: int, joint: Joint) -> None:
        """Ask for a further pass in which an axis has other units for each place on another axis."""
        if (number, axis) not in self.joints:
            self.requests[(number, axis)] = joint

    def replica(self) -> Run:
        """The same trace without labels, with units of its own: to apply a rule once more and see what it does."""
        other = copy(self)
        other.algebra, other.labels, other.requests, other.unknown = Algebra(), {}, {}, {}
        return other
