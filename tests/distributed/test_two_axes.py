"""FSDP2 on top of tensor parallelism: two meshes cut one axis, the inner one first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    scenarios = Path(__file__).with_name("scenarios_two_axes.py")
    return run_ranks(scenarios, ["transfer", "which_rows"], tmp_path_factory.mktemp("two_axes"), size=4)


def test_every_weight_lands(results):
    for rank in results["transfer"]:
        assert rank.get("wrong") == [], rank
        assert rank["loaded"] > 0
        assert "StridedShard" in rank["placements"]
        assert rank["held"] == 0.25
        assert rank["same objects"] is True


def test_rows_are_cut_by_tensor_parallelism_first(results):
    for rank in results["which_rows"]:
        expected = torch.arange(12.0).chunk(2)[rank["tp"]].chunk(2)[rank["dp"]]
        assert rank["rows"] == expected.tolist()
