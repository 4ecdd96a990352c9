"""Two orders in each other's way, and diagonals: both orders move, planted ones come back, the function stays."""

from __future__ import annotations

import copy

import pytest
import torch
from small_nets import Net
from torch import Tensor, nn
from torch.nn import functional as F

from lit_wsl.rebasin import PermutationSpec, apply_permutation, infer_permutation_spec, weight_matching

GENERATOR = torch.Generator().manual_seed(0)
ROWS, OTHERS = torch.randn(4, 3, generator=GENERATOR), torch.randn(4, 2, generator=GENERATOR)
STEPS, IMAGE = torch.randn(2, 5, 3, generator=GENERATOR), torch.randn(2, 3, 8, 8, generator=GENERATOR)


def normed_heads(net, x):
    x = net.a(x)
    q, k, v = net.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (net.n(q), net.m(k), v)))
    return net.b(x + y.transpose(1, 2).flatten(2))


def relative_keys(net, x):
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in net.a(x).chunk(3, -1))
    distance = torch.arange(x.shape[1])[None] - torch.arange(x.shape[1])[:, None] + 4
    score = q @ k.mT + torch.einsum("bhtd,tsd->bhts", q, net.r[distance])
    return net.b((score.softmax(-1) @ v).transpose(1, 2).flatten(2))


def mixture(net, x):
    outputs = torch.stack([expert(x) for expert in net.e], 1)
    return net.b((net.r(x).softmax(-1)[..., None] * outputs).sum(1).relu())


def fused(net, x, y):
    return net.b(net.f((net.a(x).relu()[:, :, None] * net.c(y).relu()[:, None]).flatten(1)).relu())


def generated(net, x, y):
    return net.b(torch.einsum("boi,bi->bo", net.c(y).view(-1, 4, 6), net.a(x).relu()).relu())


def picked(net, x):
    outputs = torch.einsum("bi,eio->beo", net.a(x), net.w)
    return net.b(outputs[torch.arange(len(x)), net.r(x).argmax(-1)])


def dispatched(net, x):
    h = net.a(x)
    gates = net.r(x).softmax(-1)
    sent = F.one_hot(gates.argmax(-1), 4).to(x.dtype)
    outputs = torch.bmm(torch.einsum("be,bi->ebi", sent, h), net.w)
    return net.b(torch.einsum("be,ebo->bo", gates * sent, outputs).relu())


def shuffled_beside(net, x):
    h = net.a(x).relu()
    return net.b(torch.cat([F.pixel_shuffle(net.c(F.avg_pool2d(h, 2)), 2), h], 1))


def experts() -> dict[str, nn.Module | Tensor]:
    return {"a": nn.Linear(3, 6), "r": nn.Linear(3, 4), "w": torch.randn(4, 6, 5), "b": nn.Linear(5, 2)}


