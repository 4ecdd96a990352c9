"""The examples run as they are shown and keep what they claim."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "140"}
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *args],
        capture_output=True,
        text=True,
        timeout=800,
        env=env,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("demo")
    return run("demo_digits.py", "--output", str(folder)), folder


def test_demo_proves_its_claims(demo):
    done, _ = demo
    assert done.returncode == 0, done.stdout + done.stderr
    claims = [line for line in done.stdout.splitlines() if line.startswith(("yes ", "NO "))]
    assert len(claims) >= 4
    assert all(line.startswith("yes") for line in claims)


def test_demo_shows_the_coverage_and_every_answer(demo):
    done, _ = demo
    assert "backbone" in done.stdout
    assert "head" in done.stdout
    assert done.stdout.count("360 of 360 images") == 2  # the old network, and the new one before any training step


def test_the_readme_shows_what_the_demo_prints(demo):
    sys.path.insert(0, str(ROOT / "docs"))
    from pages import blocks, shape

    done, folder = demo
    (shown,) = (block for block in blocks(ROOT / "README.md") if "demo_digits" in block.output)
    printed = done.stdout.replace(str(folder), "demo-output").replace("\ndemo-output", " demo-output")
    printed = printed.replace(f"{folder.name}/", "demo-output/")
    decided = [{line for line in text.splitlines() if "next best" in line} for text in (shown.code, printed)]
    assert all(
        len(lines) > 2 for lines in decided
    )  # which one is the most decisive depends on the processor's rounding
    rest = [
        [shape(line).strip() for line in text.splitlines() if line not in some]
        for text, some in zip((shown.code, printed), decided)
    ]
    assert rest[0] == rest[1], "python docs/pages.py README.md"


def test_demo_leaves_checkpoint_and_report(demo):
    _, folder = demo
    assert (folder / "old.ckpt").stat().st_size > 0
    assert list(folder.glob("new/version_*/weight_transfer.json"))


def test_demo_fails_when_a_claim_does_not_hold(tmp_path):
    done = run("demo_digits.py", "--output", str(tmp_path), "--epochs", "0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(line.startswith("NO ") for line in done.stdout.splitlines())
