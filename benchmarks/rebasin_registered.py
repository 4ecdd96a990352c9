"""The hand-written specs of the registry, proven on the public models that they are named after.

    python -m benchmarks.rebasin_registered [--only vit] [--out benchmarks/results/rebasin_registered.json]

Each registered name that torchvision, timm or open_clip builds a model for: the spec is made from the model's state
dict, and a random element of the whole group is applied to perturbed float64 weights. ``kept`` means that no group had
to be dropped and the outputs differ by less than 1e-5. ``inferred`` is the number of groups that inference finds.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import torchvision_guard  # noqa: F401
from lit_wsl.rebasin import infer_permutation_spec, verify_permutation_spec
from lit_wsl.rebasin.spec.registry import permutation_spec, registered_permutation_specs


def clip_tower(name: str, part: str) -> nn.Module:
    """One half of an OpenCLIP model under the names that it has there."""
    import open_clip

    model = open_clip.create_model(name)
    if part == "visual":
        return model.visual
    model.visual = None
    model.forward = model.encode_text
    return model


def models(only: str) -> Iterator[tuple[str, str, nn.Module, torch.Tensor]]:
    """Registered name, library, model and example input of the names with this part, one model at a time."""
    import timm
    import torchvision.models as vision

    image, text = torch.randn(1, 3, 224, 224), torch.randint(0, 49408, (1, 77))
    for name in filter(lambda name: only in name, registered_permutation_specs()):
        clip = re.fullmatch(r"open_clip_vit_([bl])_(\d+)_(visual|text)", name)
        if clip:
            size, patch, part = clip.groups()
            model = clip_tower(f"ViT-{size.upper()}-{patch}", part)
            yield name, "open_clip", model, text if part == "text" else image
        elif name in vision.list_models():
            yield name, "torchvision", vision.get_model(name, weights=None), image
        elif name in timm.list_models():
            yield name, "timm", timm.create_model(name, num_classes=1000), image


def measure(name: str, library: str, model: nn.Module, example: torch.Tensor) -> dict[str, Any]:
    """Prove the registered spec of a model."""
    spec = permutation_spec(name, model)
    found = verify_permutation_spec(spec, model, (example,))
    inferred = infer_permutation_spec(model, (example,), verify=False)
    return {
        "name": name,
        "library": library,
        "kept": found.ok and found.difference < 1e-5,
        "difference": found.difference,
        "dropped": list(found.dropped),
        "groups": len(spec.groups),
        "coverage": spec.coverage,
        "inferred": len(inferred.groups),
        "inferred_coverage": inferred.coverage,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for name, library, model, example in models(options.only):
        row = measure(name, library, model.eval(), example)
        rows.append(row)
        print(
            f"{'kept' if row['kept'] else 'LOST':4} {library:11} {name:28} {row['groups']:3} groups "
            f"{row['coverage']:7.2%} (inferred {row['inferred']:3}, {row['inferred_coverage']:7.2%}), "
            f"difference {row['difference']:.1e} {' '.join(row['dropped'][:3])}",
            flush=True,
        )
    print(f"{sum(row['kept'] for row in rows)} of {len(rows)} kept")
    if options.out:
        options.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
