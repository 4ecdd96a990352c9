"""Proof by function: what names and shapes can't tell, outputs do."""

from __future__ import annotations

import copy

import pytest
import torch
from pairs import NewEncoder, OldEncoder, randomise, sample
from torch import nn

from lit_wsl import transfer_weights
from lit_wsl.mapper import build_plan
from lit_wsl.matching.proof import prove
from lit_wsl.structure import describe, trace_execution_order


def proven(old, new, x):
    plan = build_plan(describe(old), describe(new))
    return prove(plan, old, new, [((x,), {})])


def test_a_right_plan_is_proven_and_nothing_is_touched():
    old, new = randomise(OldEncoder()), randomise(NewEncoder(), 1)
    before = [copy.deepcopy(m.state_dict()) for m in (old, new)]
    rng = torch.get_rng_state()
    assert proven(old, new, sample()).proof == "proven"
    for module, state in zip((old, new), before):
        assert all(torch.equal(t, state[n]) for n, t in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_interleaved_heads_are_found_by_function():
    old, new = randomise(OldEncoder()), randomise(NewEncoder(interleaved=True), 1)
    blind = copy.deepcopy(new)
    transfer_weights(blind, old.state_dict())
    assert not torch.allclose(blind(sample()), old(sample()), atol=1e-3)
    report = transfer_weights(new, old.state_dict(), example_args=(sample(),), source_module=old)
    assert report.plan.proof == "proven"
    torch.testing.assert_close(new(sample()), old(sample()), rtol=1e-4, atol=1e-5)


def test_interleaved_heads_are_taken_apart_by_function():
    old, new = randomise(NewEncoder(interleaved=True)), randomise(OldEncoder(), 1)
    report = transfer_weights(new, old.state_dict(), example_args=(sample(),), source_module=old)
    assert report.plan.proof == "proven"
    torch.testing.assert_close(new(sample()), old(sample()), rtol=1e-4, atol=1e-5)


class Gated(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.into = nn.Linear(5, 8)
        if fused:
            self.lin = nn.Linear(8, 12)
        else:
            self.alpha, self.omega = nn.Linear(8, 6), nn.Linear(8, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        x = self.into(x)
        a, b = self.lin(x).chunk(2, -1)[::-1] if self.fused else (self.alpha(x), self.omega(x))
        return self.out(torch.sigmoid(a) * b)


def test_the_order_of_nameless_parts_is_open_without_the_old_code_and_found_with_it():
    old, new = randomise(Gated(False)), randomise(Gated(True), 1)
    x = torch.randn(4, 5)
    plan = build_plan(describe(old.state_dict()), describe(new))
    assert {t for a in plan.ambiguous for t in a.targets} == {"lin.weight", "lin.bias"}
    report = transfer_weights(new, old.state_dict(), example_args=(x,), source_module=old)
    assert report.ambiguous == ()
    torch.testing.assert_close(new(x), old(x))


class Another(nn.Module):
    """The same tensors, another function: nothing makes them agree."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign
        self.a, self.b, self.c, self.d = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        x = self.b(torch.sin(self.sign * self.a(x)) if self.sign > 1 else self.a(x))
        return self.d(torch.relu(self.c(x)))


def test_a_different_function_is_refuted_and_what_may_have_caused_it_is_not_loaded():
    old, new = randomise(Another(1.0)), randomise(Another(2.0), 1)
    before = copy.deepcopy(new.state_dict())
    plan = proven(old, new, torch.randn(4, 5))
    assert plan.proof == "refuted"
    assert any("'b'" in note for note in plan.notes)
    assert {t for a in plan.ambiguous for t in a.targets} == {"b.weight", "b.bias"}  # d would fit there as well
    assert all("refuted" in a.reason for a in plan.ambiguous)
    loaded = {t for e in plan for t in e.targets}
    assert {"a.weight", "a.bias", "c.weight", "c.bias"} <= loaded  # seen to agree, or without a rival
    assert all(torch.equal(t, before[n]) for n, t in new.state_dict().items())
    report = transfer_weights(new, old.state_dict(), example_args=(torch.randn(4, 5),), source_module=old)
    assert any("refuted" in warning for warning in report.warnings)


class Listed(nn.Module):
    """All layers in one registered list; what runs them is not registered, and holds the same objects."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        self.layers = nn.ModuleList([inner[0], inner[2]])
        self.held = [inner, inner[0].weight]

    def forward(self, x):
        return self.held[0](x) + self.held[1].sum()


def test_what_is_held_elsewhere_too_is_run_with_the_trial_s_weights():
    old, new = randomise(Listed()), randomise(Listed(), 1)
    before = copy.deepcopy(new.state_dict())
    assert proven(old, new, torch.randn(4, 5)).proof == "proven"
    assert all(torch.equal(t, before[n]) for n, t in new.state_dict().items())
    assert new.held[1] is new.layers[0].weight


class Pair(nn.Module):
    """Takes two inputs; ``Encoder`` is its first half."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = Encoder(), nn.Linear(8, 5)

    def forward(self, x, y):
        return self.dec(self.enc(x)) + y


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


def test_an_old_model_that_takes_more_inputs_is_run_too():
    old, new = randomise(Pair()), randomise(Encoder(), 1)
    assert proven(old, new, torch.randn(4, 5)).proof == "proven"


def test_a_sample_that_does_not_run_is_reported():
    old, new = randomise(OldEncoder()), randomise(NewEncoder(), 1)
    plan = proven(old, new, torch.randn(1, 1))
    assert plan.proof == "not tested"
    assert any("not tested" in note for note in plan.notes)


class Twice(nn.Module):
    """Two equal maps; ``flip`` runs them in the other order than it registers them."""

    def __init__(self, names: str, flip: bool) -> None:
        super().__init__()
        self.names, self.flip = names, flip
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x):
        for name in reversed(self.names) if self.flip else self.names:
            x = torch.tanh(getattr(self, name)(x))
        return x


def test_orders_that_contradict_each_other_decide_nothing():
    old, new = randomise(Twice("ab", flip=False)), randomise(Twice("uw", flip=True), 1)
    x = torch.randn(3, 4)
    orders = [trace_execution_order(m, (x,)) for m in (old, new)]
    plan = build_plan(describe(old, execution_order=orders[0]), describe(new, execution_order=orders[1]))
    assert not plan.entries
    assert {t for a in plan.ambiguous for t in a.targets} == set(new.state_dict())


def test_the_function_decides_between_orders_that_contradict_each_other():
    old, new = randomise(Twice("ab", flip=False)), randomise(Twice("uw", flip=True), 1)
    x = torch.randn(3, 4)
    report = transfer_weights(new, old, example_args=(x,), min_coverage=0.0)
    assert report.plan.proof == "proven"
    torch.testing.assert_close(new(x), old(x))


class Cells(nn.Module):
    """An LSTM by hand: gates in another order, the layers from the last to the first."""

    def __init__(self, width: int, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order
        self.h = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.x = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))

    def forward(self, rows):
        rows = rows.unbind(1)
        for x, h in zip(reversed(self.x), reversed(self.h)):
            state, cell, out = torch.zeros_like(rows[0]), torch.zeros_like(rows[0]), []
            for row in rows:
                parts = (x(row) + h(state)).chunk(4, -1)
                into, keep, new, put = (parts[self.order.index(k)] for k in range(4))
                cell = keep.sigmoid() * cell + into.sigmoid() * new.tanh()
                state = put.sigmoid() * cell.tanh()
                out.append(state)
            rows = out
        return torch.stack(rows, 1)


class Stacked(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, width, 2, batch_first=True)

    def forward(self, rows):
        return self.rnn(rows)[0]


@pytest.mark.parametrize("order", [(1, 3, 0, 2)])
def test_the_distance_of_the_outputs_decides_what_no_module_tells(order):
    torch.manual_seed(0)
    old, new, rows = Stacked(8), Cells(8, order), torch.randn(3, 3, 8)
    for source, target in ((old, new), (new, old)):
        torch.manual_seed(1)
        fresh = copy.deepcopy(target)
        for parameter in fresh.parameters():
            torch.nn.init.normal_(parameter)
        report = transfer_weights(fresh, source, source_module=source, example_args=(rows,))
        torch.testing.assert_close(fresh(rows), source(rows), rtol=1e-4, atol=1e-5)
        assert (report.plan.proof, report.plan.proof_by) == ("proven", "function")
