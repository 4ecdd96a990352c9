"""Operators that change how tensors are stored: fused, split, turned, stacked, normed in another way."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.refactors.forms import HEADS
from benchmarks.refactors.network import Leaf, Path, Side, Step
from benchmarks.refactors.operators import LAST, Apply, operator

Choose = Callable[[Leaf], bool]
ATTENTION = ("q", "k", "v", "o", "qkv", "kv", "rows", "columns")


def _fuse(side: Side, roles: Sequence[str], into: str, order: Sequence[int] | None = None) -> bool:
    """Join siblings of these roles into one leaf, parts in the given order."""
    families: dict[Path, dict[str, Leaf]] = {}
    for leaf in side.leaves:
        if leaf.role in roles and leaf.kind == "linear" and leaf.plain and leaf.path[-1].index is None:
            families.setdefault(leaf.parent, {})[leaf.role] = leaf
    done = False
    for parent, members in families.items():
        if len(members) < len(roles) or len({member.sizes[0][1:] for member in members.values()}) > 1:
            continue  # what reads something else cannot be joined
        parts = [members[role] for role in roles]
        if order:
            parts = [parts[i] for i in order]
        whole = replace(
            parts[0],
            path=(*parent, Step(into)),
            pieces=tuple(p.pieces[0] for p in parts),
            sizes=tuple(p.sizes[0] for p in parts),
            when=min(p.when for p in parts),
        )
        at = min(side.leaves.index(p) for p in parts)
        side.leaves[at] = whole
        side.leaves = [leaf for leaf in side.leaves if leaf not in parts]
        done = True
    return done


@operator("first", "layout", weight=2)
def fuse_qkv(side: Side, rng: random.Random) -> bool:
    return _fuse(side, "qkv", "qkv")


@operator("second", "layout", weight=2)
def fuse_kv(side: Side, rng: random.Random) -> bool:
    return _fuse(side, "kv", "kv")


@operator("first", "layout", weight=2)
def fuse_gate_up(side: Side, rng: random.Random) -> bool:
    return _fuse(side, ("gate", "up"), "gate_up")


@operator("second", "layout", weight=2)
def in_projection(side: Side, rng: random.Random) -> bool:
    """``in_proj_weight`` and ``in_proj_bias``, parameters of the attention itself, beside ``out_proj``."""
    if not _fuse(side, "qkv", "=in_proj"):
        return False
    side.leaves = [replace(leaf, layout="bare") if leaf.role == "=in_proj" else leaf for leaf in side.leaves]
    return True


@operator("first", "layout", LAST)
def spelled_part_order(side: Side, rng: random.Random) -> bool:
    """Fused in another order, which the whole's name spells: ``vqk``, ``kqv``."""
    order = rng.choice([(1, 0, 2), (2, 0, 1)])
    name = "".join("qkv"[i] for i in order)
    return _fuse(side, "qkv", rng.choice([f"={name}", f"=to_{name}", f"={name}_proj"]), order)


@operator("second", "layout", LAST)
def up_before_gate(side: Side, rng: random.Random) -> bool:
    """The same of gated units: ``up_gate``, ``value_gate``."""
    return _fuse(side, ("gate", "up"), rng.choice(["=up_gate", "=up_gate_proj", "=up_and_gate"]), (1, 0))


@operator("second", "layout", LAST, weight=0.5)
def interleave_heads(side: Side, rng: random.Random) -> bool:
    """Fused by head; no shape and no name shows it."""
    if not _fuse(side, "qkv", "qkv"):
        return False
    fits = all(size[0] % HEADS == 0 for leaf in side.leaves if leaf.role == "qkv" for size in leaf.sizes)
    if fits:
        side.leaves = [replace(leaf, layout="interleaved") if leaf.role == "qkv" else leaf for leaf in side.leaves]
    return fits


def _restore(layout: str, kind: str, choose: Choose) -> Apply:
    """Store chosen leaves of a kind in another layout."""

    def apply(side: Side, rng: random.Random) -> bool:
        before = list(side.leaves)
        side.leaves = [
            replace(leaf, layout=layout) if leaf.kind == kind and not leaf.layout and choose(leaf) else leaf
            for leaf in side.leaves
        ]
        return side.leaves != before

    return apply


def _anything(leaf: Leaf) -> bool:
    return True


