"""Rules for products of two tensors, summed over what they have in common: matrix products and convolutions.

Each is an Einstein sum of labels. A weight with a batch axis, be it a stack of matrices, groups of channels or experts,
may have other units for each place on that axis; its rule asks for them, and the next pass over the trace has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lit_wsl.rebasin.labels import Label, depends
from lit_wsl.rebasin.rules import rule
from lit_wsl.rebasin.rules_compute import ORDER
from lit_wsl.rebasin.rules_shape import reshape_label
from lit_wsl.rebasin.run import Joint, Run
from lit_wsl.rebasin.tracing import Node, tensor_args


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
            run.request(inner[0], inner[1], Joint(owner[1], run.shape_of(owner[0])[owner[1]]))


def product(run: Run, refs: Sequence[Any], words: Sequence[str], out: str) -> Label:
    """Einstein sum of tensors of the trace."""
    labels = [run.algebra.settle(run.label(ref)) for ref in refs]
    sizes: dict[str, int] = {}
    for label, word in zip(labels, words, strict=True):
        sizes.update({c: n for c, n in zip(word, label.shape, strict=True) if n > 1 or c not in sizes})
        if "b" in word and label.shape[word.index("b")] > 1:
            ask_for_joint(run, label, word.index("b"))
    return run.algebra.contract(labels, words, out, sizes)


@rule("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv", "linear", "matmul")
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
    if name.startswith(("add", "badd")):
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
    weight = algebra.pinned(weight, range(2, weight.ndim), ORDER)
    inner = 1  # the axis of the weight that has one group's channels only
    if groups > 1 and weight.shape[inner] > 1 and weight.origin is not None:
        owned = [f for f in weight.factors if depends(f) == {inner}]
        if owned and run.shape_of(weight.origin) == weight.shape:
            run.request(weight.origin, inner, Joint(0, groups))
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
    spatial = len(shape) - 2
    result = replace(
        result,
        shape=shape,
        factors=tuple(f.reshape((*f.shape, *(1,) * spatial)) for f in result.factors),
        varies=(True,) * len(shape),
    )
    if args.get("bias") is None:
        return result
    bias = run.label(args["bias"])
    bias = reshape_label(algebra, bias, (bias.shape[0], *(1,) * spatial))
    return algebra.join([result, bias], shape)


def _channels_only(label: Label) -> Label:
    """The first two axes of a label whose other axes nothing moves."""
    factors = tuple(f.reshape(f.shape[:2]) for f in label.factors)
    return replace(label, shape=label.shape[:2], factors=factors, varies=label.varies[:2])
