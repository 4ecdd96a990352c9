"""RebasinCallback in two processes: rank zero does the work, nobody waits for ever."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run_ranks(*args):
    spec = importlib.util.spec_from_file_location("launch_ranks", HERE.parent / "distributed" / "launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run_ranks(*args)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """All scenarios in the same two processes, and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    names = ["ddp", "ddp_failing", "sharded", "sharded_with_a_spec"]
    return run_ranks(HERE / "rebasin_ranks.py", names, folder), folder


def test_rank_zero_does_the_work_and_failures_end_normally(ran):
    results, tmp_path = ran
    assert results["ddp"] == [{"finished": True, "share": 1.0}, {"finished": True, "share": None}]
    report = json.loads((tmp_path / "ddp" / "root" / "rebasin.json").read_text())
    assert report["perm_matching"] is True
    assert results["ddp_failing"] == [{"finished": True, "share": None}] * 2
    failed = json.loads((tmp_path / "ddp_failing" / "root" / "rebasin.json").read_text())
    assert failed["perm_matching"] is False
    assert "nowhere.ckpt" in failed["reason"]


def test_sharded_models_are_gathered(ran):
    """Under FSDP2 rank zero has all weights; units are aligned by a spec that is given, else compared as they are."""
    results, tmp_path = ran
    assert results["sharded"] == [{"finished": True, "share": None}] * 2
    report = json.loads((tmp_path / "sharded" / "root" / "rebasin.json").read_text())
    assert report["perm_matching"] is False
    assert "spec=" in report["reason"]
    assert results["sharded_with_a_spec"] == [{"finished": True, "share": 1.0}, {"finished": True, "share": None}]
    aligned = json.loads((tmp_path / "sharded_with_a_spec" / "root" / "rebasin.json").read_text())
    assert aligned["perm_matching"] is True
    whole = json.loads((tmp_path / "ddp" / "root" / "rebasin.json").read_text())
    for one in (report, aligned):
        layers = one["models"]["run"]["before"]["layers"]
        assert set(layers) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
        for name, metrics in whole["models"]["run"]["before"]["layers"].items():
            assert layers[name]["l2"] == pytest.approx(metrics["l2"], rel=1e-4)
    saved = tmp_path / "sharded_with_a_spec" / "root" / aligned["files"]["aligned/run"]
    state = torch.load(saved, weights_only=True)["state_dict"]
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "net.0.weight": (16, 6),
        "net.0.bias": (16,),
        "net.2.weight": (3, 16),
        "net.2.bias": (3,),
    }
