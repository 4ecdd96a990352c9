"""What a refactor does to a side: the registry, and operators that add, remove and copy.

An operator changes a side in place and says whether there was anything to do. Each belongs to a stage (what is there,
how it is stored, where it stands, what it is called, in which order), to a part of the corpus, and to regimes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks.refactors.forms import drawn
from benchmarks.refactors.network import Leaf, Path, Side, Step

Regime = Literal["in_order", "safetensors", "shuffled", "everything"]
REGIMES: tuple[Regime, ...] = ("in_order", "safetensors", "shuffled", "everything")
Stage = Literal["content", "layout", "places", "names", "order"]
STAGES: tuple[Stage, ...] = ("content", "layout", "places", "names", "order")
Which = Literal["first", "second", "third", "fourth", "validate", "both"]  # ``both``: of every part
Where = Literal["any", "source", "target"]
Apply = Callable[[Side, random.Random], bool]

ALWAYS: tuple[Regime, ...] = REGIMES
UNORDERED: tuple[Regime, ...] = ("shuffled", "everything")
LAST: tuple[Regime, ...] = ("everything",)


@dataclass(frozen=True)
class Operator:
    """A kind of change.

    Attributes:
        name: What it is called.
        split: The part of the corpus that it belongs to.
        stage: When it happens.
        regimes: Where it may happen.
        where: On which side.
        weight: How often, relative to others.
        apply: The change itself.
    """

    name: str
    split: Which
    stage: Stage
    regimes: tuple[Regime, ...]
    where: Where
    weight: float
    apply: Apply


OPERATORS: dict[str, Operator] = {}


def operator(
    split: Which,
    stage: Stage,
    regimes: tuple[Regime, ...] = ALWAYS,
    where: Where = "any",
    weight: float = 1.0,
    name: str = "",
) -> Callable[[Apply], Apply]:
    """Register an operator under the name of its function."""

    def register(apply: Apply) -> Apply:
        called = name or apply.__name__
        OPERATORS[called] = Operator(called, split, stage, regimes, where, weight, apply)
        return apply

    return register


def lists_of(side: Side) -> dict[tuple[Path, str], int]:
    """Every numbered list, by the path above it and its role, with its length."""
    found: dict[tuple[Path, str], int] = {}
    for leaf in side.leaves:
        for depth, step in enumerate(leaf.path):
            if step.index is not None:
                key = (leaf.path[:depth], step.role)
                found[key] = max(found.get(key, 0), step.index + 1)
    return found


def registered(side: Side, arrange: Callable[[Path, list[Step]], list[Step]]) -> bool:
    """Register the members of every module in the order that ``arrange`` gives them; what is below stays together."""
    before = list(side.leaves)
    orders: dict[Path, list[Step]] = {}
    for leaf in side.leaves:
        for depth, step in enumerate(leaf.path):
            steps = orders.setdefault(leaf.path[:depth], [])
            if step not in steps:
                steps.append(step)
    arranged = {above: arrange(above, steps) for above, steps in orders.items()}
    side.leaves.sort(key=lambda leaf: [arranged[leaf.path[:depth]].index(step) for depth, step in enumerate(leaf.path)])
    return side.leaves != before


def renumbered(side: Side, where: tuple[Path, str], number: Callable[[int], int | None]) -> None:
    """Give the members of a list other numbers; ``None`` takes one out."""
    above, role = where
    kept = []
    for leaf in side.leaves:
        step = leaf.path[len(above)] if len(leaf.path) > len(above) else None
        if step is None or leaf.path[: len(above)] != above or step.role != role or step.index is None:
            kept.append(leaf)
            continue
        new = number(step.index)
        if new is not None:
            kept.append(leaf.moved((*above, Step(role, new), *leaf.path[len(above) + 1 :])))
    side.leaves = kept


def _some_list(side: Side, rng: random.Random, least: int = 2) -> tuple[tuple[Path, str], int] | None:
    found = [item for item in lists_of(side).items() if item[1] >= least]
    return rng.choice(found) if found else None


def _pruned(keep: Callable[[int], list[int]]) -> Apply:
    def apply(side: Side, rng: random.Random) -> bool:
        chosen = _some_list(side, rng)
        if chosen is None:
            return False
        where, length = chosen
        kept = keep(length)
        if not kept or len(kept) == length:
            return False
        renumbered(side, where, lambda i: kept.index(i) if i in kept else None)
        return True

    return apply


operator("first", "content", LAST, name="prune_front")(_pruned(lambda n: list(range(1, n))))
operator("first", "content", LAST, name="prune_end")(_pruned(lambda n: list(range(n - 1))))
operator("second", "content", LAST, name="prune_middle")(_pruned(lambda n: [i for i in range(n) if i != n // 2]))
operator("second", "content", LAST, name="prune_every_second")(_pruned(lambda n: list(range(0, n, 2))))


def _inserted(at: Callable[[int], list[int]]) -> Apply:
    """Copies of a member, with values of their own, at these new places."""

    def apply(side: Side, rng: random.Random) -> bool:
        chosen = _some_list(side, rng, 1)
        if chosen is None:
            return False
        where, length = chosen
        fresh = at(length)
        old = [i for i in range(length + len(fresh)) if i not in fresh]
        renumbered(side, where, lambda i: old[i])
        above, role = where
        for place in fresh:
            twin = old[min(len(old) - 1, len([i for i in old if i < place]))]
            model = [leaf for leaf in side.leaves if leaf.path[: len(above) + 1] == (*above, Step(role, twin))]
            copies = [
                _copy(leaf, f"new {place} ", (*above, Step(role, place), *leaf.path[len(above) + 1 :]))
                for leaf in model
            ]
            first = min(i for i, leaf in enumerate(side.leaves) if leaf in model)
            spot = first if twin > place else first + len(model)
            side.leaves[spot:spot] = copies
        return True

    return apply


operator("first", "content", LAST, name="insert_front")(_inserted(lambda n: [0]))
operator("second", "content", LAST, name="insert_middle")(_inserted(lambda n: [max(1, n // 2)]))
operator("second", "content", LAST, name="insert_every_second")(_inserted(lambda n: list(range(1, 2 * n, 2))))


def _copy(leaf: Leaf, mark: str, path: Path) -> Leaf:
    return replace(leaf, path=path, pieces=tuple(mark + piece for piece in leaf.pieces))


def _copied(pairs: Iterable[tuple[str, str]]) -> Apply:
    """The whole network again, with other values: an average, a teacher."""
    options = list(pairs)

    def apply(side: Side, rng: random.Random) -> bool:
        own, other = rng.choice(options)
        copies = [_copy(leaf, f"{other} ", (Step(f"={other}"), *leaf.path)) for leaf in side.leaves]
        wrapped = [leaf.moved((Step(f"={own}"), *leaf.path)) if own else leaf for leaf in side.leaves]
        side.leaves = copies + wrapped if rng.random() < 0.3 else wrapped + copies
        return True

    return apply


operator("first", "content", LAST, "source", name="average_beside")(
    _copied([("model", "ema_model"), ("net", "net_ema"), ("model", "model_ema.module"), ("network", "shadow")])
)
operator("second", "content", LAST, "source", name="teacher_beside")(
    _copied([("student", "teacher"), ("online", "target"), ("main", "frozen_copy"), ("policy", "policy_old")])
)


def _foreign_head(words: Iterable[str]) -> Apply:
    """Another task's head, of the same size, takes the place of the last linear map."""
    options = list(words)

    def apply(side: Side, rng: random.Random) -> bool:
        for at in range(len(side.leaves) - 1, -1, -1):
            leaf = side.leaves[at]
            if leaf.kind == "linear" and leaf.plain and not any(s.index is not None for s in leaf.path):
                word = rng.choice(options)
                side.leaves[at] = _copy(leaf, f"{word} ", (*leaf.parent, Step(f"={word}")))
                return True
        return False

    return apply


