"""Applying streams tensor by tensor: nothing of the model's size is ever allocated beside the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_wsl import transfer_weights
from lit_wsl.checkpoint import open_checkpoint
from lit_wsl.structure import describe
from lit_wsl.transfer import Concat, PlanEntry, SideSummary, Split, Stack, TransferPlan, Transpose
from lit_wsl.transfer.apply import apply_plan

D, LAYERS, EXPERTS = 64, 24, 4


class Allocations(TorchDispatchMode):
    """The size of the largest new storage, and of all of them together."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                self.largest = max(self.largest, storage.nbytes())
                self.total += storage.nbytes()
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


class Target(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(D, 3 * D, bias=False) for _ in range(LAYERS))
        self.gate = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(LAYERS))
        self.up = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(LAYERS))
        self.experts = nn.ParameterList(nn.Parameter(torch.zeros(EXPERTS, D, D)) for _ in range(LAYERS))


def source_and_plan() -> tuple[dict[str, torch.Tensor], TransferPlan]:
    source: dict[str, torch.Tensor] = {}
    entries = []
    one = (D, D)
    for i in range(LAYERS):
        for name in ("q", "k", "v", "down", *(f"e{j}" for j in range(EXPERTS))):
            source[f"{i}.{name}"] = torch.randn(D, D)
        source[f"{i}.gate_up"] = torch.randn(2 * D, D)
        qkv, experts = tuple(f"{i}.{n}" for n in "qkv"), tuple(f"{i}.e{j}" for j in range(EXPERTS))
        both = (f"gate.{i}.weight", f"up.{i}.weight")
        entries += [
            PlanEntry(qkv, (f"qkv.{i}.weight",), (Concat(0, (D, D, D)),), (one,) * 3, ((3 * D, D),)),
            PlanEntry((f"{i}.gate_up",), both, (Split(0, (D, D)),), ((2 * D, D),), (one, one)),
            PlanEntry((f"{i}.down",), (f"down.{i}.weight",), (Transpose(),), (one,), (one,)),
            PlanEntry(experts, (f"experts.{i}",), (Stack(0, EXPERTS),), (one,) * EXPERTS, ((EXPERTS, D, D),)),
        ]
    sides = describe(source), describe(Target())
    return source, TransferPlan(tuple(entries), SideSummary.of(sides[0]), SideSummary.of(sides[1]))


@pytest.mark.parametrize("format", ["torch", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_allocation_is_one_tensor_or_one_stack(tmp_path, format, dtype):
    source, plan = source_and_plan()
    path = tmp_path / ("model.safetensors" if format == "safetensors" else "model.ckpt")
    if format == "safetensors":
        save_file(source, path)
    else:
        torch.save({"state_dict": source}, path)
    model = Target().to(dtype)
    checkpoint = open_checkpoint(path)
    with Allocations() as seen:
        apply_plan(plan, checkpoint, model)
    assert 0 < seen.largest <= EXPERTS * D * D * 4  # one stack of experts, in the file's dtype
    assert torch.equal(model.experts[3][1], source["3.e1"].to(dtype))
    assert torch.equal(model.down[5].weight, source["5.down"].T.to(dtype))


def test_planning_reads_no_data(tmp_path):
    source, plan = source_and_plan()
    path = tmp_path / "model.safetensors"
    save_file(source, path)
    with torch.device("meta"):
        model = Target()
    checkpoint = open_checkpoint(path)
    reads: list[str] = []

    class Watched(type(checkpoint)):
        def __getitem__(self, name: str) -> torch.Tensor:
            reads.append(name)
            return super().__getitem__(name)

    checkpoint.__class__ = Watched
    from lit_wsl.mapper import MatchingOptions
    from lit_wsl.transfer import sides
    from lit_wsl.transfer.api import prepare_transfer

    opened = sides.Source(path, checkpoint)
    prepared = prepare_transfer(opened, sides.Target.of(model), MatchingOptions(), plan=plan)
    assert len(prepared.plan) == len(plan)
    assert reads == []


def test_a_target_without_memory_is_refused_with_the_remedy():
    source, plan = source_and_plan()
    with torch.device("meta"):
        model = Target()
    with pytest.raises(Exception, match="meta device"):
        transfer_weights(model, source, plan=plan)
