"""Rules for operations that pick or put positions: by integer tensors (tables, gathers, scatters, routing), diagonals.

Indices that do not depend on the inputs (a table of relative positions) act on units as on data. Indices that do
(tokens) could be others tomorrow: what they pick from keeps its order. What stands on a diagonal has the same unit on
both axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lit_wsl.rebasin.inference.labels import MAX_LABEL, Label, compress, depends, lifted
from lit_wsl.rebasin.inference.rules_compute import ORDER, ask_for_joint
from lit_wsl.rebasin.inference.rules_shape import axes_of, permute_label, take
from lit_wsl.rebasin.inference.run import ROUTING_RULES, SEGMENT_RULES, Run, rule, unknown
from lit_wsl.rebasin.inference.trace import Node, Ref, flat_refs
from lit_wsl.rebasin.inference.units import Array

SEGMENT_RULES.update(
    f"aten.{name}"
    for name in (
        *("_grouped_mm", "bmm", "mul", "add", "add_", "clone", "_to_copy", "detach", "alias", "copy_"),
        *("slice", "split", "split_with_sizes", "select", "transpose", "unsqueeze", "squeeze", "expand"),
    )
)

ROUTING_RULES.update(
    f"aten.{name}"
    for name in ("histc", "bincount", "cumsum", "_grouped_mm", "index", "index_select", "embedding")
    + ("gather", "take_along_dim", "scatter", "scatter_")
)


def _one_factor(label: Label, dim: int) -> Array | None:
    """The units along an axis, if one factor of that axis alone is all there is."""
    if len(label.factors) == 1 and depends(label.factors[0]) == {dim}:
        return label.factors[0].ravel()
    return None


@rule("topk", "sort", "argsort")
def choose(run: Run, node: Node) -> list[Label]:
    """The largest along an axis; the positions name units of that axis."""
    label = run.algebra.settle(run.label(node.args["self"]))
    dim = int(node.args.get("dim", -1)) % max(label.ndim, 1)
    outs = list(flat_refs(node.outs))
    run.algebra.sign(label, 0)
    units = _one_factor(label, dim)
    if units is None:
        label = run.algebra.pinned(label, [dim], ORDER)
    plain = [replace(label, shape=run.shape(out), factors=(), varies=(), values=None) for out in outs]
    if units is None:
        plain = [replace(one, factors=label.factors) for one in plain]
    if label.values is not None:  # experts sorted by number: rows stand in an order of their own now
        plain[0] = replace(plain[0], values=label.values, routed=True)
        return [plain[0], *(replace(one, routed=True) for one in plain[1:])]
    if units is not None:
        plain[-1] = replace(plain[-1], values=units)
    return plain


@rule("histc", "bincount")
def count(run: Run, node: Node) -> Sequence[Label]:
    """How often each expert was chosen."""
    label = run.label(node.args["self"])
    shape = run.shape(node.outs[0])
    whole = node.name.endswith("bincount") or (
        node.args.get("min") == 0 and node.args.get("max") == node.args.get("bins", 0) - 1
    )
    if label.values is None or not whole or len(label.values) != shape[0]:
        return unknown(run, node)
    return [Label(shape, (label.values,), tainted=True, routed=True)]


@rule("cumsum")
def running_sum(run: Run, node: Node) -> Label:
    """Counts of experts summed up are the offsets of their rows; otherwise the order of positions matters."""
    label = run.algebra.settle(run.label(node.args["self"]))
    units = _one_factor(label, 0)
    if label.ndim == 1 and label.routed and units is not None:
        return Label(label.shape, (), tainted=True, routed=True, segments=units)
    label = run.algebra.pinned(label, [int(node.args["dim"]) % max(label.ndim, 1)], ORDER)
    run.algebra.sign(label, 0)
    return replace(label, values=None)


def _meet(run: Run, weight: Label, units: Array | None) -> None:
    """The router's experts are those of the weights' first axis."""
    met = False
    for factor in weight.factors:
        if 0 not in depends(factor):
            continue
        experts = run.algebra.blocks(factor, range(1, weight.ndim))
        if experts is None:
            continue
        if units is not None and len(units) == experts.size:
            run.algebra.units.unify(experts.ravel(), units)
            met = True
        else:
            run.algebra.units.freeze(experts, "chosen by a routing that is not followed")
    if not met and units is not None:
        run.algebra.units.freeze(units, "sends rows to experts that stay")


@rule("_grouped_mm")
def grouped_product(run: Run, node: Node) -> Sequence[Label]:
    """Rows, segment by segment, times the matrix of the segment's expert."""
    rows, weight = (run.algebra.settle(run.label(node.args[name])) for name in ("self", "mat2"))
    if rows.ndim != 2 or weight.ndim != 3 or not isinstance(node.args.get("offs"), Ref):
        return unknown(run, node)
    ask_for_joint(run, weight, 0)
    _meet(run, weight, run.label(node.args["offs"]).segments)
    experts, k, m = weight.shape
    if rows.segmented is None:
        rows = run.algebra.pinned(rows, [0], "rows sent to experts")
    by_expert = replace(rows, shape=(experts, k), varies=(rows.segmented is not None, rows.varies[1]))
    sizes = {"e": experts, "k": k, "m": m}
    product = run.algebra.contract([by_expert, weight], ["ek", "ekm"], "em", sizes)
    # The experts themselves do not label rows: the routing sends each row to where its expert stands.
    factors = tuple(f for f in product.factors if depends(f) != {0})
    shape = run.shape(node.outs[0])
    return [Label(shape, factors, tainted=True, routed=True, segmented=0)]


