"""Truth of a pair, written as rules: a pipeline of renames and lossless operations over a state dict.

Every rule is a pure function from a dict of tensors to a dict of tensors. Names are matched with regular expressions
(``re.sub``/``re.fullmatch``), so that one line stands for all blocks. :func:`invert` turns the truth of A -> B into the
truth of B -> A by sending element numbers through the rules, so every pair is written once and scored both ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Rule = Callable[[Tensors], Tensors]


class TruthError(Exception):
    """A truth that is not proven: a rule that does not fit, a name too many, an output that differs."""


def _add(out: Tensors, name: str, value: Tensor) -> None:
    if name in out:
        raise TruthError(f"two sources for {name!r}")
    out[name] = value


def apply_rules(rules: Sequence[Rule], state: Mapping[str, Tensor]) -> Tensors:
    """Send a state dict through the rules, in order."""
    out = dict(state)
    for rule in rules:
        out = rule(out)
    return out


def rename(*pairs: tuple[str, str | Callable[[re.Match[str]], str]]) -> Rule:
    """Apply ``re.sub(pattern, replacement)`` for each pair, in order, to every name."""

    def rule(state: Tensors) -> Tensors:
        out: Tensors = {}
        for name, value in state.items():
            for pattern, replacement in pairs:
                name = re.sub(pattern, replacement, name)
            _add(out, name, value)
        return out

    return rule


def drop(pattern: str) -> Rule:
    """Leave out what the target does not have."""
    return lambda state: {name: value for name, value in state.items() if not re.search(pattern, name)}


def keep(pattern: str) -> Rule:
    """Leave out everything else."""
    return lambda state: {name: value for name, value in state.items() if re.search(pattern, name)}


def change(pattern: str, operation: Callable[[Tensor], Tensor]) -> Rule:
    """Apply one operation to every tensor whose name contains the pattern; the pattern must hit something."""

    def rule(state: Tensors) -> Tensors:
        if not any(re.search(pattern, name) for name in state):
            raise TruthError(f"nothing matches {pattern!r}")
        return {name: operation(value) if re.search(pattern, name) else value for name, value in state.items()}

    return rule


def transpose(pattern: str) -> Rule:
    """Swap the two axes of a matrix, or the last two of a stack of matrices."""
    return change(pattern, lambda value: value.transpose(-1, -2))


def reshape(pattern: str, *shape: int) -> Rule:
    """View with another shape, same elements in the same order."""
    return change(pattern, lambda value: value.reshape(shape))


def add_axes(pattern: str, count: int = 2) -> Rule:
    """Append axes of size one: a Linear's weight becomes that of a 1x1 convolution."""
    return change(pattern, lambda value: value.reshape(*value.shape, *[1] * count))


def add_leading_axis(pattern: str) -> Rule:
    """Put an axis of size one in front."""
    return change(pattern, lambda value: value.unsqueeze(0))


def squeeze(pattern: str) -> Rule:
    """Remove all axes of size one."""
    return change(pattern, lambda value: value.squeeze())


def permute_axes(pattern: str, view: Sequence[int], order: Sequence[int]) -> Rule:
    """View the first axis as ``view``, reorder these parts as ``order`` and flatten them again."""

    def operation(value: Tensor) -> Tensor:
        rest = value.shape[1:]
        parts = value.reshape(*view, *rest)
        axes = [*order, *range(len(view), parts.dim())]
        return parts.permute(axes).reshape(-1, *rest)

    return change(pattern, operation)


