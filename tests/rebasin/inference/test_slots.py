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
