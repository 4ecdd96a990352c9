"""The script of the guide, started as a user starts it: Lightning launches the second process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_script_of_the_guide(tmp_path):
    page = (ROOT / "docs" / "guides" / "distributed.md").read_text()
    script = re.search(r'```python title="sharded.py"\n(.*?)```', page, re.S)[1]
    (tmp_path / "sharded.py").write_text(script)
    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    done = subprocess.run(
        [sys.executable, "sharded.py"],
        cwd=tmp_path,
        env={**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("[0.25, 0.25, 0.25, 0.25]") == 2  # on both ranks, whose lines may run into each other
    assert done.stdout.count("100.0% of 884 elements") == 2  # of the model and of the checkpoint, printed once
