"""Proof on data in plain Python: what is taken, what stays open, what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_wsl import TransferPlan, transfer_weights
from lit_wsl.matching.bench import FAR, GAIN, MOST, Bench, fresh_losses
from lit_wsl.matching.judge import judge_by_loss
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.planner import build_plan
from lit_wsl.matching.rivals import CLOSE, EARLY, LAST, LossJudge
from lit_wsl.matching.trials import Budget, Trials
from lit_wsl.matching.witnesses import RISK, risk_of
from lit_wsl.plan.operations import Reorder, Rotary
from lit_wsl.structure.description import describe
from lit_wsl.structure.losses import LossMeter


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(3, 12)
        self.gate, self.value = nn.Linear(12, 12), nn.Linear(12, 12)
        self.out = nn.Linear(12, 2)

    def forward(self, x):
        x = torch.tanh(self.inlet(x))
        return self.out(torch.sigmoid(self.gate(x)) * torch.relu(self.value(x)))


class New(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.r = nn.Linear(12, 2), nn.Linear(12, 24), nn.Linear(3, 12)

    def forward(self, x):
        value, gate = self.q(torch.tanh(self.r(x))).chunk(2, -1)
        return self.p(torch.sigmoid(gate) * torch.relu(value))


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


@pytest.fixture(scope="module")
def points():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 3, generator=generator)
    return x, (torch.sin(2 * x[:, 0]) + x[:, 1] > 0).long()


@pytest.fixture(scope="module")
def batches(points):
    return list(zip(points[0].split(16), points[1].split(16)))


@pytest.fixture(scope="module")
def trained(points):
    torch.manual_seed(0)
    return fitted(Old(), points)


def fitted(net, points):
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss(net, points).backward()
        optimizer.step()
    return net


def test_the_loss_tells_the_order_of_the_parts_and_the_plan_carries_its_proof(trained, points, batches, tmp_path):
    torch.manual_seed(1)
    new = New()
    report = transfer_weights(new, trained.state_dict(), loss=loss, batches=batches)
    torch.testing.assert_close(new(points[0]), trained(points[0]), rtol=1e-4, atol=1e-4)
    assert (report.plan.proof, report.plan.proof_by, report.ambiguous) == ("proven", "data", ())
    (decision,) = [d for d in report.plan.measured.decisions if "order" in d.question]
    assert decision.taken
    assert decision.loss < decision.rival_loss
    report.plan.save(tmp_path / "plan.json")
    loaded = TransferPlan.load(tmp_path / "plan.json")
    assert loaded == report.plan
    calls = []
    again = New()
    transfer_weights(
        again, trained.state_dict(), plan=loaded, loss=lambda *a: calls.append(a) or loss(*a), batches=batches
    )
    assert calls == []  # a plan is replayed without trials
    torch.testing.assert_close(again(points[0]), trained(points[0]), rtol=1e-4, atol=1e-4)


def test_what_makes_no_difference_to_the_loss_stays_open(trained, points, batches):
    class Symmetric(New):
        def forward(self, x):
            a, b = self.q(torch.tanh(self.r(x))).chunk(2, -1)
            return self.p(torch.relu(a) + torch.relu(b))

    torch.manual_seed(1)
    new = Symmetric()
    before = copy.deepcopy(new.state_dict())
    report = transfer_weights(new, trained.state_dict(), loss=loss, batches=batches, min_coverage=0)
    assert set(report.ambiguous) == {"q.weight", "q.bias"}
    assert torch.equal(new.q.weight, before["q.weight"])


def test_a_measurement_leaves_nothing_behind(points):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    batch = {"x": points[0][:16], "y": points[1][:16]}

    def greedy(model, taken):
        return F.cross_entropy(model(taken.pop("x").mul_(2)), taken.pop("y"))

    meter = LossMeter(net, greedy, [batch])
    assert meter.has(0)
    lent = {"0.weight": torch.zeros(4, 3)}
    first = meter.losses(lent, 0)
    assert first == meter.losses(lent, 0) != meter.losses({}, 0)
    assert len(first) == 16
    meter.slopes(lent, 0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert net.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(batch["x"], points[0][:16])


def test_losses_of_samples_are_those_of_the_samples_alone(points):
    net = nn.Linear(3, 2)
    meter = LossMeter(net, loss, [points])
    assert meter.has(0)
    alone = [float(loss(net, (x[None], y[None]))) for x, y in zip(*points)]
    assert meter.losses({}, 0) == pytest.approx(alone, abs=1e-5)


def test_risks_are_those_of_paired_tests():
    assert risk_of([1.0] * 8, [1.0] * 8) == 1.0
    assert risk_of([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]) == 1.0
    assert risk_of([math.nan] * 8, [1.0] * 8) == 0.0
    generator = torch.Generator().manual_seed(0)
    false = 0
    for _ in range(400):
        a, b = torch.randn(2, 16, generator=generator).tolist()
        false += risk_of(a, b) < 0.05
    assert false <= 0.05 * 400 + 3 * math.sqrt(0.05 * 400)


def test_losses_of_few_samples_are_compared_by_how_many_times_they_differ():
    best = [10 ** (-1 + 0.15 * k) for k in range(-8, 8)]  # as skewed as those of a trained classifier
    assert risk_of([(4 + k % 3) * x for k, x in enumerate(best)], best) < 1e-6


def test_what_is_surer_of_most_samples_is_not_better_where_it_loses_as_much():
    best, rival = [0.01 * (1 + k % 2) for k in range(16)], [0.001] * 15 + [0.3]
    assert risk_of(best, rival) > 0.001 or sum(rival) > sum(best)
    assert risk_of(rival, best) > 0.05


@pytest.mark.parametrize("operation", [Rotary(8, 8, True), Rotary(8, 4, False, (1,)), Reorder((2, 0, 3, 1))])
def test_rows_in_another_order_come_back(operation):
    tensors = [torch.randn(16, 3), torch.randn(8, 3), torch.randn(8)]
    there = operation.apply(tensors)
    assert [tuple(t.shape) for t in there] == operation.shapes([tuple(t.shape) for t in tensors])
    back = operation.reverse().apply(there)
    assert all(torch.equal(a, b) for a, b in zip(tensors, back, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tensors, there, strict=True))


def test_what_the_loss_refutes_is_not_loaded(trained, points, batches):
    class Outlet(nn.Module):  # other names and nothing open, but not the function that was trained
        def __init__(self) -> None:
            super().__init__()
            self.inlet = nn.Linear(3, 12)
            self.value, self.gate = nn.Linear(12, 12), nn.Linear(12, 12)
            self.out = nn.Linear(12, 2)

        def forward(self, x):
            x = torch.tanh(self.inlet(x))
            return -20 * self.out(torch.sigmoid(self.gate(x)) * torch.relu(self.value(x)))

    def doubtful(plan):
        return replace(plan, entries=tuple(replace(e, margin=0.1) for e in plan))

    torch.manual_seed(1)
    new = Outlet()
    sides = describe(trained.state_dict()), describe(new)
    plan = doubtful(build_plan(*sides, MatchingOptions()))
    assert len(plan.entries) == 8
    judged = judge_by_loss(plan, sides, trained.state_dict(), LossMeter(new, loss, batches))
    assert (judged.entries, judged.proof, judged.proof_by) == ((), "refuted", "data")
    assert "REFUTED" in judged.notes[-1]
    assert {t for a in judged.ambiguous for t in a.targets} == set(new.state_dict())


def judge_with(**trials):
    judge = LossJudge(SimpleNamespace(space=None, score=None, budget=None, **trials))
    judge.rounds = 1
    return judge


@pytest.mark.parametrize(
    ("gap", "early", "late"),
    [(1.0, True, True), (0.0, False, True), (-1.0, False, False)],
    ids=["worse", "same", "better"],
)
def test_balances_are_heard_at_once_where_the_loss_agrees_and_never_against_it(gap, early, late):
    noise = torch.randn(16, generator=torch.Generator().manual_seed(0))
    own, theirs = noise.tolist(), (noise + gap + 0.1 * noise.flip(0) - 0.1 * noise.mean()).tolist()
    judge = judge_with(balance=SimpleNamespace(risk=lambda rival, choice: 1e-6))
    for when, told in ((EARLY, early), (CLOSE, late), (LAST, late)):
        assert bool(judge._by_balance((0,), {(1,): (theirs, own)}, 1, when)) == told
    doubtful = judge_with(balance=SimpleNamespace(risk=lambda rival, choice: RISK / 9))
    assert bool(doubtful._by_balance((0,), {(1,): (theirs, own)}, 1, LAST)) == late
    # Its risk is shared, and may be too much, unless the loss says the same.
    assert bool(doubtful._by_balance((0,), {(1,): (theirs, own)}, 2, LAST)) == early


def test_what_the_search_found_about_as_good_is_a_rival_however_much_it_changes():
    noise = torch.randn(16, generator=torch.Generator().manual_seed(0)).tolist()
    seen = {(0, 0): noise, (1, 1): noise[::-1], (1, 0): [x + 9 for x in noise], (0, 1): noise, (-1, 1): noise}
    judge = LossJudge(
        SimpleNamespace(
            space=SimpleNamespace(meaning=lambda c: "same" if c == (0, 1) else c, rotary=None, numbering={}),
            score=None,
            budget=None,
            screened=sorted(seen),
            extent=lambda c: 16,
            losses=lambda c, samples: seen[c],
        )
    )
    assert judge._as_good((0, 0)) == [(0, 0), (0, 1), (1, 1)]  # what means the same is no rival in the end


@pytest.mark.parametrize("contrastive", [False, True])
def test_whether_samples_depend_on_each_other_is_seen_by_measuring_some_alone(contrastive):
    generator = torch.Generator().manual_seed(0)
    net, x = nn.Linear(6, 6), torch.randn(32, 6, generator=generator)

    def measured(net, batch):
        (x,) = batch
        scores = net(x) @ x.T if contrastive else net(x)
        return F.cross_entropy(scores, torch.arange(len(x)) if contrastive else (x > 0).long().sum(1) % 6)

    meter = LossMeter(net, measured, [(x,)])
    assert meter.has(0)
    assert Bench({}, meter, None, meter.losses({}, 0)).depend == contrastive


@pytest.mark.parametrize("far", [False, True])
def test_short_training_is_told_from_a_wrong_mapping_by_what_a_step_gains(far):
    generator = torch.Generator().manual_seed(0)
    net, x = nn.Linear(6, 1, bias=False), torch.randn(32, 6, generator=generator)
    wanted = torch.randn(1, 6, generator=generator)
    meter = LossMeter(net, lambda net, batch: F.mse_loss(net(batch[0]), batch[1]), [(x, x @ wanted.T)])
    assert meter.has(0)
    state = {"weight": 0.3 * wanted + 0.7 * wanted.flip(1) if far else 0.99 * wanted}
    losses, fresh = (meter.losses(weights, 0) for weights in (state, {"weight": 0 * wanted}))
    restless = judge_with(slopes=lambda choice, batch: meter.slopes(state, batch)).unrest((0,))
    assert restless > FAR  # all samples pull the same way: the gradient alone does not tell
    assert (Bench({}, meter, None, fresh).gain(state, losses) >= GAIN) == far


def test_a_mapping_where_a_gradient_is_above_its_noise_is_asked_what_a_step_gains(monkeypatch):
    """Names that lie about gates and rotary rows left a loss that had fallen and a gradient of twice its noise."""
    generator = torch.Generator().manual_seed(0)
    net, x = nn.Linear(6, 1, bias=False), torch.randn(32, 6, generator=generator)
    wanted = torch.randn(1, 6, generator=generator)
    meter = LossMeter(net, lambda net, batch: F.mse_loss(net(batch[0]), batch[1]), [(x, x @ wanted.T)])
    assert meter.has(0)
    for unrest, gain, borne_out in ((0.5, 1.0, True), (2.0, 1.0, False), (2.0, 0.0, True)):
        monkeypatch.setattr("lit_wsl.matching.bench.unrest_of", lambda products, unrest=unrest: unrest)
        monkeypatch.setattr(Bench, "gain", lambda *args, gain=gain: gain)
        monkeypatch.setattr(Bench, "falls", lambda *args: True)
        plan = SimpleNamespace(entries=())
        monkeypatch.setattr("lit_wsl.matching.bench.values", lambda plan, tensors: {"weight": wanted})
        assert Bench({}, meter, None, [9.0] * 32).bears_out(plan) is borne_out


def test_where_names_mislead_the_data_finds_what_is_right():
    class Misnamed(Old):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.gate = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            x = torch.tanh(self.inlet(x))
            return self.out(torch.sigmoid(self.value(x)) * torch.relu(self.gate(x)))

    torch.manual_seed(1)
    x = torch.randn(512, 3)
    points = x, (torch.sin(2 * x[:, 0]) + x[:, 1] > 0).long()
    old = fitted(Old(), points)
    new = Misnamed()
    batches = list(zip(x.split(64), points[1].split(64)))
    report = transfer_weights(new, old.state_dict(), loss=loss, batches=batches)
    assert report.plan.proof == "proven"
    torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-4)


def test_samples_that_the_search_has_seen_do_not_count_as_unseen():
    losses = {(0,): [float(i) for i in range(16)], (1,): [float(-i) for i in range(16)]}
    trials = {"size": 8, "losses": losses.__getitem__, "meter": SimpleNamespace(in_pieces=False)}
    judge = judge_with(known=lambda choice, samples: True, **trials)
    judge.searched = 2
    assert judge._unseen([*losses]) == {choice: own[4:] for choice, own in losses.items()}  # two losses a sample
    judge.searched = 8
    assert judge._unseen([*losses]) == {(0,): [], (1,): []}
    assert judge_with(known=lambda choice, samples: choice == (0,), **trials)._unseen([*losses]) == {}


def test_a_choice_that_was_beaten_does_not_come_again(monkeypatch, trained, batches):
    asked = []

    def never_content(judge, choice):
        asked.append(choice)
        return next(rival for rivals in judge.rivals(choice).values() for rival in rivals), {}

    monkeypatch.setattr(LossJudge, "test", never_content)
    torch.manual_seed(1)
    report = transfer_weights(New(), trained.state_dict(), loss=loss, batches=batches, min_coverage=0)
    assert len(asked) == len(set(asked)) > 1
    assert {"q.weight", "q.bias"} <= set(report.ambiguous)  # where the tests contradict each other nothing is taken


class Starts:
    """A meter whose random starts lose what they are told to; the samples of each differ by far more."""

    unit = 1

    def __init__(self, *losses, passes=0.0) -> None:
        self.model, self.losses_of_starts, self.passes = nn.Linear(2, 2), iter(losses), passes

    def losses(self, state, number):
        return spread_around(next(self.losses_of_starts))


def unlike(net, batch):
    """What the features of a batch have in common, which few samples say little about."""
    x = net(batch[0])
    x = (x - x.mean(0)) / (x.std(0) + 1e-4)
    return (x.mT @ x / len(x) - torch.eye(x.shape[1])).square().sum()


def squares(net, batch):
    """A mean over samples that torch does not reduce by itself."""
    return (net(batch[0]) ** 2).sum() / len(batch[0])


@pytest.mark.parametrize("whole", [True, False])
def test_a_loss_that_compares_samples_is_measured_in_large_pieces(whole):
    torch.manual_seed(0)
    meter = LossMeter(nn.Linear(6, 12), unlike if whole else squares, [(torch.randn(32, 6),) for _ in range(8)])
    assert meter.has(0)
    found = fresh_losses(meter)
    assert meter.is_biased is whole
    assert len(meter.losses({}, 0, 0, 16)) == (4 if whole else 8)
    assert Bench({}, meter, None, found).depend is whole
    with torch.no_grad():
        one = float((unlike if whole else squares)(meter.model, meter._batches[0]))
    assert meter.at_first == meter.whole({}) == one
    assert (sum(found) / len(found) == pytest.approx(one, rel=1e-4)) is not whole


def test_pieces_decide_nothing_that_a_whole_batch_gainsays():
    whole = {(0,): 2.0, (1,): 3.0, (2,): 1.0, (3,): 4.0}
    meter = SimpleNamespace(in_pieces=True, is_biased=True, at_first=9.0, whole=lambda state: whole[state])
    pieces = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95]
    judge = judge_with(meter=meter, state=lambda choice: choice, losses=lambda choice: pieces)
    judge.budget = SimpleNamespace(room=4)
    risks = {(1,): 0.001, (2,): 0.002, (3,): 0.5}
    assert judge.confirmed((0,), risks) == {(1,): 0.001, (2,): 1.0, (3,): 0.5}
    judge.budget.room = 1  # too few passes to ask
    assert judge.confirmed((0,), risks) == dict.fromkeys(risks, 1.0)
    meter.is_biased = False
    assert judge.confirmed((0,), risks) == risks
    judge.trials.losses = lambda choice: [loss + 3 for loss in pieces]  # other weights show what the fresh ones hide
    assert judge.confirmed((0,), risks) == dict.fromkeys(risks, 1.0)


@pytest.mark.parametrize("size", [6, 20, 32, 50])
def test_what_was_measured_is_known_whatever_the_size_of_the_batch(size):
    meter = SimpleNamespace(size=lambda number: size, elements=1, losses=lambda state, k, a, b: [0.0] * (b - a))
    space = SimpleNamespace(entries=lambda choice: ())
    trials = Trials(space, {}, meter, {}, SimpleNamespace())
    assert not trials.known((0,), trials.screen)
    assert len(trials.losses((0,), trials.screen)) == trials.screen
    assert trials.known((0,), trials.screen)
    assert trials.known((0,), size) is (trials.screen == size)
    assert len(trials.losses((0,))) == size
    assert trials.known((0,), size)


def spread_around(mean):
    return [mean + far for far in (-9.0, -3.0, 0.0, 3.0, 9.0)]


def bench_of(fresh, *starts, **options):
    return Bench({}, Starts(*starts, **options), None, spread_around(fresh))


def test_the_loss_falls_if_no_random_start_comes_near():
    bench = bench_of(10.0, 10.4, 9.7, 10.1, 9.9, 10.2)
    assert bench.falls(spread_around(7.8))  # told by six starts, not by three
    assert len(bench.starts) == 5
    assert bench.falls(spread_around(7.8))  # known starts cost no pass
    assert not bench.falls(spread_around(9.4))
    assert not bench.falls(spread_around(math.nan))
    assert not bench_of(10.0, 10.4, 9.7, passes=MOST).falls(spread_around(7.8))  # there is no pass left for more


def test_one_more_random_start_is_seldom_taken_for_trained():
    generator = torch.Generator().manual_seed(0)
    false = sum(
        bench_of(*starts).falls(spread_around(last))
        for *starts, last in (10 + torch.randn(1000, 7, generator=generator)).tolist()
    )
    assert false <= 0.011 * 1000 + 3 * math.sqrt(0.011 * 1000)


@pytest.mark.parametrize("ahead", [False, True])
def test_passes_are_left_to_test_a_rival_that_is_ahead(ahead):
    generator = torch.Generator().manual_seed(0)
    seen = {}

    def losses(choice, batch):
        if (choice, batch) not in seen:
            budget.room -= 1
            noise = torch.randn(8, generator=generator)
            seen[choice, batch] = (noise + (choice == (1,)) * (-0.2 if ahead else 0.2)).tolist()
        return seen[choice, batch]

    budget = SimpleNamespace(room=50, left=lambda: budget.room > 0)
    meter = SimpleNamespace(has=lambda n: n < 99, has_slopes=False, in_pieces=True)
    judge = judge_with(meter=meter, losses=losses, known_of=lambda c, n, slopes: (c, n) in seen and not slopes)
    judge.budget = budget
    judge._on_fresh_batches((0,), [(1,)], {}, 9)
    assert budget.room == (10 if ahead else 0) or budget.room > 10  # decided before
    spent = budget.room
    judge._on_fresh_batches((1,), [(0,)], {}, 0)  # what was measured once takes no pass
    assert budget.room <= spent
    assert len(seen) == 50 - budget.room


class Noisy:
    """Trials whose losses and gradients are noise about the minimum, but for a rival further away."""

    away = 0.8

    def __init__(self, passes):
        self.meter = SimpleNamespace(
            has=lambda n: n < 4, size=lambda n: 32, has_slopes=True, in_pieces=True, unit=1, passes=60.0 - passes
        )
        self.asked = []

    def known_of(self, choice, number, *, slopes):
        return False

    def slopes(self, choice, number, stop=0):
        samples = stop or 32
        self.asked.append((choice, number, samples))
        self.meter.passes += samples / 32
        x = torch.randn(samples // 2, 2, 20, generator=torch.Generator().manual_seed(number))
        gaps = self.away * (choice != (0,)) - x
        return list(zip((gaps.pow(2).sum(-1) / 2).tolist(), gaps.mean(1), strict=True))


def fresh_with(passes, rivals, found=(0,)):
    judge = LossJudge(SimpleNamespace(space=None, score=None, budget=None))
    judge.trials, judge.rounds = Noisy(passes), 1
    judge.budget = Budget(math.inf, 60.0, judge.trials.meter)
    others = [(k,) for k in range(rivals + 1) if (k,) != found]
    return judge.trials, judge._on_fresh_batches(found, others, {}, 0)


def test_where_a_batch_for_all_rivals_is_too_much_all_see_a_part_of_it():
    trials, (best, risks) = fresh_with(6, 8)
    assert best == (0,)
    assert len(risks) == 8
    assert max(risks.values()) < RISK
    assert {(number, samples) for _, number, samples in trials.asked} == {(1, 20)}
    trials, (_, risks) = fresh_with(4, 8)  # too little to tell anything: the first ones see all of it
    assert len(risks) == 3


def test_a_rival_that_is_ahead_is_tested_in_place_of_what_was_found(monkeypatch):
    monkeypatch.setattr(Noisy, "away", 0.2)  # too little to tell on one batch
    _, (better, risks) = fresh_with(4, 2, found=(1,))
    assert (better, risks) == ((0,), {})
    _, (better, risks) = fresh_with(4, 2)
    assert better == (0,)
    assert min(risks.values()) > RISK
