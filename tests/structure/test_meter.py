"""Measuring losses: every pass sees the same model, whatever the passes before have done to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_wsl.structure.losses import LossMeter


def masked(net, batch):
    """A loss over some places of each sample."""
    (x,) = batch
    hidden = torch.rand(x.shape[:2]) < 0.3
    return F.mse_loss(net(x.masked_fill(hidden[..., None], 0.0))[hidden], x[hidden])


def paired(net, batch):
    """A loss over all pairs of samples."""
    x = net(batch[0].flatten(1))
    one, other = torch.triu_indices(len(x), len(x), 1)
    return F.mse_loss(x[one], -x[other])


@pytest.mark.parametrize("size", [32, 20])
def test_a_loss_over_some_places_of_the_samples_is_told_in_as_many_pieces_as_there_are_samples(size):
    torch.manual_seed(0)
    net = nn.Linear(5, 5)
    meter = LossMeter(net, masked, [(torch.randn(size, 9, 5),)])
    assert meter.has(0)
    with meter.session():
        found = meter.losses({}, 0)
        again = meter.losses({}, 0)
        few = meter.losses({}, 0, 0, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        whole = float(masked(net, meter._batches[0]))
    assert len(found) == size
    assert found == again
    assert sum(found) / size == pytest.approx(whole, rel=1e-4)
    assert len(few) == 4
    assert not meter.in_pieces


def test_a_loss_over_pairs_of_samples_is_measured_on_pieces_of_the_batch():
    torch.manual_seed(0)
    meter = LossMeter(nn.Linear(6, 1), paired, [(torch.randn(32, 6),)])
    assert meter.has(0)
    found = meter.losses({}, 0)
    assert len(found) == 8
    assert meter.in_pieces


def noisy(net, batch):
    """A loss with noise of its own."""
    return F.mse_loss(net(batch[0]), torch.randn(len(batch[0]), 5))


def test_pieces_see_noise_of_their_own_and_the_same_each_time():
    meter = LossMeter(nn.Linear(5, 5), noisy, [(torch.zeros(8, 5),)])
    assert meter.has(0)
    one, other = meter.losses({}, 0, 0, 4), meter.losses({}, 0, 4, 8)
    assert not set(one) & set(other)
    assert (one, other) == (meter.losses({}, 0, 0, 4), meter.losses({}, 0, 4, 8))
    first, *rest = (slopes for _, slopes in meter.slopes({}, 0))
    assert not any(torch.equal(first, slopes) for slopes in rest)


def test_gradients_of_the_first_samples_are_the_first_of_the_batch():
    torch.manual_seed(0)
    batch = torch.randn(12, 5), torch.randint(3, (12,))
    meter = LossMeter(nn.Linear(5, 3), lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), [batch])
    assert meter.has(0)
    whole, first = meter.slopes({}, 0), meter.slopes({}, 0, 8)
    assert meter.passes == pytest.approx(1 + 8 / 12)
    assert [losses for losses, _ in first] == [losses for losses, _ in whole[:4]]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(first, whole))


class Counting(nn.Module):
    """Its loss depends on what earlier calls have left behind."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls, self.seen = kind, 0, []
        self.linear = nn.Linear(3, 2)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        own = {"attribute": self.calls, "list": len(self.seen), "buffer": float(self.steps), "weight": 0}[self.kind]
        if self.kind == "attribute":
            self.calls += 1
        elif self.kind == "list":
            self.seen.append(1)
        elif self.kind == "buffer":
            self.steps += 1
        else:
            with torch.no_grad():
                self.linear.weight.mul_(2.0)
        return self.linear(x) + own


@pytest.mark.parametrize("kind", ["attribute", "list", "buffer", "weight"])
@pytest.mark.parametrize("in_session", [True, False])
def test_a_model_that_changes_itself_is_measured_alike_every_time(kind, in_session):
    torch.manual_seed(0)
    net = Counting(kind).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batch = torch.randn(8, 3), torch.randn(8, 2)
    meter = LossMeter(net, lambda net, batch: F.mse_loss(net(batch[0]), batch[1]), [batch])
    assert meter.has(0)
    lent = {"linear.weight": torch.randn(2, 3)}
    kept = lent["linear.weight"].clone()

    def measured():
        found = [meter.losses({}, 0), meter.losses(lent, 0), meter.losses({}, 0), meter.losses(lent, 0)]
        return [*found, *(losses for losses, _ in meter.gradients(lent, 0, 1))]

    if in_session:
        with meter.session():
            first, other, *rest = measured()
    else:
        first, other, *rest = measured()
    assert first != other
    assert rest == [first, other, pytest.approx(other)]
    assert torch.equal(lent["linear.weight"], kept)
    assert net.training
    assert net.calls == 0
    assert net.seen == []
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert all(p.grad is None for p in net.parameters())
