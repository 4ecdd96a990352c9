"""Rules for mixtures of experts: the router's choice is followed, so that experts may change places.

``topk`` of router scores gives indices whose *values* name experts: permuting the experts permutes these values. Such
an index tensor carries the units of the experts (``Label.values``); sorted, counted and summed up it becomes the row
offsets of a grouped product (``Label.segments``), where the units of the router meet those of the experts' weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lit_wsl.rebasin.labels import Label, depends
from lit_wsl.rebasin.rules import ROUTING_RULES, SEGMENT_RULES, rule, unknown
from lit_wsl.rebasin.rules_compute import ORDER
from lit_wsl.rebasin.rules_product import ask_for_joint
from lit_wsl.rebasin.run import Run
from lit_wsl.rebasin.tracing import Node, Ref, flat_refs
from lit_wsl.rebasin.units import Array

SEGMENT_RULES.update(
    f"aten.{name}"
    for name in (
        *("_grouped_mm", "bmm", "mul", "add", "add_", "clone", "_to_copy", "detach", "alias", "copy_"),
        *("slice", "split", "split_with_sizes", "select", "transpose", "unsqueeze", "squeeze", "expand"),
    )
)

ROUTING_RULES.update(
    f"aten.{name}" for name in ("histc", "bincount", "cumsum", "_grouped_mm", "index", "scatter", "scatter_")
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


def index_by_expert(run: Run, node: Node) -> Label | None:
    """Weights or biases picked by the experts that rows were sent to."""
    refs = node.args["indices"]
    if len(refs) != 1 or not isinstance(refs[0], Ref):
        return None
    chosen, table = run.label(refs[0]), run.algebra.settle(run.label(node.args["self"]))
    if chosen.values is None or chosen.ndim != 1 or len(chosen.values) != table.shape[0]:
        return None
    ask_for_joint(run, table, 0)
    _meet(run, table, chosen.values)
    factors = tuple(f for f in table.factors if depends(f) != {0})
    return Label(run.shape(node.outs[0]), factors, tainted=True, routed=True, segmented=0)
