"""The three witnesses of a mapping: the loss, the norm of its gradient, the size of its mean."""

from __future__ import annotations

import math

import pytest
import torch

from lit_wsl.matching.witnesses import is_ahead, products_of, risk_by_gradient, stepped_down, unrest, unrest_of
from lit_wsl.structure.losses import FOLD, folded


def pieces(weight, seed=0, count=64, batch=2):
    """Losses and gradients of ``|w - x|^2 / 2`` on pieces of standard normal data, whose best w is zero."""
    x = torch.randn(count, batch, len(weight), generator=torch.Generator().manual_seed(seed))
    gaps = weight - x
    return gaps.pow(2).sum(-1).mean(-1) / 2, gaps.mean(1)


def test_away_from_the_minimum_all_three_witnesses_agree_and_are_significant():
    away, best = pieces(torch.full((20,), 0.4)), pieces(torch.zeros(20))
    assert risk_by_gradient(away, best) < 1e-4
    assert risk_by_gradient(best, away) == 1.0
    assert risk_by_gradient(best, best) == 1.0


def test_one_witness_that_speaks_against_is_enough_to_leave_it_open():
    (losses, slopes), best = pieces(torch.full((20,), 0.4)), pieces(torch.zeros(20))
    assert risk_by_gradient((-losses, slopes), best) == 1.0
    assert risk_by_gradient((losses, slopes / 100), best) == 1.0


def test_of_two_weights_equally_far_away_neither_is_called_worse_more_often_than_the_risk_says():
    torch.manual_seed(0)
    false = 0
    for seed in range(300):
        step = torch.randn(20) * 0.2
        false += risk_by_gradient(pieces(step, seed), pieces(-step, seed)) < 0.05
    assert false <= 0.05 * 300 + 3 * math.sqrt(0.05 * 300)


def test_what_is_nearer_to_the_minimum_is_ahead():
    away, best = pieces(torch.full((20,), 0.4)), pieces(torch.zeros(20))
    assert is_ahead(best, away)
    assert not is_ahead(away, best)


def test_the_mean_gradient_need_not_agree_unless_it_speaks_against():
    losses, slopes = pieces(torch.zeros(20))
    worse = losses + 0.5 + 0.2 * losses.flip(0), 1.3 * slopes  # their expected gradient is zero, too
    assert risk_by_gradient(worse, (losses, slopes)) < 1e-4
    assert risk_by_gradient(worse, (losses, 0.3 * slopes + 0.3)) == 1.0  # smaller, but always in one direction


def test_tests_that_tell_leave_their_share_of_the_risk_to_the_others_and_no_more():
    torch.manual_seed(0)
    false = 0
    for _ in range(400):  # nine are false, one is true beyond doubt
        risks = dict(enumerate([1e-9, *torch.rand(9).tolist()]))
        found = stepped_down(risks, 1.0, 10)
        assert all(risk <= found[name] <= min(1.0, 10 * risk) for name, risk in risks.items())
        false += min(found[name] for name in range(1, 10)) < 0.05
    assert 0 < false <= 0.05 * 400 + 3 * math.sqrt(0.05 * 400)


def test_a_gradient_is_at_rest_where_the_noise_of_a_batch_hides_its_mean():
    assert unrest(pieces(torch.zeros(200), count=16)[1]) < 1
    assert 1 < unrest(pieces(torch.full((200,), 0.5), count=16)[1]) < math.inf
    assert unrest(pieces(torch.zeros(200), count=4)[1]) == math.inf  # too few to tell


def test_rest_is_told_by_the_products_of_gradients_that_stay_where_they_are():
    _, slopes = pieces(torch.full((20,), 0.4), count=8)
    apart = [{"weight": own[:12].view(3, 4), "bias": own[12:]} for own in slopes]
    assert unrest_of(products_of(apart)) == pytest.approx(unrest(slopes), rel=1e-4)
    assert unrest_of(products_of(apart[:2])) > 0  # as few as two pieces


def test_folded_gradients_keep_their_products():
    torch.manual_seed(0)
    long = [[torch.randn(3, FOLD), torch.randn(7)] for _ in range(2)]
    flat = [torch.cat([g.flatten() for g in slopes]) for slopes in long]
    a, b = (folded(slopes) for slopes in long)
    assert len(a) == FOLD
    assert float(a @ a) == pytest.approx(float(flat[0] @ flat[0]), rel=0.05)
    assert abs(float(a @ b) - float(flat[0] @ flat[1])) < 0.05 * float(flat[0].norm() * flat[1].norm())
    short = folded([torch.ones(7)])
    assert torch.equal(short, torch.ones(7))
