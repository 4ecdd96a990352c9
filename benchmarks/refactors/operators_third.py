"""Operators of the third part: what is there, and how it is stored."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from benchmarks.refactors.forms import HEADS, drawn
from benchmarks.refactors.network import Leaf, Path, Side, Step
from benchmarks.refactors.operators import LAST, Apply, _copied, _copy, _inserted, _pruned, _resized, operator
from benchmarks.refactors.operators_layout import _fuse, _restore

Same = Callable[[Leaf], bool]


def numbered(leaf: Leaf) -> bool:
    """Whether it stands in a list."""
    return any(step.index is not None for step in leaf.path)


# Content: copies and strangers --------------------------------------------------------------------------------------


@operator("third", "content", LAST, "source", 1.5)
def numbered_averages(side: Side, rng: random.Random) -> bool:
    """Averages as an optimiser or an average of parameters keeps them: a list, in the order of the parameters."""
    above = rng.choice(["ema.shadow_params", "averager.params", "optimizer_ema.averages"])
    shapes = [size for leaf in side.leaves if leaf.kind in ("linear", "norm", "conv2d") for size in _shapes(leaf)]
    side.extra |= {f"{above}.{i}": drawn(f"average {i}", shape) for i, shape in enumerate(shapes)}
    return bool(shapes)


def _shapes(leaf: Leaf) -> list[tuple[int, ...]]:
    out, *rest = leaf.sizes[0]
    weight = (out, *rest) if leaf.kind != "conv2d" else (out, rest[0], rest[1], rest[1])
    return [weight, (out,)] if leaf.bias else [weight]


@operator("third", "content", LAST, "source", 1.5)
def frozen_part_beside(side: Side, rng: random.Random) -> bool:
    """A frozen copy of one part, for a loss or a distillation."""
    parts = sorted({leaf.path[0].role for leaf in side.leaves})
    chosen, word = rng.choice(parts), rng.choice(["frozen", "reference", "ref_model", "initial_copy"])
    side.leaves += [
        _copy(leaf, f"{word} ", (Step(f"={word}"), *leaf.path)) for leaf in side.leaves if leaf.path[0].role == chosen
    ]
    return True


operator("third", "content", LAST, "source", 1.5, name="swa_model_beside")(
    _copied([("", "swa_model.module"), ("generator", "generator_ema"), ("", "best_model"), ("current", "previous")])
)


@operator("third", "content", LAST, weight=1.5)
def auxiliary_head(side: Side, rng: random.Random) -> bool:
    """A second head of the same size for an auxiliary loss, before the true one."""
    word = rng.choice(["aux_classifier", "auxiliary", "deep_supervision", "aux_logits", "intermediate_head"])
    for at in range(len(side.leaves) - 1, -1, -1):
        leaf = side.leaves[at]
        if leaf.kind in ("linear", "conv2d", "conv1d") and leaf.plain and not numbered(leaf):
            side.leaves.insert(at, _copy(leaf, f"{word} ", (Step(f"={word}"),)))
            return True
    return False


@operator("third", "content", LAST, weight=1.5)
def learned_tokens(side: Side, rng: random.Random) -> bool:
    """Parameters of the model's width that one of the two code bases has: masks, registers, prompts, a null class."""
    width = next((leaf.sizes[0][-1] for leaf in side.leaves if leaf.kind in ("embedding", "norm")), 0)
    names = {"mask_token": (1, 1, width), "register_tokens": (1, 7, width), "null_embedding": (width,)}
    names |= {"prompt": (5, width), "distill_token": (1, 1, width)}
    for name in rng.sample(sorted(names), 2):
        side.leaves.insert(0, Leaf((Step(f"={name}"),), "table", (f"learned {name}",), (names[name],)))
    return width > 0


@operator("third", "content", LAST, weight=1.5)
def constants_as_buffers(side: Side, rng: random.Random) -> bool:
    """Masks and frequencies that one code base registers in every attention, and the other computes."""
    name, size = rng.choice([("mask", (1, 1, 7, 7)), ("inv_freq", (4,)), ("relative_index", (7, 7)), ("slopes", (2,))])
    seen: set[Path] = set()
    out: list[Leaf] = []
    for leaf in side.leaves:
        if leaf.role == "q" and leaf.parent not in seen:
            seen.add(leaf.parent)
            path = (*leaf.parent, Step(f"={name}"))
            out.append(
                replace(leaf, path=path, kind="table", layout="kind:buffer", sizes=(size,), pieces=(f"{name} {path}",))
            )
        out.append(leaf)
    side.leaves = out
    return bool(seen)


