"""One full matching with the shapes of an 8-billion-parameter Llama, synthetic weights, planted permutation and noise.

    python -m benchmarks.rebasin_llama --device cuda            # 32 layers, 4096 / 14336, 32 heads on 8
    python -m benchmarks.rebasin_llama --layers 2 --scale 16    # the same, sixteen times narrower, on a CPU

The spec is written by hand here, since what is measured is the matching: the residual stream, in every layer the units
of the gated MLP, the key-value heads, the query heads inside each of them, and the units inside each value head (which
the output projection reads as a product of query head and unit). Rotary embeddings fix the order inside q and k heads.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from lit_wsl.rebasin import AxisSpec, PermutationGroup, PermutationSpec, compose_permutations, weight_matching
from lit_wsl.rebasin.spec.spec import permute_tensor


def llama_spec(layers: int, width: int, hidden: int, heads: int, kv: int, dim: int, vocabulary: int) -> PermutationSpec:
    groups = {"residual": PermutationGroup("residual", width)}
    axes: dict[str, dict[int, AxisSpec]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    stream = AxisSpec(("residual",), torch.arange(width)[None])
    per = heads // kv

    def tensor(name: str, shape: tuple[int, ...], by_axis: dict[int, AxisSpec]) -> None:
        shapes[name], axes[name] = shape, by_axis

    tensor("embed_tokens.weight", (vocabulary, width), {1: stream})
    for layer in range(layers):
        at = f"layers.{layer}."
        head, query, unit, mlp = (at + name for name in ("kv_head", "query_head", "value_unit", "mlp"))
        groups[head] = PermutationGroup(head, kv)
        groups[query] = PermutationGroup(query, per, head)
        groups[unit] = PermutationGroup(unit, dim, head)
        groups[mlp] = PermutationGroup(mlp, hidden)
        outer = torch.arange(kv).repeat_interleave(per * dim)
        inner = torch.arange(per).repeat_interleave(dim).repeat(kv)
        fine = torch.arange(dim).repeat(heads)
        of_kv = torch.arange(kv).repeat_interleave(dim)
        hidden_axis = AxisSpec((mlp,), torch.arange(hidden)[None])
        tensor(
            at + "q_proj", (heads * dim, width), {0: AxisSpec((head, query), torch.stack([outer, inner])), 1: stream}
        )
        tensor(at + "k_proj", (kv * dim, width), {0: AxisSpec((head,), of_kv[None]), 1: stream})
        values = AxisSpec((head, unit), torch.stack([of_kv, torch.arange(dim).repeat(kv)]))
        tensor(at + "v_proj", (kv * dim, width), {0: values, 1: stream})
        reads = AxisSpec((head, query, unit), torch.stack([outer, inner, fine]))
        tensor(at + "o_proj", (width, heads * dim), {0: stream, 1: reads})
        tensor(at + "gate_proj", (hidden, width), {0: hidden_axis, 1: stream})
        tensor(at + "up_proj", (hidden, width), {0: hidden_axis, 1: stream})
        tensor(at + "down_proj", (width, hidden), {0: stream, 1: hidden_axis})
        tensor(at + "input_norm", (width,), {0: stream})
        tensor(at + "post_norm", (width,), {0: stream})
    tensor("norm.weight", (width,), {0: stream})
    tensor("lm_head.weight", (vocabulary, width), {1: stream})
    return PermutationSpec(groups, axes, shapes, tuple(shapes))


def weights(spec: PermutationSpec, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        .mul_(shape[-1] ** -0.5)
        .to(dtype)
        for name, shape in spec.shapes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--scale", type=int, help="divide widths and vocabulary by this")
    parser.add_argument("--noise", type=float, default=0.5, help="share of each tensor's standard deviation")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("No CUDA device at hand: not measured. Without --device the same runs scaled down on the CPU.")
    torch.set_num_threads(options.threads)
    small = device.type == "cpu"
    layers = options.layers or (4 if small else 32)
    scale = options.scale or (16 if small else 1)
    dtype = torch.float32 if small else torch.bfloat16
    dim = max(8, 128 // scale)
    spec = llama_spec(layers, 4096 // scale, 14336 // scale, 32, 8, dim, 128256 // scale)
    reference = weights(spec, device, dtype, 0)
    planted = spec.random_permutations(1)
    other = {name: permute_tensor(spec, planted, name, tensor) for name, tensor in reference.items()}
    generator = torch.Generator(device).manual_seed(2)
    for tensor in other.values():
        noise = torch.randn(tensor.shape, generator=generator, device=device, dtype=tensor.dtype)
        tensor.add_(noise, alpha=options.noise * float(tensor.float().std()))
        del noise
    size = sum(t.numel() * t.element_size() for t in reference.values())
    count = sum(t.numel() for t in reference.values())
    print(
        f"{count / 1e9:.2f} billion parameters of {dtype}, {layers} layers on {device}; "
        f"two models {2 * size / 2**30:.1f} GiB"
    )
    held = start_peak(device)
    began = time.perf_counter()
    found = weight_matching(spec, reference, other, seed=0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    back = compose_permutations(spec, planted, found)
    entries = sum(p.numel() for p in back.values())
    right = sum(int((p == torch.arange(p.shape[-1])).sum()) for p in back.values())
    print(
        f"matched in {seconds:.1f} s, {found.sweeps} sweeps from {found.start}; {right} of {entries} entries recovered"
    )
    peak = peak_since_start(device)
    if peak is not None and held is not None:
        # What stood there before is the two models (and, on a CPU, the program).
        print(f"peak memory {2 * size / 2**30:.2f} GiB of models + {(peak - held) / 2**30:.2f} GiB")
        print(f"that is {(2 * size + peak - held) / (2 * size):.2f} x the two models")


def start_peak(device: torch.device) -> int | None:
    """Forget the peak so far; bytes that are held now, None where that cannot be known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def peak_since_start(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


if __name__ == "__main__":
    main()
