"""Query heads that share a key head change places among themselves, whatever the projections look like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_wsl.rebasin import PermutationSpec, apply_permutation, infer_permutation_spec, weight_matching

HEADS, DIM, WIDTH = 4, 3, 6


class Grouped(nn.Module):
    """One layer of attention in which query heads share key heads."""

    def __init__(self, shared: int, way: str) -> None:
        super().__init__()
        self.shared, self.way = shared, way
        self.inp, self.out = nn.Linear(2, WIDTH), nn.Linear(WIDTH, 2)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * shared) * DIM)
        self.o = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        parts = self.qkv(x).split([HEADS * DIM, self.shared * DIM, self.shared * DIM], -1)
        q, k, v = (part.unflatten(-1, (-1, DIM)).transpose(1, 2) for part in parts)
        times = HEADS // self.shared
        if self.way == "repeat":
            y = F.scaled_dot_product_attention(q, *(one.repeat_interleave(times, 1) for one in (k, v)))
        elif self.way == "expand":
            k, v = (one[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for one in (k, v))
            y = (q @ k.mT).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(x + self.o(y.transpose(1, 2).flatten(2)))


ARGS = (torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize("way", ["repeat", "expand", "built in"])
@pytest.mark.parametrize("shared", [1, 2])
def test_the_order_of_query_heads_is_found_and_recovered(shared, way):
    torch.manual_seed(0)
    model = Grouped(shared, way).eval()
    spec = infer_permutation_spec(model, ARGS)
    assert not spec.dropped
    orders = [group for group in spec.groups.values() if group.name.endswith("/order")]
    assert [group.size for group in orders] == [HEADS // shared]
    assert {use.tensor for use in spec.uses(orders[0].name)} == {"qkv.weight", "qkv.bias", "o.weight"}
    assert PermutationSpec.from_json(spec.to_json()) == spec
    state = model.state_dict()
    other = apply_permutation(spec, spec.random_permutations(3), state)
    found = weight_matching(spec, state, other)
    aligned = apply_permutation(spec, found.permutations, other)
    for name, tensor in state.items():
        torch.testing.assert_close(aligned[name], tensor, msg=name)


class OnOwnAxes(nn.Module):
    """The same with weights ``(key heads, query heads, dim, width)``, each axis of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.inp, self.out = nn.Linear(2, WIDTH), nn.Linear(WIDTH, 2)
        self.q, self.o = (nn.Parameter(torch.randn(2, 3, DIM, WIDTH)) for _ in range(2))
        self.k, self.v = (nn.Parameter(torch.randn(2, DIM, WIDTH)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(2, 3, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        q = torch.einsum("btc,kgdc->bkgtd", x, self.q) + self.bias[:, :, None]
        k, v = (torch.einsum("btc,kdc->bktd", x, weight) for weight in (self.k, self.v))
        if self.way == "expand":
            y = F.scaled_dot_product_attention(q, *(one[:, :, None].expand_as(q) for one in (k, v)))
        else:
            weights = torch.einsum("bkgtd,bksd->bkgts", q, k).softmax(-1)
            y = torch.einsum("bkgts,bksd->bkgtd", weights, v)
        if self.way == "told apart":
            y = y * torch.arange(1.0, 4.0)[:, None, None]
        return self.out(x + torch.einsum("bkgtd,kgdc->btc", y, self.o))


@pytest.mark.parametrize("way", ["expand", "einsum"])
def test_query_heads_on_an_axis_of_their_own_move_and_are_recovered(way):
    torch.manual_seed(0)
    model = OnOwnAxes(way).eval()
    spec = infer_permutation_spec(model, ARGS)
    assert not spec.dropped
    for name in ("q", "o", "k", "v", "bias"):
        assert set(spec.axes[name]) == set(range(model.get_parameter(name).ndim))
    assert PermutationSpec.from_json(spec.to_json()) == spec
    state = model.state_dict()
    other = apply_permutation(spec, spec.random_permutations(3), state)
    aligned = apply_permutation(spec, weight_matching(spec, state, other), other)
    for name, tensor in state.items():
        torch.testing.assert_close(aligned[name], tensor, msg=name)


def test_query_heads_that_are_told_apart_keep_their_order():
    torch.manual_seed(0)
    spec = infer_permutation_spec(OnOwnAxes("told apart").eval(), ARGS)
    assert not spec.dropped
    assert set(spec.axes["q"]) == set(spec.axes["o"]) == {0, 2, 3}


def test_gates_of_recurrent_layers_are_no_slots():
    torch.manual_seed(0)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(2, 5, num_layers=2, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    spec = infer_permutation_spec(Stack().eval(), ARGS)
    assert [group.size for group in spec.groups.values()] == [5, 5]
    assert not spec.dropped
