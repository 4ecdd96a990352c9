"""Tensors of another size than the model's: position tables, the stem's input channels, and heads.

Each of them changes one axis of one tensor. What a tensor is, shapes and places tell:
a table that lies in a grid, the one convolution that sees the input, a last layer whose outputs nobody takes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from lit_wsl.matching.tree import role_of
from lit_wsl.matching.words import split_numbers
from lit_wsl.plan.operations import Operation
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.plan.value_changing import FoldBatchNorm, NewInputChannels, PartialHead, ResizePositionEmbedding
from lit_wsl.structure.description import ModelDescription, ParameterGroup, ParameterInfo, Shape


@dataclass(frozen=True)
class Change:
    """One adaptation of one unit of the source."""

    sources: tuple[str, ...]  # the real tensors, in the order in which the operation takes them
    # the pretended tensors, in the order in which the operation gives them; the first bears the name of the real tensor
    # in whose place it stands
    made: tuple[ParameterInfo, ...]
    operations: tuple[Operation, ...]  # what takes the ones into the others, in order
    reason: str  # what is done to the values, in words
    dropped: tuple[str, ...] = ()  # real tensors that nothing needs any more
    # names of the targets each pretended tensor was meant for; empty if any may be right
    partners: tuple[tuple[str, ...], ...] = ()

    @property
    def badge(self) -> str:
        """The operations in one word."""
        return "+".join(op.name for op in self.operations)

    def after(self, earlier: Change) -> Change:
        """Both changes as one, where this one concerns what an earlier one makes: other channels for a folded stem."""
        if len(self.made) > 1:  # a norm is folded into the real weight, before it gets other channels
            operations, first, last = (*self.operations, *earlier.operations), self, self
        else:
            operations, first, last = (*earlier.operations, *self.operations), earlier, self
        return replace(
            self,
            sources=first.sources,
            made=(*last.made, *first.made[len(last.made) :]),
            operations=operations,
            reason=f"{earlier.reason}; {self.reason}",
            dropped=(*earlier.dropped, *self.dropped),
        )


@dataclass(frozen=True)
class Proposals:
    """What an adaptation proposes."""

    changes: tuple[Change, ...] = ()
    # why tensors that look like a case for it are none: by name in the source, or ``->name`` in the target
    reasons: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False  # whether the changes make sense together only
    others: tuple[tuple[Change, ...], ...] = ()  # other choices of changes that are as likely


Propose = Callable[[TransferPlan, ModelDescription, ModelDescription], Proposals]


MAX_PREFIX = 16  # rows of a position table that belong to no place: class, distillation and register tokens


LEAST_ROWS = 4  # of a grid


def _left_over(
    plan: TransferPlan, source: ModelDescription, target: ModelDescription
) -> tuple[list[ParameterInfo], list[ParameterInfo]]:
    """Tensors of both sides that no entry uses."""
    free_s = [i for i in source.parameters if i.name not in plan.by_source]
    free_t = [i for i in target.parameters if i.name not in plan.by_target]
    return free_s, free_t


# -- position tables --------------------------------------------------------------------------------------------------
def resize_position_embedding(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> Proposals:
    """Resize tables over square grids, where both models lay their input out in a grid."""
    free_s, free_t = _left_over(plan, source, target)
    changes: list[Change] = []
    reasons: dict[str, str] = {}
    for info in free_s:
        fits: dict[ResizePositionEmbedding, list[str]] = {}
        why = ""
        for other in free_t:
            operation, problem = _resizing(info, other, source, target)
            if problem:
                why = why or problem
                reasons[f"->{other.name}"] = f"resize_position_embedding: {problem}"
            if operation is not None:
                fits.setdefault(operation, []).append(other.name)
        if len(fits) > 1:  # grids of several sizes: of the same name, or none
            fits = {op: names for op, names in fits.items() if info.name in names}
            why = "tables of several sizes could take it"
        if len(fits) != 1:
            if why:
                reasons[info.name] = f"resize_position_embedding: {why}"
            continue
        (operation, names), *_ = fits.items()
        shape = operation.shapes([info.shape])[0]
        (h, w), (th, tw) = operation.source, operation.target
        kept = f", {operation.prefix} prefix token{'s' * (operation.prefix > 1)} kept" if operation.prefix else ""
        reason = f"resized by bicubic interpolation (antialiased) from {h}x{w} to {th}x{tw}{kept}"
        changes.append(
            Change((info.name,), (replace(info, shape=shape),), (operation,), reason, partners=(tuple(names),))
        )
    return Proposals(tuple(changes), reasons)


def _resizing(
    info: ParameterInfo, other: ParameterInfo, source: ModelDescription, target: ModelDescription
) -> tuple[ResizePositionEmbedding | None, str]:
    """The operation that takes one table into another; or none, and why if they look like position tables."""
    s, t = info.shape, other.shape
    if not info.dtype.is_floating_point or not other.dtype.is_floating_point or s == t:
        return None, ""
    if len(s) == len(t) == 4 and s[0] == t[0] == 1:
        if s[1] == t[1] and s[2] == s[3] and t[2] == t[3]:
            return ResizePositionEmbedding(s[2:], t[2:], 0, "channels_first"), ""
        if s[3] == t[3] and s[1] == s[2] and t[1] == t[2]:
            return ResizePositionEmbedding(s[1:3], t[1:3], 0, "channels_last"), ""
        return None, ""
    s, t = _rows(s), _rows(t)
    if len(s) != 2 or len(t) != 2 or s[1] != t[1] or s[0] == t[0] or min(s[0], t[0]) < LEAST_ROWS:
        return None, ""
    if not _is_table(info, source) or not _is_table(other, target):
        return None, ""
    p, q = (rows - math.isqrt(rows) ** 2 for rows in (s[0], t[0]))
    h, th = math.isqrt(s[0]), math.isqrt(t[0])
    shown = f"{info.name} has {s[0]} rows, {other.name} {t[0]}"
    if p != q or p > MAX_PREFIX:
        return None, f"{shown}, which are no square grids behind one number of prefix tokens"
    if not (_has_grid(s[1], p, source) and _has_grid(t[1], p, target)) and not (
        p == 0 and h % 2 and th % 2 and _is_bias_per_head(info, source) and _is_bias_per_head(other, target)
    ):
        return None, f"{shown}, but nothing in the models shows that these positions lie in a grid"
    return ResizePositionEmbedding((h, h), (th, th), p), ""


def _rows(shape: Shape) -> Shape:
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _is_table(info: ParameterInfo, side: ModelDescription) -> bool:
    """Whether a tensor stands alone, as tables do: no bias beside it."""
    rows = _rows(info.shape)[:1]
    return not any(i.module_path == info.module_path and i.shape == rows for i in side.parameters)


def _has_grid(width: int, prefix: int, side: ModelDescription) -> bool:
    """Whether pictures become tokens of this width: a convolution gives them, or a token of its own goes before."""
    tokens = {(1, prefix, width), (1, 1, width)} if prefix else set()
    return any((len(i.shape) >= 4 and i.shape[0] == width) or i.shape in tokens for i in side.parameters)


def _is_bias_per_head(info: ParameterInfo, side: ModelDescription) -> bool:
    """Whether a table of ``(2h-1)(2w-1)`` rows has one column per head of the attention that it belongs to."""
    heads, path = info.shape[-1], info.module_path
    near = [i.shape for i in side.parameters if i.module_path.startswith(path) and i is not info and len(i.shape) == 2]
    return heads >= 1 and any(s[1] % heads == 0 and s[1] > heads for s in near)


# -- input channels ---------------------------------------------------------------------------------------------------
def new_input_channels(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> Proposals:
    """Adapt the one convolution that sees the input: the first of both models."""
    stems = [next((i for i in side.parameters if _is_kernel(i)), None) for side in (source, target)]
    s, t = stems
    if s is None or t is None or s.name in plan.by_source or t.name in plan.by_target:
        return Proposals()
    if len(s.shape) != len(t.shape) or s.shape[:1] + s.shape[2:] != t.shape[:1] + t.shape[2:] or s.shape == t.shape:
        reason = f"new_input_channels: {s.name} {s.shape} and {t.name} {t.shape} differ in more than input channels"
        return Proposals((), {s.name: reason})
    n, m = s.shape[1], t.shape[1]
    how = "summed over the input channels" if m == 1 else f"input channels repeated in turn and scaled by {n}/{m}"
    operation = NewInputChannels(n, m)
    reason = f"{how}, from {n} to {m}"
    return Proposals((Change((s.name,), (replace(s, shape=t.shape),), (operation,), reason, partners=((t.name,),)),))


def _is_kernel(info: ParameterInfo) -> bool:
    """Whether a tensor is the weight of a convolution; tables ``(1, C, H, W)`` and layer scales are not."""
    return len(info.shape) >= 4 and info.kind == "parameter" and info.shape[0] > 1 and role_of(info.name) == "weight"


# -- heads ------------------------------------------------------------------------------------------------------------
def partial_head(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> Proposals:
    """Copy rows between heads: the last units of both models, or units of one name, whose outputs nobody takes."""
    free_s, free_t = _left_over(plan, source, target)
    heads_s, heads_t = _heads(free_s, source, plan.by_source), _heads(free_t, target, plan.by_target)
    changes: list[Change] = []
    reasons: dict[str, str] = {}
    for head in heads_s:
        fits = [other for other in heads_t if _same_but_rows(head, other)]
        named = [other for other in fits if _tail(other.weight.name) == _tail(head.weight.name)]
        fits = [other for other in (named or fits) if named or (head.last and other.last)]
        sizes = {other.weight.shape[0] for other in fits}
        if len(sizes) != 1:
            if fits:
                reasons[head.weight.name] = "partial_head: heads of several sizes could take it"
            continue
        m = sizes.pop()
        for k, info in enumerate(head.tensors):
            n = info.shape[0]
            rest = f"; the model's other {m - n} rows stay as they are" if m > n else ""
            reason = f"the first {min(n, m)} of {n} rows copied{rest}"
            partners = tuple(other.tensors[k].name for other in fits)
            made = replace(info, shape=(m, *info.shape[1:]))
            changes.append(Change((info.name,), (made,), (PartialHead(n, m),), reason, partners=(partners,)))
    return Proposals(tuple(changes), reasons)


@dataclass(frozen=True)
class _Head:
    """A linear map that could be a head."""

    weight: ParameterInfo  # its weight, ``(classes, ...)``
    tensors: tuple[ParameterInfo, ...]  # the weight, and the bias if there is one
    last: bool  # whether no matched weight comes after it


def _heads(free: Sequence[ParameterInfo], side: ModelDescription, matched: Mapping[str, object]) -> list[_Head]:
    """Units that are left over and whose outputs no other tensor that is left over takes."""
    end = max((i.index for i in side.parameters if len(i.shape) >= 2 and i.name in matched), default=-1)
    found = []
    for weight in free:
        if len(weight.shape) < 2 or weight.kind != "parameter" or role_of(weight.name) != "weight":
            continue
        if "Embedding" in weight.module_type or min(weight.shape) == 0:
            continue
        rows = weight.shape[0]
        beside = (i for i in free if i.module_path == weight.module_path and i.shape == (rows,))
        bias = next((i for i in beside if role_of(i.name) == "bias"), None)
        taken = any(rows in i.shape[1:] or (i.shape == (rows,) and role_of(i.name) != "bias") for i in free)
        if bias is None and weight.index < end:
            continue  # a table or an inner layer rather than a head
        if not taken:
            found.append(_Head(weight, (weight, bias) if bias else (weight,), weight.index > end))
    return found


def _same_but_rows(one: _Head, other: _Head) -> bool:
    a, b = one.weight.shape, other.weight.shape
    return a[0] != b[0] and a[1:] == b[1:] and len(one.tensors) == len(other.tensors)


def _tail(name: str) -> str:
    """A name without the outermost module, which is often only a wrapper."""
    return ".".join(name.split(".")[-3:])


_NUMBERED = re.compile(r"[A-Za-z_]+?(\d+)$")


@dataclass(frozen=True)
class NormOf:
    """A batch norm and the map whose outputs it takes."""

    mean: ParameterInfo  # running mean, ``(C,)``
    var: ParameterInfo  # running variance, ``(C,)``
    gamma: ParameterInfo | None  # scale, ``(C,)``; ``None`` with ``beta`` for a norm without
    beta: ParameterInfo | None  # shift, ``(C,)``
    # weight of the map before, with C outputs along axis 0; ``None`` if none stands directly before
    weight: ParameterInfo | None
    bias: ParameterInfo | None
    others: tuple[str, ...]  # names of what else the norm holds: a counter


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


MAX_FAMILIES = 12  # of norms, of which any may go


MAX_CHOICES = 4  # of norms that go, each of which is tried


def fold_batchnorm(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> Proposals:
    """Fold the batch norms of the source that stand behind a linear map and have no place in the target.

    Where the target keeps some norms, those that go are whole families (the second norm of every block), as many of
    each width as are too many. Several choices of families may fit; the matching decides.
    """
    norms, kept = norms_behind(source), norms_behind(target)
    if not kept:
        foldable = tuple(_fold(norm) for norm in norms if norm.weight is not None)
        alone = "fold_batchnorm: no convolution or linear layer stands directly before this norm"
        return Proposals(foldable, {norm.mean.name: alone for norm in norms if norm.weight is None})
    surplus = Counter(norm.mean.shape for norm in norms)
    surplus.subtract(Counter(norm.mean.shape for norm in kept))
    if not any(surplus.values()):
        return Proposals()
    families: dict[tuple[tuple[str, ...], str], list[NormOf]] = {}
    for norm in norms:
        parent, _, last = norm.mean.module_path.rpartition(".")
        families.setdefault((split_numbers(parent)[0], last), []).append(norm)
    whole = [members for members in families.values() if all(norm.weight is not None for norm in members)]
    fitting = [
        tuple(_fold(norm) for members in choice for norm in members)
        for size in range(1, len(whole) + 1)
        for choice in combinations(whole[:MAX_FAMILIES], size)
        if _counts(choice) == +surplus
    ]
    if not fitting or min(surplus.values()) < 0 or len(fitting) > MAX_CHOICES:
        why = f"fold_batchnorm: {len(fitting) or 'no'} choices of norms leave those that the model has"
        return Proposals((), {norm.mean.name: why for norm in norms})
    return Proposals(fitting[0], whole=True, others=tuple(fitting[1:]))


def _counts(choice: Sequence[Sequence[NormOf]]) -> Counter[Shape]:
    """How many norms of each width."""
    return Counter(norm.mean.shape for members in choice for norm in members)


def _fold(norm: NormOf) -> Change:
    weight = norm.weight
    assert weight is not None
    head, dot, leaf = weight.name.rpartition(".")
    bias = norm.bias
    made = bias or replace(weight, name=f"{head}{dot}{leaf.replace('weight', 'bias')}", shape=weight.shape[:1])
    vectors = [i for i in (bias, norm.gamma, norm.beta, norm.mean, norm.var) if i is not None]
    operation = FoldBatchNorm(bias=bias is not None, affine=norm.gamma is not None)
    return Change(
        sources=(weight.name, *(i.name for i in vectors)),
        made=(weight, made),
        operations=(operation,),
        reason=f"batch norm {norm.mean.module_path} folded into the weights, eps={operation.eps:g} assumed ("
        "checkpoints do not hold it); the same function in evaluation mode only",
        dropped=norm.others,
    )
