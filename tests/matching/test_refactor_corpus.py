"""Whether the corpus of random refactors is fair: a careful human could tell every partner, or see that none shows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.refactors import forms_validate
from benchmarks.refactors.config import SOURCE, TARGET, Config, draw
from benchmarks.refactors.fairness import deceptions
from benchmarks.refactors.forms import FORMS
from benchmarks.refactors.network import Leaf, Net, Side, names_lie, parse_path, true_tensors
from benchmarks.refactors.operators import OPERATORS, REGIMES, Operator, Regime
from benchmarks.refactors.pair import drawn_pair
from benchmarks.refactors.structures import SPLITS, STRUCTURES, Draft, Sizes, Split, Structure
from benchmarks.refactors.vocabulary import draw_words, groups_of

PARTS: tuple[Split, ...] = ("fourth", "validate")  # of structures, operators and words of their own
OWN = [structure for structure in STRUCTURES.values() if structure.split in PARTS]
OPS = [op for op in OPERATORS.values() if op.split in PARTS]
SIZES = Sizes(depth=4, stages=3, experts=2)
PAIRS = 12  # per regime


def plain(structure: Structure, seed: str, sizes: Sizes = SIZES) -> Config:
    """A pair whose sides are called alike, and to which nothing was done."""
    words: dict[str, str] = {}
    for group in structure.groups:
        words |= draw_words(group, structure.split, random.Random(seed))
    return Config(structure.name, sizes, (words, dict(words)))


def strange_names(structure: Structure) -> set[str]:
    """What the operators call things that a structure has not."""
    found = set()
    for op, seed in product((op for op in OPS if (op.split, op.stage) == (structure.split, "content")), "abcdef"):
        side = plain(structure, op.name).plain_side(TARGET)
        known = {leaf.pieces for leaf in side.leaves}
        if op.apply(side, random.Random(seed)):
            added = [leaf for leaf in side.leaves if leaf.pieces not in known]
            given = [[step.role[1:] for step in leaf.path if step.role.startswith("=")] for leaf in added]
            found |= {words[0] for words in given if words}  # what is below it stands in a module of its own
    return found


def changed(op: Operator, many: int) -> Iterator[tuple[Net, Net]]:
    """Networks before and after one operator, where it has something to do."""
    structures = [structure for structure in OWN if structure.split == op.split]
    for structure in random.Random(op.name).sample(structures, len(structures)):
        config = plain(structure, op.name)
        side = config.plain_side(TARGET)
        if many and op.apply(side, random.Random(op.name)):
            many -= 1
            sides = (config.plain_side(SOURCE), side)
            old, new = sides[::-1] if op.where == "source" else sides
            yield Net(old), Net(new)


def make(structure: Structure) -> list[tuple[object, ...]]:
    """What a structure is but for the names in it."""
    draft = Draft(SIZES)
    structure.write(draft)
    roles: dict[str, int] = {}
    return [
        (leaf.kind, leaf.sizes, tuple((roles.setdefault(step.role, len(roles)), step.index) for step in leaf.path))
        for leaf in draft.leaves
    ]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_no_operator_deceives(op: Operator) -> None:
    """Where all words are the same, none comes to mean what it meant for a sibling; and the new network runs."""
    pairs = list(changed(op, 3))
    assert pairs, "it has something to do in no structure"
    for old, new in pairs:
        assert not deceptions(old, new)
        assert op.name.startswith("count_down") or not names_lie(old, new)  # descending, which order shows
        new(torch.zeros(1))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("regime", REGIMES)
def test_no_drawn_pair_deceives(regime: Regime, part: Split) -> None:
    """With different words and several operators at once."""
    for seed in range(PAIRS):
        pair = drawn_pair(part, regime, seed)
        assert not deceptions(pair.old, pair.new), pair.config.seed


@pytest.mark.parametrize("part", PARTS)
def test_nothing_stands_ready_that_is_not_wanted(part: Split) -> None:
    """What has no source in the old network has no namesake of its size in the file either.

    Lists of other lengths are known for it: what is taken from the member of the same number counts as assumed there.
    """
    for seed in range(2 * PAIRS):
        pair = drawn_pair(part, "everything", seed)
        if not any(change.operator.startswith(("prune_", "insert_")) for change in pair.config.changes):
            shapes = {name: tensor.shape for name, tensor in pair.state.items()}
            alone = {name for name, tensor in pair.truth.items() if tensor is None}
            held = pair.new.state_dict()
            assert not [name for name in alone if shapes.get(name) == held[name].shape], pair.config.seed


@pytest.mark.parametrize("structure", OWN, ids=lambda structure: structure.name)
def test_strangers_have_names_of_their_own(structure: Structure) -> None:
    """What one side alone has is not called as anything of the other might be."""
    groups = [words for group in structure.groups for words, _ in groups_of(group, structure.split)]
    assert not strange_names(structure) & {
        part for words in groups for word in words.values() for part in word.split(".")
    }


def test_a_deception_is_seen() -> None:
    """Exchanged words deceive, at any level; counting from elsewhere does not, as it shows."""
    config = plain(STRUCTURES["radiance_field"], "exchanged")
    old = Net(config.plain_side(SOURCE))
    for one, other in (("coarse", "fine"), ("density", "features")):
        words = config.words[TARGET] | {one: config.words[TARGET][other], other: config.words[TARGET][one]}
        side = config.plain_side(TARGET)
        new = Net(Side([replace(leaf, sizes=((8, 8),)) for leaf in side.leaves], words))
        same = Net(Side([replace(leaf, sizes=((8, 8),)) for leaf in side.leaves], config.words[SOURCE]))
        assert {found.module.rpartition("/")[2] for found in deceptions(same, new)} == {one, other}
        assert not deceptions(old, Net(side))
    config = plain(STRUCTURES["volume_segmenter"], "counted")
    from_one = {"solid1": "conv1", "solid2": "conv2", "solid_norm1": "norm1", "solid_norm2": "norm2"}
    from_zero = {"solid1": "conv0", "solid2": "conv1", "solid_norm1": "norm0", "solid_norm2": "norm1"}
    leaves = config.plain_side(SOURCE).leaves
    old, new = (Net(Side(list(leaves), config.words[SOURCE] | names)) for names in (from_one, from_zero))
    assert not deceptions(old, new)


def test_no_structure_is_a_copy() -> None:
    """Structures differ in more than their names, within their part and from all others."""
    known = [make(structure) for structure in STRUCTURES.values()]
    assert all(known.count(make(structure)) == 1 for structure in OWN)
    for part in PARTS:
        assert sum(structure.split == part for structure in OWN) >= 20
        assert sum(op.split == part for op in OPS) >= 40


def test_what_is_shared_is_one_parameter() -> None:
    """A module under two names is one, and a file holds it twice, unless its operator says otherwise."""
    for name in ("common_trunk", "aligned_translator", "one_layer_encoder", "gated_captioner"):
        config = plain(STRUCTURES[name], "shared")
        net = Net(config.plain_side(SOURCE))
        pieces = [placed.leaf.pieces for placed in net.placed]
        twice = [placed for placed in net.placed if pieces.count(placed.leaf.pieces) > 1]
        assert len(twice) >= 2
        held = net.state_dict(keep_vars=True)
        assert len({id(held[f"{placed.name}.weight"]) for placed in twice}) == len(twice) // 2
        truth = true_tensors(net)
        for placed in twice:
            twin = next(other for other in twice if other is not placed and other.leaf.pieces == placed.leaf.pieces)
            one, other = truth[f"{placed.name}.weight"], truth[f"{twin.name}.weight"]
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


COMPARED = {  # kind -> layouts that compute what the plain layer does, from tensors in another shape or order
    "linear": (
        "transposed",
        "bare_matrix",
        "bare",
        "pointwise",
        "pointwise_1d",
        "pointwise_3d",
        "by_head",
        "masked",
        "",
    ),
    "conv2d": ("channels_last", "channels_behind", "inflated", "flat", ""),
    "conv1d": ("channels_last", "channels_behind", "as_2d", "flat", ""),
    "norm": ("as_group", "as_column", ""),
    "batch_norm": ("named", "moving", "uncounted", ""),
    "weight_norm": ("own", "style", ""),
    "spectral2d": ("style", ""),
    "embedding": ("bag", "bare", "named", ""),
    "lstm": ("gates_apart", "cell"),
    "gru": ("gates_apart", "cell"),
}


def ramp(*shape: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    """In place of zeros: numbers that tell channels apart, and places along the last axis of what is convolved."""
    size = shape[0] if shape and not isinstance(shape[0], int) else shape
    if dtype is not None and not dtype.is_floating_point:
        return torch.full(tuple(size), 0, dtype=dtype)
    out = torch.full(tuple(size), 1.0)
    if len(size) > 1:
        out = out * (0.3 + torch.arange(size[1])).sin().view(-1, *(1,) * (len(size) - 2))
    return out + torch.arange(8).sub(3.5).mul(0.1) if len(size) > 2 and size[-1] == 8 else out


def outputs(leaves: list[Leaf]) -> list[torch.Tensor]:
    """What each leaf with its true tensors makes of the same numbers, a value for each channel."""
    with mock.patch("torch.zeros", ramp):
        net = Net(Side([replace(leaf, path=parse_path(f"leaf#{n}")) for n, leaf in enumerate(leaves)], {})).eval()
    net.load_state_dict(true_tensors(net))
    found = []
    with torch.no_grad():
        for placed in net.placed:
            recurrent = placed.leaf.kind in ("lstm", "gru")  # they start from a state of zeros
            with nullcontext() if recurrent else mock.patch("torch.zeros", ramp):
                y = placed.form.run() if placed.form.run else torch.ones(1, 1)
            y = y[0] if isinstance(y, tuple) else y
            y = y.flatten(1) if placed.leaf.kind in ("linear", "embedding") and "point" not in placed.leaf.layout else y
            found.append(y.flatten(2).mean(2)[0] if y.dim() > 2 else y[0])
    return found


def compared(side: Side) -> set[tuple[str, str]]:
    """Compare what each layer that is stored otherwise computes with what the plain one does; returns which."""
    chosen = [leaf for leaf in side.leaves if leaf.layout.partition(":")[0] in COMPARED.get(leaf.kind, ())]
    chosen = [leaf for leaf in chosen if leaf.layout or len(leaf.pieces) > 1]
    plain = [
        replace(leaf, pieces=(piece,), sizes=(size,), layout="cell" if leaf.kind in ("lstm", "gru") else "")
        for leaf in chosen
        for piece, size in zip(leaf.pieces, leaf.sizes)
    ]
    expected = iter(outputs(plain))
    for leaf, found in zip(chosen, outputs(chosen)):
        wanted = torch.cat([next(expected) for _ in leaf.pieces])
        torch.testing.assert_close(found, wanted, equal_nan=True, msg=f"{leaf.kind} as {leaf.layout}: {leaf.pieces}")
    return {(leaf.kind, leaf.layout.partition(":")[0]) for leaf in chosen}


def test_another_layout_computes_the_same() -> None:
    """The true tensors are those with which the new layer is the function that the old one was."""
    seen: set[tuple[str, str]] = set()
    for op in (op for op in OPS if (op.split, op.stage) == ("validate", "layout")):
        changed_sides = 0
        for structure in (structure for structure in OWN if structure.split == op.split):
            side = plain(structure, op.name, Sizes(depth=2)).plain_side(TARGET)
            if changed_sides < 2 and op.apply(side, random.Random(op.name)):
                changed_sides += 1
                seen |= compared(side)
    fresh = {key for key, make in FORMS.items() if make.__module__ == forms_validate.__name__ and all(key)}
    assert seen >= {(kind, layout) for kind, layout in fresh if layout in COMPARED.get(kind, ())}


@pytest.mark.parametrize("regime", REGIMES)
def test_both_sides_compute_the_same(regime: Regime) -> None:
    """The same for whole pairs, with all that was done to them."""
    sides = [side for seed in range(PAIRS) for side in drawn_pair("validate", regime, seed).config.sides()]
    assert set().union(*map(compared, sides))


def test_parts_are_drawn_apart() -> None:
    """No part has a structure or an operator of another; what is of all parts has no second form."""
    for split in SPLITS:
        for regime in REGIMES:
            config = draw(split, regime, 1)
            assert STRUCTURES[config.structure].split == split
            assert all(OPERATORS[change.operator].split in (split, "both") for change in config.changes)
