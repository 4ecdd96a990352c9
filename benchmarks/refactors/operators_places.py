"""Operators that change where modules stand: flattened, nested, regrouped, lists cut, joined, interleaved, parallel."""

from __future__ import annotations

import random
from collections.abc import Iterable

from benchmarks.refactors.network import Leaf, Path, Side, Step
from benchmarks.refactors.operators import LAST, lists_of, operator

CONTAINERS = (
    "attn",
    "mlp",
    "self",
    "cross",
    "ff",
    "res",
    "trans",
    "ssm",
    "over_image",
    "over_text",
    "heads",
    "quantizer",
)


@operator("first", "places", weight=1.5)
def flatten_containers(side: Side, rng: random.Random) -> bool:
    """Attention and feed-forward stand directly in the block."""
    before = list(side.leaves)
    gone = rng.choice([("attn",), ("mlp",), ("attn", "mlp")])
    side.leaves = [leaf.moved(tuple(s for s in leaf.path if s.role not in gone)) for leaf in side.leaves]
    return side.leaves != before


@operator("second", "places", weight=1.5)
def join_containers(side: Side, rng: random.Random) -> bool:
    """``attn.q`` becomes ``attn_q``."""
    return _glued(side, "_", lambda step: step.role in CONTAINERS)


@operator("second", "places", LAST)
def flat_names(side: Side, rng: random.Random) -> bool:
    """No levels inside a block at all: ``blocks.0.mlp_fc1``."""
    return _glued(side, "_", lambda step: step.index is None)


def _glued(side: Side, joint: str, chosen: object) -> bool:
    """Join a level with the one below it, where neither is numbered."""
    done = False
    for at, leaf in enumerate(side.leaves):
        path: list[Step] = []
        for step in leaf.path:
            last = path[-1] if path else None
            if last is not None and last.index is None and step.index is None and chosen(last):  # type: ignore[operator]
                above, below = _word(side, last), _word(side, step)
                path[-1] = Step(f"={above}{joint}{below}".replace(".", joint)) if above else step
                done = True
            else:
                path.append(step)
        side.leaves[at] = leaf.moved(tuple(path))
    return done


def _word(side: Side, step: Step) -> str:
    return step.role[1:] if step.role.startswith("=") else side.words.get(step.role, step.role)


def _nested(words: Iterable[str]) -> object:
    options = list(words)

    def apply(side: Side, rng: random.Random) -> bool:
        """Every map stands in a wrapper of its own."""
        kind = rng.choice(["linear", "norm", "conv2d"])
        word = Step("=" + rng.choice(options))
        before = list(side.leaves)
        side.leaves = [
            leaf.moved((*leaf.path, word)) if leaf.kind == kind and leaf.layout in ("", "transposed") else leaf
            for leaf in side.leaves
        ]
        return side.leaves != before

    return apply


operator("first", "places", name="nest_leaves")(_nested(["linear", "layer", "fn", "0"]))  # type: ignore[arg-type]
operator("second", "places", name="wrap_leaves")(_nested(["module", "op", "inner", "base"]))  # type: ignore[arg-type]


@operator("first", "places", weight=1.5)
def wrap(side: Side, rng: random.Random) -> bool:
    word = Step("=" + rng.choice(["model", "net", "module", "backbone"]))
    side.leaves = [leaf.moved((word, *leaf.path)) for leaf in side.leaves]
    return True


@operator("second", "places", weight=1.5)
def wrap_twice(side: Side, rng: random.Random) -> bool:
    words = rng.choice([("module", "model"), ("_forward_module", "network"), ("lit", "core"), ("algo", "policy")])
    side.leaves = [leaf.moved((*(Step("=" + w) for w in words), *leaf.path)) for leaf in side.leaves]
    return True


@operator("second", "places", weight=1.5)
def body_and_head(side: Side, rng: random.Random) -> bool:
    """All but the last leaf moves into a body."""
    word = Step("=" + rng.choice(["body", "feature_extractor", "encoder_body", "main"]))
    *body, head = side.leaves
    side.leaves = [*(leaf.moved((word, *leaf.path)) for leaf in body), head]
    return len(body) > 0


