"""Rules for operations that change the shape and the order of axes: they act on the units as on the data.

Nothing is picked, repeated or computed here; every value of the tensor is in the result as it was (or broadcast).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lit_wsl.rebasin.inference.labels import MAX_LABEL, Algebra, Label, compress, depends, lifted
from lit_wsl.rebasin.inference.run import Run, rule, unknown
from lit_wsl.rebasin.inference.trace import Node
from lit_wsl.rebasin.inference.units import Array, mix


def moved(
    label: Label,
    shape: Sequence[int],
    function: Callable[[Array], Array],
    varies: Sequence[bool],
    rows: Callable[[int], int] = int,
) -> Label:
    """A label with another shape whose factors are made by a function; ``rows`` tells where an axis went."""
    factors, free = (tuple(function(factor) for factor in of) for of in (label.factors, label.free))
    segmented = None if label.segmented is None else rows(label.segmented)
    return replace(label, shape=tuple(shape), factors=factors, varies=tuple(varies), segmented=segmented, free=free)


def axes_of(value: Any, ndim: int) -> list[int]:
    """Axes counted from the front."""
    given = value if isinstance(value, (tuple, list)) else [value]
    return [int(dim) % max(ndim, 1) for dim in given]


@rule("clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous", "_conj", "lift", "view_as_real_copy")
def identity(run: Run, node: Node) -> Label:
    """The same values."""
    return run.label(node.args["self"])


@rule("copy")
def copy(run: Run, node: Node) -> Label:
    """Values of another tensor, broadcast."""
    target, source = run.label(node.args["self"]), run.label(node.args["src"])
    return replace(expand_label(source, target.shape), values=None if target.shape != source.shape else source.values)


def expand_label(label: Label, shape: Sequence[int]) -> Label:
    """Broadcast; values do not vary along the new axes."""
    label = lifted(label, len(shape))
    full = tuple(old if new == -1 else new for new, old in zip(shape, label.shape, strict=True))
    varies = tuple(v and not (old == 1 < new) for v, old, new in zip(label.varies, label.shape, full, strict=True))
    return replace(label, shape=full, varies=varies)


@rule("expand")
def expand(run: Run, node: Node) -> Label:
    """Broadcast."""
    return expand_label(run.label(node.args["self"]), node.args["size"])


def reshape_blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes of equal product, before and after a reshape.

    >>> reshape_blocks([2, 12, 7], [2, 3, 4, 7])
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first, second = [i] if i < len(old) else [], [j] if j < len(new) else []
        p, q = (old[i] if first else 1), (new[j] if second else 1)
        i, j = i + len(first), j + len(second)
        while p != q:
            if p < q:
                p, first, i = p * old[i], [*first, i], i + 1
            else:
                q, second, j = q * new[j], [*second, j], j + 1
        blocks.append((first, second))
    return blocks


def reshape_label(algebra: Algebra, label: Label, shape: Sequence[int]) -> Label:
    """View as another shape."""
    shape = tuple(shape)
    if shape == label.shape:
        return label
    varies = _reshape_varies(label, shape)
    if 0 in shape or 0 in label.shape:
        return Label(shape, (), varies, label.tainted, label.values, label.routed, label.segments)
    if not label.factors:
        free = [reshaped(one, label.shape, shape) for one in (*label.free, *_joined_with_varying(label, shape))]
        plain = Label(shape, (), varies, label.tainted, label.values, label.routed, label.segments)
        return replace(plain, free=tuple(one for one in free if one is not None))
    label = algebra.settle(label, single=True)
    factors = []
    for factor in label.factors:
        found = reshaped(factor, label.shape, shape)
        if found is None:
            algebra.units.freeze(factor, "reshaped together with too many other positions")
        else:
            factors.append(found)
    factors = _one_each(algebra, label.factors, factors)
    return replace(label, shape=shape, factors=tuple(factors), varies=varies, free=())


def reshaped(factor: Array, old: Sequence[int], new: Sequence[int]) -> Array | None:
    """A factor of a tensor that is viewed as another shape; None if it became too large."""
    mine = depends(factor)
    full, target = list(factor.shape), [1] * len(new)
    for before, after in reshape_blocks(old, new):
        if mine.intersection(before):
            for axis in before:
                full[axis] = old[axis]
            for axis in after:
                target[axis] = new[axis]
    if int(np.prod(full)) > MAX_LABEL:
        return None
    return compress(np.broadcast_to(factor, full).reshape(target))


def _joined_with_varying(label: Label, shape: Sequence[int]) -> list[Array]:
    """The orders along axes where nothing varies, if they join one where something does; see ``Label.free``."""
    still = []
    for before, _ in reshape_blocks(label.shape, shape):
        wide = [axis for axis in before if label.shape[axis] > 1]
        if any(label.varies[axis] for axis in wide):
            still += [axis for axis in wide if not label.varies[axis]]
    sizes = [[n if a == axis else 1 for a, n in enumerate(label.shape)] for axis in still]
    return [np.arange(max(size)).reshape(size) for size in sizes]


def _reshape_varies(label: Label, shape: Sequence[int]) -> tuple[bool, ...]:
    varies = [True] * len(shape)
    if 0 in shape or 0 in label.shape:
        return tuple(varies)
    for before, after in reshape_blocks(label.shape, shape):
        wide = [axis for axis in before if label.shape[axis] > 1]
        for axis in after:
            varies[axis] = any(label.varies[a] for a in wide)
    return tuple(varies)


def _one_each(algebra: Algebra, before: Sequence[Array], after: list[Array]) -> list[Array]:
    """Two independent permutations that were put onto one axis: the larger one stays, or the smaller, if later."""
    if len(after) < 2 or len(after) != len(before):
        return after
    kept: list[int] = []
    order = sorted(range(len(after)), key=lambda k: (-after[k].size, k))
    for k in reversed(order) if algebra.later else order:
        clash = [
            other
            for other in range(len(after))
            if other != k
            and depends(after[k]) & depends(after[other])
            and not depends(before[k]) & depends(before[other])
        ]
        algebra.clashes += [(before[other], before[k]) for other in clash if other < k]
        if set(clash).intersection(kept):
            algebra.conflicts += 1
            algebra.units.freeze(before[k], "shares an axis with another independent permutation")
        else:
            kept.append(k)
    return [after[k] for k in sorted(kept)]


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", moves=True)
def view(run: Run, node: Node) -> Label:
    """View as another shape."""
    if "size" in node.args and isinstance(node.args["size"], tuple):
        return reshape_label(run.algebra, run.label(node.args["self"]), run.shape(node.outs[0]))
    return run.label(node.args["self"])  # view as another dtype


@rule("as_strided")
def as_strided(run: Run, node: Node) -> Sequence[Label]:
    """Other strides; known only where they describe the same tensor (new strides for axes of size 1)."""
    ref, size, stride = node.args["self"], node.args["size"], node.args["stride"]
    info = run.trace.tensors[ref.number]
    same = all(a == b or n == 1 for a, b, n in zip(info.stride, stride, size, strict=False))
    if tuple(size) == info.shape and same and node.args.get("storage_offset") is None:
        return [run.label(ref)]
    return unknown(run, node)


@rule("view_as_complex", "view_as_real")
def complex_view(run: Run, node: Node) -> Label:
    """Real and imaginary part as a last axis of two, whose order stays."""
    label = run.label(node.args["self"])
    if node.name.endswith("real"):
        return moved(label, (*label.shape, 2), lambda f: f[..., None], (*label.varies, True))
    last = label.ndim - 1
    label = run.algebra.pinned(label, [last], "real and imaginary part")
    return moved(label, label.shape[:last], lambda f: f[..., 0], label.varies[:last])


@rule("squeeze", "unsqueeze", moves=True)
def squeeze(run: Run, node: Node) -> Label:
    """Axes of size 1 go or come."""
    label = run.label(node.args["self"])
    shape = run.shape(node.outs[0])
    if node.name.startswith("aten.unsqueeze"):
        dim = int(node.args["dim"]) % (label.ndim + 1)
        varies = [*label.varies[:dim], False, *label.varies[dim:]]
        return moved(label, shape, lambda f: np.expand_dims(f, dim), varies, lambda a: a + (a >= dim))
    dims = axes_of(node.args["dim"], label.ndim) if "dim" in node.args else list(range(label.ndim))
    gone = [axis for axis in dims if label.shape[axis] == 1]
    stay = [axis for axis in range(label.ndim) if axis not in gone]
    varies = [label.varies[a] for a in stay]
    return moved(label, shape, lambda f: np.squeeze(f, tuple(gone)), varies, stay.index)


@rule("permute", "transpose", "t", "numpy_T", "swapaxes", "movedim", moves=True)
def permute(run: Run, node: Node) -> Label:
    """Axes in another order."""
    label = run.label(node.args["self"])
    order = permutation_of(node, label.ndim)
    still = [a for a in order if label.shape[a] > 1 and not any(a in depends(f) for f in label.factors)]
    turned = permute_label(label, order)
    return turned if still == sorted(still) else replace(turned, history=mix(label.history, -3, *still))


def permutation_of(node: Node, ndim: int) -> list[int]:
    """The order that a node brings axes into: for each axis of the result, that of its argument."""
    order = list(range(ndim))
    if "dims" in node.args:
        return axes_of(node.args["dims"], ndim)
    if "dim0" in node.args:
        i, j = axes_of((node.args["dim0"], node.args["dim1"]), ndim)
        order[i], order[j] = order[j], order[i]
        return order
    return order[::-1]


def permute_label(label: Label, order: Sequence[int]) -> Label:
    """Axes in another order."""
    shape = [label.shape[a] for a in order]
    return moved(label, shape, lambda f: f.transpose(order), [label.varies[a] for a in order], list(order).index)


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", moves=True)
def shuffle(run: Run, node: Node) -> Label:
    """Channels to pixels, pixels to channels, channels among channels: a view, a permutation, a view."""
    label = run.label(node.args["self"])
    *batch, c, h, w = label.shape
    n = len(batch)
    if "groups" in node.args:
        g = int(node.args["groups"])
        steps: tuple[list[int], list[int], list[int]] = ([g, c // g, h, w], [1, 0, 2, 3], [c, h, w])
    elif "upscale_factor" in node.args:
        r = int(node.args["upscale_factor"])
        steps = ([c // r**2, r, r, h, w], [0, 3, 1, 4, 2], [c // r**2, h * r, w * r])
    else:
        r = int(node.args["downscale_factor"])
        steps = ([c, h // r, r, w // r, r], [0, 2, 4, 1, 3], [c * r**2, h // r, w // r])
    split_up = reshape_label(run.algebra, label, [*batch, *steps[0]])
    turned = permute_label(split_up, [*range(n), *(n + k for k in steps[1])])
    return reshape_label(run.algebra, turned, [*batch, *steps[2]])


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


def cut(label: Label, before: Label, dim: int, *how: int) -> Label:
    """A label with a note of what was done to one of its axes before, unless units stand there and are followed."""
    if any(dim in depends(factor) for factor in before.factors):
        return label
    return replace(label, history=mix(before.history, dim, *how))


@rule("slice", "narrow", moves=True)
def slices(run: Run, node: Node) -> Label:
    """A slice of one axis."""
    label, args = run.label(node.args["self"]), node.args
    dim = axes_of(args["dim"], label.ndim)[0]
    label = run.algebra.unsegmented(label, [dim])
    where = slice(args.get("start"), args.get("end"), args.get("step", 1)).indices(label.shape[dim])
    taken = take(label, dim, slice(*where))
    return taken if taken.shape == label.shape else cut(taken, label, dim, *where)


def select_label(label: Label, dim: int, index: int) -> Label:
    """One position of an axis; the axis goes."""
    one = take(label, dim, np.array([index % label.shape[dim]]))
    stay = [a for a in range(label.ndim) if a != dim]
    varies = [one.varies[a] for a in stay]
    return moved(one, [one.shape[a] for a in stay], lambda f: np.squeeze(f, dim), varies, stay.index)


MAX_STACK = 64
"""More places on an axis than this are a table (of tokens, of positions), not a stack of parameters."""


def ask_for_stack(run: Run, label: Label, dim: int) -> None:
    """Parameters stacked on an axis and taken apart again may have units of their own: ask for them."""
    stack = next((run.maker(f) for f in label.factors if depends(f) == {dim}), None)
    if stack is None or label.shape[dim] > MAX_STACK:
        return
    for factor in label.factors:
        if dim not in depends(factor):
            run.wish(run.maker(factor), stack)


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
    ask_for_stack(run, label, dim)
    return cut(select_label(label, dim, index), label, dim, index)


@rule("unbind", moves=True)
def unbind(run: Run, node: Node) -> list[Label]:
    """All positions of an axis, one by one."""
    label = run.label(node.args["self"])
    dim = axes_of(node.args["dim"], label.ndim)[0]
    ask_for_stack(run, label, dim)
    return [cut(select_label(label, dim, index), label, dim, index) for index in range(label.shape[dim])]


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
        parts.append(cut(take(label, dim, slice(start, start + size)), label, dim, start, size))
        start += size
    return parts


@rule("flip", moves=True)
def flip(run: Run, node: Node) -> Label:
    """Axes backwards."""
    label = run.label(node.args["self"])
    dims = tuple(axes_of(node.args["dims"], label.ndim))
    turned = moved(label, label.shape, lambda f: np.flip(f, dims), label.varies)
    for dim in dims:
        turned = cut(turned, replace(label, history=turned.history), dim, -1)
    return turned


@rule("roll", moves=True)
def roll(run: Run, node: Node) -> Label:
    """Axes rotated."""
    label = run.label(node.args["self"])
    shifts = node.args["shifts"] if isinstance(node.args["shifts"], tuple) else (node.args["shifts"],)
    if not node.args.get("dims"):
        run.algebra.freeze(label, "rolled as a whole")
        return Label(label.shape)
    dims = axes_of(node.args["dims"], label.ndim)
    turned = moved(label, label.shape, lambda f: np.roll(f, tuple(shifts), tuple(dims)), label.varies)
    for dim, shift in zip(dims, shifts, strict=True):
        turned = cut(turned, replace(label, history=turned.history), dim, -2, int(shift))
    return turned


@rule("repeat", moves=True)
def repeat(run: Run, node: Node) -> Label:
    """Tiles."""
    times = tuple(int(n) for n in node.args["repeats"])
    label = lifted(run.label(node.args["self"]), len(times))
    varies = [v and n > 1 for v, n in zip(label.varies, label.shape, strict=True)]

    def tile(factor: Array) -> Array:
        return np.tile(factor, [times[a] if factor.shape[a] > 1 else 1 for a in range(factor.ndim)])

    tiled = moved(label, run.shape(node.outs[0]), tile, varies)
    free = []
    for axis, (count, size) in enumerate(zip(times, label.shape, strict=True)):
        if count > 1 and varies[axis] and not label.factors:
            free.append(np.repeat(np.arange(count), size).reshape([-1 if a == axis else 1 for a in range(len(times))]))
    return replace(tiled, free=(*tiled.free, *free))


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