operator("first", "content", LAST, "target", name="other_head")(
    _foreign_head(["domain_discriminator", "rotation_head", "reward_model_head", "box_regressor"])
)
operator("second", "content", LAST, "target", name="head_of_another_task")(
    _foreign_head(["toxicity", "quality_scorer", "jigsaw_solver", "speaker_id", "contrast"])
)


def _exchanged_part(words: Iterable[str]) -> Apply:
    """A part of every block gives way to something else of the same size, called after what it is."""
    options = list(words)

    def apply(side: Side, rng: random.Random) -> bool:
        inside = [leaf for leaf in side.leaves if leaf.plain and any(step.index is not None for step in leaf.path)]
        roles = sorted({leaf.role for leaf in inside if leaf.path[-1].index is None})
        if not roles:
            return False
        role, word = rng.choice(roles), rng.choice(options)
        side.leaves = [
            _copy(leaf, f"{word} ", (*leaf.parent, Step(f"={word}"))) if leaf in inside and leaf.role == role else leaf
            for leaf in side.leaves
        ]
        return True

    return apply


operator("first", "content", LAST, "target", name="part_exchanged")(
    _exchanged_part(["fourier", "memory_bank", "relative_bias", "router_map", "dropout_gate"])
)
operator("second", "content", LAST, "target", name="part_reinvented")(
    _exchanged_part(["wavelet", "hyper_net", "timestep_scale", "retrieval", "sparsity_mask"])
)


