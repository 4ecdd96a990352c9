"""RebasinCallback in two processes: rank zero does the work, nobody waits for ever."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

HERE = Path(__file__).parent


def run_ranks(*args):
    spec = importlib.util.spec_from_file_location("launch_ranks", HERE.parent / "distributed" / "launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run_ranks(*args)


def test_rank_zero_does_the_work_and_failures_end_normally(tmp_path):
    results = run_ranks(HERE / "rebasin_ranks.py", ["ddp", "ddp_failing"], tmp_path)
    assert results["ddp"] == [{"finished": True, "share": 1.0}, {"finished": True, "share": None}]
    report = json.loads((tmp_path / "ddp" / "root" / "rebasin.json").read_text())
    assert report["perm_matching"] is True
    assert results["ddp_failing"] == [{"finished": True, "share": None}] * 2
    failed = json.loads((tmp_path / "ddp_failing" / "root" / "rebasin.json").read_text())
    assert failed["perm_matching"] is False
    assert "nowhere.ckpt" in failed["reason"]
