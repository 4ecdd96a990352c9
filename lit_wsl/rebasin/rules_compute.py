"""Rules for operations that compute on one tensor or position by position: pointwise, reductions, norms, pooling.

What sums over products of two tensors is in :mod:`~lit_wsl.rebasin.rules_product`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lit_wsl.rebasin.labels import Label
from lit_wsl.rebasin.rules import READING, pattern, rule
from lit_wsl.rebasin.rules_shape import axes_of, reshape_label
from lit_wsl.rebasin.rules_slice import take
from lit_wsl.rebasin.run import Run
from lit_wsl.rebasin.tracing import Node, Ref, flat_refs, tensor_args

ORDER = "an operation that depends on the order of positions"


@rule("constant", "pointwise_constant")
def constant(run: Run, node: Node) -> list[Label]:
    """Made of nothing: not moved."""
    return [Label(run.shape(out)) for out in flat_refs(node.outs)]


@rule(*sorted(READING))
def reading(run: Run, node: Node) -> list[Label]:
    """Values go to Python; who knows what for."""
    for ref in tensor_args(node):
        run.algebra.freeze(run.algebra.settle(run.label(ref), single=True), "read as a number by Python code")
    return []


@pattern(r"aten\.(new_)?(zeros|ones|full|empty)(_like|_strided)?|aten\.(zero|fill|scalar_tensor)_?")
def filled(run: Run, node: Node) -> Label:
    """The same value everywhere (what is empty is written before it is read)."""
    run.label(node.args.get("self"))  # only its shape counts
    shape = run.shape(node.outs[0])
    return Label(shape, (), (False,) * len(shape))


@rule(
    "pointwise",
    "_prelu_kernel",
    "prelu",
    "bernoulli",
    "native_dropout",
    "hardswish",
    "log_sigmoid_forward",
    "rrelu_with_noise",
    "floor_divide",
    "special_ndtr",
    "complex",
    "polar",
    "real",
    "imag",
)
def pointwise(run: Run, node: Node) -> Sequence[Label]:
    """Position by position, with broadcasting."""
    labels = [run.label(ref) for ref in tensor_args(node)]
    for label in labels:
        run.algebra.freeze_named(label)
    outs = list(flat_refs(node.outs))
    joined = run.algebra.join(labels, run.shape(outs[0]))
    return [joined if run.shape(out) == joined.shape else Label(run.shape(out)) for out in outs]


def _dims(value: Any, ndim: int) -> list[int]:
    return list(range(ndim)) if value is None or value == () else axes_of(value, ndim)


@rule(
    *("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "prod"),
    *("logsumexp", "any", "all", "max", "min", "aminmax", "argmax", "argmin", "count_nonzero", "nansum"),
)
def reduction(run: Run, node: Node) -> Label | Sequence[Label]:
    """A symmetric function of all positions along some axes."""
    if "other" in node.args:
        return pointwise(run, node)
    label = run.label(node.args["self"])
    dims = _dims(node.args.get("dim"), label.ndim)
    outs = list(flat_refs(node.outs))
    run.algebra.sign(run.algebra.settle(label), 0)
    positions = node.name in ("aten.argmax", "aten.argmin") or (len(outs) == 2 and "indices" in _return_names(node))
    if positions:
        label = run.algebra.pinned(label, dims, "its positions are counted")
    result = run.algebra.reduce(label, dims, keepdim=bool(node.args.get("keepdim", False)))
    return [result if run.shape(out) == result.shape else Label(run.shape(out)) for out in outs]


def _return_names(node: Node) -> list[str]:
    return [value.name for value in node.func._schema.returns]


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def softmax(run: Run, node: Node) -> Label:
    """Each position depends on all positions of an axis, symmetrically."""
    label = run.label(node.args["self"])
    run.algebra.sign(run.algebra.settle(label), 0)
    return run.algebra.normalise(label, [int(node.args["dim"])])


@rule("cumprod", "logcumsumexp", "cummax", "cummin", "kthvalue", "median", "mode")
def ordered(run: Run, node: Node) -> list[Label]:
    """Depends on the order of positions along an axis."""
    label = run.label(node.args["self"])
    label = run.algebra.pinned(label, [int(node.args.get("dim", -1)) % max(label.ndim, 1)], ORDER)
    run.algebra.sign(label, 0)
    return [replace(label, shape=run.shape(out)) for out in flat_refs(node.outs)]


@rule("tril", "triu")
def triangle(run: Run, node: Node) -> Label:
    """Zeros above or below the diagonal."""
    label = run.label(node.args["self"])
    return run.algebra.pinned(label, [label.ndim - 2, label.ndim - 1], ORDER)


@rule("glu")
def glu(run: Run, node: Node) -> Label:
    """First half times the gate of the second."""
    label = run.label(node.args["self"])
    dim = int(node.args.get("dim", -1)) % label.ndim
    half = label.shape[dim] // 2
    parts = [take(label, dim, slice(0, half)), take(label, dim, slice(half, 2 * half))]
    return run.algebra.join(parts, parts[0].shape)


# ---- norms -----------------------------------------------------------------------------------------------------------


@pattern(r"aten\.(_?native_batch_norm\w*|cudnn_batch_norm|miopen_batch_norm|_batch_norm\w*|batch_norm\w*)")
def batch_norm(run: Run, node: Node) -> list[Label]:
    """Each channel by itself, with its statistics."""
    x = run.label(node.args["input"])
    operands = [x]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(node.args.get(name), tuple) or node.args.get(name) is None:
            continue
        one = run.label(node.args[name])
        operands.append(reshape_label(run.algebra, one, (one.shape[0], *(1,) * (x.ndim - 2))))
    axes = [a for a in range(x.ndim) if a != 1]
    result = run.algebra.join([run.algebra.normalise(x, axes), *operands[1:]], x.shape)
    return [result, *(Label(run.shape(out)) for out in list(flat_refs(node.outs))[1:])]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(run: Run, node: Node) -> list[Label]:
    """Last axes normalised together, then gain and bias."""
    x = run.label(node.args["input"])
    count = len(node.args["normalized_shape"])
    operands = [run.algebra.normalise(x, range(x.ndim - count, x.ndim))]
    operands += [run.label(node.args[name]) for name in ("weight", "bias") if node.args.get(name) is not None]
    result = run.algebra.join(operands, x.shape)
    rest = [run.algebra.reduce(result, range(x.ndim - count, x.ndim), True) for _ in range(2)]
    outs = list(flat_refs(node.outs))
    return [
        result,
        *(r if run.shape(o) == r.shape else Label(run.shape(o)) for r, o in zip(rest, outs[1:], strict=False)),
    ]


@rule("native_group_norm")
def group_norm(run: Run, node: Node) -> list[Label]:
    """Channels of a group normalised together, then gain and bias of each channel."""
    x, groups = run.label(node.args["input"]), int(node.args["group"])
    n, c = x.shape[:2]
    split_up = reshape_label(run.algebra, x, (n, groups, c // groups, *x.shape[2:]))
    run.algebra.normalise(split_up, range(2, split_up.ndim))
    operands = [x]
    for name in ("weight", "bias"):
        if node.args.get(name) is not None:
            operands.append(reshape_label(run.algebra, run.label(node.args[name]), (c, *(1,) * (x.ndim - 2))))
    result = run.algebra.join(operands, x.shape)
    return [result, *(Label(run.shape(out)) for out in list(flat_refs(node.outs))[1:])]


# ---- pixels ----------------------------------------------------------------------------------------------------------


@pattern(r"aten\.\w*(pool|upsample|reflection_pad|replication_pad)\w*?([123])d\w*")
def pixels(run: Run, node: Node) -> list[Label]:
    """Pooling, resizing, padding: the last axes are worked on, all others are carried along."""
    label = run.label(node.args.get("self", node.args.get("input")))
    if isinstance(node.args.get("indices"), Ref):  # the places that a pooling took its values from
        label = run.algebra.join([label, replace(run.label(node.args["indices"]), values=None)], label.shape)
    count = next(int(c) for c in node.name if c in "123" and node.name[node.name.index(c) + 1] == "d")
    label = run.algebra.pinned(label, range(label.ndim - count, label.ndim), ORDER)
    run.algebra.sign(label, 0)
    return [replace(label, shape=run.shape(out), values=None) for out in flat_refs(node.outs)]


@rule("im2col", moves=True)
def im2col(run: Run, node: Node) -> Label:
    """Patches as columns: each channel gives one row for each place in the patch."""
    label = run.label(node.args["self"])
    label = run.algebra.pinned(label, range(label.ndim - 2, label.ndim), ORDER)
    kernel = 1
    for size in node.args["kernel_size"]:
        kernel *= int(size)
    shape = run.shape(node.outs[0])
    factors = tuple(f.reshape(f.shape[:-1]).repeat(kernel, axis=f.ndim - 3) for f in label.factors)
    return replace(label, shape=shape, factors=factors, varies=(True,) * len(shape))