def index_by_expert(run: Run, node: Node, index: Any, table: Any) -> Label | None:
    """Weights or biases picked by the experts that rows were sent to; None if the index names none."""
    if not isinstance(index, Ref):
        return None
    chosen, label = run.label(index), run.algebra.settle(run.label(table))
    if chosen.values is None or not label.ndim or len(chosen.values) != label.shape[0]:
        return None
    if chosen.ndim == 1:
        ask_for_joint(run, label, 0)
        _meet(run, label, chosen.values)
        factors = tuple(f for f in label.factors if depends(f) != {0})
        return Label(run.shape(node.outs[0]), factors, tainted=True, routed=True, segmented=0)
    # Several experts for each row: what is inside of them is labelled alike for all.
    _meet(run, label, chosen.values)
    kept = _any_expert(run, label, 0)
    factors = tuple(f.reshape((1,) * chosen.ndim + f.shape[1:]) for f in kept.factors)
    return Label(run.shape(node.outs[0]), factors, tainted=True)


def _any_expert(run: Run, label: Label, dim: int) -> Label:
    """What labels of all experts have in common: the experts themselves are where the routing says."""
    factors = [f for f in label.factors if depends(f) != {dim}]
    return run.algebra.unsegmented(replace(label, factors=tuple(factors), segmented=dim))


PICKED = "picked by positions that depend on the input"


def index_label(run: Run, label: Label, arrays: Sequence[Array | None], shape: Sequence[int], fixed: bool) -> Label:
    """Advanced indexing, ``label[arrays]`` with None for whole axes."""
    arrays = [*arrays, *[None] * (label.ndim - len(arrays))]
    dims = [k for k, array in enumerate(arrays) if array is not None]
    label = run.algebra.settle(label)
    if fixed:
        label = run.algebra.pinned(label, dims, PICKED)
    given = [array for array in arrays if array is not None]
    result = np.broadcast_shapes(*(array.shape for array in given)) if given else ()
    factors = []
    for factor in label.factors:
        hit = depends(factor).intersection(dims)
        size = int(np.prod(result)) if hit else 1
        if size * int(np.prod([n for a, n in enumerate(factor.shape) if a not in dims])) > MAX_LABEL:
            run.algebra.units.freeze(factor, "too many positions are picked at once")
            continue
        full = np.broadcast_to(factor, [label.shape[a] if a in hit else n for a, n in enumerate(factor.shape)])
        none = np.zeros(result if hit else (1,) * len(result), dtype=np.int64)
        where = tuple(
            slice(None) if array is None else (np.broadcast_to(array, result) if a in hit else none)
            for a, array in enumerate(arrays)
        )
        factors.append(compress(full[where]))
    front = 0 if dims != list(range(dims[0], dims[0] + len(dims))) else dims[0]
    rest = [label.varies[a] for a in range(label.ndim) if a not in dims]
    varies = [*rest[:front], *(True,) * len(result), *rest[front:]]
    return replace(label, shape=tuple(shape), factors=tuple(factors), varies=tuple(varies), values=None)


