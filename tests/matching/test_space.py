"""The alternatives are complete: whatever two spellings of a layer differ in, one choice means the truth."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from lit_wsl.matching.changes import blocks_exchanged, carried, questions, unlisted
from lit_wsl.matching.entries import filled
from lit_wsl.matching.layers import Unit
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.parts import agree_most
from lit_wsl.matching.planner import build_plan
from lit_wsl.matching.space import Space
from lit_wsl.structure.description import describe

D = 6


def parameters(**shapes):
    return nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})


class Net(nn.Module):
    """Some layers, each a dict of names and shapes or another such tree."""

    def __init__(self, tree) -> None:
        super().__init__()
        for name, child in tree.items():
            self.add_module(name, Net(child) if isinstance(next(iter(child.values())), dict) else parameters(**child))


def layer(rows, columns, bias=True):
    return {"weight": (rows, columns), "bias": (rows,)} if bias else {"weight": (rows, columns)}


def parts_to_heads(x):
    return x.reshape(3, 2, D // 2, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def turned_layout():
    """Queries, keys and values in one turned matrix one after the other, against head by head."""
    old = Net({"block": {"mix": {"weight": (D, 3 * D), "bias": (3 * D,)}, "out": layer(D, D)}})
    new = Net({"b": {"x": layer(D, D), "y": layer(3 * D, D)}})

    def truth(s):
        return {
            "b.x.weight": s["block.out.weight"],
            "b.x.bias": s["block.out.bias"],
            "b.y.weight": parts_to_heads(s["block.mix.weight"].T),
            "b.y.bias": parts_to_heads(s["block.mix.bias"]),
        }

    return old, new, truth


def stacked_experts():
    """Experts one by one, gate and up apart, against one turned stack with up in front, though its name says else."""
    experts = {f"{k}": {"gate": layer(4, D, False), "up": layer(4, D, False)} for k in range(3)}
    old, new = Net({"experts": experts}), Net({"e": {"gate_up": {"weight": (3, D, 8)}}})

    def truth(s):
        both = [torch.cat([s[f"experts.{k}.{n}.weight"] for n in ("up", "gate")]).T for k in range(3)]
        return {"e.gate_up.weight": torch.stack(both)}

    return old, new, truth


def fused_experts():
    """Experts one by one on both sides, gate and up apart and in one."""
    experts = {f"{k}": {"gate": layer(4, D), "up": layer(4, D), "down": layer(D, 4)} for k in range(3)}
    old = Net({"experts": experts})
    new = Net({"e": {f"{k}": {"x": layer(8, D), "y": layer(D, 4)} for k in range(3)}})

    def truth(s):
        out = {}
        for k, n in product(range(3), ("weight", "bias")):
            out[f"e.{k}.x.{n}"] = torch.cat([s[f"experts.{k}.up.{n}"], s[f"experts.{k}.gate.{n}"]])
            out[f"e.{k}.y.{n}"] = s[f"experts.{k}.down.{n}"]
        return out

    return old, new, truth


def turned_parts():
    """Square queries, keys and values apart, against one turned matrix in which they take turns head by head."""
    old = Net({"block": {n: layer(D, D) for n in ("query", "key", "value")}})
    new = Net({"b": {"x": {"weight": (D, 3 * D), "bias": (3 * D,)}}})

    def truth(s):
        both = {n: torch.cat([s[f"block.{p}.{n}"] for p in ("value", "query", "key")]) for n in ("weight", "bias")}
        return {"b.x.weight": parts_to_heads(both["weight"]).T, "b.x.bias": parts_to_heads(both["bias"])}

    return old, new, truth


def square_stacks():
    """Stacks of experts, gate and up in one and down, all square, against three stacks that are turned."""
    old = Net({"experts": {"both": {"weight": (3, 16, 8), "bias": (3, 16)}, "down": {"weight": (3, 8, 8)}}})
    new = Net({"e": {"0": {"w": (3, 8, 8), "b": (3, 8)}, "1": {"w": (3, 8, 8)}, "2": {"w": (3, 8, 8), "b": (3, 8)}}})

    def truth(s):
        (gate, up), (g, u) = s["experts.both.weight"].chunk(2, 1), s["experts.both.bias"].chunk(2, 1)
        out = {"e.0.w": up.mT, "e.1.w": s["experts.down.weight"].mT, "e.2.w": gate.mT, "e.0.b": u, "e.2.b": g}
        return {name: value.contiguous() for name, value in out.items()}

    return old, new, truth


def alternating_parts():
    """Keys and values in one by head, gate and up of stacked experts in one row by row."""
    experts = {f"{k}": {"gate": layer(8, 10, False), "up": layer(8, 10, False)} for k in range(3)}
    old = Net({"attn": {"k": layer(4, D), "v": layer(4, D)}, "experts": experts})
    new = Net({"a": {"x": layer(8, D)}, "e": {"y": {"weight": (3, 10, 16)}}})

    def truth(s):
        k, v = ({n: s[f"attn.{p}.{n}"] for n in ("weight", "bias")} for p in "kv")
        out = {
            f"a.x.{n}": torch.stack([k[n].unflatten(0, (2, 2)), v[n].unflatten(0, (2, 2))], 1).flatten(0, 2) for n in k
        }
        both = [[s[f"experts.{k}.{n}.weight"] for n in ("gate", "up")] for k in range(3)]
        return {**out, "e.y.weight": torch.stack([torch.stack(own, 1).flatten(0, 1).T for own in both])}

    return old, new, truth


def lists_of_layers():
    """Blocks in one list, against a list for each of their layers, one of them of plain parameters."""
    old = Net({"b": {f"{k}": {"mix": layer(4, D), "scale": {"weight": (D,)}, "out": layer(D, 4)} for k in range(4)}})
    new = Net({"m": {f"{k}": layer(4, D) for k in range(4)}, "o": {f"{k}": layer(D, 4) for k in range(4)}})
    new.add_module("g", parameters(**{str(k): (D, 1, 1) for k in range(4)}))

    def truth(s):
        out = {}
        for k in range(4):
            for ours, theirs in (("m", "mix"), ("o", "out")):
                out |= {f"{ours}.{k}.{n}": s[f"b.{3 - k}.{theirs}.{n}"] for n in ("weight", "bias")}
            out[f"g.{k}"] = s[f"b.{3 - k}.scale.weight"][:, None, None]
        return out

    return old, new, truth


def many_siblings():
    """Seven layers of one shape in a flat list, counted from the end, more than there is room to list all orders of."""
    old = Net({"features": {str(3 * k): layer(4, 4) for k in range(7)}, "out": layer(2, 4)})
    new = Net({"z": layer(2, 4), "c": {str(k): layer(4, 4) for k in range(7)}})

    def truth(s):
        out = {f"z.{n}": s[f"out.{n}"] for n in ("weight", "bias")}
        return out | {f"c.{k}.{n}": s[f"features.{18 - 3 * k}.{n}"] for k in range(7) for n in ("weight", "bias")}

    return old, new, truth


def table_in_the_first_block():
    """A table for all that stands in the first block, against one that stands outside."""
    blocks = {f"{k}": {"q": layer(4, D), "k": layer(4, D), "o": layer(D, 4)} for k in range(3)}
    blocks["0"]["bias"] = {"weight": (5, 2)}
    old = Net({"block": blocks})
    new = Net({"b": {f"{k}": {"x": layer(8, D), "y": layer(D, 4)} for k in range(3)}, "t": {"weight": (5, 2)}})

    def truth(s):
        out = {"t.weight": s["block.0.bias.weight"]}
        for k, n in product(range(3), ("weight", "bias")):
            out[f"b.{k}.x.{n}"] = torch.cat([s[f"block.{2 - k}.{p}.{n}"] for p in "kq"])
            out[f"b.{k}.y.{n}"] = s[f"block.{2 - k}.o.{n}"]
        return out

    return old, new, truth


def reversed_case(case):
    """The same, from the new model to the old one."""

    def made():
        old, new, truth = case()
        state = old.state_dict()
        places = {n: torch.arange(v.numel()).view(v.shape) + 1000 * k for k, (n, v) in enumerate(state.items())}
        there = {n: v.flatten() for n, v in truth(places).items()}

        def back(tensors):
            found = {int(i): v for n, own in there.items() for i, v in zip(own, tensors[n].flatten())}
            return {n: torch.stack([found[int(i)] for i in v.flatten()]).view(v.shape) for n, v in places.items()}

        return new, old, back

    return made


def two_attentions():
    """Blocks with two attentions each, whose layers stand in different orders."""
    names = ("q", "k", "v", "o")
    old = Net({"block": {str(b): {a: {n: layer(D, D, False) for n in names} for a in ("own", "cross")} for b in "01"}})
    new = Net({"b": {b: {a: {n: layer(D, D, False) for n in "wxyz"} for a in ("m", "n")} for b in "01"}})
    orders = {"own": ("n", "xwzy"), "cross": ("m", "zxyw")}

    def truth(s):
        return {
            f"b.{b}.{orders[a][0]}.{orders[a][1][k]}.weight": s[f"block.{b}.{a}.{n}.weight"]
            for b, a, (k, n) in product("01", ("own", "cross"), enumerate(names))
        }

    return old, new, truth


def lists_that_are_alike():
    """A list for each kind of layer, two and two of them alike, against blocks that hold both in one."""
    kinds = ("filter", "gate", "skip", "back")
    rows = dict(zip(kinds, (4, 4, D, D)))
    old = Net({n: {str(k): layer(rows[n], D if rows[n] == 4 else 4) for k in range(4)} for n in kinds})
    new = Net({"b": {str(k): {"x": layer(8, D), "y": layer(2 * D, 4)} for k in range(4)}})

    def truth(s):
        parts = (("x", ("gate", "filter")), ("y", ("skip", "back")))
        return {
            f"b.{k}.{whole}.{n}": torch.cat([s[f"{p}.{3 - k}.{n}"] for p in own])
            for k, (whole, own), n in product(range(4), parts, ("weight", "bias"))
        }

    return old, new, truth


def linear_layers_for_convolutions():
    """Convolutions of size one, which are square, against one linear layer that holds all."""
    old = Net({"a": {n: {"weight": (D, D, 1), "bias": (D,)} for n in ("q", "k", "v")}})
    new = Net({"b": {"x": layer(3 * D, D)}})

    def truth(s):
        weight = torch.cat([s[f"a.{p}.weight"][..., 0] for p in "vqk"])
        return {"b.x.weight": weight, "b.x.bias": torch.cat([s[f"a.{p}.bias"] for p in "vqk"])}

    return old, new, truth


def stacks_of_squares():
    """A bare tensor of four axes, the last two of which are exchanged."""
    old = Net({"caps": {"W": (2, 3, 8, 8)}, "out": layer(5, 4)})
    new = Net({"o": layer(5, 4), "c": {"m": (2, 3, 8, 8)}})
    return old, new, lambda s: {"c.m": s["caps.W"].mT, "o.weight": s["out.weight"], "o.bias": s["out.bias"]}


def experts_counted_from_the_end():
    """Blocks whose experts are counted the other way round in the other code."""

    def blocks(own, inner, up, down):
        experts = {str(k): {up: layer(4, D), down: layer(D, 4)} for k in range(4)}
        return Net({own: {str(k): {inner: experts, "r": layer(4, D)} for k in range(2)}})

    def truth(s):
        out = {}
        for block, n in product(range(2), ("weight", "bias")):
            out[f"b.{block}.r.{n}"] = s[f"layers.{block}.r.{n}"]
            for k, (old, new) in product(range(4), (("up", "x"), ("down", "y"))):
                out[f"b.{block}.e.{3 - k}.{new}.{n}"] = s[f"layers.{block}.experts.{k}.{old}.{n}"]
        return out

    return blocks("layers", "experts", "up", "down"), blocks("b", "e", "x", "y"), truth


def bare_squares_beside_layers():
    """Squares of which one is a bare tensor of inputs by outputs in the other code, the others are layers."""
    old = Net({"a": {n: layer(D, D, False) for n in "qko"}})
    new = Net({"b": {"x": layer(D, D, False), "y": {"kernel": (D, D)}, "z": layer(D, D, False)}})
    return (
        old,
        new,
        lambda s: {"b.x.weight": s["a.k.weight"], "b.y.kernel": s["a.o.weight"].T, "b.z.weight": s["a.q.weight"]},
    )


def one_of_many_squares_turned():
    """Squares of which one alone stands the other way round, beside others that are parts of a whole."""
    old = Net({"a": {n: layer(D, D) for n in "qkvo"}, "f": {n: layer(D + 1, D + 1) for n in "ab"}})
    new = Net({"b": {"x": layer(3 * D, D), "y": layer(D, D)}, "g": {n: layer(D + 1, D + 1) for n in "cd"}})

    def truth(s):
        whole = {f"b.x.{n}": torch.cat([s[f"a.{p}.{n}"] for p in "vqk"]) for n in ("weight", "bias")}
        alone = {"b.y": s["a.o.weight"].T, "g.c": s["f.b.weight"].T, "g.d": s["f.a.weight"]}
        biases = {"b.y.bias": s["a.o.bias"], "g.c.bias": s["f.b.bias"], "g.d.bias": s["f.a.bias"]}
        return whole | {f"{n}.weight": value for n, value in alone.items()} | biases

    return old, new, truth


def stacked_vectors_and_blocks_in_any_order():
    """Bare vectors that are one tensor in the other code, in four blocks of no order."""
    old = Net({"l": {str(k): {"fc": layer(9, D), "n": {"scale": (D,), "gain": (D,)}} for k in range(4)}})
    new = Net({"m": {str(k): {"x": layer(9, D), "y": {"v": (2, D)}} for k in range(4)}})

    def truth(s):
        out = {}
        for k, other in enumerate((2, 0, 3, 1)):
            out |= {f"m.{k}.x.{n}": s[f"l.{other}.fc.{n}"] for n in ("weight", "bias")}
            out[f"m.{k}.y.v"] = torch.stack([s[f"l.{other}.n.gain"], s[f"l.{other}.n.scale"]])
        return out

    return old, new, truth


CASES = [turned_layout, stacked_experts, fused_experts, turned_parts, square_stacks, alternating_parts, lists_of_layers]
CASES += [many_siblings, table_in_the_first_block, two_attentions, lists_that_are_alike, stacks_of_squares]
CASES += [
    linear_layers_for_convolutions,
    experts_counted_from_the_end,
    bare_squares_beside_layers,
    one_of_many_squares_turned,
    stacked_vectors_and_blocks_in_any_order,
]


@pytest.mark.parametrize("case", [*CASES, *map(reversed_case, CASES)])
def test_a_choice_means_the_truth(case):
    torch.manual_seed(0)
    old, new, truth = case()
    tensors = {name: value.detach() for name, value in old.state_dict().items()}
    wanted = truth(tensors)
    sides = describe(tensors), describe(new)
    plan = build_plan(*sides, MatchingOptions())
    space = Space(*sides, plan, wide=True, counts=True, trust=False)

    def means_it(number, choice):
        made = {n: v for entry in space.entries_of(number, choice) for n, v in filled(entry, tensors).items()}
        return bool(made) and all(torch.equal(value, wanted[name]) for name, value in made.items())

    told = {n for e in plan for n, v in filled(e, tensors).items() if torch.equal(v, wanted[n])}
    asked = {n for part in space.parts for unit in part.target for n in unit.all_names}
    assert told | asked == set(wanted)
    for number, part in enumerate(space.parts):
        places = [*part.decisions, *(d for d in space.all_of(number) if d not in part.decisions)]
        choices = product(*(range(len(space.decisions[d].options)) for d in places))
        found = (tuple(dict(zip(places, own)).get(d, 0) for d in range(len(space.decisions))) for own in choices)
        assert any(means_it(number, choice) for choice in found), part.describe(part.covers[0])


def test_exchanges_lead_from_one_order_of_many_siblings_to_any_other():
    old, new, _ = many_siblings()
    sides = describe(dict(old.state_dict())), describe(new)
    space = Space(*sides, build_plan(*sides, MatchingOptions()))
    (part,) = [part for part in space.parts if part.grows]
    wanted = tuple(((i,), (j,)) for j, i in enumerate([3, 1, 6, 0, 2, 5, 4]))
    choice, steps = space.first, 0
    while part.covers[choice[part.which]] != wanted:
        choice = max(
            space.exchanges(choice, part),
            key=lambda one: sum(a == b for a, b in zip(part.covers[one[part.which]], wanted)),
        )
        steps += 1
        assert steps < 7
    decision = space.decisions[part.which]
    assert len(decision.labels) == len(decision.options) == len(part.covers)


class Listed(nn.Module):
    """Two blocks, and beside them a list of tensors that counts like them."""

    def __init__(self, blocks: str, norm: str, linear: str, scales: str) -> None:
        super().__init__()
        layers = {norm: nn.LayerNorm(8), linear: nn.Linear(8, 8)}
        setattr(self, blocks, nn.ModuleList(nn.ModuleDict(copy.deepcopy(layers)) for _ in range(2)))
        setattr(self, scales, nn.ParameterList(torch.ones(5) for _ in range(2)))


@pytest.mark.parametrize(
    ("theirs", "ours", "is_open"),
    [
        (("blocks", "norm", "linear", "scales"), ("blocks", "norm", "linear", "scales"), False),
        (("blocks", "norm", "linear", "scales"), ("b", "q", "w", "scales"), True),
    ],
)
def test_where_the_numbers_of_blocks_are_in_question_so_are_those_of_lists_beside_them(theirs, ours, is_open):
    source, target = describe(Listed(*theirs).state_dict()), describe(Listed(*ours))
    plan = build_plan(source, target, MatchingOptions())
    doubtful = replace(plan, entries=tuple(replace(e, margin=0.0) for e in plan))  # so that something is asked
    space = Space(source, target, doubtful)
    asked = {len(d.options) for d in space.decisions if "scales.0" in d.text}
    assert asked == ({2} if is_open else set())


def test_layers_of_several_modules_are_asked_about_where_the_other_side_has_one_list():
    source = Net({f"m{c}": {name: {"weight": (D,)} for name in ("one", "two")} for c in "abcd"})
    target = Net({"n": {str(k): {"weight": (D,)} for k in range(8)}})
    sides = describe(source.state_dict()), describe(target)
    space = Space(*sides, build_plan(*sides, MatchingOptions()))
    (part,) = space.parts
    assert len(part.source) == len(part.target) == 8
    assert len(list(space.exchanges(space.first, part))) >= 8 * 7 / 2  # any two, and both layers of two modules


def test_numbers_are_asked_about_if_wanted_even_where_names_tell_what_is_in_the_blocks():
    blocks = {str(k): {n: layer(D, D) for n in ("query", "key", "value")} for k in range(2)}
    sides = describe(Net({"layers": blocks}).state_dict()), describe(Net({"stage": blocks}))
    plan = build_plan(*sides, MatchingOptions())
    doubtful = replace(plan, entries=tuple(replace(e, margin=0.0) for e in plan))
    asked = {
        counts: [(len(d.options), d.told) for d in Space(*sides, doubtful, counts=counts).decisions if "numb" in d.text]
        for counts in (False, True)
    }
    assert asked == {False: [], True: [(2, True)]} or asked == {False: [(1, True)], True: [(2, True)]}


@pytest.mark.parametrize(("count", "pairs"), [(4, 0), (6, 15), (9, 8)])
def test_many_blocks_are_exchanged_two_by_two(count, pairs):
    old, new = (
        describe(Net({name: {str(k): {"x": layer(5, D), "y": layer(D, 5)} for k in range(count)}, "out": layer(3, D)}))
        for name in ("blocks", "layers")
    )
    space = Space(old, new, build_plan(old, new, MatchingOptions()), counts=True, trust=False)
    found = [c for d in unlisted(space) for c in blocks_exchanged(space, space.first, d)]
    moved = [{e.targets[0].split(".")[1] for e in space.meaning(c) - space.meaning(space.first)} for c in found]
    assert len(found) == pairs
    assert all(len(own) == 2 for own in moved)


def test_exchanges_lead_to_any_assignment_of_many_squares_of_which_some_are_one():
    squares = ("q", "k", "v", "o", "x", "y", "z", "w", "p")
    source = Net({n: layer(D, D) for n in squares})
    target = Net({"i": layer(3 * D, D), **{n: layer(D, D) for n in "abcdef"}})
    sides = describe(source.state_dict()), describe(target)
    space = Space(*sides, build_plan(*sides, MatchingOptions()))
    (part,) = space.parts
    assert part.grows
    wanted = dict(zip(sorted(u.path for u in part.target), ("xyz", "p", "o", "k", "q", "v", "w")[::-1]))

    def right(choice):
        cover = part.covers[choice[part.which]]
        return sum(part.source[i].path in wanted[part.target[h[0]].path] for g, h in cover for i in g)

    choice = max(
        ((*space.first[: part.which], o, *space.first[part.which + 1 :]) for o in range(len(part.covers))), key=right
    )
    wanted["i"], wanted[next(k for k, v in wanted.items() if v == "xyz")] = "xyz", wanted["i"]
    for _ in range(9):
        choice = max([choice, *space.exchanges(choice, part)], key=right)
    assert right(choice) == 9
    names = {t for entry in space.entries_of(0, choice) for t in entry.targets}
    assert names == set(target.state_dict())


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        (("to_b", "to_c"), ("c", "v"), False),
        (("w_q", "w_k", "w_o"), ("q", "k", "out"), True),
        (("q",), ("q", "z"), False),
    ],
)
def test_letters_tell_where_all_of_one_side_are_on_the_other_and_one_tells_nothing(theirs, ours, told):
    sources, targets = (
        [Unit(f"m.{n}", (((f"m.{n}.weight",),),), ((D, D),)) for n in names] for names in (theirs, ours)
    )
    agreeing = {(s.path, t.path) for s in sources for t in targets if agree_most(s, t, sources, targets)}
    assert agreeing == ({("m.w_q", "m.q"), ("m.w_k", "m.k")} if told else set())


def test_a_table_whose_width_no_other_layer_has_is_no_fusion():
    def layouts(tree):
        sides = (
            describe(Net({"a": {"latents": (8, 24)}, **tree}).state_dict()),
            describe(Net({"b": {"z": (8, 24)}, **tree})),
        )
        plan = build_plan(*sides, MatchingOptions())
        doubtful = replace(plan, entries=tuple(replace(e, margin=0.0) for e in plan))
        return [part.layout for part in Space(*sides, doubtful, trust=False).parts if part.layout is not None]

    assert not layouts({"x": layer(24, 5)})
    assert layouts({"x": layer(24, 8)})


def test_rows_of_a_bias_are_not_laid_out_where_the_columns_of_its_weight_are():
    sides = (
        describe(Net({"a": layer(8, 24), "c": layer(5, 8)}).state_dict()),
        describe(Net({"b": layer(8, 24), "d": layer(5, 8)})),
    )
    plan = build_plan(*sides, MatchingOptions())
    space = Space(*sides, replace(plan, entries=tuple(replace(e, margin=0.0) for e in plan)), trust=False)
    number, part = next((k, part) for k, part in enumerate(space.parts) if part.layout is not None)
    options = range(len(space.decisions[part.layout].options))
    for option in options:
        choice = (*space.first[: part.layout], option, *space.first[part.layout + 1 :])
        tensors = {name: torch.randn(info.shape) for name, info in ((i.name, i) for i in sides[0].parameters)}
        made = {n: v for entry in space.entries_of(number, choice) for n, v in filled(entry, tensors).items()}
        assert torch.equal(made["b.bias"], tensors["a.bias"])


def test_kernels_of_size_one_are_not_turned():
    parts = {n: {"weight": (D, D, 1), "bias": (D,)} for n in ("res", "skip")}
    sides = (
        describe(Net({"a": parts}).state_dict()),
        describe(Net({"b": {"x": {"weight": (2 * D, D, 1), "bias": (2 * D,)}}})),
    )
    space = Space(*sides, build_plan(*sides, MatchingOptions()))
    (part,) = space.parts
    (turn,) = part.turns.values()
    choices = [(*space.first[:turn], option, *space.first[turn + 1 :]) for option in range(2)]
    assert space.meaning(choices[0]) == space.meaning(choices[1])


def test_names_that_tell_tell_nothing_where_they_are_not_trusted():
    source = Net({"block": {"norm1": {"weight": (D,)}, "norm2": {"weight": (D,)}, "fc": layer(2 * D, D)}})
    sides = (
        describe(source.state_dict()),
        describe(Net({"b": {"norm2": {"weight": (D,)}, "norm1": {"weight": (D,)}, "fc": layer(2 * D, D)}})),
    )
    plan = build_plan(*sides, MatchingOptions())
    named, nameless = (Space(*sides, plan, counts=True, trust=trust) for trust in (True, False))
    assert not named.is_open
    assert nameless.is_open
    assert questions(named) != questions(nameless)
    exchanged = tuple(1 for _ in nameless.first)
    assert carried(carried(exchanged, nameless, named), named, nameless) == nameless.first
    assert carried(exchanged, nameless, nameless) == exchanged


def test_single_numbers_are_asked_about_like_others():
    source, target = (Net({a: {b: ()}, "fc": layer(D, D)}) for a, b in (("t", "temperature"), ("u", "x")))
    sides = describe(source.state_dict()), describe(target)
    plan = build_plan(*sides, MatchingOptions())
    doubtful = replace(plan, entries=tuple(replace(e, margin=0.0) for e in plan))
    assert Space(*sides, doubtful, counts=True, trust=False).regions


def test_layers_that_keep_statistics_go_to_such_layers():
    class Normed(nn.Module):
        def __init__(self, kinds) -> None:
            super().__init__()
            self.inlet = nn.Linear(3, D)
            for name, kind in kinds.items():
                self.add_module(name, kind(D))

    old = Normed({"ln": nn.LayerNorm, "bn": nn.BatchNorm1d, "again": nn.LayerNorm})
    new = Normed({"x": nn.BatchNorm1d, "y": nn.LayerNorm, "z": nn.LayerNorm})
    sides = describe(old.state_dict()), describe(new)
    space = Space(*sides, build_plan(*sides, MatchingOptions()), trust=False)
    part = next(part for part in space.parts if any(unit.path == "x" for unit in part.target))
    assert len(part.covers) == 2
    assert all("bn -> x" in part.describe(cover) for cover in part.covers)


def test_vectors_of_one_shape_beside_a_matrix_may_stand_for_each_other():
    shapes = [(D, D), (D,), (D,)]
    old, new = (Net({"flow": dict(zip(names, shapes)), "out": layer(2, D)}) for names in ("wsb", "xyz"))
    sides = describe(old.state_dict()), describe(new)
    plan = build_plan(*sides, MatchingOptions())
    space = Space(*sides, replace(plan, entries=(), ambiguous=()), counts=True, trust=False)
    choices = product(*(range(len(decision.options)) for decision in space.decisions))
    meant = [{e.targets[0]: e.sources[0] for e in space.meaning(choice)} for choice in choices]
    assert {(own["flow.y"], own["flow.z"]) for own in meant} == {("flow.s", "flow.b"), ("flow.b", "flow.s")}


@pytest.mark.parametrize("cell", [False, True])
def test_rows_of_gates_are_no_queries_keys_and_values(cell):
    class Reader(nn.Module):
        def __init__(self, name) -> None:
            super().__init__()
            self.add_module(name, nn.GRUCell(D, D) if cell else nn.Linear(D, 3 * D))
            self.out = nn.Linear(D, D)

    sides = describe(Reader("cell").state_dict()), describe(Reader("x"))
    plan = build_plan(*sides, MatchingOptions())
    space = Space(*sides, replace(plan, entries=(), ambiguous=()), counts=True, trust=False)
    assert any(part.layout is not None for part in space.parts) != cell


def test_the_layout_of_a_whole_is_asked_about_in_nested_copies_too():
    def stages(name):
        return {f"{i}": {"blocks": {f"{k}": {name: layer(3 * D, D), "o": layer(D, D)} for k in range(2)}} for i in "01"}

    old, new = Net({"stages": stages("qkv")}), Net({"stages": stages("x")})
    sides = describe(old.state_dict()), describe(new)
    space = Space(*sides, build_plan(*sides, MatchingOptions()), counts=True, trust=False)
    (number, part), *_ = [(k, part) for k, part in enumerate(space.parts) if part.layout is not None]
    heads = space.decisions[part.layout].options.index((2, False))
    choice = (*space.first[: part.layout], heads, *space.first[part.layout + 1 :])
    torch.manual_seed(0)
    tensors = {i.name: torch.randn(i.shape) for i in sides[0].parameters}
    made = {n: v for entry in space.entries_of(number, choice) for n, v in filled(entry, tensors).items()}
    for i, k in product(range(2), range(2)):
        for leaf in ("weight", "bias"):
            (source,) = [
                e.sources[0]
                for e in space.entries_of(number, choice)
                if made and f"stages.{i}.blocks.{k}.x.{leaf}" in e.targets
            ]
            back = made[f"stages.{i}.blocks.{k}.x.{leaf}"]
            assert torch.equal(parts_to_heads(back), tensors[source])


def test_statistics_of_nested_copies_go_with_their_norms():
    class Stages(nn.Module):
        def __init__(self, conv, norm) -> None:
            super().__init__()
            blocks = [[nn.ModuleDict({conv: nn.Conv2d(D, D, 3), norm: nn.BatchNorm2d(D)}) for _ in "ab"] for _ in "ab"]
            self.stages = nn.ModuleList(map(nn.ModuleList, blocks))

    sides = describe(Stages("conv", "bn").state_dict()), describe(Stages("x", "y"))
    space = Space(*sides, build_plan(*sides, MatchingOptions()), counts=True, trust=False)
    filled_ = {t: e.sources[0] for e in space.meaning(space.first) for t in e.targets}
    norms = [name.removesuffix(".weight") for name in filled_ if name.endswith("y.weight")]
    assert len(norms) == 4
    for norm in norms:
        home = filled_[f"{norm}.weight"].removesuffix(".weight")
        assert filled_[f"{norm}.running_mean"] == f"{home}.running_mean"
