"""Models that write to their own weights: in a first call, or in every one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_wsl.rebasin import apply_permutation, infer_permutation_spec, verify_permutation_spec

SAMPLE = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


class DataInitialised(nn.Module):
    """A scaling that takes its values from the first batch, as in normalising flows."""

    def __init__(self, flag: bool) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(3, 6), nn.Linear(6, 2)
        self.shift, self.scale = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.ones(6))
        if flag:
            self.register_buffer("done", torch.tensor(0))
        else:
            self.done = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        if not self.done:
            self.shift.data.copy_(x.mean(0))
            self.scale.data.copy_(x.std(0))
            if isinstance(self.done, Tensor):
                self.done.fill_(1)
            else:
                self.done = 1
        return self.out((x - self.shift) / self.scale)


@pytest.mark.parametrize("flag", [True, False])
def test_weights_that_a_first_call_initialises_move_with_their_units(flag):
    fresh, trained = DataInitialised(flag), DataInitialised(flag)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    spec = infer_permutation_spec(fresh, (SAMPLE,))
    assert verify_permutation_spec(spec, fresh, (SAMPLE,)).ok
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    assert not fresh.done

    with torch.no_grad():
        wanted = trained(SAMPLE)
        trained.load_state_dict(apply_permutation(spec, spec.random_permutations(seed=1), trained.state_dict()))
        found = trained(SAMPLE)
    assert all(bool(spec.axes[name][0].touched.all()) for name in ("inp.weight", "shift", "scale"))
    torch.testing.assert_close(found, wanted)


def test_an_embedding_that_rescales_its_rows_is_left_as_it_is():
    net = nn.Sequential(nn.Embedding(5, 6, max_norm=0.5), nn.Linear(6, 2))
    before = net[0].weight.detach().clone()
    spec = infer_permutation_spec(net, (torch.tensor([[0, 3]]),))
    assert torch.equal(net[0].weight, before)
    assert bool(spec.axes["0.weight"][1].touched.all())


class Routed(nn.Module):
    """Experts that take the tokens a router sends them, in a loop; a small sample leaves some without."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out, self.router = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        chosen, found = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (tokens,) = torch.where(chosen == number)
            found.index_add_(0, tokens, expert(x[tokens]))
        return self.out(found)


def test_an_expert_that_gets_no_token_fixes_nothing():
    torch.manual_seed(0)
    spec = infer_permutation_spec(Routed(), (SAMPLE,))  # five tokens for eight experts
    assert not spec.dropped
    assert bool(spec.axes["inp.weight"][0].touched.all())
