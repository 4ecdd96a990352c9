"""What W&B, MLflow and Comet keep of a run without network, read back from their own files."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = {"wandb": "wandb", "mlflow": "mlflow", "comet": "comet_ml"}
SCRIPT = Path(__file__).parent / "real_loggers.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One run with all loggers that are installed, in a process of its own."""
    names = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
    if not names:
        pytest.skip("needs wandb, mlflow-skinny or comet-ml")
    folder = tmp_path_factory.mktemp("loggers")
    command = [sys.executable, str(SCRIPT), str(folder), *names]
    env = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1"}  # no settings, no login of the user's
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "could not log" not in done.stderr, done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(params=sorted(MODULES))
def kept(request, found):
    if request.param not in found:
        pytest.skip(f"needs {MODULES[request.param]}")
    return found[request.param]


def the(found, name):
    if name not in found:
        pytest.skip(f"needs {MODULES[name]}")
    return found[name]


def test_every_logger_keeps_the_scalars_of_both_callbacks(kept):
    # counted by hand: 4*8+8 and 8+8 of 4*8+8+8+8+8*3+3 parameter elements are loaded, three buffers with them
    expected = {"target_coverage": 56 / 83, "source_coverage": 56 / 199, "loaded": 7, "missing": 2, "unused": 1}
    expected |= {"module_coverage/net.0": 1, "module_coverage/net.4": 0}
    for name, value in expected.items():
        assert kept["scalars"][f"weight_transfer/{name}"] == pytest.approx(value), name
    assert "loss" in kept["scalars"]
    assert kept["scalars"]["rebasin/perm_matching"] == 1.0
    assert -1 <= kept["scalars"]["rebasin/run/after/cosine"] <= 1
    assert kept["scalars"]["rebasin/run/after/cosine"] >= kept["scalars"]["rebasin/run/before/cosine"] - 1e-6


def test_every_logger_keeps_the_interactive_page(kept):
    data = json.loads(re.search(r'id="data">(.*?)</script>', kept["page"], re.S)[1])
    assert data["coverage"]["target"]["elements"] == 56
    assert 'http-equiv="Content-Security-Policy"' in kept["page"]
    assert not re.search(r"<(link|base)\b", kept["page"])  # nothing of the logger's own, no request to anywhere


def test_wandb_shows_the_table(found):
    kept = the(found, "wandb")
    assert kept["table"]["columns"] == ["module", "loaded", "missing", "ambiguous", "elements", "share"]
    assert ["net.4", "0 of 2", "2", "0", "0 of 27", "0.0%"] in kept["table"]["data"]
    assert kept["table_step"] == 0


def test_mlflow_keeps_the_text_beside_a_finished_run(found):
    kept = the(found, "mlflow")
    assert kept["status"] == "FINISHED"
    assert "missing (2): net.4.weight 3x8, net.4.bias 3" in kept["text"]
    assert re.search(r"net\.4 +0 of 2 +2 +0 +0 of 27 +0\.0%", kept["text"])


def test_comet_shows_the_rendering_of_the_terminal(found):
    html = the(found, "comet")["html"]
    assert "net.4" in html
    assert "missing (2)" in html
