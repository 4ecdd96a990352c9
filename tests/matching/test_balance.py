"""Balances that training leaves: the right mapping hangs together better, and random weights tell nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_wsl import transfer_weights
from lit_wsl.matching.balance import Balance, agreement, likeness
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.planner import build_plan
from lit_wsl.matching.space import Space
from lit_wsl.matching.symmetries import Gradients, Relation
from lit_wsl.structure.description import describe
from lit_wsl.structure.losses import LossMeter
from lit_wsl.structure.running import shaken_state

D = 24


class Old(nn.Module):
    """Two branches, each behind a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(4, D), nn.Linear(D, 3)
        self.first_norm, self.second_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        x = self.inlet(x)
        x = x + torch.tanh(self.first(self.first_norm(x)))
        return self.outlet(x + torch.relu(self.second(self.second_norm(x))))


class New(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)])
        self.b = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.c = nn.ModuleList([nn.Linear(D, 3), nn.Linear(4, D)])

    def forward(self, x):
        x = self.c[1](x)
        x = x + torch.tanh(self.b[0](self.a[1](x)))
        return self.c[0](x + torch.relu(self.b[1](self.a[0](x))))


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()


@pytest.fixture(scope="module")
def trained(data):
    torch.manual_seed(0)
    net = Old()
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    for _ in range(300):
        optimizer.zero_grad()
        loss(net, data).backward()
        optimizer.step()
    return net


def balance_of(tensors, data):
    """The balance of a source in a new model, and the choices that mean each order of the norms."""
    torch.manual_seed(1)
    new = New()
    plan = build_plan(describe(tensors), describe(new), MatchingOptions())
    space = Space(describe(tensors), describe(new), plan)
    meter = LossMeter(new, loss, [data])
    assert meter.has(0)
    weights = shaken_state(new)
    gradients = Gradients(weights, [slopes for _, slopes in meter.gradients(weights, 0)])
    return space, Balance(space, tensors, {}, gradients, lambda: True)


def by_norms(space):
    """Choices, the rest right, by where the first norm goes."""
    found = {}
    for number in range(2 ** len(space.decisions)):
        choice = tuple(number >> d & 1 if len(space.decisions[d].options) > 1 else 0 for d in range(len(space.first)))
        goes = {e.targets[0]: e.sources[0] for e in space.meaning(choice)}
        plain = all(not e.operations for e in space.meaning(choice))
        if plain and goes["b.0.weight"] == "first.weight":
            found[goes["a.1.weight"]] = choice
    return found


def test_norms_hang_together_with_the_layer_that_reads_them(trained, data):
    space, balance = balance_of(trained.state_dict(), data)
    choices = by_norms(space)
    right, wrong = choices["first_norm.weight"], choices["second_norm.weight"]
    assert balance.lead(right, wrong) == -balance.lead(wrong, right) > 2
    assert balance.risk(right, wrong) > 0.5


def test_random_weights_say_nothing(data):
    for seed in range(10):
        torch.manual_seed(seed)
        tensors = {name: torch.randn(value.shape) for name, value in Old().state_dict().items()}
        space, balance = balance_of(tensors, data)
        right, wrong = (by_norms(space)[name] for name in ("first_norm.weight", "second_norm.weight"))
        assert min(balance.risk(wrong, right), balance.risk(right, wrong)) > 0.01
        assert set(balance.plausible([right, wrong])) == {right, wrong}


def test_what_the_loss_hardly_tells_is_still_decided_right(trained, data):
    torch.manual_seed(1)
    new = New()
    batches = list(zip(data[0].split(32), data[1].split(32)))
    report = transfer_weights(new, trained.state_dict(), min_coverage=0.0, loss=loss, batches=batches)
    torch.testing.assert_close(new(data[0]), trained(data[0]), rtol=1e-4, atol=1e-4)
    assert report.plan.proof == "proven"


def test_likeness_counts_in_standard_errors():
    torch.manual_seed(0)
    values = torch.tensor([likeness(*torch.randn(2, 40)) for _ in range(400)])
    assert abs(float(values.mean())) < 0.2
    assert float(values.std()) == pytest.approx(1, rel=0.15)
    assert likeness(torch.arange(40.0), torch.arange(40.0) ** 3) > 10  # ranks, not values
    assert likeness(torch.ones(40), torch.randn(40)) == 0


def test_norms_and_products_of_rows_count_as_two_correlations():
    torch.manual_seed(0)
    relation = Relation(0, (), (), mixed=tuple((i, j) for i in range(12) for j in range(i)))
    values = torch.tensor([agreement(relation, *torch.randn(2, 12, 40)) for _ in range(400)])
    assert float(values.var()) == pytest.approx(2, rel=0.25)


def test_the_lead_of_one_choice_over_another_has_unit_variance_where_weights_tell_nothing(data):
    space, balance = balance_of(Old().state_dict(), data)
    right, wrong = (by_norms(space)[name] for name in ("first_norm.weight", "second_norm.weight"))
    leads = []
    for seed in range(200):
        torch.manual_seed(seed)
        tensors = {name: torch.randn(value.shape) for name, value in Old().state_dict().items()}
        balance.tensors = tensors
        for known in (balance._said, balance._looked, balance._known, balance._values):
            known.clear()
        leads.append(balance.lead(right, wrong))
    leads = torch.tensor(leads)
    assert abs(float(leads.mean())) < 0.25
    assert 0.7 < float(leads.std()) < 1.2