@operator("first", "content", LAST, "source")
def loss_network_beside(side: Side, rng: random.Random) -> bool:
    """A part of the old module that the new one has not: a few more maps of the model's own sizes."""
    linear = [leaf for leaf in side.leaves if leaf.kind == "linear" and leaf.plain]
    if not linear:
        return False
    name = rng.choice(["loss_fn.proj", "perceptual.lin", "aux_head", "criterion.center"])
    leaf = rng.choice(linear)
    side.leaves.append(_copy(leaf, "loss ", (Step(f"={name}"),)))
    return True


@operator("second", "content", LAST, "source")
def metric_states_beside(side: Side, rng: random.Random) -> bool:
    """What metrics and schedules write into a state dict."""
    width = side.leaves[0].sizes[0][-1]
    side.extra |= {
        "val_metric.confmat": drawn("confmat", (width, width)),
        "val_metric.total": torch.tensor(311),
        "class_weights": drawn("class weights", (width,)),
    }
    return True


@operator("both", "content", LAST, "any", weight=0.7)
def part_only(side: Side, rng: random.Random) -> bool:
    """One of several top-level parts is missing: of the checkpoint, or of the new model."""
    parts = sorted({leaf.path[0].role for leaf in side.leaves})
    if len(parts) < 3:
        return False
    dropped = rng.choice(parts)
    side.leaves = [leaf for leaf in side.leaves if leaf.path[0].role != dropped]
    return True


@operator("both", "content", LAST, "target")
def sizes_exchanged(side: Side, rng: random.Random) -> bool:
    """Two outputs get new sizes, each the one that the other had: neither can be taken, whatever fits."""
    outputs = [
        leaf for leaf in side.leaves if leaf.kind == "linear" and not any(s.index is not None for s in leaf.path)
    ]
    pairs = [
        (a, b) for a in outputs for b in outputs if a.sizes[0][0] < b.sizes[0][0] and a.sizes[0][1] == b.sizes[0][1]
    ]
    if not pairs:
        return False
    one, other = rng.choice(pairs)
    sizes = {one: other.sizes, other: one.sizes}
    side.leaves = [
        replace(_copy(leaf, "resized ", leaf.path), sizes=sizes[leaf]) if leaf in sizes else leaf
        for leaf in side.leaves
    ]
    return True


@operator("first", "content", LAST, "source")
def averages_underscored(side: Side, rng: random.Random) -> bool:
    """Averages as one flat module holds them: every dot of a name is an underscore."""
    side.shadow = rng.choice(["ema", "model_ema", "averaged_params"])
    return True


def _resized(chosen: Callable[[Leaf], bool], dimension: int) -> Apply:
    """Another size: nothing of the old one can be taken without changing values."""

    def apply(side: Side, rng: random.Random) -> bool:
        before = list(side.leaves)
        extra = rng.choice([1, 3, 8])
        side.leaves = [
            replace(
                _copy(leaf, f"{extra} more ", leaf.path),
                sizes=tuple((*s[:dimension], s[dimension] + extra, *s[dimension + 1 :]) for s in leaf.sizes),
            )
            if chosen(leaf) and len(leaf.pieces) == 1
            else leaf
            for leaf in side.leaves
        ]
        return side.leaves != before

    return apply


operator("first", "content", LAST, name="larger_vocabulary")(
    _resized(lambda leaf: leaf.kind == "embedding" and leaf.role == "tokens", 0)
)
operator("second", "content", LAST, name="longer_positions")(
    _resized(lambda leaf: leaf.role == "pos" and leaf.kind == "table", 1)
)


def _added(kind: str, words: Iterable[str], beside: tuple[str, ...]) -> Apply:
    """Something new of the model's own width in every block."""
    options = list(words)

    def apply(side: Side, rng: random.Random) -> bool:
        word = rng.choice(options)
        out: list[Leaf] = []
        for leaf in side.leaves:
            out.append(leaf)
            if leaf.role in beside and leaf.kind in ("norm", "batch_norm", "linear"):
                width = leaf.sizes[0][0]
                fresh = replace(leaf, kind=kind, bias=True, sizes=((width,),), path=(*leaf.parent, Step(f"={word}")))
                out.append(replace(fresh, pieces=(f"new {word} {leaf.pieces[0]}",)))
        done = len(out) > len(side.leaves)
        side.leaves = out
        return done

    return apply


operator("first", "content", LAST, name="scales_added")(
    _added("table", ["gamma", "layer_scale", "ls", "gate"], ("o", "bn2", "neighbour"))
)
operator("second", "content", LAST, name="norms_added")(
    _added("norm", ["post_norm", "sandwich", "inner_norm", "ln_extra"], ("o", "fc2", "rows", "norm_mix"))
)
