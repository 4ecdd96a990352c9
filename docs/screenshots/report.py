"""A picture of the HTML report: a Vision Transformer of Hugging Face against timm's, random weights.

Needs the gauntlet extra and Chromium: ``.venv-bench/bin/python docs/screenshots/report.py``
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import torchvision_guard  # noqa: F401, I001

import timm
from transformers import ViTConfig, ViTForImageClassification

from lit_wsl import WeightMapper

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=2000",
    "--window-size=1400,820",
]


def main() -> None:
    """Write ``report.png`` beside this file."""
    config = ViTConfig(
        hidden_size=96, num_hidden_layers=12, num_attention_heads=3, intermediate_size=384, image_size=64, num_labels=10
    )
    old = ViTForImageClassification(config)
    new = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=96, num_heads=3, num_classes=7)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("needs Chromium (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        page = WeightMapper(old, new).save_html(Path(folder) / "report.html")
        picture = Path(__file__).with_suffix(".png")
        profile = f"--user-data-dir={folder}/profile"
        subprocess.run([browser, *FLAGS, profile, f"--screenshot={picture}", page.as_uri()], check=True)


if __name__ == "__main__":
    main()