@operator("third", "content", LAST, weight=1.5)
def probes_of_the_same_size(side: Side, rng: random.Random) -> bool:
    """An unrelated module with maps of the model's own sizes."""
    linear = [leaf for leaf in side.leaves if leaf.kind == "linear" and leaf.plain]
    word = rng.choice(["projector", "online_probe", "proto_head", "pretext", "domain_net"])
    for at, leaf in enumerate(rng.sample(linear, min(2, len(linear)))):
        side.leaves.append(_copy(leaf, f"{word} {at} ", (Step(f"={word}"), Step(f"={2 * at}"))))
    return bool(linear)


operator("third", "content", LAST, weight=1.5, name="prune_inner")(_pruned(lambda n: sorted({0, n - 1})))
operator("third", "content", LAST, weight=1.5, name="insert_end")(_inserted(lambda n: [n]))


@operator("third", "content", LAST, weight=1.5)
def padded_vocabulary(side: Side, rng: random.Random) -> bool:
    """Rows added to the table of tokens and to what predicts them, up to a round number."""
    rows = {leaf.sizes[0][0] for leaf in side.leaves if leaf.kind == "embedding" and leaf.sizes[0][0] > 12}
    return bool(rows) and _resized(lambda leaf: leaf.kind in ("embedding", "linear") and leaf.sizes[0][0] in rows, 0)(
        side, rng
    )


operator("third", "content", LAST, weight=1.5, name="another_number_of_outputs")(
    _resized(
        lambda leaf: leaf.role in ("head", "relevance", "kind", "segment", "map", "quantiles", "forecast", "voice"), 0
    )
)
operator("third", "content", LAST, weight=1.5, name="another_number_of_inputs")(
    _resized(lambda leaf: leaf.role in ("stem_conv", "tubelets", "entry", "sub1", "strokes", "frame_conv", "eye1"), 1)
)


# Layout -------------------------------------------------------------------------------------------------------------


@operator("third", "layout", weight=1.0)
def norms_without_shift(side: Side, rng: random.Random) -> bool:
    """Layer norms become RMS norms, or the other way round."""
    norms = [leaf for leaf in side.leaves if leaf.kind == "norm" and leaf.plain]
    shifted = any(leaf.bias for leaf in norms)
    side.leaves = [replace(leaf, bias=not shifted) if leaf in norms else leaf for leaf in side.leaves]
    return bool(norms)


def _biases(chosen: Same, bias: bool) -> Apply:
    def apply(side: Side, rng: random.Random) -> bool:
        before = list(side.leaves)
        side.leaves = [
            replace(leaf, bias=bias)
            if leaf.kind in ("linear", "conv2d", "conv1d") and leaf.plain and chosen(leaf)
            else leaf
            for leaf in side.leaves
        ]
        return side.leaves != before

    return apply


operator("third", "layout", name="biases_in_attention")(_biases(lambda leaf: leaf.role in "qkv", True))
operator("third", "layout", name="no_biases_before_norms")(_biases(lambda leaf: leaf.kind != "linear", False))
operator("third", "layout", weight=0.6, name="biases_outside_lists")(_biases(lambda leaf: not numbered(leaf), True))


@operator("third", "layout", LAST, weight=0.7)
def parts_in_another_order(side: Side, rng: random.Random) -> bool:
    """Fused as keys, values, queries or the like, under a name that spells no order: what only the code shows."""
    role = rng.choice(["=in_proj", "=c_attn", "=fused_proj", "=W_pack", "=projections", "=input_map"])
    if not _fuse(side, "qkv", role, rng.choice([(1, 2, 0), (2, 1, 0), (1, 0, 2)])):
        return False
    side.leaves = [replace(leaf, layout="reordered") if leaf.role == role else leaf for leaf in side.leaves]
    return True


@operator("third", "layout", weight=1.5)
def fuse_qk(side: Side, rng: random.Random) -> bool:
    """Queries and keys in one map, values in another."""
    same = all(a.sizes == b.sizes for a, b in zip(_of(side, "q"), _of(side, "k")))
    return same and _fuse(side, "qk", rng.choice(["=qk", "=to_qk", "=qk_proj", "=query_key"]))


def _of(side: Side, role: str) -> list[Leaf]:
    return [leaf for leaf in side.leaves if leaf.role == role]


@operator("third", "layout", weight=1.0)
def fuse_twins(side: Side, rng: random.Random) -> bool:
    """Two maps of the same input in one: both sides of a triangle, mean and spread, a map and its gate."""
    pairs = [("left", "right"), ("mean", "spread"), ("past", "future"), ("left_gate", "right_gate")]
    words = [[side.words.get(role, role).replace(".", "_") for role in pair] for pair in pairs]
    fused = [_fuse(side, pair, f"={one}_{other}") for pair, (one, other) in zip(pairs, words)]
    return any(fused)


