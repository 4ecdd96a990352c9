"""Networks put together at random: whatever is found must keep the function, with all groups at once."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_wsl.rebasin import infer_permutation_spec, verify_permutation_spec


class RandomNet(nn.Module):
    """A stack of randomly chosen steps on ``(batch, tokens, 12)``; what a step needs is drawn beforehand."""

    def __init__(self, seed: int, steps: int = 7, width: int = 12) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.layers = nn.ModuleList()
        self.free = nn.ParameterList()
        self.plan: list[tuple[str, int, int, int]] = []
        self.width = width
        self.inp, self.out = nn.Linear(5, width), nn.Linear(width, 3)
        for _ in range(steps):
            kind = draw.choice(sorted(name[5:] for name in dir(self) if name.startswith("step_")))
            self.plan.append((kind, len(self.layers), len(self.free), draw.choice([2, 3, 4])))
            self.layers.extend(nn.Linear(width, width) for _ in range(4))
            self.layers.append(nn.LayerNorm(width))
            self.layers.append(nn.Conv1d(width, width, 3, padding=1, groups=self.plan[-1][3]))
            self.free.append(nn.Parameter(torch.randn(width)))
            self.free.append(nn.Parameter(torch.randn(self.plan[-1][3], width // self.plan[-1][3])))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for kind, layer, free, parts in self.plan:
            x = getattr(self, f"step_{kind}")(x, self.layers[layer : layer + 6], self.free[free : free + 2], parts)
        return self.out(x)

    def step_linear(self, x, layers, free, parts):
        return layers[0](x).relu()

    def step_residual(self, x, layers, free, parts):
        return x + layers[1](layers[0](x).tanh())

    def step_norm(self, x, layers, free, parts):
        return layers[4](x)

    def step_gain(self, x, layers, free, parts):
        return x * free[0] + 0.5

    def step_gain_by_part(self, x, layers, free, parts):
        y = x.reshape(*x.shape[:2], parts, -1) * free[1]
        return y.flatten(2)

    def step_gain_of_part(self, x, layers, free, parts):
        y = x.reshape(*x.shape[:2], parts, -1) * free[1][:, :1]
        return y.flatten(2)

    def step_gate(self, x, layers, free, parts):
        a, b = torch.cat([layers[0](x), layers[1](x)], dim=-1).chunk(2, dim=-1)
        return a * b.sigmoid()

    def step_halves(self, x, layers, free, parts):
        first, *rest = x.split(self.width // parts, dim=-1)
        return torch.cat([first.relu(), *(part.sin() for part in rest)], dim=-1)

    def step_one_apart(self, x, layers, free, parts):
        return torch.cat([x[..., :1].exp().clamp(max=2), x[..., 1:]], dim=-1)

    def step_roll(self, x, layers, free, parts):
        return x.roll(parts, dims=-1)

    def step_flip(self, x, layers, free, parts):
        return x + layers[0](x).flip(-1)

    def step_shuffle(self, x, layers, free, parts):
        return x.reshape(*x.shape[:2], parts, -1).transpose(2, 3).reshape(x.shape)

    def step_softmax_inside(self, x, layers, free, parts):
        return x.reshape(*x.shape[:2], parts, -1).softmax(-1).flatten(2)

    def step_softmax_across(self, x, layers, free, parts):
        return x.reshape(*x.shape[:2], parts, -1).softmax(2).flatten(2)

    def step_sum_parts(self, x, layers, free, parts):
        y = x.reshape(*x.shape[:2], parts, -1).sum(2)
        return y.repeat(1, 1, parts)

    def step_expand_parts(self, x, layers, free, parts):
        y = x[..., : self.width // parts, None].expand(-1, -1, -1, parts)
        return y.reshape(x.shape)

    def step_attention(self, x, layers, free, parts):
        q, k, v = (layers[i](x).unflatten(-1, (parts, -1)).transpose(1, 2) for i in range(3))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + layers[3](y.transpose(1, 2).flatten(2))

    def step_packed_attention(self, x, layers, free, parts):
        weight = torch.cat([layers[i].weight for i in range(3)])
        q, k, v = F.linear(x, weight).unflatten(-1, (3, parts, -1)).permute(2, 0, 3, 1, 4)
        return (((q @ k.mT).softmax(-1) @ v).transpose(1, 2)).flatten(2)

    def step_channel_attention(self, x, layers, free, parts):
        q, k, v = (layers[i](x) for i in range(3))
        return x + v @ (q.mT @ k).softmax(-1)

    def step_grouped_convolution(self, x, layers, free, parts):
        return x + layers[5](x.mT).mT

    def step_group_norm(self, x, layers, free, parts):
        return F.group_norm(x.mT, parts, free[0]).mT

    def step_pool(self, x, layers, free, parts):
        return x + x.mean(1, keepdim=True) * x.amax(-1, keepdim=True)

    def step_cumulative(self, x, layers, free, parts):
        return x + layers[1](layers[0](x).cumsum(-1))

    def step_tied(self, x, layers, free, parts):
        return F.linear(F.linear(x, layers[0].weight).relu(), layers[0].weight.T)

    def step_pick(self, x, layers, free, parts):
        index = torch.arange(self.width).roll(1)
        return x + layers[0](x)[..., index]

    def step_stack(self, x, layers, free, parts):
        y = torch.stack([layers[i](x) for i in range(parts)], dim=0)
        return y[0] + y.sum(0).relu()

    def step_write(self, x, layers, free, parts):
        y = torch.zeros_like(x)
        y[..., parts:] = layers[0](x)[..., parts:]
        return x + y

    def step_pad(self, x, layers, free, parts):
        return layers[1](F.pad(layers[0](x)[..., :-parts], (0, parts)))


# Blocks of heads, norms and grouped convolutions that overlap; positions of one unit in crossing orders.
ONCE_WRONG = (45, 50, 60, 86, 130, 196, 252, 266, 331, 355, 403, 700)


@pytest.mark.parametrize("seed", [*range(40), *ONCE_WRONG])
def test_random_networks_keep_their_function(seed):
    torch.manual_seed(seed)
    model, args = RandomNet(seed), (torch.randn(2, 4, 5),)
    spec = infer_permutation_spec(model, args, verify=False)
    found = verify_permutation_spec(spec, model, args)
    assert found.ok, (model.plan, found.dropped)
