"""Writing in place: what is written into a view is put back into the tensor that it is a view of.

A loop that fills ``out[:, t] = h`` writes into views of one tensor. What the whole tensor is moved by then, is what a
concatenation of the parts would be moved by. Views that were taken before are labelled anew when they are read.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from lit_wsl.rebasin.inference.labels import Label
from lit_wsl.rebasin.inference.rules_compute import cat_labels
from lit_wsl.rebasin.inference.rules_shape import axes_of, permutation_of, permute_label, reshape_label, take
from lit_wsl.rebasin.inference.run import Move, Run
from lit_wsl.rebasin.inference.trace import Node, Ref, flat_refs, tensor_args, written_arguments
from lit_wsl.rebasin.inference.units import Array

WRITTEN = "written into a part of another tensor"
_RESHAPED = {"view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "detach", "alias"}
_TURNED = {"permute", "transpose", "t", "numpy_T", "swapaxes", "movedim"}
_PARTS = {"slice", "narrow", "select", "unbind", "split", "split_with_sizes", "chunk", "tensor_split"}


def note_views(run: Run, node: Node) -> None:
    """Remember which tensors a node made as views of others."""
    written = written_arguments(node)
    sources = {run.storage(ref): ref.number for ref in tensor_args(node) if ref.number not in written}
    for out in flat_refs(node.outs):
        base = sources.get(run.storage(out))
        if base is not None and base != out.number:
            run.views[out.number] = (node, base)


def overwrite(run: Run, out: Ref, label: Label) -> None:
    """A tensor was written into: what it is a view of has a new label, too, and so have other views of that."""
    chain = [out.number]
    while chain[-1] in run.views and _followed(run.views[chain[-1]][0]):
        chain.append(run.views[chain[-1]][1])
    root = chain[-1]
    others = [number for number in run.aliases(out) if number not in chain]
    strange = [n for n in others if root in run.views or not _descends(run, n, root)]
    before = {number: run.label(Ref(number)) for number in strange}
    run.assign(out.number, label)
    for view, base in pairwise(chain):
        label = _put_back(run, run.views[view][0], base, view, label)
        run.assign(base, label)
    run.stale.update(set(others).difference(strange))
    for number, old in before.items():
        _keep(run, number, old, label)


def _followed(node: Node) -> bool:
    known = _name(node) in _RESHAPED | _TURNED | _PARTS and "dtype" not in node.args
    return known and not isinstance(node.args.get("index"), Ref) and not isinstance(node.args.get("start"), Ref)


def _name(node: Node) -> str:
    return node.name.removeprefix("aten.").removeprefix("unsafe_").removesuffix("_")


def _descends(run: Run, number: int, base: int) -> bool:
    while number in run.views and number != base:
        number = run.views[number][1]
    return number == base


def _keep(run: Run, number: int, old: Label, label: Label) -> None:
    """How a tensor of the same memory was made is not known: what it did not carry before must stay where it is."""
    units = run.algebra.units
    before = [units.find(factor) for factor in old.factors]
    for factor in label.factors:
        found = units.find(factor)
        if not any(found.shape == f.shape and np.array_equal(found, f) for f in before):
            units.freeze(factor, WRITTEN)
    run.labels[number] = replace(old, varies=(True,) * old.ndim, tainted=old.tainted or label.tainted)


def _put_back(run: Run, node: Node, base: int, view: int, label: Label) -> Label:
    """The label of the base once its view has this one."""
    whole = run.label(Ref(base))
    if _name(node) in _RESHAPED:
        return reshape_label(run.algebra, label, whole.shape)
    if _name(node) in _TURNED:
        order = permutation_of(node, whole.ndim)
        return permute_label(label, [order.index(axis) for axis in range(whole.ndim)])
    dim = axes_of(node.args["dim"], whole.ndim)[0]
    where = _positions(run, node, dim, whole.shape[dim], view)
    part = label
    if label.ndim < whole.ndim:
        part = reshape_label(run.algebra, label, (*whole.shape[:dim], 1, *whole.shape[dim + 1 :]))

    def put(other: Run, _: Node) -> Label:
        return put_at(other, other.label(Ref(base)), other.label(Ref(view)), dim, where)

    run.assign(view, part)
    run.moves.append(Move(put, node, {base: whole, view: part}))
    result = put(run, node)
    run.assign(view, label)
    return result


def _positions(run: Run, node: Node, dim: int, size: int, view: int) -> Array:
    """The positions of an axis that a view shows."""
    args, places = node.args, np.arange(size)
    if "index" in args:
        return places[[int(args["index"])]]
    if "step" in args:
        return places[args.get("start") : args.get("end") : args.get("step", 1)]
    if "length" in args:
        return places[int(args["start"]) :][: int(args["length"])]
    start = 0
    for out in flat_refs(node.outs):
        shape = run.shape(out)
        length = shape[dim] if len(shape) == len(run.shape(node.args["self"])) else 1
        if out.number == view:
            return places[start : start + length]
        start += length
    return places[:0]


def put_at(run: Run, whole: Label, part: Label, dim: int, where: Array) -> Label:
    """A label in which some positions of one axis are those of another label."""
    if len(where) == whole.shape[dim]:
        return part
    rest = np.setdiff1d(np.arange(whole.shape[dim]), where)
    first = int(where[0]) if len(where) else 0
    if np.array_equal(where, np.arange(first, first + len(where))):
        parts = [take(whole, dim, slice(0, first)), part, take(whole, dim, slice(first + len(where), None))]
        return cat_labels(run.algebra, [one for one in parts if one.shape[dim]], dim)
    beside = cat_labels(run.algebra, [take(whole, dim, rest), part], dim)
    return take(beside, dim, np.argsort(np.concatenate([rest, where])))
