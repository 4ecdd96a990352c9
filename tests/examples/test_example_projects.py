"""The examples run and hold what they claim."""

import importlib.util
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

if importlib.util.find_spec("torchvision"):  # see there
    sys.path.insert(0, str(ROOT))
    importlib.import_module("benchmarks.torchvision_guard")


def run(path, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")


def test_lightning_cli_project_starts_with_the_old_accuracy(tmp_path, monkeypatch, capsys):
    project = shutil.copytree(EXAMPLES / "lightning_cli_project", tmp_path / "project")
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    try:
        run(project / "old_model.py", monkeypatch=monkeypatch)
        run(project / "main.py", "fit", "--config", "config.yaml", "--trainer.max_epochs=1", monkeypatch=monkeypatch)
    finally:
        for name in ("data", "model"):
            sys.modules.pop(name, None)
    said = capsys.readouterr().out
    old, new = re.findall(r"([\d.]+)% right", said)
    assert float(old) > 90
    assert old == new
    assert list((project / "lightning_logs").rglob("weight_transfer.json"))


def test_hugging_face_to_timm(monkeypatch, capsys):
    if not all(importlib.util.find_spec(name) for name in ("timm", "transformers")):
        pytest.skip("needs the gauntlet extra: .venv-bench/bin/python -m pytest tests/examples")
    with pytest.raises(SystemExit) as end:
        run(EXAMPLES / "hf_timm_vit.py", monkeypatch=monkeypatch)
    assert end.value.code == 0, capsys.readouterr().out
