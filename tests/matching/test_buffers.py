"""Buffers: which of several of one size belongs where, by its name and by the module that it stands in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_wsl import transfer_weights


class Held(nn.Module):
    """Buffers of one size, and a layer if ``size`` is given."""

    def __init__(self, *names, size=0):
        super().__init__()
        for name in names:
            self.register_buffer(name, torch.randn(6))
        if size:
            self.fc = nn.Linear(size, size)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (("u", "v"), {"v": "v"}),
        (("bank", "age"), {"bank": "bank"}),
        (("betas", "alphas"), {"alphas": "alphas", "alphas_bar": ""}),
        (("A_log", "D"), {"D": "D", "B_bias": ""}),
        (("s", "m"), {"scale": "s", "margin": "m"}),
        (("x_mean", "y_mean"), {"y_mean": "y_mean", "z_mean": ""}),
    ],
)
@pytest.mark.parametrize("size", [0, 4])
def test_of_buffers_of_one_size_each_goes_where_its_name_stands(old, new, size, ordered):
    """``new`` has, by the name of each buffer of the new model, what it was called; nothing for what is new."""
    source = nn.ModuleDict(
        {"net": nn.Linear(3, 3), "parts": nn.ModuleList(Held(*old, size=size) for _ in range(2)), "stats": Held(*old)}
    )
    target = nn.ModuleDict(
        {
            "body": nn.Linear(3, 3),
            "blocks": nn.ModuleList(Held(*new, size=size) for _ in range(2)),
            "scaler": Held(*new),
        }
    )
    state = source.state_dict() if ordered else dict(sorted(source.state_dict().items()))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    transfer_weights(target, state, min_coverage=0.0)
    for theirs, ours in (("parts.0", "blocks.0"), ("parts.1", "blocks.1"), ("stats", "scaler")):
        for name, was in new.items():
            held = target.state_dict()[f"{ours}.{name}"]
            assert torch.equal(held, before[f"{ours}.{name}"]) or (was and torch.equal(held, state[f"{theirs}.{was}"]))


def test_what_two_buffers_have_in_common_makes_them_no_copies():
    """``weight_v`` of a spectral norm is no ``weight_sigma``."""
    layers = [nn.utils.spectral_norm(nn.Linear(8, 8)) for _ in range(2)]
    new = nn.utils.spectral_norm(nn.Linear(8, 8))
    new.register_buffer("weight_sigma", torch.zeros(8))
    del new._buffers["weight_v"]
    transfer_weights(nn.ModuleList([new]), nn.ModuleList(layers[:1]).state_dict(), min_coverage=0.0)
    assert not new.weight_sigma.any()
    assert torch.equal(new.weight_u, layers[0].weight_u)
