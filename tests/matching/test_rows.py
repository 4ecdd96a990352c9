"""Queries and keys of a model in which nothing turns: its gradient shows that, or any order that both share will do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_wsl import transfer_weights
from lit_wsl.matching import judge

WORDS, WIDTH = 12, 16


class Spoken(nn.Module):
    """The largest word so far, found by attention that prefers what is near."""

    roles = {role: role for role in "qkvo"}

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.normed = normed
        self.embed = nn.Embedding(WORDS, WIDTH)
        for name in sorted(self.roles.values()):
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        x, t = self.embed(ids), torch.arange(ids.shape[1])
        q, k, v = (getattr(self, self.roles[r])(x).unflatten(-1, (2, -1)).transpose(1, 2) for r in "qkv")
        if self.normed:  # so that no gradient shows which rows meet
            q, k = (3 * F.normalize(p, dim=-1) for p in (q, k))
        gap = t[:, None] - t
        bias = torch.where(gap < 0, -1e9, -0.1 * gap) * torch.tensor([1.0, 0.5])[:, None, None]
        mixed = ((q @ k.mT / 3 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(self.norm(x + getattr(self, self.roles["o"])(mixed)))


class Hostile(Spoken):
    roles = {"q": "layer2", "k": "layer0", "v": "layer3", "o": "layer1"}


def loss(net, batch):
    return F.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize("normed", [False, True])
def test_a_model_that_turns_no_rows_is_not_left_open_for_them(monkeypatch, normed):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (256, 8), generator=generator)
    batches = list(zip(ids.split(32), ids.cummax(1).values.split(32)))
    torch.manual_seed(0)
    old = Spoken(normed)
    optimizer = torch.optim.Adam(old.parameters(), 5e-3)
    for _ in range(40):
        for batch in batches:
            optimizer.zero_grad()
            loss(old, batch).backward()
            optimizer.step()
    asked = []
    plain = judge.LossJudge.with_rows_as_they_are

    def watched(own, choice):
        found = plain(own, choice)
        asked.append((own.space.rotary is not None, own.rows_are_free))
        return found

    monkeypatch.setattr(judge.LossJudge, "with_rows_as_they_are", watched)
    torch.manual_seed(1)
    new = Hostile(normed)
    report = transfer_weights(new, old.state_dict(), min_coverage=0.0, loss=loss, batches=batches)
    assert asked == [(normed, normed)]
    assert report.plan.proof == "proven"
    assert not any(op.name == "rotary" for entry in report.plan for op in entry.operations)
    torch.testing.assert_close(new(ids), old(ids), rtol=1e-4, atol=1e-5)
