"""What is open about two models holds the truth: copies without a counterpart, stacks, parts, layers exchanged."""

from __future__ import annotations

import torch
from torch import nn

from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.planner import build_plan
from lit_wsl.matching.space import Space, filled
from lit_wsl.structure.description import describe


def space_of(source, target):
    sides = describe(source), describe(target)
    return Space(*sides, build_plan(*sides, MatchingOptions()))


def reachable(space, source, truth, steps=6):
    """Whether options and exchanges lead to the true values of all that is open, each step nearer to them."""
    tensors = source.state_dict()
    assert space.is_open

    def wrong(choice):
        values = {n: v for e, _ in space.entries(choice) for n, v in filled(e, tensors).items()}
        return sum(int((truth[n] != v).sum()) for n, v in values.items())

    choice = space.first
    for _ in range(steps):
        near = [
            (*choice[:d], o, *choice[d + 1 :])
            for d, decision in enumerate(space.decisions)
            for o in range(min(len(decision.options), 64))
        ]
        near += [c for part in space.parts for c in space.exchanges(choice, part)]
        near += [
            (*c[:d], o, *c[d + 1 :])
            for part in space.parts
            for c in space.exchanges(choice, part)
            for d in part.order.values()
            for o in range(len(space.decisions[d].options))
        ]
        choice = min([choice, *near], key=wrong)
    return wrong(choice) == 0


def linear(*sizes):
    return nn.ModuleList(nn.Linear(a, b) for a, b in sizes)


def carried(source, pairs):
    state = source.state_dict()
    return {f"{b}.{leaf}": state[f"{a}.{leaf}"] for a, b in pairs.items() for leaf in ("weight", "bias")}


class Nets(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_towers_of_one_side_are_looked_at_layer_by_layer_where_the_other_side_has_none():
    old = Nets(left=linear((8, 12), (12, 12)), right=linear((8, 12), (12, 12)))
    new = Nets(a=nn.Linear(12, 12), b=nn.Linear(8, 12), c=nn.Linear(12, 12), d=nn.Linear(8, 12))
    truth = carried(old, {"left.0": "d", "left.1": "a", "right.0": "b", "right.1": "c"})
    assert reachable(space_of(old, new), old, truth)


def test_experts_find_stacks_whose_biases_are_tensors_of_their_own():
    old = Nets(inlet=nn.Linear(5, 12), experts=nn.ModuleList(linear((12, 12), (12, 12)) for _ in range(3)))
    new = Nets(z=nn.Linear(5, 12))
    new.w = nn.ParameterList([torch.randn(3, 12, 12) for _ in range(2)])
    new.v = nn.ParameterList([torch.randn(3, 12) for _ in range(2)])
    state = old.state_dict()
    truth = carried(old, {"inlet": "z"})
    for own, theirs in ((0, 1), (1, 0)):
        truth[f"w.{own}"] = torch.stack([state[f"experts.{e}.{theirs}.weight"].T for e in range(3)])
        truth[f"v.{own}"] = torch.stack([state[f"experts.{e}.{theirs}.bias"] for e in range(3)])
    assert reachable(space_of(old, new), old, truth)


def test_convolutions_are_parts_of_a_whole_too():
    old = Nets(gate=nn.Conv1d(8, 8, 2), value=nn.Conv1d(8, 8, 2), out=nn.Conv1d(8, 6, 1))
    new = Nets(q=nn.Conv1d(8, 6, 1), p=nn.Conv1d(8, 16, 2))
    state, truth = old.state_dict(), carried(old, {"out": "q"})
    truth |= {f"p.{leaf}": torch.cat([state[f"value.{leaf}"], state[f"gate.{leaf}"]]) for leaf in ("weight", "bias")}
    assert reachable(space_of(old, new), old, truth)


def test_modules_of_the_same_layers_change_places_as_a_whole():
    names = ("q", "k", "v", "o")
    old = Nets(
        blocks=nn.ModuleList(
            Nets(
                one=nn.ModuleDict({n: nn.Linear(12, 12) for n in names}),
                two=nn.ModuleDict({n: nn.Linear(12, 12) for n in names}),
            )
            for _ in range(2)
        )
    )
    new = Nets(
        u=nn.ModuleList(Nets(x=linear((12, 36), (12, 12)), y=linear((12, 24), (12, 12), (12, 12))) for _ in range(2))
    )
    state, truth = old.state_dict(), {}
    for k in range(2):
        truth |= carried(old, {f"blocks.{k}.two.o": f"u.{k}.x.1", f"blocks.{k}.one.o": f"u.{k}.y.1"})
        truth |= carried(old, {f"blocks.{k}.one.q": f"u.{k}.y.2"})
        for leaf in ("weight", "bias"):
            truth[f"u.{k}.x.0.{leaf}"] = torch.cat([state[f"blocks.{k}.two.{n}.{leaf}"] for n in "vqk"])
            truth[f"u.{k}.y.0.{leaf}"] = torch.cat([state[f"blocks.{k}.one.{n}.{leaf}"] for n in "vk"])
    space = space_of(old, new)
    assert reachable(space, old, truth)
    for part in space.parts:
        before = space.meaning(space.first)
        for choice in space.exchanges(space.first, part):
            sources = [s for e in space.meaning(choice) for s in e.sources]
            assert sorted(sources) == sorted(s for e in before for s in e.sources)
            assert space.meaning(choice) != before


def test_a_whole_may_be_laid_out_by_head_on_one_side_and_by_part_on_the_other():
    old = Nets(z=nn.Linear(12, 36), k=nn.Linear(12, 12))
    new = Nets(p=nn.Linear(12, 12), q=nn.Linear(12, 36))
    state = old.state_dict()
    for heads in (2, 3, 4):
        for shape in ((3, heads), (heads, 3)):
            truth = carried(old, {"k": "p"})
            for leaf in ("weight", "bias"):
                value = state[f"z.{leaf}"]
                truth[f"q.{leaf}"] = value.reshape(*shape, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
            assert reachable(space_of(old, new), old, truth)


def test_nothing_is_asked_about_the_layout_of_what_has_the_same_name():
    old, new = (Nets(inlet=nn.Linear(5, 12), qkv=nn.Linear(12, 36), proj=nn.Linear(12, 12)) for _ in range(2))
    assert not space_of(old, new).is_open