CASES = {
    "norms that all heads share": (
        normed_heads,
        lambda: {
            "a": nn.Linear(3, 8),
            "qkv": nn.Linear(8, 24),
            "n": nn.LayerNorm(4),
            "m": nn.LayerNorm(4),
            "b": nn.Linear(8, 2),
        },
        (STEPS,),
        "a.weight:0 qkv.weight:0 qkv.weight:1 n.weight:0 m.weight:0 b.weight:1",
    ),
    "relative keys that all heads share": (
        relative_keys,
        lambda: {"a": nn.Linear(3, 24), "r": torch.randn(9, 4), "b": nn.Linear(8, 2)},
        (STEPS,),
        "a.weight:0 r:1 b.weight:1",
    ),
    "experts side by side, weighted": (
        mixture,
        lambda: {
            "e": nn.ModuleList(nn.Linear(3, 5) for _ in range(3)),
            "r": nn.Linear(3, 3),
            "b": nn.Linear(5, 2),
        },
        (ROWS,),
        "e.0.weight:0 e.2.weight:0 b.weight:1",
    ),
    "an outer product": (
        fused,
        lambda: {"a": nn.Linear(3, 6), "c": nn.Linear(2, 4), "f": nn.Linear(24, 5), "b": nn.Linear(5, 2)},
        (ROWS, OTHERS),
        "a.weight:0 c.weight:0 f.weight:0 f.weight:1 b.weight:1",
    ),
    "generated weights": (
        generated,
        lambda: {"a": nn.Linear(3, 6), "c": nn.Linear(2, 24), "b": nn.Linear(4, 2)},
        (ROWS, OTHERS),
        "a.weight:0 c.weight:0 b.weight:1",
    ),
    "factors of three": (
        lambda n, x: torch.einsum("bij,ir,jr,or->bo", x, n.p, n.q, n.r),
        lambda: {"p": torch.randn(5, 4), "q": torch.randn(3, 4), "r": torch.randn(2, 4)},
        (STEPS,),
        "p:1 q:1 r:1",
    ),
    "outputs of experts by two indices": (picked, experts, (ROWS,), "a.weight:0 r.weight:0 w:0 w:1 w:2 b.weight:1"),
    "experts by one-hot vectors": (dispatched, experts, (ROWS,), "a.weight:0 r.weight:0 w:0 w:1 w:2 b.weight:1"),
    "codes by one-hot vectors": (
        lambda n, x: n.b(F.one_hot(torch.cdist(n.a(x), n.c).argmin(-1), 5).to(x.dtype) @ n.c),
        lambda: {"a": nn.Linear(3, 6), "c": torch.randn(5, 6), "b": nn.Linear(6, 2)},
        (ROWS,),
        "a.weight:0 c:0 c:1 b.weight:1",
    ),
    "pixels from channels beside others": (
        shuffled_beside,
        lambda: {"a": nn.Conv2d(3, 6, 3, padding=1), "c": nn.Conv2d(6, 20, 1), "b": nn.Conv2d(11, 2, 1)},
        (IMAGE,),
        "a.weight:0 c.weight:0 c.weight:1 b.weight:1",
    ),
    "a matrix beside the identity": (
        lambda n, x: n.b(n.a(x).relu() @ (torch.eye(6, dtype=x.dtype) + n.w - n.w.T)),
        lambda: {"a": nn.Linear(3, 6), "w": torch.randn(6, 6), "b": nn.Linear(6, 2)},
        (ROWS,),
        "a.weight:0 w:0 w:1 b.weight:1",
    ),
    "a low rank beside a diagonal": (
        lambda n, x: torch.einsum("bi,ij,bj->b", n.a(x), torch.diag_embed(n.d.exp()) + n.u @ n.u.T, n.a(x)),
        lambda: {"a": nn.Linear(3, 6), "d": torch.randn(6), "u": torch.randn(6, 4)},
        (ROWS,),
        "a.weight:0 d:0 u:0 u:1",
    ),
    "the diagonal of a correlation": (
        lambda n, x: torch.diagonal(n.a(x).T @ n.a(x)).add(-1).square().sum() + (n.a(x).T @ n.a(x)).trace(),
        lambda: {"a": nn.Linear(3, 6)},
        (ROWS,),
        "a.weight:0 a.bias:0",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_both_orders_move_keep_the_function_and_are_recovered(name):
    forward, parts, args, movable = CASES[name]
    torch.manual_seed(0)
    model = Net(forward, **parts()).eval()
    spec = infer_permutation_spec(model, args)
    assert not spec.dropped
    assert PermutationSpec.from_json(spec.to_json()) == spec
    for place in movable.split():
        tensor, axis = place.rsplit(":", 1)
        assert bool(spec.axes[tensor][int(axis)].touched.all()), place
        assert int(axis) not in spec.frozen.get(tensor, {}), place
    model, args = model.double(), tuple(arg.double() for arg in args)
    state, before = model.state_dict(), model(*args)
    for seed in range(4):
        other = copy.deepcopy(model)
        other.load_state_dict(apply_permutation(spec, spec.random_permutations(seed), state))
        torch.testing.assert_close(other(*args), before, rtol=1e-9, atol=1e-9)
    found = weight_matching(spec, state, other.state_dict(), progress=False)
    for key, tensor in apply_permutation(spec, found, other.state_dict()).items():
        torch.testing.assert_close(tensor, state[key], msg=key)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_diagonal_of_two_different_factors_ties_them_only_where_it_is_the_main_one(offset):
    model = Net(
        lambda net, x: (net.a(x)[:, :, None] * net.c(x)[:, None]).diagonal(offset, -2, -1).sum(-1),
        a=nn.Linear(3, 6),
        c=nn.Linear(3, 6),
    )
    spec = infer_permutation_spec(model.eval(), (ROWS,), verify=False)
    assert {name for name in spec.axes if name.endswith("weight")} == (set() if offset else {"a.weight", "c.weight"})


def test_the_largest_position_counts_where_it_gives_the_number_of_classes():
    def forward(net, x):
        return net.b(net.a(x)) * F.one_hot(net.r(x).argmax(-1)).shape[1]

    model = Net(forward, a=nn.Linear(3, 6), b=nn.Linear(6, 2), r=nn.Linear(3, 4)).eval()
    spec = infer_permutation_spec(model, (ROWS,), verify=False)
    assert 0 not in spec.axes.get("r.weight", {})
    assert 0 in spec.axes["a.weight"]