operator("first", "layout", weight=0.4, name="transpose_all")(_restore("transposed", "linear", _anything))
operator("first", "layout", weight=0.4, name="transpose_attention")(
    _restore("transposed", "linear", lambda leaf: leaf.role in ATTENTION)
)
operator("second", "layout", weight=0.4, name="transpose_in_lists")(
    _restore("transposed", "linear", lambda leaf: any(step.index is not None for step in leaf.path))
)
operator("second", "layout", weight=0.4, name="transpose_feed_forward")(
    _restore("transposed", "linear", lambda leaf: leaf.role in ("fc1", "fc2", "gate", "up", "down", "gate_up"))
)
operator("first", "layout", LAST, weight=0.5, name="dense_kernels")(_restore("transposed:kernel", "linear", _anything))
operator("first", "layout", LAST, weight=0.5, name="bare_matrices")(
    _restore("bare_matrix", "linear", lambda leaf: not leaf.bias and leaf.path[-1].index is None)
)
operator("second", "layout", LAST, weight=0.5, name="projections_by_heads")(
    _restore("bare_heads", "linear", lambda leaf: leaf.role in ("q", "k", "v") and not leaf.bias)
)
operator("first", "layout", weight=0.5, name="pointwise_convolutions")(_restore("pointwise", "linear", _anything))
operator("second", "layout", LAST, weight=0.5, name="channels_last_kernels")(
    _restore("channels_last", "conv2d", _anything)
)
operator("second", "layout", weight=1.0, name="spectral_norm_parametrized")(
    _restore("style:parametrized", "spectral", _anything)
)
operator("second", "layout", weight=1.0, name="weight_norm_parametrized")(
    _restore("style:parametrized", "weight_norm", _anything)
)
operator("first", "layout", name="gamma_and_beta")(_restore("named:gamma,beta", "norm", _anything))
operator("second", "layout", name="g_and_b")(_restore("named:g,b", "norm", _anything))
operator("second", "layout", weight=0.6, name="w_and_b")(_restore("named:w,b", "linear", _anything))
operator("first", "layout", weight=0.6, name="matrix_and_shift")(_restore("named:matrix,shift", "linear", _anything))
operator("second", "layout", name="moving_statistics")(_restore("moving", "batch_norm", _anything))
operator("first", "layout", name="freeze_batch_norm")(_restore("frozen", "batch_norm", _anything))
operator("second", "layout", name="position_as_buffer")(
    _restore("kind:buffer", "table", lambda leaf: leaf.role == "pos")
)
operator("second", "layout", name="position_as_embedding")(
    _restore("embedding", "table", lambda leaf: leaf.role == "pos")
)
operator("second", "layout", LAST, "source", weight=0.5, name="low_rank_adapters")(
    _restore("lora", "linear", lambda leaf: leaf.role in ("q", "v"))
)


@operator("first", "layout", weight=1.0)
def no_biases(side: Side, rng: random.Random) -> bool:
    """The maps inside lists lose their biases."""
    before = list(side.leaves)
    side.leaves = [
        replace(leaf, bias=False) if leaf.kind == "linear" and any(s.index is not None for s in leaf.path) else leaf
        for leaf in side.leaves
    ]
    return side.leaves != before


@operator("first", "layout", weight=1.5)
def stack_experts(side: Side, rng: random.Random) -> bool:
    """One parameter for all experts, as (experts, out, in)."""
    return _stack(side, "")


@operator("first", "layout", LAST, weight=1.0)
def stack_experts_turned(side: Side, rng: random.Random) -> bool:
    """One parameter for all experts, as (experts, in, out)."""
    return _stack(side, "t")


def _stack(side: Side, turned: str) -> bool:
    families: dict[tuple[Path, Path], list[Leaf]] = {}
    for leaf in side.leaves:
        at = next((i for i, step in enumerate(leaf.path) if step.role == "experts"), None)
        if at is not None and leaf.kind == "linear" and not leaf.layout and not leaf.bias:
            families.setdefault((leaf.path[:at], leaf.path[at + 1 :]), []).append(leaf)
    for (above, below), members in families.items():
        whole = replace(
            members[0],
            path=(*above, Step("experts"), *below),
            pieces=tuple(p for m in members for p in m.pieces),
            sizes=tuple(s for m in members for s in m.sizes),
            layout=f"stacked:{len(members[0].pieces)}{turned}",
        )
        side.leaves[side.leaves.index(members[0])] = whole
        side.leaves = [leaf for leaf in side.leaves if leaf not in members]
    return bool(families)


@operator("both", "layout", weight=1.5)
def unroll_layers(side: Side, rng: random.Random) -> bool:
    """A recurrent module of several layers becomes a list of cells, or of modules with one layer each."""
    return _unroll(side, rng.choice(["cell", ""]))


@operator("second", "layout", LAST)
def own_cells(side: Side, rng: random.Random) -> bool:
    """A recurrent module becomes a list of hand-written cells with another order of gates."""
    return _unroll(side, "own_cell")


def _unroll(side: Side, layout: str) -> bool:
    out: list[Leaf] = []
    for leaf in side.leaves:
        if leaf.kind not in ("lstm", "gru") or leaf.layout:
            out.append(leaf)
            continue
        word = Step(leaf.role, 0)
        out += [
            replace(leaf, path=(*leaf.parent, word._replace(index=i)), pieces=(piece,), sizes=(size,), layout=layout)
            for i, (piece, size) in enumerate(zip(leaf.pieces, leaf.sizes))
        ]
    done = out != side.leaves
    side.leaves = out
    return done