def index_arrays(run: Run, node: Node, refs: Sequence[Any]) -> tuple[list[Array | None], bool] | None:
    """The values of index tensors (masks as positions) and whether they depend on the inputs; None if not known."""
    arrays: list[Array | None] = []
    tainted = False
    for ref in refs:
        if not isinstance(ref, Ref):
            arrays.append(None)
            continue
        values = run.integers(node, ref)
        if values is None:
            return None
        tainted |= run.label(ref).tainted
        _freeze_index(run, ref)
        found = values.cpu().numpy()
        if found.dtype == np.bool_ or found.dtype == np.uint8:
            arrays.extend(np.asarray(axis, dtype=np.int64) for axis in np.nonzero(found))
        else:
            arrays.append(found.astype(np.int64))
    return arrays, tainted


def _freeze_index(run: Run, ref: Any) -> None:
    """Positions that are computed from parameters: a permutation of these would pick others."""
    label = run.label(ref)
    if label.values is not None:
        run.algebra.units.freeze(label.values, "routing indices that pick positions")
    for factor in label.factors:
        run.algebra.units.freeze(factor, "positions are computed from it")


@rule("index", "_unsafe_index", moves=True)
def index(run: Run, node: Node) -> Sequence[Label]:
    """``self[indices]``."""
    refs, label = node.args["indices"], run.label(node.args["self"])
    named = [k for k, ref in enumerate(refs) if isinstance(ref, Ref) and run.label(ref).values is not None]
    if named == [0] and len(refs) == 1:
        routed = index_by_expert(run, node, refs[0], node.args["self"])
        if routed is not None:
            return [routed]
    elif len(named) == 1 and (picked := _picked(run, label, named[0], run.label(refs[named[0]]).values)) is not None:
        # What experts gave, for each row that of the one it was sent to: ``outputs[arange, chosen]``.
        found = index_arrays(run, node, [ref if k not in named else None for k, ref in enumerate(refs)])
        if found is None:
            return unknown(run, node)
        found[0][named[0]] = np.zeros(run.shape(refs[named[0]]), dtype=np.int64)
        return [_indexed(run, node, picked, *found)]
    found = index_arrays(run, node, refs)
    if found is None:
        return unknown(run, node)
    return [_indexed(run, node, label, *found)]


def _picked(run: Run, label: Label, dim: int, named: Array | None) -> Label | None:
    """What is picked along an axis by who was chosen: units there change places with the router's rows."""
    label = run.algebra.settle(label)
    if named is None or dim >= label.ndim or len(named) != label.shape[dim]:
        return None
    _meet(run, permute_label(label, [dim, *(a for a in range(label.ndim) if a != dim)]), named)
    return _any_expert(run, label, dim)


def _indexed(run: Run, node: Node, label: Label, arrays: Sequence[Array | None], tainted: bool) -> Label:
    result = index_label(run, label, arrays, run.shape(node.outs[0]), tainted)
    routed = any(run.label(ref).routed for ref in flat_refs(tuple(node.args.values())))
    return replace(result, routed=routed or label.routed)


