"""Execution order, and that taking it leaves no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from lit_wsl.structure import trace_execution_order
from lit_wsl.structure.running import undisturbed


def order(module, *args, **kwargs):
    found = trace_execution_order(module, args, kwargs)
    return sorted(found, key=found.__getitem__)


def test_modules_called_several_times_count_once_and_modules_never_called_are_absent():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.never, self.last, self.shared = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.shared(self.shared(x)))

    assert order(Net(), torch.ones(1, 3)) == ["shared.weight", "shared.bias", "last.weight", "last.bias"]


def test_parameters_used_without_a_module_call_come_where_they_are_used():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 3))
            self.head = nn.Linear(3, 2)
            self.embed = nn.Linear(3, 3)

        def forward(self, x):
            x = torch.cat([self.embed(x), self.token])
            return nn.functional.linear(x, self.head.weight)

    assert order(Net(), torch.ones(1, 3)) == ["embed.weight", "embed.bias", "token", "head.weight"]


def test_asking_a_weight_for_its_dtype_or_shape_is_no_use_of_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = x.to(self.last.weight.dtype).view(-1, self.last.weight.shape[0])
            assert self.last.weight.numel() == 9
            return self.last(self.first(x))

    assert order(Net(), torch.ones(1, 3))[0] == "first.weight"


def test_fused_attention_shows_the_order_of_its_parts():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = order(layer, torch.randn(2, 4, 8))
    assert set(found) == set(layer.state_dict())
    assert found.index("linear1.weight") < found.index("linear2.weight") < found.index("norm2.weight")
    assert found.index("self_attn.in_proj_weight") < found.index("self_attn.out_proj.weight")


class Messy(nn.Module):
    """Does everything in forward that a forward should not do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 3, max_norm=0.1)  # rescales its weight when called
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.metric = torchmetrics.MeanMetric()
        self.curve = torchmetrics.CatMetric()
        self.register_buffer("seen", torch.zeros(1))
        self.calls, self.history, self.cache, self.plain = 0, [], {}, torch.zeros(2)
        self.rng = np.random.default_rng(0)

    def forward(self, x):
        self.train()
        self.calls += 1
        self.history.append(self.calls)
        self.cache["x"] = x
        self.plain += 1
        self.seen = self.seen + 1
        y = self.drop(self.norm(self.embed(x)))
        self.norm.weight.data.clamp_(max=0.5)
        self.norm.bias.requires_grad_(False)
        self.embed.weight.grad = None
        self.metric.update(y.mean())
        self.curve.update(y.flatten())
        return y + torch.rand(1) + random.random() + np.random.rand() + self.rng.random()


def fingerprint(module):
    state = {name: value.clone() for name, value in module.state_dict().items()}
    world = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    rest = (
        [m.training for m in module.modules()],
        [p.requires_grad for p in module.parameters()],
        [None if p.grad is None else p.grad.clone().tolist() for p in module.parameters()],
        [id(b) for b in module.buffers()],
        (module.calls, list(module.history), dict(module.cache), module.plain.tolist()),
        (module.metric.mean_value.tolist(), module.metric._update_count, len(module.curve.value)),
        module.rng.bit_generator.state,
        set(vars(module)),
    )
    return state, world, rest


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_sample_call_leaves_no_trace(training, fails):
    module = Messy().train(training)
    module.embed.weight.grad = torch.ones(4, 3)
    state, world, rest = fingerprint(module)
    x = torch.tensor([[0, 1]]).expand(2, 2).reshape(-1)
    with undisturbed(module), torch.no_grad():
        assert not module.training
        module(x)
        if fails:
            module.embed.weight.data.zero_()
    after, world_after, rest_after = fingerprint(module)
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert world == world_after
    assert rest == rest_after


def test_an_error_in_forward_leaves_no_trace_either():
    class Failing(Messy):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("no")

    module = Failing()
    state, world, rest = fingerprint(module)
    with pytest.raises(RuntimeError, match="no"):
        trace_execution_order(module, (torch.tensor([0, 1]),))
    after, world_after, rest_after = fingerprint(module)
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert (world, rest) == (world_after, rest_after)


def test_a_lazy_model_stays_lazy():
    module = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2))
    assert order(module, torch.ones(1, 5)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(nn.parameter.is_lazy(p) for p in module.parameters())
    assert type(module[0]) is nn.LazyLinear


def test_a_model_on_the_meta_device_is_traced_without_memory():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(10_000, 100_000), nn.BatchNorm1d(100_000))
    assert order(module, torch.ones(2, 10_000, device="meta"))[:2] == ["0.weight", "0.bias"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_parts_run_and_keep_their_mode():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3)))
            self.last = nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.scripted(x))

    for training in (True, False):
        module = Net().train(training)
        mean = module.state_dict()["scripted.2.running_mean"].clone()
        assert order(module, torch.ones(2, 3))[-2:] == ["last.weight", "last.bias"]
        assert {m.training for m in module.modules()} == {training}
        assert torch.equal(mean, module.state_dict()["scripted.2.running_mean"])


def test_a_compiled_model_is_traced_uncompiled():
    module = torch.compile(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    assert order(module, torch.ones(1, 3))[0] == "_orig_mod.0.weight"
