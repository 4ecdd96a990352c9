"""Infer the permutation spec of any model from one forward pass: labels of axes are carried through every node.

What holds for every operation is seen to here, so that no rule has to: what enters an operation without a rule stays as
it is, and so does a tensor that its rule did not look at, and a result of another shape than its rule says.

What is written into a view is put back into the tensor it is a view of, as a loop that fills ``out[:, t] = h`` does.
What the whole tensor is moved by then, is what a concatenation of the parts would be moved by. Views that were taken
before are labelled anew when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.inference import (  # noqa: F401  (registers the rules)
    rules_compute,
    rules_index,
    rules_shape,
)
from lit_wsl.rebasin.inference.additions import united, with_unused_siblings
from lit_wsl.rebasin.inference.groups import build_spec
from lit_wsl.rebasin.inference.labels import Label, depends
from lit_wsl.rebasin.inference.rules_compute import cat_labels
from lit_wsl.rebasin.inference.rules_shape import axes_of, permutation_of, permute_label, reshape_label, take
from lit_wsl.rebasin.inference.run import (
    MOVING_RULES,
    READING,
    ROUTING_RULES,
    RULES,
    SEGMENT_RULES,
    Joint,
    Move,
    Run,
    find_rule,
    unknown,
)
from lit_wsl.rebasin.inference.trace import (
    Node,
    Ref,
    Trace,
    flat_refs,
    tensor_args,
    trace_forward,
    traceable,
    written_arguments,
)
from lit_wsl.rebasin.inference.units import Array
from lit_wsl.rebasin.spec.spec import PermutationSpec
from lit_wsl.structure.description import require_module, require_sample


def propagate(run: Run) -> None:
    """Apply the rules to every node that counts, then fix the outputs."""
    for node in live_nodes(run.trace):
        run.used.update(ref.number for ref in tensor_args(node))
        step(run, node)
    for output in run.trace.outputs:
        run.algebra.freeze(run.label(output), "output of the model")


def live_nodes(trace: Trace) -> list[Node]:
    """The nodes that the outputs depend on; what else was computed ties nothing together."""
    tensors = trace.tensors
    live = {ref.number for ref in trace.outputs}
    storages = {tensors[number].storage for number in live}
    kept = []
    for node in reversed(trace.nodes):
        written = written_arguments(node)
        if not (
            node.name in READING
            or torch.Tag.dynamic_output_shape in node.func.tags  # Python may ask how many there are
            or any(out.number in live for out in flat_refs(node.outs))
            or any(tensors[number].storage in storages for number in written)
        ):
            continue
        kept.append(node)
        for ref in tensor_args(node):
            live.add(ref.number)
            storages.add(tensors[ref.number].storage)
    return kept[::-1]


def step(run: Run, node: Node) -> None:
    """Apply the rule of one node."""
    run.algebra.node = node.number + 1
    function = find_rule(node)
    if node.name not in SEGMENT_RULES:  # labels by expert end at operations that do not know them
        for ref in tensor_args(node):
            if ref.number in run.labels:
                run.labels[ref.number] = run.algebra.unsegmented(run.label(ref))
    if function in MOVING_RULES:
        run.moves.append(Move(function, node, {ref.number: run.label(ref) for ref in tensor_args(node)}))
    run.looked.clear()
    labels = unknown(run, node) if function is None else function(run, node)
    for ref in tensor_args(node):
        if ref.number not in run.looked:  # its rule knows nothing of this argument
            run.algebra.freeze(run.label(ref), f"operation {node.name} with arguments its rule does not expect")
    if isinstance(labels, Label):
        labels = (labels,)
    _ask_for_joints(run)
    _check_routing(run, node, labels)
    written = written_arguments(node)
    for out, label in zip(flat_refs(node.outs), labels, strict=False):
        shape = run.trace.tensors[out.number].shape
        if label.shape != shape:
            run.algebra.freeze(label, f"operation {node.name} with a shape its rule does not expect")
            label = Label(shape, tainted=True)
        tainted = label.tainted or any(run.label(ref).tainted for ref in tensor_args(node))
        label = replace(label, tainted=tainted, free=label.free if function in FREE_RULES else ())
        if out.number in written:
            overwrite(run, out, label)
        else:
            run.assign(out.number, label)
    note_views(run, node)


def _ask_for_joints(run: Run) -> None:
    """Ask for finer labels of parameters where those of this pass were too coarse to be followed."""
    for one, two in run.algebra.clashes:
        first, second = run.maker(one), run.maker(two)
        if first is not None and second is not None:
            run.wish(max(first, second), min(first, second))
    for label, factor, other in run.algebra.unaligned:
        for beyond in label.factors:
            if len(depends(beyond)) == 1 and depends(beyond) < depends(other):
                run.wish(run.maker(factor), run.maker(beyond))
    run.algebra.clashes.clear()
    run.algebra.unaligned.clear()


def _check_routing(run: Run, node: Node, labels: Sequence[Label]) -> None:
    """Indices that name units must be carried on or be used by an operation that knows them; otherwise freeze."""
    if node.name in ROUTING_RULES or any(out.values is not None or out.segments is not None for out in labels):
        return
    for ref in tensor_args(node):
        run.algebra.freeze_named(run.label(ref))


FREE_RULES = {*MOVING_RULES, *(RULES[f"aten.{name}"] for name in ("clone", "expand", "pointwise"))}
"""Rules that carry on which orders leave a tensor as it is."""
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
    run.labels[number] = replace(old, varies=(True,) * old.ndim, tainted=old.tainted or label.tainted, free=())


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


MAX_PASSES = 6
MIDDLE = "between two levels of blocks"
Place: TypeAlias = tuple[int, int]


def infer_permutation_spec(
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Callable[[Any], Any] | None = None,
    verify: bool = True,
) -> PermutationSpec:
    """Find every permutation of units that leaves the function of a model as it is.

    One forward pass is recorded at the ATen level. Every position of every parameter axis (and of the statistics of
    norms) is a unit; operations that move data move units, operations that compute tie units together, fix them, or
    tie them into blocks (heads, groups, experts). Units of equal use form a group. An operation without a rule fixes
    all that enters it.

    Args:
        model: Any module; its mode, buffers, gradients and the random state are left as they were.
        example_args: Positional arguments of one call.
        example_kwargs: Keyword arguments of the call.
        outputs: Picks what counts from what the model returns (``lambda output: output.logits``). Whatever counts stays
            as it is; by default every floating tensor in tuples, mappings and dataclasses does, hidden states too.
        verify: Check the result with :func:`verify_permutation_spec` and drop groups that would break the function.

    Returns:
        The spec; ``spec.summary()`` says what was found, what stays and why, ``spec.coverage`` how much of the
        parameters it moves. A model without any such permutation gets a spec without groups.

    Raises:
        RebasinError: The forward pass fails, or the model cannot be verified in float64.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> spec = infer_permutation_spec(net, (torch.ones(1, 3),))
    >>> [(group.name, group.size) for group in spec.groups.values()]
    [('0.weight:0', 8)]
    """
    require_module(model, "model", "")
    require_sample(example_args, example_kwargs)
    with traceable(model) as wrote:
        trace = trace_forward(model, example_args, example_kwargs, outputs)
        if wrote():  # a first call that initialises weights from data overwrites them; every later one reads them
            model.train()  # drops what the first call cached
            model.eval()
            trace = trace_forward(model, example_args, example_kwargs, outputs)
    spec = spec_from_trace(trace)
    spec = with_unused_siblings(replace(spec, parameters=tuple(dict(model.named_parameters()))), model)
    if verify and spec.groups:
        from lit_wsl.rebasin.inference.verify import verify_permutation_spec, with_interchangeable_slots

        spec = with_interchangeable_slots(spec, model, example_args, example_kwargs, outputs)
        spec = verify_permutation_spec(spec, model, example_args, example_kwargs, outputs=outputs).spec
    return spec


def spec_from_trace(trace: Trace) -> PermutationSpec:
    """Apply the rules to a trace, and once more with the other choice where two orders were in each other's way."""
    first, conflicts = _best(trace, later=False)
    if not conflicts:
        return first
    try:
        return united(first, _best(trace, later=True)[0])
    except RebasinError:  # what the other choice finds cannot be written as a spec
        return first


