"""Changes of a choice: two modules that are alike change places with all that they hold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lit_wsl.matching.changes import carried, odd_ones, options_of, twins_exchanged
from lit_wsl.matching.layers import regions
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.planner import build_plan
from lit_wsl.matching.space import Space
from lit_wsl.structure.description import describe

D = 6


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


class Apart(nn.Module):
    """Two branches and a third that is larger, each a module, in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.inlet = Branch(), Branch(), nn.Linear(3, D)


class Flat(nn.Module):
    """The same layers in two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.i = nn.Linear(3, D)
        self.d = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(3))
        self.u = nn.ModuleList(nn.Linear(D, 2 * D) for _ in range(3))


class Three(Apart):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.ModuleDict({"up": nn.Linear(D, 2 * D), "down": nn.Linear(2 * D, D), "norm": nn.LayerNorm(D)})


def space_of(source, target):
    sides = describe(source.state_dict()), describe(target)
    return Space(*sides, build_plan(*sides, MatchingOptions()))


def filled_from(space, choice):
    return {t: e.sources[0] for e in space.meaning(choice) for t in e.targets}


def test_all_that_two_modules_hold_is_exchanged_at_once():
    torch.manual_seed(0)
    flat = Flat()
    flat.n = nn.LayerNorm(D)
    for source, target in ((Three(), flat), (flat, Three())):
        space = space_of(source, target)
        before = filled_from(space, space.first)
        found = twins_exchanged(space, space.first)
        moved = [{t for t, s in filled_from(space, choice).items() if before[t] != s} for choice in found]
        assert found
        assert all(len(own) == 8 for own in moved)  # two layers of two branches, weight and bias
        for choice in found:
            after = filled_from(space, choice)
            assert sorted(after.values()) == sorted(before.values())
            assert space.first in twins_exchanged(space, choice)


def test_what_one_group_of_layers_holds_alone_is_among_its_own_options():
    space = space_of(Apart(), Apart())
    assert twins_exchanged(space, space.first) == []
    flat = space_of(Flat(), Flat())
    for part in flat.parts:
        assert len(options_of(flat, flat.first, part.which)) >= len(part.covers)


def test_squares_that_each_may_stand_their_own_way_stand_as_all_did_where_a_choice_is_carried():
    names = ("query", "key", "value")
    source, target = (nn.ModuleDict({n: nn.Linear(D, D) for n in own}) for own in (names, "abc"))
    sides = describe(source.state_dict()), describe(target)
    plan = build_plan(*sides, MatchingOptions())
    narrow, wide = (Space(*sides, plan, wide=wide, counts=True, trust=False) for wide in (False, True))
    (turn,) = narrow.parts[0].turns.values()
    assert len(wide.parts[0].turns) == len(names)
    choice = tuple(int(d == turn) for d in range(len(narrow.decisions)))
    assert wide.meaning(carried(choice, narrow, wide)) == narrow.meaning(choice)


def test_wholes_change_places_with_all_their_parts():
    """The layers of a highway network: gate and transform apart, in two lists, against both in one."""
    old, new = nn.Module(), nn.Module()
    old.transform, old.gate = (nn.ModuleList(nn.Linear(D, D) for _ in range(3)) for _ in range(2))
    new.h = nn.ModuleList(nn.Linear(D, 2 * D) for _ in range(3))
    old.out, new.o = nn.Linear(D, 3), nn.Linear(D, 3)
    for source, target in ((old, new), (new, old)):
        space = space_of(source, target)
        (part,) = [part for part in space.parts if part.fusions]
        pairs = tuple(((k, k + 3), (k,)) if source is old else ((k,), (k, k + 3)) for k in range(3))
        choice = (*space.first[: part.which], part.numbers[pairs], *space.first[part.which + 1 :])
        reached, edge = {choice}, [choice]
        while edge:
            edge = [c for one in edge for c in twins_exchanged(space, one) if c not in reached]
            reached |= set(edge)
        orders = {part.covers[c[part.which]] for c in reached}
        together = {frozenset(whole) for cover in orders for pair in cover for whole in pair if len(whole) > 1}
        assert len(orders) == 6  # of three pairs
        assert together == {frozenset({k, k + 3}) for k in range(3)}  # none was parted


def test_in_one_of_two_modules_alone_like_layers_may_stand_the_other_way_round():
    class Pair(nn.Module):
        def __init__(self, *names) -> None:
            super().__init__()
            self.inlet = nn.Linear(3, 6)
            for name in names:
                self.add_module(name, nn.ModuleList(nn.Linear(6, 6) for _ in range(2)))

    sides = describe(Pair("a", "b").state_dict()), describe(Pair("attend", "sum"))
    space = Space(*sides, build_plan(*sides, MatchingOptions()), counts=True)
    first = {e.targets[0]: e.sources[0] for e in space.meaning(space.first)}
    odd = [{e.targets[0]: e.sources[0] for e in space.meaning(choice)} for _, choice in odd_ones(space, space.first)]
    changed = [{name.partition(".")[0] for name in first if first[name] != other[name]} for other in odd]
    assert sorted(map(sorted, changed)) == [["attend"], ["sum"]]
    assert all(sorted(other.values()) == sorted(first.values()) for other in odd)
    assert not list(odd_ones(space, next(choice for _, choice in odd_ones(space, space.first))))


def test_members_of_a_list_are_counted_however_deep_their_number_stands():
    def copies(*paths):
        tree = nn.Module()
        for path in paths:
            node = tree
            for word in path.split("."):
                node.add_module(word, node._modules.get(word) or nn.Module())
                node = node._modules[word]
            node.add_module("a", nn.Linear(D, D))
            node.add_module("b", nn.Linear(D, D))
        return next(region for region in regions(describe(tree)) if len(region.copies) == 2)

    assert copies("stages.0.blocks", "stages.1.blocks").is_counted
    assert copies("stages.0", "stages.1").is_counted
    assert not copies("left.0", "right.0").is_counted
