"""A Vision Transformer of Hugging Face becomes one of timm: the same function under other names, with fused layers.

Both models start from random weights (no download). Separate queries, keys and values become one fused layer, names
and grouping change, and the outputs agree.

    pip install '.[gauntlet]'
    python examples/hf_timm_vit.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import torchvision_guard  # noqa: F401, I001  torchvision of the index is a CUDA build: see there

import torch
from rich.console import Console

try:
    import timm
    from transformers import ViTConfig, ViTForImageClassification
except ModuleNotFoundError as error:
    sys.exit(f"{error}: this example needs pip install '.[gauntlet]' in the checkout")

from lit_wsl import WeightMapper, transfer_weights


def main() -> int:
    """Transfer one way and back, and compare outputs."""
    console = Console()
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=384,
        image_size=64,
        patch_size=16,
        num_labels=10,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    theirs = ViTForImageClassification(config).eval()
    ours = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=96, num_heads=3, num_classes=10, pretrained=False
    ).eval()
    images = torch.randn(4, 3, 64, 64)

    with torch.no_grad():
        wanted = theirs(images).logits
        before = (ours(images) - wanted).abs().max().item()
        report = transfer_weights(ours, theirs, example_args=(images,))
        after = (ours(images) - wanted).abs().max().item()
    WeightMapper(theirs, ours).visualize_mapping(console=console)
    console.print(report)

    back = ViTForImageClassification(config)
    transfer_weights(back, ours, plan=report.plan.reverse())
    restored = all(torch.equal(back.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())

    claims = {
        f"outputs differ before the transfer (by {before:.2g})": before > 0.01,
        f"outputs agree after it (to {after:.2g})": after < 1e-4,
        "every parameter of both sides has found its place": report.coverage.target.share
        == report.coverage.source.share
        == 1.0,
        "the reversed plan restores the original to the last bit": restored,
    }
    for claim, holds in claims.items():
        console.print(f"[{'green' if holds else 'bold red'}]{'yes' if holds else 'NO '}[/]  {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