def _best(trace: Trace, later: bool) -> tuple[PermutationSpec, int]:
    """The spec that the rules give once none asks for a finer labelling, and how often there was a choice.

    Finer labels that rules wish for, but can do without, are kept if more moves with them; those of three levels (query
    heads inside a key head, dimensions inside these) also with the order of the middle ones fixed.
    """
    best, wishes, conflicts = _spec(trace, False, later)
    middle = frozenset(place for place, _ in wishes).intersection(o for wish in wishes for o in _places(wish)[1:])
    for still in dict.fromkeys([frozenset[Place](), middle]) if wishes else ():
        try:
            finer, *_ = _spec(trace, True, later, still)
        except RebasinError:  # what is found cannot be written as a spec
            continue
        if _moved(finer) > _moved(best):
            best = finer
    return best, conflicts


def _spec(
    trace: Trace, wishes: bool, later: bool, still: frozenset[Place] = frozenset()
) -> tuple[PermutationSpec, list[tuple[Place, Joint]], int]:
    """The spec with some orders fixed, the finer labels that rules wished for, and how often two orders collided."""
    joints: dict[Place, Joint] = {}
    for _ in range(MAX_PASSES):
        run = Run(trace, joints=joints)
        run.algebra.later = later
        for place in sorted(still):
            run.algebra.units.freeze(run.axes[place], MIDDLE)
        propagate(run)
        wished = [wish for wish in run.wishes if wishes and not still.intersection(_places(wish))]
        asked = [*run.requests, *wished]
        finer = refined(joints, [ask for ask in asked if ask[0] not in run.ordered])
        if finer == joints:
            # Nothing to be followed more closely: where an axis or what it is bound to stays, units may be loose.
            fixed = {place for place, made in run.axes.items() if not run.algebra.units.find(made).any()}
            finer = {
                (number, axis): replace(
                    joint, bound=joint.bound and not fixed.intersection([(number, axis), (number, joint.outer[-1])])
                )
                for (number, axis), joint in joints.items()
            }
        if finer == joints:
            break
        joints = finer
    wished = [wish for wish in run.wishes if wish[0] not in run.ordered]
    return build_spec(run), wished, run.algebra.conflicts


