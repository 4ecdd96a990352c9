"""What the example call does not run: experts without rows are moved like their siblings, unproven."""

from __future__ import annotations

import copy

import pytest
import torch
from small_nets import Net
from torch import nn
from torch.nn import functional as F

from lit_wsl.rebasin import (
    PermutationSpec,
    PermutationSpecBuilder,
    apply_permutation,
    infer_permutation_spec,
    verify_permutation_spec,
)
from lit_wsl.rebasin.job_model import find_spec

ROWS = torch.rand(4, 3)


def expert(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 5))


def by_list(net, x):
    h, chosen = net.a(x), (x[:, 0] > 2).long()
    out = h.clone()
    for number, one in enumerate(net.experts):
        rows = (chosen == number).nonzero()[:, 0]
        if len(rows):
            out[rows] = out[rows] + one(h[rows])
    return net.b(out)


def by_name(net, x):
    h = net.a(x)
    return net.b(h + (net.expert1(h) if x.mean() < 2 else net.expert2(h)))


def by_lists(net, x):
    h, number = net.a(x), min(int(x.mean() / 2), 2)
    return net.b(h + net.down[number](net.up[number](h).relu()))


def by_parameters(net, x):
    h, number = net.a(x), min(int(x.mean() / 2), 2)
    return net.b(h + (h @ net.w[number]).relu() @ net.v[number])


def by_router(net, x):
    h = net.a(x)
    gain, chosen = net.r(h).softmax(-1).topk(2, -1)
    hot, out = F.one_hot(chosen, 5).permute(2, 1, 0), torch.zeros_like(h)
    for number, one in enumerate(net.experts):
        place, row = torch.where(hot[number])
        if len(row):
            out.index_add_(0, row, one(h[row]) * gain[row, place, None])
    return net.b(h + out)


def by_key(net, x):
    h = net.a(x)
    return net.b(h + net.experts["low" if x.mean() < 2 else "high"](h))


CASES = {
    "list": (by_list, lambda: {"experts": nn.ModuleList([expert(), expert(), expert()])}),
    "numbered": (by_name, lambda: {"expert1": expert(), "expert2": expert()}),
    "router": (
        by_router,
        lambda: {"experts": nn.ModuleList(expert() for _ in range(5)), "r": nn.Linear(5, 5, bias=False)},
    ),
    "two lists": (
        by_lists,
        lambda: {
            "up": nn.ModuleList(nn.Linear(5, 6) for _ in range(3)),
            "down": nn.ModuleList(nn.Linear(6, 5) for _ in range(3)),
        },
    ),
    "lists of parameters": (
        by_parameters,
        lambda: {
            "w": nn.ParameterList(torch.randn(5, 6) for _ in range(3)),
            "v": nn.ParameterList(torch.randn(6, 5) for _ in range(3)),
        },
    ),
    "keys": (by_key, lambda: {"experts": nn.ModuleDict({"low": expert(), "high": expert()})}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_expert_without_rows_moves_like_its_siblings(name):
    forward, parts = CASES[name]
    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(3, 5), b=nn.Linear(5, 2), **parts()).double().eval()
    rows = ROWS[:1].double()
    spec = infer_permutation_spec(model, (rows,))
    assert spec.proof is not None
    assert spec.proof.unseen
    assert "Nothing is proven" in spec.summary()
    assert PermutationSpec.from_json(spec.to_json()).proof == spec.proof
    with torch.no_grad():
        for seed in range(3):
            other = copy.deepcopy(model)
            other.load_state_dict(apply_permutation(spec, spec.random_permutations(seed), model.state_dict()))
            for sample in (rows, rows + 5, torch.cat([rows, 20 * rows - 10, rows + 5])):
                torch.testing.assert_close(other(sample), model(sample), rtol=1e-9, atol=1e-9)


def test_nothing_is_concluded_from_siblings_that_are_moved_differently_or_are_of_another_shape():
    def forward(net, x):
        h = net.layers[1](net.layers[0](net.a(x)).relu()).relu()
        return net.b(h if x.mean() < 2 else net.wide[1](net.layers[2](h))) + net.b(net.wide[0](h))

    parts = {"layers": nn.ModuleList(nn.Linear(5, 5) for _ in range(3))}
    parts["wide"] = nn.ModuleList([expert(6), expert(7)])
    model = Net(forward, a=nn.Linear(3, 5), b=nn.Linear(5, 2), **parts).eval()
    spec = infer_permutation_spec(model, (ROWS,))
    assert "layers.1.weight" in spec.axes
    assert not {"layers.2.weight", "wide.1.0.weight"} & set(spec.axes)
    _, _, _, remarks = find_spec(model, [((ROWS,), {})], None)
    assert any("layers.2.weight" in remark and "does not use" in remark for remark in remarks)


def test_a_group_by_hand_that_the_sample_does_not_use_is_not_called_proven():
    forward, parts = CASES["numbered"]
    model = Net(forward, a=nn.Linear(3, 5), b=nn.Linear(5, 2), **parts()).eval()
    wrong = PermutationSpecBuilder(model).axis("expert2.0.weight", 0, "wrong").build()
    found = verify_permutation_spec(wrong, model, (ROWS,))
    assert found.spec.proof is not None
    assert found.spec.proof.unseen == ("wrong",)
    assert verify_permutation_spec(wrong, model, (ROWS + 5,)).dropped == ("wrong",)