@rule("index_select", "embedding", moves=True)
def index_select(run: Run, node: Node) -> Sequence[Label]:
    """Positions of one axis; rows of a table."""
    table = node.name == "aten.embedding"
    if table or (node.args["dim"] == 0 and run.label(node.args["index"]).ndim == 1):
        names = ("indices", "weight") if table else ("index", "self")
        if (routed := index_by_expert(run, node, *(node.args[name] for name in names))) is not None:
            return [routed]
    found = index_arrays(run, node, [node.args["indices" if table else "index"]])
    if found is None:
        return unknown(run, node)
    label = run.label(node.args["weight" if table else "self"])
    dim = 0 if table else int(node.args["dim"]) % max(label.ndim, 1)
    return [_indexed(run, node, label, [None] * dim + found[0], found[1])]


@rule("gather", "take_along_dim")
def gather(run: Run, node: Node) -> Sequence[Label]:
    """Other positions along one axis for each place."""
    label = run.label(node.args["self"])
    dim = int(node.args["dim"]) % max(label.ndim, 1)
    picked = _picked(run, label, dim, run.label(node.args["index"]).values)
    if picked is None:
        run.algebra.freeze_named(run.label(node.args["index"]))
        picked = run.algebra.pinned(label, [dim], PICKED)
    label = picked
    shape = run.shape(node.outs[0])
    factors = tuple(f[tuple(slice(0, n if f.shape[a] > 1 else 1) for a, n in enumerate(shape))] for f in label.factors)
    where = run.algebra.settle(run.label(node.args["index"]))
    result = replace(label, shape=shape, factors=factors, varies=(True,) * len(shape), values=None)
    return [run.algebra.join([result, replace(where, varies=(False,) * where.ndim)], shape)]


@rule("index_add", "index_copy", "index_reduce")
def index_add(run: Run, node: Node) -> Label:
    """Rows added at positions of one axis."""
    dim = int(node.args["dim"])
    target, source = run.label(node.args["self"]), run.label(node.args["source"])
    _freeze_index(run, node.args["index"])
    dim %= max(target.ndim, 1)
    return _put(run, target, source, [dim], [dim])


@rule("segment_reduce")
def segment_reduce(run: Run, node: Node) -> Label:
    """Rows reduced segment by segment."""
    label = run.label(node.args["data"])
    dim = int(node.args["axis"]) % max(label.ndim, 1)
    for name in ("lengths", "indices", "offsets"):
        _freeze_index(run, node.args.get(name))
    label = run.algebra.pinned(label, [dim], PICKED)
    run.algebra.sign(label, 0)
    return replace(label, shape=run.shape(node.outs[0]), varies=(True,) * label.ndim)


@rule("_pack_padded_sequence")
def pack(run: Run, node: Node) -> list[Label]:
    """Steps of sequences of several lengths one behind the other, without their padding."""
    label = run.algebra.pinned(run.label(node.args["input"]), [0, 1], PICKED)
    _freeze_index(run, node.args["lengths"])
    run.algebra.sign(label, 0)
    shape = run.shape(node.outs[0])
    factors = tuple(f.reshape(1, *f.shape[2:]) for f in label.factors)
    packed = replace(label, shape=shape, factors=factors, varies=(True, *label.varies[2:]))
    return [packed, Label(run.shape(node.outs[1]), tainted=True)]


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(run: Run, node: Node) -> list[Label]:
    """Rows of a table, summed up bag by bag."""
    for name in ("indices", "offsets"):
        _freeze_index(run, node.args[name])
    weights = run.label(node.args.get("per_sample_weights"))
    run.algebra.pinned(weights, range(weights.ndim), PICKED)
    label = run.algebra.pinned(run.label(node.args["weight"]), [0], PICKED)
    run.algebra.sign(label, 0)
    shapes = [run.shape(out) for out in flat_refs(node.outs)]
    like = replace(label, shape=shapes[0], varies=(True, True), tainted=True)
    return [like if shape == like.shape else Label(shape, tainted=True) for shape in shapes]


