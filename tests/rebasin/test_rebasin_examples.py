"""The rebasin examples check their own claims; they must hold and be quick."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("script", "epochs"), [("rebasin_digits.py", 6), ("merge_two_finetunings.py", 4)], ids=["line", "merge"]
)
def test_example_keeps_what_it_claims(script, epochs, tmp_path):
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), "--epochs", str(epochs), "--plot", str(tmp_path / "p.svg")],
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nyes ") >= 4
    assert "NO " not in done.stdout
    assert (tmp_path / "p.svg").stat().st_size > 1000