@operator("third", "layout", LAST, weight=1.0)
def parts_along_an_axis(side: Side, rng: random.Random) -> bool:
    """Queries, keys and values as one parameter of (3, out, in)."""
    sizes = {leaf.sizes for leaf in side.leaves if leaf.role in ("q", "k", "v")}
    if len(sizes) != 1 or not _fuse(side, "qkv", "qkv"):
        return False
    side.leaves = [replace(leaf, layout="parts_apart") if leaf.role == "qkv" else leaf for leaf in side.leaves]
    return True


@operator("third", "layout", LAST, weight=1.0)
def heads_as_modules(side: Side, rng: random.Random) -> bool:
    """Every head has maps of its own: ``heads.0.query``."""
    word = rng.choice(["=heads", "=head_list", "=attn_heads"])
    out: list[Leaf] = []
    done: set[Path] = set()
    for leaf in side.leaves:
        if leaf.role != "q" or not leaf.plain:
            if leaf.role not in ("k", "v") or leaf.parent not in done:
                out.append(leaf)
            continue
        done.add(leaf.parent)
        parts = [one for one in side.leaves if one.parent == leaf.parent and one.role in ("q", "k", "v")]
        out += [
            replace(one, path=(*one.parent, Step(f"{word}.{head}"), one.path[-1]), layout=f"rows:{head}/{HEADS}")
            for head in range(HEADS)
            for one in parts
        ]
    side.leaves = out
    return bool(done)


operator("third", "layout", weight=0.6, name="maps_as_convolutions_1d")(
    _restore("pointwise_1d", "linear", lambda leaf: numbered(leaf))
)
operator("third", "layout", weight=0.8, name="convolutions_as_maps")(
    _restore("flat", "conv2d", lambda leaf: leaf.sizes[0][2] == 1)
)
operator("third", "layout", weight=0.8, name="patches_as_maps")(_restore("flat", "conv3d", lambda leaf: True))
operator("third", "layout", weight=0.6, name="one_dimension_as_two")(_restore("as_2d", "conv1d", lambda leaf: True))
operator("third", "layout", LAST, weight=0.6, name="kernels_1d_turned")(
    _restore("channels_last", "conv1d", lambda leaf: leaf.sizes[0][1] > 1)
)
operator("third", "layout", name="tables_squeezed")(
    _restore("squeezed", "table", lambda leaf: 1 in leaf.sizes[0] and len(leaf.sizes[0]) > 1)
)
operator("third", "layout", name="tables_broadcast")(
    _restore("broadcast", "table", lambda leaf: len(leaf.sizes[0]) < 3)
)
operator("third", "layout", LAST, "source", name="uncounted_batches")(
    _restore("uncounted", "batch_norm", lambda leaf: True)
)


@operator("third", "layout", weight=0.8)
def constants_kept(side: Side, rng: random.Random) -> bool:
    """Tables that are learned on one side are buffers on the other."""
    return _restore("kind:buffer", "table", lambda leaf: True)(side, rng)


@operator("third", "layout", LAST, weight=1.0)
def port_from_flax(side: Side, rng: random.Random) -> bool:
    """Another framework's words and layouts throughout: ``kernel``, ``scale``, ``mean``, ``var``, ``embedding``."""
    layouts = {
        "linear": "transposed:kernel",
        "conv2d": "channels_last",
        "conv1d": "channels_last",
        "norm": "named:scale,bias",
        "group_norm": "named:scale,bias",
        "batch_norm": "flax",
        "embedding": "named:embedding",
    }
    before = list(side.leaves)
    side.leaves = [
        replace(leaf, layout=layouts[leaf.kind]) if leaf.kind in layouts and not leaf.layout else leaf
        for leaf in side.leaves
    ]
    return side.leaves != before


@operator("third", "layout", weight=2)
def untied(side: Side, rng: random.Random) -> bool:
    """The last map has a parameter of its own, as long as the table."""
    tied = [leaf for leaf in side.leaves if leaf.layout == "tied"]
    side.leaves = [replace(leaf, layout="") if leaf in tied else leaf for leaf in side.leaves]
    return bool(tied)


@operator("third", "layout", where="source", weight=2)
def tied_once_in_the_file(side: Side, rng: random.Random) -> bool:
    """The file holds a shared parameter under the name of the table alone."""
    tied = [leaf for leaf in side.leaves if leaf.layout == "tied"]
    side.leaves = [leaf for leaf in side.leaves if leaf not in tied]
    return bool(tied)
