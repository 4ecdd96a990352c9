"""Planted permutations on public architectures: are they recovered to the last entry?

    python -m benchmarks.rebasin_planted [--models resnet18,vit_b_16] [--noise 0,0.5] [--seed 0]

A model with random weights (norm gains, biases and statistics drawn at random as well) is permuted by a random element
of its whole group; then noise of a share of each tensor's standard deviation is added. Units that are exact copies of
each other would make the answer ambiguous; there are none with random weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import torchvision_guard  # noqa: F401  (before torchvision, timm and transformers)
from lit_wsl.rebasin import apply_permutation, compose_permutations, infer_permutation_spec, weight_matching

Example = tuple[tuple[Any, ...], dict[str, Any]]


def torchvision_model(name: str) -> tuple[nn.Module, Example]:
    import torchvision

    return torchvision.models.get_model(name), ((torch.randn(2, 3, 224, 224),), {})


def bert() -> tuple[nn.Module, Example]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(attn_implementation="eager")
    return BertForSequenceClassification(config), ((torch.randint(0, 30000, (2, 12)),), {})


MODELS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    **{
        name: (lambda name=name: torchvision_model(name))
        for name in (
            "resnet18",
            "resnet50",
            "vgg16_bn",
            "densenet121",
            "mobilenet_v2",
            "mobilenet_v3_large",
            "mnasnet1_0",
            "vit_b_16",
            "convnext_tiny",
            "swin_t",
        )
    },
    "bert": bert,
}


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Gains, biases and statistics drawn at random, so that they tell units apart as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif float(tensor.std()) == 0.0:
                tensor.add_(0.2 * (noise - 0.5))
    return model.eval()


def noisy(state: dict[str, Tensor], share: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t + share * t.std() * torch.randn(t.shape, generator=generator)
        if share and t.is_floating_point() and t.numel() > 1
        else t
        for name, t in state.items()
    }


def measure(name: str, noises: list[float], seed: int) -> list[bool]:
    torch.manual_seed(seed)
    model, (args, kwargs) = MODELS[name]()
    model = randomised(model, seed)
    began = time.perf_counter()
    spec = infer_permutation_spec(model, args, kwargs)
    inferred = time.perf_counter() - began
    state = {k: v.detach() for k, v in model.state_dict().items()}
    planted = spec.random_permutations(seed + 1)
    shuffled = apply_permutation(spec, planted, state)
    results = []
    for share in noises:
        other = noisy(shuffled, share, seed + 2)
        began = time.perf_counter()
        found = weight_matching(spec, state, other, seed=seed)
        seconds = time.perf_counter() - began
        back = compose_permutations(spec, planted, found)
        entries = sum(p.numel() for p in back.values())
        right = sum(int((p == torch.arange(p.shape[-1])).sum()) for p in back.values())
        results.append(right == entries)
        print(
            f"{name:20} noise {share:.1f} std: {right:7d} of {entries:7d} entries "
            f"{'ok ' if right == entries else 'BAD'} "
            f"in {seconds:6.1f} s ({found.sweeps} sweeps from {found.start}); coverage {spec.coverage:.3f}, "
            f"inferred in {inferred:.1f} s",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--noise", default="0,0.5")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    noises = [float(x) for x in options.noise.split(",")]
    results = [ok for name in options.models.split(",") for ok in measure(name, noises, options.seed)]
    print(f"recovered to the last entry: {sum(results)} of {len(results)}")


if __name__ == "__main__":
    main()