def split(pattern: str, into: Sequence[str], dim: int = 0, sizes: Sequence[int] | None = None) -> Rule:
    """Cut a tensor into parts along ``dim``; ``into`` are templates of the match."""

    def rule(state: Tensors) -> Tensors:
        out: Tensors = {}
        hits = 0
        for name, value in state.items():
            match = re.fullmatch(pattern, name)
            if match is None:
                _add(out, name, value)
                continue
            hits += 1
            lengths = list(sizes) if sizes is not None else [value.shape[dim] // len(into)] * len(into)
            for template, part in zip(into, value.split(lengths, dim), strict=True):
                _add(out, match.expand(template), part)
        if not hits:
            raise TruthError(f"nothing matches {pattern!r}")
        return out

    return rule


def concat(parts: Sequence[str], into: str, dim: int = 0) -> Rule:
    """Join tensors along ``dim``. ``parts[0]`` is a pattern, the others and ``into`` are templates of its match."""

    def rule(state: Tensors) -> Tensors:
        out: Tensors = {}
        used: set[str] = set()
        for name in state:
            match = re.fullmatch(parts[0], name)
            if match is None:
                continue
            names = [name, *(match.expand(template) for template in parts[1:])]
            missing = [part for part in names if part not in state]
            if missing:
                raise TruthError(f"{name!r} has no partner {missing}")
            used.update(names)
            _add(out, match.expand(into), torch.cat([state[part] for part in names], dim))
        if not used:
            raise TruthError(f"nothing matches {parts[0]!r}")
        for name, value in state.items():
            if name not in used:
                _add(out, name, value)
        return out

    return rule


def stack(pattern: str, into: str, dim: int = 0) -> Rule:
    r"""Stack tensors that differ by an index, the group ``(?P<i>\d+)``, along a new axis."""

    def rule(state: Tensors) -> Tensors:
        out: Tensors = {}
        families: dict[str, dict[int, Tensor]] = {}
        for name, value in state.items():
            match = re.fullmatch(pattern, name)
            if match is None:
                _add(out, name, value)
            else:
                families.setdefault(match.expand(into), {})[int(match["i"])] = value
        if not families:
            raise TruthError(f"nothing matches {pattern!r}")
        for name, members in families.items():
            if sorted(members) != list(range(len(members))):
                raise TruthError(f"{name!r} has gaps: {sorted(members)}")
            _add(out, name, torch.stack([members[i] for i in sorted(members)], dim))
        return out

    return rule


def unstack(pattern: str, into: str, dim: int = 0) -> Rule:
    """Cut a tensor into its slices along ``dim``; ``{i}`` in the template is the slice's number."""

    def rule(state: Tensors) -> Tensors:
        out: Tensors = {}
        hits = 0
        for name, value in state.items():
            match = re.fullmatch(pattern, name)
            if match is None:
                _add(out, name, value)
                continue
            hits += 1
            for i, part in enumerate(value.unbind(dim)):
                _add(out, match.expand(into.replace("{i}", str(i))), part)
        if not hits:
            raise TruthError(f"nothing matches {pattern!r}")
        return out

    return rule


def copy(pattern: str, into: str) -> Rule:
    """One source feeds a second target too (tied weights)."""

    def rule(state: Tensors) -> Tensors:
        out = dict(state)
        for name, value in state.items():
            match = re.fullmatch(pattern, name)
            if match is not None:
                _add(out, match.expand(into), value)
        return out

    return rule


def invert(rules: Sequence[Rule], source: Mapping[str, Tensor]) -> Rule:
    """The truth of target -> source.

    Every element of the source is given a number, the numbers go through the rules, and where a number arrives is where
    the element comes back from. A source tensor none of whose elements arrive has no truth in the other direction.

    Args:
        rules: The truth of source -> target.
        source: The source's state dict; shapes and dtypes are used.

    Returns:
        A rule from the target's state dict to the source's.

    Raises:
        TruthError: If only a part of a source tensor arrives.
    """
    numbers: Tensors = {}
    total = 0
    for name, value in source.items():
        numbers[name] = torch.arange(total, total + value.numel()).reshape(value.shape)
        total += value.numel()
    arrived = apply_rules(rules, numbers)
    shapes = {name: value.shape for name, value in arrived.items()}
    flat = torch.cat([value.reshape(-1) for value in arrived.values()])
    place = torch.full((total,), -1)
    place[flat.flip(0)] = torch.arange(flat.numel()).flip(0)  # of several places, the first

    def rule(state: Tensors) -> Tensors:
        for name, shape in shapes.items():
            if name not in state or state[name].shape != shape:
                raise TruthError(f"{name!r} should have the shape {tuple(shape)}")
        values = torch.cat([state[name].reshape(-1).double() for name in shapes])
        out: Tensors = {}
        for name, number in numbers.items():
            index = place[number.reshape(-1)]
            if bool((index < 0).all()):
                continue
            if bool((index < 0).any()):
                raise TruthError(f"only a part of {name!r} comes back")
            out[name] = values[index].to(source[name].dtype).reshape(number.shape)
        return out

    return rule