@operator("first", "places")
def group_entry(side: Side, rng: random.Random) -> bool:
    """What stands before the first list moves into a group."""
    word = Step("=" + rng.choice(["embeddings", "entry", "prepare"]))
    first = next((i for i, leaf in enumerate(side.leaves) if any(s.index is not None for s in leaf.path)), 0)
    side.leaves = [*(leaf.moved((word, *leaf.path)) for leaf in side.leaves[:first]), *side.leaves[first:]]
    return first > 0


def _first_list(side: Side, least: int) -> tuple[Path, str] | None:
    found = [key for key, length in lists_of(side).items() if length >= least]
    return found[0] if found else None


@operator("first", "places", LAST)
def cut_list(side: Side, rng: random.Random) -> bool:
    """One list becomes two: ``blocks.0 .. 3`` to ``stages.0.blocks.0 .. 1``, ``stages.1.blocks.0 .. 1``."""
    where = _first_list(side, 2)
    if where is None:
        return False
    half = (lists_of(side)[where] + 1) // 2
    outer = rng.choice(["=stages", "=groups", "=parts"])
    _move_list(side, where, lambda i: (Step(f"{outer}.{i // half}"), Step(where[1], i % half)))
    return True


@operator("second", "places", LAST)
def lists_by_name(side: Side, rng: random.Random) -> bool:
    """One list becomes named members: ``first_blocks``, ``later_blocks``."""
    where = _first_list(side, 2)
    if where is None:
        return False
    half = (lists_of(side)[where] + 1) // 2
    words = rng.choice([("=lower", "=upper"), ("=early", "=late"), ("=part_a", "=part_b")])
    _move_list(side, where, lambda i: (Step(words[i // half]), Step(where[1], i % half)))
    return True


@operator("second", "places", LAST)
def parallel_lists(side: Side, rng: random.Random) -> bool:
    """A list of blocks becomes a list for each part: ``attn.0``, ``mlp.0``."""
    where = _first_list(side, 1)
    if where is None:
        return False
    above, _ = where
    side.leaves = [
        leaf.moved((*above, leaf.path[len(above) + 1]._replace(index=step.index), *leaf.path[len(above) + 2 :]))
        if (step := _in_list(leaf, where))
        and len(leaf.path) > len(above) + 1
        and leaf.path[len(above) + 1].index is None
        else leaf
        for leaf in side.leaves
    ]
    order = {}
    for leaf in side.leaves:  # each of the new lists is registered on its own
        order.setdefault(_head(leaf, above), []).append(leaf)
    side.leaves = [leaf for group in order.values() for leaf in group]
    return True


def _head(leaf: Leaf, above: Path) -> tuple[Path, str]:
    inside = leaf.path[: len(above)] == above and len(leaf.path) > len(above)
    return (
        (above, leaf.path[len(above)].role) if inside and leaf.path[len(above)].index is not None else (leaf.path, "")
    )


@operator("first", "places", LAST)
def interleaved_list(side: Side, rng: random.Random) -> bool:
    """Attention and feed-forward become members of one list: ``layers.0`` attention, ``layers.1`` feed-forward."""
    where = _first_list(side, 1)
    if where is None:
        return False
    above, role = where
    depth = len(above) + 1
    second = {"norm2", "mlp", "fc1", "fc2", "gate", "up", "down", "gate_up", "conv2", "bn2"}
    if not any(
        _in_list(leaf, where) and len(leaf.path) > depth and leaf.path[depth].role in second for leaf in side.leaves
    ):
        return False
    side.leaves = [
        leaf.moved((*above, Step(role, 2 * step.index + (leaf.path[depth].role in second)), *leaf.path[depth:]))  # type: ignore[operator]
        if (step := _in_list(leaf, where)) and len(leaf.path) > depth
        else leaf
        for leaf in side.leaves
    ]
    return True


def _in_list(leaf: Leaf, where: tuple[Path, str]) -> Step | None:
    above, role = where
    if leaf.path[: len(above)] == above and len(leaf.path) > len(above):
        step = leaf.path[len(above)]
        if step.role == role and step.index is not None:
            return step
    return None


def _move_list(side: Side, where: tuple[Path, str], to: object) -> None:
    above, _ = where
    side.leaves = [
        leaf.moved((*above, *to(step.index), *leaf.path[len(above) + 1 :]))  # type: ignore[operator]
        if (step := _in_list(leaf, where))
        else leaf
        for leaf in side.leaves
    ]
