"""What can be rescaled against each other: all that is found keeps the function, and nothing is missed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_wsl.matching.layers import regions
from lit_wsl.matching.symmetries import Gradients, Rotations, _splits, relations, turnings
from lit_wsl.plan.operations import run_operations
from lit_wsl.structure.description import describe
from lit_wsl.structure.running import shaken_state

HEADS, WIDTH, D = 2, 12, 24


def turned(x, pairs):
    """Rotary positions on ``(B, heads, T, WIDTH)``."""
    angle = torch.arange(x.shape[-2])[:, None] * 0.7 ** torch.arange(WIDTH // 2)
    a, b = (x[..., ::2], x[..., 1::2]) if pairs else x.chunk(2, -1)
    both = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.stack(both, -1).flatten(-2) if pairs else torch.cat(both, -1)


class Block(nn.Module):
    """Fused attention and a gated feed-forward, laid out as ``layout`` says."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.n, self.m = nn.LayerNorm(D), nn.LayerNorm(D)
        keys = WIDTH if "shared" in layout else D
        self.sizes = [D, keys, keys]
        self.a, self.b = nn.Linear(D, sum(self.sizes)), nn.Linear(D, D)
        self.c, self.d = nn.Linear(D, 40), nn.Linear(20, D)

    def forward(self, x):
        y = self.a(self.n(x))
        if "by head" in self.layout:
            parts = [p.flatten(2) for p in y.view(*y.shape[:2], HEADS, 3, WIDTH).unbind(3)]
        else:
            parts = list(y.split(self.sizes, -1))
        q, k, v = (p.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for p in parts)
        if "rotary" in self.layout:
            q, k = turned(q, "pairs" in self.layout), turned(k, "pairs" in self.layout)
        k, v = (p.expand(-1, HEADS, -1, -1) for p in (k, v))
        x = x + self.b(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        gate, up = self.c(self.m(x)).chunk(2, -1)
        return x + self.d(F.silu(gate) * up)


class Net(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(5, D), nn.Linear(D, 3)
        self.blocks = nn.ModuleList(Block(layout) for _ in range(2))

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return self.outlet(x)


LAYOUTS = ("plain", "by head", "rotary halves", "rotary pairs by head", "rotary pairs shared", "shared")


def measured(layout):
    """A model at weights that hide nothing, its regions, its gradients, and a sample."""
    torch.manual_seed(0)
    net = Net(layout)
    net.load_state_dict(shaken_state(net))
    x, y = torch.randn(8, 6, 5), torch.randint(3, (8, 6))
    slopes = []
    for k in range(0, 8, 4):
        loss = F.cross_entropy(net(x[k : k + 4]).flatten(0, 1), y[k : k + 4].flatten())
        slopes.append(dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())))))
    return net, regions(describe(net)), Gradients(net.state_dict(), slopes), x


def studied(layout):
    """The same with the relations found in the gradients instead of these."""
    net, found, gradients, x = measured(layout)
    with torch.no_grad():
        return net, found, relations(found, gradients), x


def rescaled(state, region, view, factors, copy):
    """Scale the rows of a view."""
    (name,) = region.units[view.unit].names[view.tensor][copy]
    value = state[name].movedim(view.axes[0], 0).clone()
    for k, factor in enumerate(factors):
        value[list((k,) if view.rows is None else view.rows[k])] *= factor
    state[name] = value.movedim(0, view.axes[0])


