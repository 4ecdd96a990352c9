"""Norms with running statistics tell where they belong, and what stands before them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_wsl import transfer_weights
from lit_wsl.matching.entries import filled
from lit_wsl.matching.moments import Moments
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.planner import build_plan
from lit_wsl.matching.space import Space
from lit_wsl.matching.trials import Budget, Trials
from lit_wsl.structure.description import describe
from lit_wsl.structure.losses import LossMeter

WIDTH, DEPTH = 8, 5
NORMS, CONVS = (3, 0, 4, 1, 2), (2, 0, 1, 3)  # where the new model holds the k-th of the old one


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(1, WIDTH, 3, padding=1), nn.Linear(WIDTH, 3)
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(DEPTH - 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        for conv, norm in zip((self.stem, *self.convs), self.norms):
            x = F.relu(norm(conv(x)))
        return self.out(x.mean((2, 3)))


class New(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.z, self.a = nn.Linear(WIDTH, 3), nn.Conv2d(1, WIDTH, 3, padding=1)
        self.n = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in NORMS)
        self.c = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in CONVS)

    def forward(self, x):
        x = F.relu(self.n[NORMS[0]](self.a(x)))
        for conv, norm in zip(CONVS, NORMS[1:]):
            x = F.relu(self.n[norm](self.c[conv](x)))
        return self.z(x.mean((2, 3)))


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(256) % 3
    pattern = torch.randn(3, 1, 6, 6, generator=generator)
    x = pattern[y] + torch.randn(256, 1, 6, 6, generator=generator)
    return list(zip(x.split(32), y.split(32)))


@pytest.fixture(scope="module")
def trained(batches):
    torch.manual_seed(0)
    net = Old()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for batch in 8 * batches:
        optimizer.zero_grad()
        loss(net, batch).backward()
        optimizer.step()
    return net.eval()


def truth(state):
    places = {"stem": "a", "out": "z"} | {f"norms.{k}": f"n.{j}" for k, j in enumerate(NORMS)}
    places |= {f"convs.{k}": f"c.{j}" for k, j in enumerate(CONVS)}
    return {
        f"{places[module]}.{leaf}": v for (module, _, leaf), v in ((n.rpartition("."), v) for n, v in state.items())
    }


def trials_of(state, batches):
    torch.manual_seed(1)
    model, sides = New(), (describe(state), describe(New()))
    plan = build_plan(*sides, MatchingOptions())
    space = Space(*sides, plan)
    meter = LossMeter(model, loss, batches)
    assert meter.has(0)
    meter.losses({}, 0)
    asked = {t for entry, _ in space.entries(space.first) for t in entry.targets}
    fixed = {n: v for e in plan if not asked & set(e.targets) for n, v in filled(e, state).items()}
    return Trials(space, state, meter, fixed, Budget(60.0, 60.0, meter))


def test_layers_are_assigned_in_the_order_in_which_they_run(trained, batches):
    state = trained.state_dict()
    trials = trials_of(state, batches)
    moments, before = Moments(trials), trials.meter.passes
    choice, sure = moments.arranged(trials.space.first)
    wanted = truth(state)
    made = trials.state(choice)
    assert sure
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert trials.meter.passes - before < 10  # of a batch; all orders are 120 times 24
    for part in trials.space.parts:
        for rival in trials.space.exchanges(choice, part):
            assert moments.risk(rival, choice, whole=True) < 1e-4
            assert moments.risk(choice, rival, whole=True) > 0.5  # never the other way round


def test_norms_that_recorded_nothing_tell_nothing(trained, batches):
    state = trained.state_dict()
    fresh = Old().state_dict()
    untold = {name: fresh[name] if "running" in name else value for name, value in state.items()}
    trials = trials_of(untold, batches)
    moments = Moments(trials)
    choice, sure = moments.arranged(trials.space.first)
    rivals = [rival for part in trials.space.parts for rival in trials.space.exchanges(choice, part)]
    assert not sure
    assert all(moments.risk(rival, choice, whole=True) > 0.01 for rival in rivals)


def test_the_loss_and_the_norms_together_fill_the_whole_model(trained, batches):
    state = trained.state_dict()
    torch.manual_seed(1)
    model = New()
    plan = transfer_weights(model, dict(state), min_coverage=0.0, loss=loss, batches=batches).plan
    assert (plan.proof, plan.proof_by) == ("proven", "data")
    wanted = truth(state)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert plan.measured.passes <= 64


def test_a_model_without_such_norms_costs_no_pass(batches):
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(36, 36), nn.Linear(36, 36)
            self.out = nn.Linear(36, 3)

        def forward(self, x):
            return self.out(F.relu(self.b(F.relu(self.a(x.flatten(1))))))

    state = Plain().state_dict()
    sides = describe(state), describe(Plain())
    space = Space(*sides, build_plan(*sides, MatchingOptions()))
    meter = LossMeter(Plain(), loss, batches)
    assert meter.has(0)
    meter.losses({}, 0)
    trials = Trials(space, state, meter, {}, Budget(60.0, 60.0, meter))
    before, moments = meter.passes, Moments(trials)
    assert moments.arranged(space.first) == (space.first, False)
    assert moments.risk(space.first, space.first) == 1.0
    assert meter.passes == before
