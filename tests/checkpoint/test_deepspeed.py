"""DeepSpeed's ZeRO folders are joined to the weights that were cut, for every stage and number of ranks.

The folders are written here in the layout of DeepSpeed 0.19's files.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_wsl.checkpoint import open_checkpoint
from lit_wsl.errors import CheckpointError


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 7, bias=False))
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


class Scaler:
    """Stands for the objects of DeepSpeed's own that its files hold."""


def groups(full: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Two optimizer groups that are not in the order of the module."""
    return [{n: t for n, t in full.items() if t.dim() > 1}, {n: t for n, t in reversed(full.items()) if t.dim() == 1}]


def write(
    folder: Path, stage: int, ranks: int, dtype: torch.dtype = torch.bfloat16, **change: Any
) -> dict[str, Tensor]:
    """Write a folder; gives what has to come out."""
    full, frozen = weights(), {"frozen.weight": torch.randn(3, 3).to(dtype)}
    buffers = {"count": torch.arange(4)}
    inner = folder / "checkpoint"
    inner.mkdir(parents=True)
    (folder / "latest").write_text("checkpoint")
    (folder / "zero_to_fp32.py").write_text("raise SystemExit('was run')")
    cut = stage == 3
    module = {n: torch.empty(0, dtype=dtype) if cut else t.to(dtype) for n, t in (full | frozen).items()}
    common = {
        "module": OrderedDict(buffers | module | {"tied.weight": module["1.weight"]}),
        "buffer_names": ["count"],
        "param_shapes": [OrderedDict((n, t.shape) for n, t in group.items()) for group in groups(full)],
        "frozen_param_shapes": OrderedDict((n, t.shape) for n, t in frozen.items()),
        "shared_params": {"tied.weight": "1.weight"} if cut else {},
        "epoch": 3,
        "ds_version": "0.19.8",
        **change,
    }
    for rank in range(ranks):
        if cut or rank == 0:
            parts = {n: padded(t, ranks)[rank] if cut else t for n, t in frozen.items()}
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if cut else "mp_rank_00_model_states.pt"
            torch.save({**common, "frozen_param_fragments": OrderedDict(parts)}, inner / name)
        state: dict[str, Any] = {"zero_stage": stage, "loss_scaler": Scaler(), "partition_count": ranks}
        if cut:
            flat = [torch.cat([padded(t, ranks)[rank] for t in group.values()]) for group in groups(full)]
            state["fp32_flat_groups"] = flat
        else:
            state["partition_count"] = [ranks, ranks]
            flat = [torch.cat([t.flatten() for t in group.values()]) for group in groups(full)]
            state["single_partition_of_fp32_groups"] = [padded(vector, ranks, 2)[rank] for vector in flat]
        if stage:
            name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": state}, inner / name)
    wanted = buffers | ({n: t.to(dtype) for n, t in full.items()} if stage == 0 else full) | frozen
    return wanted | {"tied.weight": wanted["1.weight"]}


def padded(tensor: Tensor, ranks: int, align: int = 1) -> list[Tensor]:
    """Cut a flat tensor evenly over the ranks, padded with a number that must not come out."""
    unit = ranks * align
    flat = F.pad(tensor.flatten(), (0, math.ceil(tensor.numel() / unit) * unit - tensor.numel()), value=99.0)
    return [part.clone() for part in flat.chunk(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_weights_come_out(tmp_path: Path, stage: int, ranks: int) -> None:
    wanted = write(tmp_path / "ds", stage, ranks)
    checkpoint = open_checkpoint(tmp_path / "ds")
    assert checkpoint.format == "deepspeed"
    assert set(checkpoint) == set(wanted)
    for name, tensor in wanted.items():
        assert checkpoint.meta(name).shape == tensor.shape
        assert checkpoint[name].dtype == tensor.dtype, name
        assert torch.equal(checkpoint[name], tensor), name
    assert checkpoint.content["epoch"] == 3
    assert any("DeepSpeed" in note for note in checkpoint.notes)


def test_the_folder_of_the_step_can_be_given(tmp_path: Path) -> None:
    wanted = write(tmp_path / "ds", 2, 2)
    assert set(open_checkpoint(tmp_path / "ds" / "checkpoint")) == set(wanted)


def test_of_several_steps_the_latest_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "ds", 2, 2)
    (tmp_path / "ds" / "checkpoint").rename(tmp_path / "ds" / "global_step9")
    (tmp_path / "ds" / "latest").unlink()
    write(tmp_path / "other", 3, 2)
    (tmp_path / "other" / "checkpoint").rename(tmp_path / "ds" / "global_step8")
    with pytest.raises(CheckpointError, match="global_step8"):
        open_checkpoint(tmp_path / "ds")
    (tmp_path / "ds" / "latest").write_text("global_step9")
    assert torch.equal(open_checkpoint(tmp_path / "ds")["1.weight"], weights()["1.weight"])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_rank_is_an_error_that_names_the_script(tmp_path: Path, stage: int) -> None:
    write(tmp_path / "ds", stage, 3)
    next((tmp_path / "ds" / "checkpoint").glob("*rank_2_*optim*")).unlink()
    with pytest.raises(CheckpointError, match=r"rank.*zero_to_fp32\.py"):
        open_checkpoint(tmp_path / "ds")


@pytest.mark.parametrize("stage", [2, 3])
def test_shapes_that_do_not_add_up_are_refused(tmp_path: Path, stage: int) -> None:
    shapes = [OrderedDict({"0.weight": torch.Size([7, 5000])}), OrderedDict()]
    write(tmp_path / "ds", stage, 2, param_shapes=shapes)
    with pytest.raises(CheckpointError, match="ds"):
        open_checkpoint(tmp_path / "ds")


def test_fp32_copies_of_other_weights_are_refused(tmp_path: Path) -> None:
    """The optimizer's copy, rounded, has to be the module's weight to the last bit."""
    other = OrderedDict({name: tensor.to(torch.bfloat16) + 1 for name, tensor in weights().items()})
    write(tmp_path / "ds", 2, 2, module=other)
    with pytest.raises(CheckpointError, match=r"'0\.weight'"):
        open_checkpoint(tmp_path / "ds")["0.weight"]


def test_names_without_data_are_told(tmp_path: Path) -> None:
    write(tmp_path / "ds", 3, 2, shared_params={})
    checkpoint = open_checkpoint(tmp_path / "ds")
    assert "tied.weight" not in checkpoint
    assert any("tied.weight" in note for note in checkpoint.notes)


def test_model_parallelism_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "ds", 2, 1)
    inner = tmp_path / "ds" / "checkpoint"
    (inner / "mp_rank_01_model_states.pt").write_bytes((inner / "mp_rank_00_model_states.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"parallelism.*zero_to_fp32\.py"):
        open_checkpoint(tmp_path / "ds")
