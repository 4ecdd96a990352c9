"""Rules for diagonals: what stands on them has the same unit on both axes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lit_wsl.rebasin.inference.labels import Label, depends
from lit_wsl.rebasin.inference.rules_compute import ORDER
from lit_wsl.rebasin.inference.rules_shape import axes_of, take
from lit_wsl.rebasin.inference.run import Run, rule
from lit_wsl.rebasin.inference.trace import Node


@rule("eye")
def eye(run: Run, node: Node) -> Label:
    """Ones on the diagonal: the same in any order of rows and columns alike."""
    shape = run.shape(node.outs[0])
    if len(set(shape)) != 1:
        return Label(shape)
    units = run.algebra.units.fresh(shape[0])
    return Label(shape, (units[:, None], units[None, :]))


@rule("diag_embed")
def diag_embed(run: Run, node: Node) -> Label:
    """Positions of the last axis on the diagonal of two new ones."""
    label, shape = run.label(node.args["self"]), run.shape(node.outs[0])
    one, two = axes_of((node.args.get("dim1", -2), node.args.get("dim2", -1)), len(shape))
    last = label.ndim - 1
    if node.args.get("offset"):
        label = run.algebra.pinned(label, [last], ORDER)
    rest = [axis for axis in range(len(shape)) if axis not in (one, two)]
    factors = []
    for factor in label.factors:
        for axis in (one, two) if last in depends(factor) else (one,):
            sizes = dict(zip([*rest, axis], factor.shape, strict=True))
            order = np.argsort([*rest, axis])
            factors.append(factor.transpose(order).reshape([sizes.get(k, 1) for k in range(len(shape))]))
    varies = dict(zip(rest, label.varies, strict=False))
    return replace(
        label, shape=shape, factors=tuple(factors), varies=tuple(varies.get(k, True) for k in range(len(shape)))
    )


@rule("diagonal", "diagonal_copy", "trace")
def diagonal(run: Run, node: Node) -> Label:
    """The diagonal of two axes, a new last axis; its sum."""
    label = run.algebra.settle(run.label(node.args["self"]))
    one, two = axes_of((node.args.get("dim1", 0), node.args.get("dim2", 1)), label.ndim)
    size = min(label.shape[one], label.shape[two])
    moved = {axis for factor in label.factors for axis in depends(factor)}
    alone = len({one, two} & moved) == 1 and all(label.varies[axis] for axis in (one, two))
    if node.args.get("offset") or alone or label.shape[one] != label.shape[two]:
        label = run.algebra.pinned(label, [one, two], ORDER)
    label = take(take(label, one, slice(0, size)), two, slice(0, size))
    rest = [axis for axis in range(label.ndim) if axis not in (one, two)]
    shape = (*(label.shape[axis] for axis in rest), size)
    whole = replace(label, shape=shape, factors=(), varies=(*(label.varies[axis] for axis in rest), True))
    parts = [whole]
    for factor in label.factors:
        turned = factor.transpose([*rest, one, two])
        if 1 in turned.shape[-2:]:
            found = turned.reshape(*turned.shape[:-2], -1)
        else:
            found = np.diagonal(turned, axis1=-2, axis2=-1)
        parts.append(replace(whole, factors=(found,), varies=(False,) * len(shape)))
    if parts[1:]:
        parts[0] = replace(whole, varies=(False,) * len(shape))
    result = replace(run.algebra.join(parts, shape), varies=whole.varies)
    return run.algebra.reduce(result, [len(shape) - 1], keepdim=False) if node.name == "aten.trace" else result
