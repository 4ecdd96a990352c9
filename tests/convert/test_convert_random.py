"""Random models, freezing, parameter groups and refactors: every converted optimizer state is right, or refused."""

from random import Random

import pytest
import torch
from torch import nn

from lit_wsl.convert.checkpoint import convert_checkpoint
from lit_wsl.convert.weights import convert_tensors
from lit_wsl.errors import CheckpointError
from lit_wsl.structure import describe
from lit_wsl.transfer import PlanEntry, SideSummary, Split, TransferPlan


def random_old(random):
    """A model, some of its parameters frozen, and an optimizer with random groups after one step."""
    old = nn.Module()
    for i in range(random.randint(1, 6)):
        old.add_module(f"l{i}", nn.Linear(random.choice([2, 3]), random.choice([2, 4]), bias=random.random() < 0.7))
    parameters = dict(old.named_parameters())
    frozen = [name for name in parameters if random.random() < 0.15]
    used = [name for name in parameters if name not in frozen or random.random() < 0.3] or list(parameters)
    kind = random.random()
    if kind < 0.5:
        groups = [used]
    elif kind < 0.85:
        groups = [[n for n in used if parameters[n].ndim == d] for d in (2, 1)]
    else:
        groups = [used[: len(used) // 2], used[len(used) // 2 :]]
    groups = [group for group in groups if group]
    optimizer = torch.optim.AdamW(
        [{"params": [parameters[n] for n in group], "lr": 0.1 * (g + 1)} for g, group in enumerate(groups)]
    )
    for name in used:
        if name not in frozen:
            parameters[name].grad = torch.randn_like(parameters[name])
    optimizer.step()
    return old, optimizer, groups


def random_refactor(old, random):
    """Another order, other names, some layers split in two; the new model and the plan."""
    new, entries = nn.Module(), []
    modules = list(old.named_children())
    random.shuffle(modules)
    for name, layer in modules:
        parts = [f"{name}_a", f"{name}_b"] if random.random() < 0.4 else [f"new_{name}"]
        size = layer.out_features // len(parts)
        for part in parts:
            new.add_module(part, nn.Linear(layer.in_features, size, bias=layer.bias is not None))
        for leaf, tensor in layer.named_parameters():
            shape = tuple(tensor.shape)
            operations = (Split(0, (size,) * 2),) if len(parts) == 2 else ()
            targets = tuple(f"{part}.{leaf}" for part in parts)
            results = ((size, *shape[1:]),) * len(parts)
            entries.append(PlanEntry((f"{name}.{leaf}",), targets, operations, (shape,), results))
    return new, TransferPlan(tuple(entries), SideSummary.of(describe(old)), SideSummary.of(describe(new)))


@pytest.mark.parametrize("block", range(4))
def test_states_are_right_or_refused(block, tmp_path):
    right = 0
    for seed in range(20 * block, 20 * block + 20):
        random = Random(seed)
        torch.manual_seed(seed)
        old, optimizer, groups = random_old(random)
        new, plan = random_refactor(old, random)
        content = {"state_dict": old.state_dict(), "optimizer_states": [optimizer.state_dict()], "lr_schedulers": []}
        torch.save(content, tmp_path / "old.ckpt")
        try:
            convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", plan)
        except CheckpointError as error:
            if "not unique" not in str(error):
                raise
            continue
        made = torch.load(tmp_path / "new.ckpt", weights_only=True)
        new.load_state_dict(made["state_dict"])
        check(old, optimizer, groups, new, plan, made["optimizer_states"][0])
        right += 1
    assert right >= 10


def check(old, optimizer, groups, new, plan, saved):
    """Load the converted state into an optimizer with the same groups, and compare with the truth."""
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    source = {target: entry.sources[0] for entry in plan for target in entry.targets}
    fresh = torch.optim.AdamW([{"params": [p for n, p in after.items() if source[n] in g]} for g in groups])
    fresh.load_state_dict(saved)
    assert [group["lr"] for group in fresh.param_groups] == [group["lr"] for group in optimizer.param_groups]
    for key in ("exp_avg", "exp_avg_sq"):
        states = {
            n: optimizer.state[p][key] if p in optimizer.state else torch.zeros_like(p) for n, p in before.items()
        }
        expected = convert_tensors(states, plan)
        for name, parameter in after.items():
            if before[source[name]] in optimizer.state:
                assert torch.equal(fresh.state[parameter][key], expected[name])
            else:
                assert parameter not in fresh.state
