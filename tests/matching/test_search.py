"""The search: whom it drops on a few samples, and what it looks at again."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from lit_wsl.matching.search import KEPT, Search

SIZE = 32


class Table:
    """Trials of a table of losses, which keep in mind what was looked at on how many samples."""

    least, screen, size, balance = 2, 8, SIZE, None

    def __init__(self, losses):
        self.of, self.looks = losses, []
        self.space = SimpleNamespace(is_consistent=lambda choice: True)
        self.budget = SimpleNamespace(left=lambda share: True)

    def more(self, samples):
        return self.least if samples == 0 else min(2 * samples, self.size)

    def losses(self, choice, samples=SIZE):
        return self.of[choice][:samples]

    def mean(self, choice, samples):
        self.looks.append((choice, samples))
        return sum(self.losses(choice, samples)) / samples

    def score(self, choice):
        return self.mean(choice, self.screen)


def table(count):
    noise = torch.rand(count, SIZE, generator=torch.Generator().manual_seed(0))
    return {(k,): (1.5 + noise[k]).tolist() for k in range(count)}


def test_one_sample_that_is_far_off_does_not_drop_what_is_best_on_all_others():
    losses = table(36)
    losses[35,] = [0.06, 9.0, *[0.1] * (SIZE - 2)]
    assert Search(Table(losses), 1.0)._ranked(losses, SIZE)[0] == (35,)


def test_what_loses_clearly_more_is_not_looked_at_on_more_samples():
    losses = table(KEPT)
    losses[0,] = [0.5 + 0.1 * (k % 3) for k in range(SIZE)]
    trials = Table(losses)
    assert Search(trials, 1.0)._ranked(losses, SIZE) == [(0,)]
    assert max(samples for _, samples in trials.looks) < trials.screen
