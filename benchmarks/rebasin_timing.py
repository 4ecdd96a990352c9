"""Time of one sweep: ours, the pure matrix products and assignments in it, and the ``rebasin`` package beside it.

    python -m benchmarks.rebasin_timing [--models resnet50,vgg16_bn,vit_b_16] [--threads 2] [--repeats 3]

Both models have random, unrelated weights, so that every assignment problem has to be solved: the costliest case. The
pure time is measured inside the same sweep: for each step, the products of the very matrices that the step compares,
laid out beforehand, and scipy's assignment on their sum. ``rebasin`` runs one step of its own descent, in the same
process, after ours. A fine-tuned pair (noise of a tenth of each tensor's deviation, no permutation) is timed to its
end. Seconds are given twice, by the wall clock and of processor time over all threads: on a machine that does other
things as well only the latter can be compared.
"""

from __future__ import annotations

import argparse
import time

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from benchmarks.rebasin_planted import MODELS, noisy, randomised
from lit_wsl.rebasin import infer_permutation_spec, weight_matching
from lit_wsl.rebasin.descent import Descent
from lit_wsl.rebasin.matching import matched_names
from lit_wsl.rebasin.progress import progress_bar


def now() -> torch.Tensor:
    """Wall clock and processor time."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def shown(seconds: torch.Tensor) -> str:
    return f"{float(seconds[0]):6.2f} s ({float(seconds[1]):6.2f} s cpu)"


def pure_seconds(descent: Descent, root: str) -> torch.Tensor:
    """Products and assignment of one step, without layout, without checks (heads as one whole assignment)."""
    tree = descent.trees[root]
    rows: dict[tuple[str, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for term in tree.terms:
        a, b = term.rows(descent.reference[term.tensor]), term.rows(descent.current[term.tensor])
        flat = (a.reshape(-1, a.shape[-1]).contiguous(), b.reshape(-1, b.shape[-1]).contiguous())
        rows.setdefault(term.groups, []).append(flat)
    seconds = torch.zeros(2, dtype=torch.float64)
    for groups, pairs in rows.items():
        began = now()
        whole = pairs[0][0] @ pairs[0][1].T
        for a, b in pairs[1:]:
            whole.addmm_(a, b.T)
        size = descent.spec.groups[groups[-1]].size
        ancestors = len(whole) // size
        blocks = whole.reshape(ancestors, size, ancestors, size)
        for i in range(ancestors):
            for j in range(ancestors) if ancestors > 1 else (0,):
                linear_sum_assignment(blocks[i, :, j].numpy(), maximize=True)
        seconds += now() - began
    return seconds


def ours(descent: Descent, order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Seconds of one sweep from the start, and of the pure part of the same sweep."""
    names = list(descent.trees)
    descent.reset()
    with progress_bar(False) as bar:
        began = now()
        descent.sweep(order, bar)
        sweep = now() - began
    descent.reset()
    pure = torch.zeros(2, dtype=torch.float64)
    for number in order:
        pure += pure_seconds(descent, names[number])
        descent.step(descent.trees[names[number]])
    return sweep, pure


def peer(first: nn.Module, second: nn.Module, example: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Seconds that the ``rebasin`` package takes to set up, and for one sweep."""
    from rebasin import PermutationCoordinateDescent

    began = now()
    descent = PermutationCoordinateDescent(first, second, example)
    ready = now()
    descent._calculate_permutations_step(range(1))
    return ready - began, now() - ready


def measure(name: str, repeats: int, with_peer: bool) -> None:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, (args, kwargs) = MODELS[name]()
        models.append(randomised(model, seed))
    began = now()
    spec = infer_permutation_spec(models[0], args, kwargs)
    inferred = now() - began
    a, b = ({k: v.detach() for k, v in m.state_dict().items()} for m in models)
    names = matched_names(spec, a, b)
    descent = Descent(spec, {n: a[n] for n in names}, {n: b[n] for n in names})
    order = torch.randperm(len(descent.trees), generator=torch.Generator().manual_seed(0)).tolist()
    times = [ours(descent, order) for _ in range(repeats)]
    sweep, pure = (torch.stack(column).median(dim=0).values for column in zip(*times))
    ratio = sweep / pure
    print(f"{name}: spec in {shown(inferred)}")
    print(f"    sweep {shown(sweep)}; pure products and assignments {shown(pure)}")
    print(f"    ratio {float(ratio[0]):.2f} ({float(ratio[1]):.2f} cpu)", flush=True)
    tuned = noisy(a, 0.1, 5)
    began = now()
    found = weight_matching(spec, a, tuned)
    share = found.identity_share
    print(f"    fine-tuned pair, to the end: {shown(now() - began)}, {found.sweeps} sweep, identity {share:.3f}")
    if with_peer:
        try:
            setup, theirs = peer(models[0], models[1], args[0])
        except Exception as error:
            print(f"    rebasin package: {type(error).__name__}: {str(error)[:100]}")
            return
        times_ours = theirs / sweep
        print(f"    rebasin package: set up {shown(setup)}, sweep {shown(theirs)}")
        print(f"    that is {float(times_ours[0]):.1f} x ours ({float(times_ours[1]):.1f} x cpu)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet50,vgg16_bn,vit_b_16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-on", default="resnet50", help="models that the rebasin package is run on as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, median of {options.repeats}")
    for name in options.models.split(","):
        measure(name, options.repeats, name in options.peer_on.split(","))


if __name__ == "__main__":
    main()
