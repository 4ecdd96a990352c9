"""FSDP2 on top of tensor parallelism, in four processes: run by ``launch``, judged by ``test_two_axes.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checks_dist import differing, save_old, whole
from models_dist import New, make_plan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lit_wsl.transfer.api import transfer_weights
from lit_wsl.transfer.apply import copy_into
from lit_wsl.transfer.ranks import held_part


def _sharded() -> tuple[New, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(7)
    net = New()
    plan = {f"body.{n}": ColwiseParallel(output_layouts=Replicate()) for n in ("query", "key", "value", "gate_up")}
    plan |= {n: RowwiseParallel(input_layouts=Replicate()) for n in ("body.down", "head")}
    parallelize_module(net, mesh["tp"], plan)
    for part in (net.body, net):
        fully_shard(part, mesh=mesh["dp"])
    return net, mesh


def transfer(folder: Path) -> dict[str, Any]:
    path, expected = save_old(folder)
    net, _ = _sharded()
    parameters = dict(net.named_parameters())
    report = transfer_weights(net, path, plan=make_plan())
    twice = net.body.query.weight
    return {
        "wrong": differing(whole(net), expected),
        "loaded": len(report.loaded),
        "placements": str(twice.placements),
        "held": held_part(twice).numel() / twice.numel(),
        "same objects": all(parameters[n] is p for n, p in net.named_parameters()),
    }


def which_rows(folder: Path) -> dict[str, Any]:
    """Which rows this rank holds of a layer that both meshes cut by rows."""
    net, mesh = _sharded()
    weight = net.body.query.weight
    copy_into(weight, torch.arange(12.0)[:, None].expand(12, 12))
    return {
        "rows": held_part(weight)[:, 0].tolist(),
        "dp": mesh["dp"].get_local_rank(),
        "tp": mesh["tp"].get_local_rank(),
    }
