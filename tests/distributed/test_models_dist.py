"""The test network itself: the two forms compute the same with the expected weights."""

from __future__ import annotations

import torch
from models_dist import New, expected_state, make_plan, old_model

from lit_wsl import transfer_weights


def test_expected_state_is_the_same_function():
    old, new = old_model(), New().eval()
    new.load_state_dict(expected_state(old))
    x = torch.randn(7, 6)
    torch.testing.assert_close(new(x), old(x), atol=1e-5, rtol=1e-5)


def test_plan_gives_the_expected_state_in_one_process():
    old, new = old_model(), New()
    report = transfer_weights(new, old.state_dict(), plan=make_plan())
    expected = expected_state(old)
    assert sorted(report.loaded) == sorted(expected)
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
