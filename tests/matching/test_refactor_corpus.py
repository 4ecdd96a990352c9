"""Whether the corpus of random refactors is fair: a careful human could tell every partner, or see that none shows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from benchmarks.refactors.config import SOURCE, TARGET, Config, draw
from benchmarks.refactors.fairness import deceptions
from benchmarks.refactors.network import Net, Side, names_lie, true_tensors
from benchmarks.refactors.operators import OPERATORS, REGIMES, Operator, Regime
from benchmarks.refactors.pair import drawn_pair
from benchmarks.refactors.structures import SPLITS, STRUCTURES, Draft, Sizes, Structure
from benchmarks.refactors.vocabulary import draw_words, groups_of

FOURTH = [structure for structure in STRUCTURES.values() if structure.split == "fourth"]
OWN = [op for op in OPERATORS.values() if op.split == "fourth"]
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
    for op, seed in product((op for op in OWN if op.stage == "content"), "abcdef"):
        side = plain(structure, op.name).plain_side(TARGET)
        known = {leaf.pieces for leaf in side.leaves}
        if op.apply(side, random.Random(seed)):
            added = [leaf for leaf in side.leaves if leaf.pieces not in known]
            given = [[step.role[1:] for step in leaf.path if step.role.startswith("=")] for leaf in added]
            found |= {words[0] for words in given if words}  # what is below it stands in a module of its own
    return found


def changed(op: Operator, many: int) -> Iterator[tuple[Net, Net]]:
    """Networks before and after one operator, where it has something to do."""
    for structure in random.Random(op.name).sample(FOURTH, len(FOURTH)):
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


@pytest.mark.parametrize("op", OWN, ids=lambda op: op.name)
def test_no_operator_deceives(op: Operator) -> None:
    """Where all words are the same, none comes to mean what it meant for a sibling; and the new network runs."""
    pairs = list(changed(op, 3))
    assert pairs, "it has something to do in no structure"
    for old, new in pairs:
        assert not deceptions(old, new)
        assert op.name.startswith("count_down") or not names_lie(old, new)  # descending, which order shows
        new(torch.zeros(1))


@pytest.mark.parametrize("regime", REGIMES)
def test_no_drawn_pair_deceives(regime: Regime) -> None:
    """With different words and several operators at once."""
    for seed in range(PAIRS):
        pair = drawn_pair("fourth", regime, seed)
        assert not deceptions(pair.old, pair.new), pair.config.seed


def test_nothing_stands_ready_that_is_not_wanted() -> None:
    """What has no source in the old network has no namesake of its size in the file either.

    Lists of other lengths are known for it: what is taken from the member of the same number counts as assumed there.
    """
    for seed in range(2 * PAIRS):
        pair = drawn_pair("fourth", "everything", seed)
        if not any(change.operator.startswith(("prune_", "insert_")) for change in pair.config.changes):
            shapes = {name: tensor.shape for name, tensor in pair.state.items()}
            alone = {name for name, tensor in pair.truth.items() if tensor is None}
            held = pair.new.state_dict()
            assert not [name for name in alone if shapes.get(name) == held[name].shape], pair.config.seed


@pytest.mark.parametrize("structure", FOURTH, ids=lambda structure: structure.name)
def test_strangers_have_names_of_their_own(structure: Structure) -> None:
    """What one side alone has is not called as anything of the other might be."""
    groups = [words for group in structure.groups for words, _ in groups_of(group, "fourth")]
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
    """Structures differ in more than their names, within the fourth part and from all others."""
    known = [make(structure) for structure in STRUCTURES.values()]
    assert all(known.count(make(structure)) == 1 for structure in FOURTH)
    assert len(FOURTH) >= 20
    assert len(OWN) >= 40


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


def test_parts_are_drawn_apart() -> None:
    """No part has a structure or an operator of another; what is of all parts has no second form."""
    for split in SPLITS:
        for regime in REGIMES:
            config = draw(split, regime, 1)
            assert STRUCTURES[config.structure].split == split
            assert all(OPERATORS[change.operator].split in (split, "both") for change in config.changes)
