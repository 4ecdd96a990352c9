"""Rules for operations that put tensors side by side: concatenation, stacking, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lit_wsl.rebasin.algebra import Algebra
from lit_wsl.rebasin.labels import Label, depends
from lit_wsl.rebasin.rules import rule
from lit_wsl.rebasin.rules_shape import axes_of, moved
from lit_wsl.rebasin.rules_slice import take
from lit_wsl.rebasin.run import Run
from lit_wsl.rebasin.tracing import Node
from lit_wsl.rebasin.units import FIXED, Array

_FEW = 8


@rule("cat", "concatenate", "concat", moves=True)
def cat(run: Run, node: Node) -> Label:
    """Parts one behind the other."""
    labels = [run.label(ref) for ref in node.args["tensors"]]
    labels = [label for label in labels if 0 not in label.shape]
    if not labels:
        return Label(run.shape(node.outs[0]))
    return cat_labels(run.algebra, labels, axes_of(node.args.get("dim", 0), labels[0].ndim)[0])


@rule("stack", moves=True)
def stack(run: Run, node: Node) -> Label:
    """Parts side by side on a new axis."""
    labels = [run.label(ref) for ref in node.args["tensors"]]
    dim = axes_of(node.args.get("dim", 0), labels[0].ndim + 1)[0]
    lifted = []
    for label in labels:
        shape = [*label.shape[:dim], 1, *label.shape[dim:]]
        varies = [*label.varies[:dim], False, *label.varies[dim:]]
        lifted.append(moved(label, shape, lambda f: np.expand_dims(f, dim), varies))
    # A few tensors side by side (hidden states of layers and directions) keep their own units.
    result = cat_labels(run.algebra, lifted, dim, apart=len(labels) <= _FEW)
    return replace(result, varies=tuple(v or a == dim for a, v in enumerate(result.varies)))


def cat_labels(algebra: Algebra, labels: Sequence[Label], dim: int, apart: bool = False) -> Label:
    """Concatenate along ``dim``: units side by side there, and the same units on all other axes.

    With ``apart``, other axes may have other units for each place along ``dim``; labels become larger by that.
    """
    labels = [algebra.settle(label, single=True) for label in labels]
    shape = list(labels[0].shape)
    shape[dim] = sum(label.shape[dim] for label in labels)
    tainted, routed = any(label.tainted for label in labels), any(label.routed for label in labels)
    varies = tuple(any(label.varies[a] for label in labels) or a == dim for a in range(len(shape)))
    result = Label(tuple(shape), (), varies, tainted=tainted, routed=routed)
    for _ in range(4):
        before = algebra.units.losses
        labels = _pin_missing(algebra, labels, dim)
        if algebra.units.losses == before:
            break
        labels = [algebra.settle(label, single=True) for label in labels]
    slots = sorted({depends(f) - {dim} for label in labels for f in label.factors}, key=lambda s: (len(s), sorted(s)))
    factors = []
    for slot in slots:
        parts = [_slot(label, slot, dim) for label in labels]
        flat = all(part is None or part.shape[dim] == 1 for part in parts) and bool(slot)
        if flat and not (apart and all(part is not None for part in parts)):
            present = [part for part in parts if part is not None]
            for part in present[1:]:
                algebra.units.unify(present[0], part)
            factors.append(present[0])
            continue
        factors.append(_beside(algebra, labels, parts, slot, dim))
    return algebra.settle(replace(result, factors=tuple(factors)))


def _pin_missing(algebra: Algebra, labels: Sequence[Label], dim: int) -> list[Label]:
    moving = [frozenset().union(*(depends(f) for f in label.factors)) - {dim} for label in labels]
    anywhere = frozenset().union(*moving)
    fixed = [
        axis
        for axis in sorted(anywhere)
        if any(label.varies[axis] and axis not in mine for label, mine in zip(labels, moving, strict=True))
    ]
    return [algebra.fixed(label, fixed, "beside something that stays") for label in labels] if fixed else list(labels)


def _slot(label: Label, slot: frozenset[int], dim: int) -> Array | None:
    found = [f for f in label.factors if depends(f) - {dim} == slot]
    found.sort(key=lambda f: f.shape[dim] == 1)
    return found[0] if found else None


def _beside(
    algebra: Algebra, labels: Sequence[Label], parts: Sequence[Array | None], slot: frozenset[int], dim: int
) -> Array:
    shape = [labels[0].shape[a] if a in slot else 1 for a in range(labels[0].ndim)]
    pieces = []
    for label, part in zip(labels, parts, strict=True):
        shape[dim] = label.shape[dim]
        if part is not None:
            pieces.append(np.broadcast_to(part, shape))
        elif not label.varies[dim] and not slot:
            # Constant along the axis (zeros, padding): its positions may be permuted freely.
            pieces.append(algebra.units.fresh(shape[dim]).reshape(shape))
        else:
            pieces.append(np.full(shape, FIXED, dtype=np.int64))
    return np.concatenate(pieces, axis=dim)


@rule("constant_pad_nd", "pad", moves=True)
def pad(run: Run, node: Node) -> Label:
    """A constant around, or parts cut off."""
    label, amounts = run.label(node.args["self"]), node.args["pad"]
    for k in range(len(amounts) // 2):
        dim = label.ndim - 1 - k
        before, after = int(amounts[2 * k]), int(amounts[2 * k + 1])
        if before < 0 or after < 0:
            label = take(label, dim, slice(max(0, -before), label.shape[dim] - max(0, -after)))
        before, after = max(0, before), max(0, after)
        if not before and not after:
            continue
        around = []
        for size in (before, after):
            shape = [*label.shape[:dim], size, *label.shape[dim + 1 :]]
            around.append(Label(tuple(shape), (), (False,) * label.ndim))
        parts = [p for p in (around[0], label, around[1]) if p.shape[dim]]
        label = cat_labels(run.algebra, parts, dim)
    return label
