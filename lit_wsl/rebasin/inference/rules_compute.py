"""Rules for operations that compute on one tensor or position by position: pointwise, reductions, norms, pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lit_wsl.rebasin.inference.labels import Algebra, Label, depends
from lit_wsl.rebasin.inference.rules_shape import axes_of, moved, reshape_label, take
from lit_wsl.rebasin.inference.run import READING, Joint, Run, pattern, rule, unknown
from lit_wsl.rebasin.inference.trace import Node, Ref, flat_refs, tensor_args
from lit_wsl.rebasin.inference.units import FIXED, Array, distinct, mix

_FEW = 8


@rule("cat", "concatenate", "concat", moves=True)
def cat(run: Run, node: Node) -> Label:
    """Parts one behind the other."""
    labels = [run.label(ref) for ref in node.args["tensors"]]
    labels = [label for label in labels if 0 not in label.shape]
    if not labels:
        return Label(run.shape(node.outs[0]))
    return cat_labels(run.algebra, labels, axes_of(node.args.get("dim", 0), labels[0].ndim)[0], loose=True)


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


def cat_labels(algebra: Algebra, labels: Sequence[Label], dim: int, apart: bool = False, loose: bool = False) -> Label:
    """Concatenate along ``dim``: units side by side there, and the same units on all other axes.

    With ``apart``, other axes may have other units for each place along ``dim``; labels become larger by that. With
    ``loose``, what is constant along ``dim`` (a state that starts as zeros) goes with any order there, even if nothing
    else moves along it.
    """
    labels = [algebra.settle(label, single=True) for label in labels]
    if len({label.history for label in labels if label.factors}) > 1:
        for label in labels:
            for factor in label.factors if label.history else ():
                algebra.units.sign(factor, mix(7331, label.history))
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
    slots = {depends(f) - {dim} for label in labels for f in label.factors}
    if loose and any(label.shape[dim] > 1 and not label.varies[dim] for label in labels):
        slots.add(frozenset())
    factors = []
    for slot in sorted(slots, key=lambda s: (len(s), sorted(s))):
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
    if not fixed:
        return list(labels)
    # Where others are moved along dim by units that know nothing of these axes (channels beside channels whose pixels
    # were shuffled), only what is the same all along them can stand beside it.
    flat = [any(dim in depends(f) and not depends(f) & {*fixed} for f in label.factors) for label in labels]
    pin = algebra.pinned if any(flat) else algebra.fixed
    return [pin(label, fixed, "beside something that stays") for label in labels]


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
            # Constant along the axis (zeros, padding): its positions may be permuted freely, but among themselves only.
            pieces.append(algebra.tell_apart(algebra.units.fresh(shape[dim])).reshape(shape))
        elif slot and not any(label.varies[axis] for axis in (dim, *slot)):
            # Constant along these axes: it goes with what stands beside it.
            beside = next(part for part in parts if part is not None).take([0], axis=dim)
            pieces.append(np.broadcast_to(beside, shape))
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
    "hardswish",
    "log_sigmoid_forward",
    "rrelu_with_noise",
    "floor_divide",
    *("leaky_relu", "ldexp"),  # torch 2.10 does not tag these two
    "special_ndtr",
    "complex",
    "polar",
    "real",
    "imag",
)
def pointwise(run: Run, node: Node) -> Sequence[Label]:
    """Position by position, with broadcasting."""
    if node.args.get("training"):  # random slopes
        return unknown(run, node)
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
    *("median", "nanmedian", "kthvalue", "mode", "_is_all_true", "_is_any_true"),
)
def reduction(run: Run, node: Node) -> Label | Sequence[Label]:
    """A symmetric function of all positions along some axes."""
    if "other" in node.args:
        return pointwise(run, node)
    label = run.label(node.args["self"])
    dims = _dims(node.args.get("dim"), label.ndim)
    outs = list(flat_refs(node.outs))
    settled = run.algebra.settle(label)
    run.algebra.sign(settled, 0)
    named_outs = [value.name for value in node.func._schema.returns]
    positions = node.name in ("aten.argmax", "aten.argmin") or (len(outs) == 2 and "indices" in named_outs)
    named = settled.factors[0].ravel() if positions and _alone(settled, dims) else None
    if positions and named is None:
        label = run.algebra.pinned(label, dims, "its positions are counted")
    result = run.algebra.reduce(label, dims, keepdim=bool(node.args.get("keepdim", False)))
    results = [result if run.shape(out) == result.shape else Label(run.shape(out)) for out in outs]
    if named is not None:  # the position names a unit
        results[-1] = replace(results[-1], values=named)
    return results


def _alone(label: Label, dims: Sequence[int]) -> bool:
    """Whether one factor of one axis is all that moves a tensor, and each unit stands at one place."""
    found = len(label.factors) == 1 == len(dims) and depends(label.factors[0]) == set(dims)
    return found and len(distinct(label.factors[0])) == label.factors[0].size


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def softmax(run: Run, node: Node) -> Label:
    """Each position depends on all positions of an axis, symmetrically."""
    label = run.label(node.args["self"])
    run.algebra.sign(run.algebra.settle(label), 0)
    return run.algebra.normalise(label, [int(node.args["dim"])])


@rule("embedding_renorm")
def embedding_renorm(run: Run, node: Node) -> Label:
    """Rows of a table rescaled to a largest norm, in place."""
    run.label(node.args["indices"])
    return run.algebra.normalise(run.label(node.args["self"]), [1])


@rule("cumprod", "logcumsumexp", "cummax", "cummin")
def ordered(run: Run, node: Node) -> list[Label]:
    """Depends on the order of positions along an axis."""
    label = run.label(node.args["self"])
    label = run.algebra.pinned(label, [int(node.args.get("dim", -1)) % max(label.ndim, 1)], ORDER)
    run.algebra.sign(label, 0)
    return [replace(label, shape=run.shape(out)) for out in flat_refs(node.outs)]


@rule("_linalg_slogdet")
def log_determinant(run: Run, node: Node) -> Sequence[Label]:
    """The logarithm is the same for any order of rows and of columns; sign and factors are not."""
    label = run.algebra.settle(run.label(node.args["A"]))
    sign, _, *factors = flat_refs(node.outs)
    if any(run.is_read(out) for out in (sign, *factors)):
        return unknown(run, node)
    run.algebra.sign(label, 0)
    result = run.algebra.reduce(label, (label.ndim - 2, label.ndim - 1), keepdim=False)
    return [Label(run.shape(sign)), result, *(Label(run.shape(out)) for out in factors)]


@rule("bucketize", "searchsorted")
def place(run: Run, node: Node) -> Sequence[Label]:
    """Position by position, among boundaries that stay."""
    where = node.args["boundaries" if "boundaries" in node.args else "sorted_sequence"]
    if len(run.shape(where)) != 1 or isinstance(node.args.get("sorter"), Ref):
        return unknown(run, node)
    run.algebra.pinned(run.label(where), [0], ORDER)
    label = run.label(node.args["self"])
    run.algebra.freeze_named(label)
    return [replace(label, values=None, segments=None)]


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
    operands = _by_channel(run, node, ("weight", "bias", "running_mean", "running_var"), x.ndim)
    normalised = run.algebra.normalise(x, [a for a in range(x.ndim) if a != 1])
    result = run.algebra.join([normalised, *operands], x.shape)
    return [result, *(Label(run.shape(out)) for out in list(flat_refs(node.outs))[1:])]


def _by_channel(run: Run, node: Node, names: Sequence[str], ndim: int) -> list[Label]:
    """The arguments of these names that are given, each with its one axis where the channels of a tensor stand."""
    given = [run.label(node.args[name]) for name in names if isinstance(node.args.get(name), Ref)]
    return [reshape_label(run.algebra, one, (one.shape[0], *(1,) * (ndim - 2))) for one in given]


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
    result = run.algebra.join([x, *_by_channel(run, node, ("weight", "bias"), x.ndim)], x.shape)
    return [result, *(Label(run.shape(out)) for out in list(flat_refs(node.outs))[1:])]


@rule("_weight_norm_interface")
def weight_norm(run: Run, node: Node) -> list[Label]:
    """A gain for each place on one axis, times the direction of what stands there."""
    v, gain = run.label(node.args["v"]), run.label(node.args["g"])
    others = [axis for axis in range(v.ndim) if axis != int(node.args["dim"]) % v.ndim]
    result = run.algebra.join([run.algebra.normalise(v, others), gain], v.shape)
    return [result, run.algebra.reduce(result, others, keepdim=True)]


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(run: Run, node: Node) -> Label:
    """Frequencies of some axes: their order counts, all others are carried along."""
    label = run.label(node.args["self"])
    dims = axes_of(node.args["dim"], label.ndim)
    label = run.algebra.pinned(label, dims, ORDER)
    run.algebra.sign(label, 0)
    varies = tuple(v or axis in dims for axis, v in enumerate(label.varies))
    return replace(label, shape=run.shape(node.outs[0]), varies=varies, values=None)


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
    kernel = math.prod(map(int, node.args["kernel_size"]))
    shape = run.shape(node.outs[0])
    factors = tuple(f.reshape(f.shape[:-1]).repeat(kernel, axis=f.ndim - 3) for f in label.factors)
    return replace(label, shape=shape, factors=factors, varies=(True,) * len(shape))


@rule("col2im")
def col2im(run: Run, node: Node) -> Label:
    """Patches added up where they overlap: the inverse of :func:`im2col`."""
    label, shape = run.label(node.args["self"]), run.shape(node.outs[0])
    label = run.algebra.pinned(label, [label.ndim - 1], ORDER)
    label = replace(label, shape=label.shape[:-1], factors=tuple(f[..., 0] for f in label.factors), varies=())
    channels = shape[-3]
    patches = reshape_label(run.algebra, label, (*label.shape[:-1], channels, label.shape[-1] // channels))
    kept = run.algebra.pinned(patches, [patches.ndim - 1], ORDER)
    run.algebra.sign(kept, 0)
    factors = tuple(f[..., None] for f in kept.factors)
    return replace(kept, shape=shape, factors=factors, varies=(True,) * len(shape))


@pattern(r"aten\.(cudnn_)?grid_sampler(_[23]d)?(_cpu_fallback)?")
def grid_sample(run: Run, node: Node) -> Label:
    """Pixels read between pixels, at places that may be computed: channels are carried along."""
    image = run.label(node.args["input" if "input" in node.args else "self"])
    image = run.algebra.pinned(image, range(2, image.ndim), ORDER)
    grid = run.algebra.pinned(run.label(node.args["grid"]), range(1, image.ndim), ORDER)
    shape = run.shape(node.outs[0])
    flat, one = (*shape[:2], *(1,) * (len(shape) - 2)), (shape[0], *(1,) * (len(shape) - 1))
    still = (False,) * (len(shape) - 2)
    operands = [
        replace(image, shape=flat, varies=(True, True, *still)),
        replace(grid, shape=one, varies=(True, False, *still)),
    ]
    return replace(run.algebra.join(operands, flat), shape=shape, varies=(True,) * len(shape))


@rule("affine_grid_generator")
def affine_grid(run: Run, node: Node) -> Label:
    """Places made of the coefficients of a map."""
    label, shape = run.algebra.pinned(run.label(node.args["theta"]), [1, 2], ORDER), run.shape(node.outs[0])
    factors = tuple(f.reshape(f.shape[0], *(1,) * (len(shape) - 1)) for f in label.factors)
    return replace(label, shape=shape, factors=factors, varies=(True,) * len(shape))


def ask_for_joint(run: Run, label: Label, batch: int) -> None:
    """A parameter used batch by batch may have other units inside each batch: ask for them in the next pass."""
    outer = [f for f in label.factors if depends(f) == {batch}]
    owner = run.owner(outer[0]) if outer else None
    if owner is None:
        return
    for factor in label.factors:
        inner = run.owner(factor) if batch not in depends(factor) else None
        # The batch may be on two axes (products of all pairs of rows): it has no units inside itself.
        if inner is not None and inner[0] == owner[0] and inner != owner:
            run.request(inner[0], inner[1], Joint((owner[1],)))


def product(run: Run, refs: Sequence[Any], words: Sequence[str], out: str) -> Label:
    """Einstein sum of tensors of the trace."""
    labels = [run.algebra.settle(run.label(ref)) for ref in refs]
    sizes: dict[str, int] = {}
    for label, word in zip(labels, words, strict=True):
        sizes.update({c: n for c, n in zip(word, label.shape, strict=True) if n > 1 or c not in sizes})
        if "b" in word and label.shape[word.index("b")] > 1:
            ask_for_joint(run, label, word.index("b"))
    return run.algebra.contract(labels, words, out, sizes)


@rule("mm", "bmm", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv", "linear", "matmul", "_sparse_mm", "_sparse_addmm")
def matrix_product(run: Run, node: Node) -> Label:
    """Matrix products with an optional summand."""
    args, name = node.args, node.name.removeprefix("aten.")
    if name == "linear":
        label = run.label(args["input"])
        lead = "abcdefgh"[: label.ndim - 1].replace("b", "z")
        result = product(run, [args["input"], args["weight"]], [lead + "k", "mk"], lead + "m")
        return result if args.get("bias") is None else run.algebra.join([result, run.label(args["bias"])], result.shape)
    refs = {
        "mm": ("self", "mat2"),
        "bmm": ("self", "mat2"),
        "mv": ("self", "vec"),
        "dot": ("self", "tensor"),
        "vdot": ("self", "other"),
        "_sparse_mm": ("sparse", "dense"),
        "_sparse_addmm": ("mat1", "mat2"),
        "addmm": ("mat1", "mat2"),
        "baddbmm": ("batch1", "batch2"),
        "addmv": ("mat", "vec"),
    }.get(name)
    if refs is None:
        for ref in tensor_args(node):
            run.algebra.freeze(run.label(ref), f"operation {node.name}")
        return Label(run.shape(node.outs[0]))
    one, two = args[refs[0]], args[refs[1]]
    words = {
        (3, 3): ("bnk", "bkm", "bnm"),
        (2, 2): ("nk", "km", "nm"),
        (2, 1): ("nk", "k", "n"),
        (1, 1): ("k", "k", ""),
    }
    word_one, word_two, out = words[len(run.shape(one)), len(run.shape(two))]
    result = product(run, [one, two], [word_one, word_two], out)
    if name.startswith(("add", "badd", "_sparse_add")):
        return run.algebra.join([result, run.label(args["self"])], result.shape)
    return result


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution")
def convolution(run: Run, node: Node) -> Label:
    """Convolutions of any number of axes: contract channels, group by group; the order of pixels stays."""
    args, algebra = node.args, run.algebra
    x, weight = run.label(args["input"]), run.label(args["weight"])
    groups, transposed = int(args["groups"]), bool(args.get("transposed", False))
    shape = run.shape(node.outs[0])
    x = algebra.pinned(x, range(2, x.ndim), ORDER)
    if weight.origin is not None and run.shape_of(weight.origin) == weight.shape:
        run.ordered.update((weight.origin, axis) for axis in range(2, weight.ndim))
    weight = algebra.pinned(weight, range(2, weight.ndim), ORDER)
    inner = 1  # the axis of the weight that has one group's channels only
    if groups > 1 and weight.shape[inner] > 1 and weight.origin is not None:
        owned = [f for f in weight.factors if depends(f) == {inner}]
        if owned and run.shape_of(weight.origin) == weight.shape:
            run.request(weight.origin, inner, Joint((0,), groups))
            weight = replace(weight, factors=tuple(f for f in weight.factors if depends(f) != {inner}))
            weight = replace(weight, varies=tuple(v and a != inner for a, v in enumerate(weight.varies)))
    n, c = x.shape[0], x.shape[1]
    x = _channels_only(x)
    rows, columns = weight.shape[:2]
    x = reshape_label(algebra, x, (n, groups, c // groups))
    weight = reshape_label(algebra, _channels_only(weight), (groups, rows // groups, columns))
    words = ["ngi", "gio"] if transposed else ["ngi", "goi"]
    outs = columns if transposed else rows // groups
    sizes = {"n": n, "g": groups, "i": c // groups, "o": outs}
    result = algebra.contract([x, weight], words, "ngo", sizes)
    result = reshape_label(algebra, result, (n, groups * outs))
    factors = tuple(f.reshape((*f.shape, *(1,) * (len(shape) - 2))) for f in result.factors)
    result = replace(result, shape=shape, factors=factors, varies=(True,) * len(shape))
    bias = _by_channel(run, node, ("bias",), len(shape))
    return algebra.join([result, *bias], shape) if bias else result


def _channels_only(label: Label) -> Label:
    """The first two axes of a label whose other axes nothing moves."""
    factors = tuple(f.reshape(f.shape[:2]) for f in label.factors)
    return replace(label, shape=label.shape[:2], factors=factors, varies=label.varies[:2])


@rule("_cdist_forward", "_euclidean_dist")
def distances(run: Run, node: Node) -> Label:
    """Distances between the rows of two tensors: symmetric in what the rows hold."""
    one, two = run.algebra.settle(run.label(node.args["x1"])), run.algebra.settle(run.label(node.args["x2"]))
    shape = run.shape(node.outs[0])
    lead = "abcdefgh"[: len(shape) - 2]
    words = [lead[len(lead) - (label.ndim - 2) :] + row + "k" for label, row in ((one, "n"), (two, "m"))]
    sizes = dict(zip(lead + "nm", shape, strict=True)) | {"k": one.shape[-1]}
    return run.algebra.contract([one, two], words, lead + "nm", sizes)


@rule("_trilinear")
def trilinear(run: Run, node: Node) -> Label:
    """Product of three tensors with new axes, summed over some: bilinear layers."""
    labels = []
    for number in "123":
        label = run.label(node.args[f"i{number}"])
        for dim in sorted(node.args[f"expand{number}"]):
            label = reshape_label(run.algebra, label, (*label.shape[:dim], 1, *label.shape[dim:]))
        labels.append(label)
    shape = tuple(max(label.shape[axis] for label in labels) for axis in range(labels[0].ndim))
    joined = run.algebra.join(labels, shape, "multiplied with something that stays")
    return run.algebra.reduce(joined, node.args["sumdim"], keepdim=False)
