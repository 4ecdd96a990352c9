"""The example of resuming runs as it is shown and keeps what it claims."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_proves_its_claims(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "resume_across_refactor.py"), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    claims = [line for line in done.stdout.splitlines() if line.startswith(("yes ", "NO "))]
    assert len(claims) == 5
    assert all(line.startswith("yes") for line in claims)
    assert "h.{0..2}.c_attn.weight -> layers.{0..2}.attention.[query,key,value].weight" in done.stdout
    assert {"old.ckpt", "new.ckpt", "plan.json"} <= {path.name for path in tmp_path.iterdir()}
