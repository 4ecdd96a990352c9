"""The pass of the rules over a trace: labels go in at the parameters and are carried through every node.

What holds for every operation is seen to here, so that no rule has to: what enters an operation without a rule stays as
it is, and so does a tensor that its rule did not look at, and a result of another shape than its rule says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lit_wsl.rebasin.inference import rules_compute, rules_index, rules_shape  # noqa: F401  (they register themselves)
from lit_wsl.rebasin.inference.labels import Label, depends
from lit_wsl.rebasin.inference.run import (
    MOVING_RULES,
    READING,
    ROUTING_RULES,
    SEGMENT_RULES,
    Move,
    Run,
    find_rule,
    unknown,
)
from lit_wsl.rebasin.inference.trace import Node, Trace, flat_refs, tensor_args, written_arguments
from lit_wsl.rebasin.inference.writes import note_views, overwrite


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
    if node.name not in SEGMENT_RULES:
        _unsegment(run, node)
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
        label = replace(label, tainted=tainted)
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


def _unsegment(run: Run, node: Node) -> None:
    """Labels by expert end at operations that do not know them."""
    for ref in tensor_args(node):
        if ref.number in run.labels:
            run.labels[ref.number] = run.algebra.unsegmented(run.label(ref))