@pytest.mark.parametrize("values", [8, 16, 24])
def test_rows_that_are_no_values_are_split_only_into_groups_that_are_as_large(values):
    for queries, keys in _splits(50, set(range(values))):
        assert sorted(queries + keys) == list(range(values, 50))
        assert len(keys) == values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_found_can_be_rescaled_without_a_change_of_the_function(layout):
    net, found, related, x = studied(layout)
    assert related
    own = {name: value.clone() for name, value in net.state_dict().items()}
    before = net(x)
    for relation in related:
        state, region = dict(own), found[relation.region]
        view = relation.left[0]
        (name,) = region.units[view.unit].names[view.tensor][0]
        count = own[name].shape[view.axes[0]] if view.rows is None else len(view.rows)
        factors = torch.rand(count) + 0.5
        for views, by in ((relation.left, factors), (relation.right, 1 / factors)):
            for one in views:
                rescaled(state, region, one, by, copy=1)
        net.load_state_dict(state)
        torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
        assert not torch.equal(state[name.replace(".0.", ".1.", 1)], own[name.replace(".0.", ".1.", 1)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pair_of_partners_is_found_once(layout):
    _, found, related, _ = studied(layout)
    pairs = []
    for relation in related:
        units = found[relation.region].units
        pairs.append(tuple(sorted({units[v.unit].path for v in relation.views})))
    expected = [("a",), ("a", "b"), ("a", "n"), ("c", "d"), ("c", "m")]
    assert sorted(pairs) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_values_are_those_that_the_output_reads(layout):
    _, found, related, _ = studied(layout)
    keys = WIDTH if "shared" in layout else D
    by_head = [3 * WIDTH * h + 2 * WIDTH + i for h in range(HEADS) for i in range(WIDTH)]
    expected = by_head if "by head" in layout else [*range(D + keys, D + 2 * keys)]
    paths = {k: [u.path for u in found[k].units] for k in range(len(found))}
    (values,) = [r for r in related if {paths[r.region][v.unit] for v in r.views} == {"a", "b"}]
    assert [row for rows in values.left[0].rows for row in rows] == expected
    mixable = math.comb(WIDTH, 2) * (keys // WIDTH)
    assert mixable <= len(values.mixed) < mixable + 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_turn_are_those_of_queries_and_keys(layout):
    net, found, gradients, _ = measured(layout)
    turning = [one for one in turnings(found, gradients) if one.ways]
    assert bool(turning) == ("rotary" in layout)
    keys = WIDTH if "shared" in layout else D
    values = {3 * WIDTH * h + 2 * WIDTH + i for h in range(HEADS) for i in range(WIDTH)}
    values = values if "by head" in layout else {*range(D + keys, D + 2 * keys)}
    for name in ("blocks.0.a.weight", "blocks.1.a.bias") if turning else ():
        rows = {row for one in turning for row in one.rows[name][1]}
        assert rows == {*range(len(net.state_dict()[name]))} - values
    for one in turning:
        assert one.in_pairs == ("pairs" in layout)
        assert (WIDTH, WIDTH) in one.ways


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "rotary" in layout])
def test_a_converted_whole_computes_the_same_in_the_other_convention(layout):
    net, found, gradients, x = measured(layout)
    rotations = Rotations(turnings(found, gradients))
    other = Net(layout.replace("halves", "pairs") if "halves" in layout else layout.replace("pairs", "halves"))
    state = {name: value.detach().clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        other.load_state_dict(state)
        wanted = other(x)
        for name, value in state.items():
            (state[name],) = run_operations(rotations.convert(name, tuple(value.shape), (WIDTH, WIDTH)), [value])
        net.load_state_dict(state)
        torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    """Attention without rotary positions; where values are normed behind it, nothing shows which they are."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        for name, rows in {"abc": 3 * D}.items() if fused else dict.fromkeys("abc", D).items():
            self.add_module(name, nn.Linear(D, rows))
        self.n, self.o = nn.LayerNorm(WIDTH), nn.Linear(D, D)

    def forward(self, x):
        parts = self.abc(x).chunk(3, -1) if self.fused else [self.a(x), self.b(x), self.c(x)]
        q, k, v = (p.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.o(self.n(y).flatten(2))


@pytest.mark.parametrize("fused", [False, True])
def test_queries_and_keys_that_meet_row_by_row_are_seen_not_to_turn(fused):
    torch.manual_seed(0)
    net = Attention(fused)
    net.load_state_dict(shaken_state(net))
    x, y = torch.randn(8, 6, D), torch.randn(8, 6, D)
    slopes = dict(zip(dict(net.named_parameters()), torch.autograd.grad(F.mse_loss(net(x), y), [*net.parameters()])))
    rotations = Rotations(turnings(regions(describe(net)), Gradients(net.state_dict(), [slopes])))
    assert not rotations
    assert {name.partition(".")[0] for name in rotations.still} == ({"abc"} if fused else {"a", "b"})


class Reader(nn.Module):
    """Attention whose scores are made of sums of queries and keys, or of products of what turns."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.adds = adds
        self.query, self.key, self.energy = nn.Linear(D, WIDTH), nn.Linear(D, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x):
        q, k = self.query(x), self.key(x)
        sums = self.energy((q[:, :, None] + k[:, None]).tanh())[..., 0]
        q, k = turned(q[:, None], False)[:, 0], turned(k[:, None], False)[:, 0]
        return (sums if self.adds else q @ k.mT + 0 * sums).softmax(-1) @ x


@pytest.mark.parametrize("adds", [True, False])
def test_queries_and_keys_that_are_added_are_seen_not_to_turn(adds):
    torch.manual_seed(0)
    net = Reader(adds)
    net.load_state_dict(shaken_state(net))
    slopes = []
    for _ in range(2):
        x, y = torch.randn(8, 6, D), torch.randn(8, 6, D)
        found = torch.autograd.grad(F.mse_loss(net(x), y), [*net.parameters()])
        slopes.append(dict(zip(dict(net.named_parameters()), found)))
    rotations = Rotations(turnings(regions(describe(net)), Gradients(net.state_dict(), slopes)))
    assert bool(rotations) == (not adds)
    assert rotations.still == ({"query.weight", "key.weight"} if adds else set())


def test_norms_in_nested_copies_hang_together_with_what_reads_them():
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(self.n(x))))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(Inner(), Inner()), nn.Linear(D, D), nn.Sequential(Inner(), Inner()))
    net.load_state_dict(shaken_state(net))
    x, y = torch.randn(32, D), torch.randn(32, D)
    slopes = dict(zip(dict(net.named_parameters()), torch.autograd.grad(F.mse_loss(net(x), y), [*net.parameters()])))
    found = regions(describe(net))
    (nested,) = [k for k, region in enumerate(found) if any(u.times == 2 for u in region.units)]
    paths = [u.path.rpartition(".")[2] for u in found[nested].units]
    related = [r for r in relations(found, Gradients(net.state_dict(), [slopes])) if r.region == nested]
    assert [{paths[v.unit] for v in r.views} for r in related] == [{"n", "up"}]