@rule(
    "_sparse_coo_tensor_with_dims_and_tensors",
    "_sparse_coo_tensor_unsafe",
    "sparse_coo_tensor",
    "_sparse_compressed_tensor_unsafe",
)
def sparse_tensor(run: Run, node: Node) -> Label:
    """Values at positions; axes behind the positions are carried along."""
    for name in ("indices", "compressed_indices", "plain_indices", "crow_indices", "col_indices"):
        _freeze_index(run, node.args.get(name))
    values, shape = run.algebra.pinned(run.label(node.args["values"]), [0], PICKED), run.shape(node.outs[0])
    run.algebra.sign(values, 0)
    sparse = len(shape) - (values.ndim - 1)
    factors = tuple(f.reshape((1,) * sparse + f.shape[1:]) for f in values.factors)
    return Label(shape, factors, tainted=True)


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(run: Run, node: Node) -> Sequence[Label]:
    """``self[indices] = values``."""
    found = index_arrays(run, node, node.args["indices"])
    target, source = run.label(node.args["self"]), run.label(node.args["values"])
    if found is None:
        return unknown(run, node)
    dims = [k for k, array in enumerate(found[0]) if array is not None]
    given = [array for array in found[0] if array is not None]
    if dims != list(range(dims[0], dims[0] + len(dims))):
        return unknown(run, node)
    count = len(np.broadcast_shapes(*(array.shape for array in given)))
    source = lifted(source, count + target.ndim - len(dims))
    return [_put(run, target, source, dims, list(range(dims[0], dims[0] + count)))]


def _put(run: Run, target: Label, source: Label, dims: Sequence[int], where: Sequence[int]) -> Label:
    """Write ``source``, whose axes ``where`` run over picked positions of the axes ``dims`` of ``target``."""
    algebra = run.algebra
    target, source = algebra.pinned(target, dims, PICKED), algebra.pinned(source, where, PICKED)
    rest = [a for a in range(source.ndim) if a not in where]
    front = dims[0]

    def fit(items: Sequence[Any], one: Any) -> list[Any]:
        kept = [items[a] for a in rest]
        return [*kept[:front], *[one] * len(dims), *kept[front:]]

    fitted = replace(
        source,
        shape=tuple(fit(source.shape, 1)),
        factors=tuple(f.reshape(fit(f.shape, 1)) for f in source.factors),
        varies=tuple(fit(source.varies, False)),
        routed=False,
    )
    result = algebra.join([target, fitted], target.shape)
    return replace(result, varies=(True,) * target.ndim)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(run: Run, node: Node) -> Label:
    """Values put at other positions along one axis for each place."""
    target = run.label(node.args["self"])
    dim = int(node.args["dim"]) % max(target.ndim, 1)
    index_of = run.label(node.args["index"])
    for factor in index_of.factors:
        run.algebra.units.freeze(factor, "positions are computed from it")
    operands = [run.algebra.pinned(target, [dim], PICKED)]
    if isinstance(node.args.get("src"), Ref):
        source = run.algebra.pinned(run.label(node.args["src"]), [dim], PICKED)
        if any(a != dim and n != source.shape[a] for a, n in enumerate(target.shape)):
            run.algebra.freeze(source, "scattered into a larger tensor")
            source = Label(source.shape)
        flat = tuple(1 if a == dim else n for a, n in enumerate(source.shape))
        varies = tuple(v and a != dim for a, v in enumerate(source.varies))
        operands.append(replace(source, shape=flat, varies=varies))
    result = run.algebra.join(operands, target.shape)
    result = replace(result, varies=(True,) * target.ndim)
    if index_of.values is not None:
        view = [1] * target.ndim
        view[dim] = target.shape[dim]
        if len(index_of.values) >= target.shape[dim]:
            labelled = index_of.values[: target.shape[dim]].reshape(view)
        else:
            labelled = np.concatenate(
                [index_of.values, run.algebra.units.fresh(target.shape[dim] - len(index_of.values))]
            ).reshape(view)
        result = replace(result, factors=(*result.factors, labelled))
    return result


@rule("nonzero", "masked_select", "where_index")
def nonzero(run: Run, node: Node) -> Sequence[Label]:
    """How many there are depends on the data."""
    label = run.label(node.args["self"])
    run.algebra.freeze(label, PICKED)
    return [Label(run.shape(out), tainted=label.tainted) for out in flat_refs(node.outs)]


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