def _places(wish: tuple[Place, Joint]) -> list[Place]:
    """The axis of a wish, and those around it."""
    (number, axis), joint = wish
    return [(number, a) for a in (axis, *joint.outer)]


def _moved(spec: PermutationSpec) -> tuple[float, int]:
    """How much a spec moves: axes, and with how many groups."""
    shares = (float(axis.touched.double().mean()) for by_axis in spec.axes.values() for axis in by_axis.values())
    return round(sum(shares), 6), len(spec.groups)


def refined(joints: Mapping[Place, Joint], asked: Sequence[tuple[Place, Joint]]) -> dict[Place, Joint]:
    """The joints with those that are asked for: each axis below the axes that those around it are below.

    >>> refined({(0, 1): Joint((0,))}, [((0, 2), Joint((1,)))])
    {(0, 1): Joint(outer=(0,), blocks=None, bound=True), (0, 2): Joint(outer=(0, 1), blocks=None, bound=True)}
    """
    result = dict(joints)
    for place, joint in asked:
        known = result.get(place, Joint(()))
        if place not in result and joint.blocks is not None:
            result[place] = joint
        elif known.blocks is None and joint.blocks is None:
            result[place] = replace(known, outer=tuple(dict.fromkeys((*known.outer, *joint.outer))))
    for _ in range(len(result)):
        for (number, axis), joint in result.items():
            if joint.blocks is not None:
                continue
            above = {outer: result.get((number, outer), Joint(())) for outer in joint.outer}
            usable = [o for o, j in above.items() if j.blocks is None and axis not in j.outer]
            every = {*usable, *(a for outer in usable for a in above[outer].outer)} - {axis}
            depths = {a: len(result.get((number, a), Joint(())).outer) for a in every}
            result[number, axis] = replace(joint, outer=tuple(sorted(every, key=lambda a: (depths[a], a))))
    return {place: joint for place, joint in result.items() if joint.outer}
