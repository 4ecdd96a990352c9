"""Weights and responses in one objective."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import apply_permutation, infer_permutation_spec, joint_matching, weight_matching


def conv_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


def transformer(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 3)).eval()


IMAGES = [(torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(k)),) for k in range(3)]
WORDS = [(torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(k)),) for k in range(3)]
NETS = pytest.mark.parametrize(("build", "batches"), [(conv_net, IMAGES), (transformer, WORDS)])


@NETS
@pytest.mark.parametrize("share", [0.1, 1.0, 10.0])
def test_a_planted_permutation_is_recovered(build, batches, share):
    model = build()
    spec = infer_permutation_spec(model, (batches[0][0][:2],))
    state = model.state_dict()
    other = apply_permutation(spec, spec.random_permutations(3), state)
    found = joint_matching(spec, model, state, other, batches, share=share)
    aligned = apply_permutation(spec, found, other)
    assert all(torch.equal(aligned[name], tensor) for name, tensor in state.items())
    assert found.start.startswith("weights and activations")


@NETS
def test_a_share_of_zero_is_weight_matching(build, batches):
    model, other = build(1), build(2).state_dict()
    spec = infer_permutation_spec(model, (batches[0][0][:2],))
    plain = weight_matching(spec, model.state_dict(), other)
    joint = joint_matching(spec, model, model.state_dict(), other, batches, share=0.0)
    assert all(torch.equal(joint[group], plain[group]) for group in spec.groups)
    assert joint.objective == pytest.approx(plain.objective)


def test_the_objective_is_the_documented_sum():
    """A linear layer's responses to whitened inputs: every correlation can be computed by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    spec = infer_permutation_spec(model, (torch.randn(2, 4),))
    a, b = model.state_dict(), {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    x = torch.randn(50, 4)
    found = joint_matching(spec, model, a, b, [(x,)], share=0.5)
    moved = apply_permutation(spec, found, b)
    weights = sum(float((a[name].double() * moved[name].double()).sum()) for name in ("0.weight", "2.weight"))
    answers = torch.stack([x.double() @ state["0.weight"].double().T for state in (a, moved)])
    answers = answers - answers.mean(dim=1, keepdim=True)
    answers = answers / answers.norm(dim=1, keepdim=True)
    correlation = float((answers[0] * answers[1]).sum())
    scale = 0.5 * math.sqrt(float(a["0.weight"].square().sum() * b["0.weight"].square().sum())) / 6
    assert found.objective == pytest.approx(weights + scale * correlation, rel=1e-5)


def test_loaders_that_shuffle_are_refused():
    model = conv_net()
    spec = infer_permutation_spec(model, (IMAGES[0][0][:2],))
    sizes = iter([4, 6])

    class Shrinking:
        def __iter__(self):
            return iter([(IMAGES[0][0][: next(sizes)],)])

    with pytest.raises(RebasinError, match="different amounts of data"):
        joint_matching(spec, model, model.state_dict(), conv_net(1).state_dict(), Shrinking())
