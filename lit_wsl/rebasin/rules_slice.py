"""Rules for operations that pick positions of an axis by place: slices, splits, rotations, tiles, windows.

Which positions are picked is said by plain numbers, the same for every input: the units are picked as the data are.
Positions that are picked by integer tensors are in :mod:`~lit_wsl.rebasin.rules_index`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_wsl.rebasin.labels import Label, lifted
from lit_wsl.rebasin.rules import rule
from lit_wsl.rebasin.rules_shape import axes_of, moved
from lit_wsl.rebasin.run import Run
from lit_wsl.rebasin.tracing import Node
from lit_wsl.rebasin.units import Array


def take(label: Label, dim: int, index: Array | slice) -> Label:
    """Some positions of one axis, by a slice or a 1-D index."""
    size = len(range(label.shape[dim])[index]) if isinstance(index, slice) else len(index)
    shape = [*label.shape[:dim], size, *label.shape[dim + 1 :]]

    def pick(factor: Array) -> Array:
        if factor.shape[dim] == 1:
            return factor
        where: list[Any] = [slice(None)] * factor.ndim
        where[dim] = index
        return factor[tuple(where)]

    return moved(label, shape, pick, label.varies)


@rule("slice", "narrow", moves=True)
def slices(run: Run, node: Node) -> Label:
    """A slice of one axis."""
    label, args = run.label(node.args["self"]), node.args
    dim = axes_of(args["dim"], label.ndim)[0]
    label = run.algebra.unsegmented(label, [dim])
    return take(label, dim, slice(args.get("start"), args.get("end"), args.get("step", 1)))


def select_label(label: Label, dim: int, index: int) -> Label:
    """One position of an axis; the axis goes."""
    one = take(label, dim, np.array([index % label.shape[dim]]))
    stay = [a for a in range(label.ndim) if a != dim]
    varies = [one.varies[a] for a in stay]
    return moved(one, [one.shape[a] for a in stay], lambda f: np.squeeze(f, dim), varies, stay.index)


@rule("select", moves=True)
def select(run: Run, node: Node) -> Label:
    """One position of an axis."""
    label = run.label(node.args["self"])
    dim = axes_of(node.args["dim"], label.ndim)[0]
    index = node.args["index"]
    label = run.algebra.unsegmented(label, [dim])
    if not isinstance(index, int):
        run.algebra.freeze(label, "selected by a computed position")
        return Label(run.shape(node.outs[0]))
    return select_label(label, dim, index)


@rule("unbind", moves=True)
def unbind(run: Run, node: Node) -> list[Label]:
    """All positions of an axis, one by one."""
    label = run.label(node.args["self"])
    dim = axes_of(node.args["dim"], label.ndim)[0]
    return [select_label(label, dim, index) for index in range(label.shape[dim])]


@rule(
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "chunk",
    "unsafe_chunk",
    "tensor_split",
    moves=True,
)
def split(run: Run, node: Node) -> list[Label]:
    """Consecutive parts of an axis."""
    label = run.label(node.args["self"])
    dim = axes_of(node.args["dim"], label.ndim)[0]
    label = run.algebra.unsegmented(label, [dim])
    parts, start = [], 0
    for out in node.outs:
        size = run.shape(out)[dim]
        parts.append(take(label, dim, slice(start, start + size)))
        start += size
    return parts


@rule("flip", moves=True)
def flip(run: Run, node: Node) -> Label:
    """Axes backwards."""
    label = run.label(node.args["self"])
    dims = tuple(axes_of(node.args["dims"], label.ndim))
    return moved(label, label.shape, lambda f: np.flip(f, dims), label.varies)


@rule("roll", moves=True)
def roll(run: Run, node: Node) -> Label:
    """Axes rotated."""
    label = run.label(node.args["self"])
    shifts = node.args["shifts"] if isinstance(node.args["shifts"], tuple) else (node.args["shifts"],)
    if not node.args.get("dims"):
        run.algebra.freeze(label, "rolled as a whole")
        return Label(label.shape)
    dims = axes_of(node.args["dims"], label.ndim)
    return moved(label, label.shape, lambda f: np.roll(f, tuple(shifts), tuple(dims)), label.varies)


@rule("repeat", moves=True)
def repeat(run: Run, node: Node) -> Label:
    """Tiles."""
    times = tuple(int(n) for n in node.args["repeats"])
    label = lifted(run.label(node.args["self"]), len(times))
    varies = [v and n > 1 for v, n in zip(label.varies, label.shape, strict=True)]

    def tile(factor: Array) -> Array:
        return np.tile(factor, [times[a] if factor.shape[a] > 1 else 1 for a in range(factor.ndim)])

    return moved(label, run.shape(node.outs[0]), tile, varies)


@rule("unfold", moves=True)
def unfold(run: Run, node: Node) -> Label:
    """Sliding windows of one axis, a new last axis."""
    label, args = run.label(node.args["self"]), node.args
    dim, size, step = axes_of(args["dimension"], label.ndim)[0], int(args["size"]), int(args["step"])
    count = (label.shape[dim] - size) // step + 1
    index = np.arange(count)[:, None] * step + np.arange(size)

    def windows(factor: Array) -> Array:
        if factor.shape[dim] == 1:
            return factor[..., None]
        return np.moveaxis(np.take(factor, index, axis=dim), dim + 1, -1)

    shape = [*label.shape[:dim], count, *label.shape[dim + 1 :], size]
    return moved(label, shape, windows, [*label.varies, label.varies[dim]])
