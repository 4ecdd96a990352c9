"""Batch norms and the linear maps before them, found from the tensors alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lit_wsl.mapper.tree import role_of
from lit_wsl.structure.info import ModelDescription, ParameterGroup, ParameterInfo

_NUMBERED = re.compile(r"[A-Za-z_]+?(\d+)$")


@dataclass(frozen=True)
class NormOf:
    """A batch norm and the map whose outputs it takes.

    Attributes:
        mean: Running mean, ``(C,)``.
        var: Running variance, ``(C,)``.
        gamma: Scale, ``(C,)``; ``None`` with ``beta`` for a norm without.
        beta: Shift, ``(C,)``.
        weight: Weight of the map before, with C outputs along axis 0; ``None`` if none stands directly before.
        bias: Its bias.
        others: Names of what else the norm holds: a counter.
    """

    mean: ParameterInfo
    var: ParameterInfo
    gamma: ParameterInfo | None
    beta: ParameterInfo | None
    weight: ParameterInfo | None
    bias: ParameterInfo | None
    others: tuple[str, ...]


def norms_behind(side: ModelDescription) -> list[NormOf]:
    """All batch norms of a model with the map before each, in registration order.

    A norm belongs to the map that comes directly before it in execution order where that is known, else in
    registration order; or to the one with its number (``conv2``, ``bn2``) registered before it in the same module. A
    map belongs to one norm at most.
    """
    units = [g for g in side.groups if g.members]
    if side.has_execution_order:  # what a sample never reached keeps its place behind the rest
        late = len(side)
        units.sort(key=lambda g: (late if g.execution_order is None else g.execution_order, g.members[0].index))
    found: list[NormOf] = []
    taken: set[str] = set()
    for place, unit in enumerate(units):
        parts = _norm_parts(unit)
        if parts is None:
            continue
        mean, var, gamma, beta = parts
        before = _by_number(unit, units[:place]) or (units[place - 1] if place else None)
        weight = _map_weight(before, mean.shape[0]) if before is not None else None
        if weight is not None and weight.name in taken:
            weight = None
        bias = None
        if weight is not None and before is not None:
            taken.add(weight.name)
            bias = next((i for i in before.members if role_of(i.name) == "bias" and i.shape == mean.shape), None)
        own = {i.name for i in parts if i is not None}
        others = tuple(i.name for i in unit.members if i.name not in own)
        found.append(NormOf(mean, var, gamma, beta, weight, bias, others))
    return found


def _norm_parts(
    unit: ParameterGroup,
) -> tuple[ParameterInfo, ParameterInfo, ParameterInfo | None, ParameterInfo | None] | None:
    """Mean, variance, scale and shift of a batch norm; ``None`` if the tensors are not those of one."""
    vectors = [i for i in unit.members if len(i.shape) == 1 and i.dtype.is_floating_point]
    means = [i for i in vectors if "mean" in i.tokens[-2:]]
    variances = [i for i in vectors if {"var", "variance"} & set(i.tokens[-2:])]
    if len(means) != 1 or len(variances) != 1 or len({i.shape for i in vectors}) != 1:
        return None
    rest = [i for i in vectors if i not in (means[0], variances[0])]
    if not rest:
        return means[0], variances[0], None, None
    shift = [i for i in rest if role_of(i.name) in ("bias", "beta")]
    if len(rest) != 2 or len(shift) != 1 or any(len(i.shape) > 1 for i in unit.members):
        return None
    return means[0], variances[0], next(i for i in rest if i is not shift[0]), shift[0]


def _by_number(unit: ParameterGroup, before: Sequence[ParameterGroup]) -> ParameterGroup | None:
    """The only map with the norm's number in the same module."""
    parent, _, name = unit.module_path.rpartition(".")
    number = _NUMBERED.match(name)
    if number is None:
        return None
    alike = []
    for other in before:
        other_parent, _, other_name = other.module_path.rpartition(".")
        match = _NUMBERED.match(other_name)
        if other_parent == parent and match and match[1] == number[1] and any(len(i.shape) > 1 for i in other.members):
            alike.append(other)
    return alike[0] if len(alike) == 1 else None


def _map_weight(unit: ParameterGroup, outputs: int) -> ParameterInfo | None:
    """The weight of a unit that is one linear map with this many outputs along axis 0."""
    weights = [i for i in unit.members if len(i.shape) >= 2]
    if len(weights) != 1 or role_of(weights[0].name) != "weight" or "Transpose" in unit.module_type:
        return None
    return weights[0] if weights[0].shape[0] == outputs else None
