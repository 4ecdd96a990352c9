"""Time of one sweep: ours, the pure matrix products and assignments in it, and the ``rebasin`` package beside it.

    python -m benchmarks.rebasin_timing [--models resnet50,vgg16_bn,vit_b_16] [--threads 2] [--repeats 3]

Both models have random, unrelated weights, so that every assignment problem has to be solved: the costliest case. The
pure time is what the textbook would run in the same sweep: for each step one float32 product for each tensor, of the
very matrices that the step compares, laid out and permuted beforehand, and scipy's dense assignment on their sum.

``rebasin`` runs one sweep of its own descent, in the same process. It finds fewer groups than there are (no residual
stream of a ResNet), so it is also compared with a sweep of ours over as many groups of each size as it has, the
costliest ones where there is a choice. A fine-tuned pair (noise of a tenth of each tensor's deviation, no permutation)
is timed to its end.

Seconds are given twice, by the wall clock and of processor time over all threads. On a machine that does other things
as well only the latter can be compared, and with several threads not even that: threads that wait for each other spin.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from benchmarks.rebasin_planted import MODELS, noisy, randomised
from lit_wsl.rebasin import infer_permutation_spec, weight_matching
from lit_wsl.rebasin.matching.descent import Descent, progress_bar
from lit_wsl.rebasin.matching.weights import matched_names

RESULTS = Path(__file__).parent / "results" / "rebasin_timing.json"


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
        a, b = term.rows(descent.reference[term.tensor]), term.rows(descent.order.tensor(term.tensor))
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


def sweep_seconds(descent: Descent, order: list[int]) -> torch.Tensor:
    """One sweep from the start."""
    descent.reset()
    with progress_bar(False) as bar:
        began = now()
        descent.sweep(order, bar)
        return now() - began


def pure_sweep_seconds(descent: Descent, order: list[int]) -> torch.Tensor:
    """The pure part of the same sweep."""
    names = list(descent.trees)
    descent.reset()
    pure = torch.zeros(2, dtype=torch.float64)
    for number in order:
        pure += pure_seconds(descent, names[number])
        descent.step(descent.trees[names[number]])
    return pure


def as_many(descent: Descent, order: list[int], sizes: list[int]) -> list[int]:
    """The part of an order with as many trees of each size, those that move the most where there are more."""
    wanted, chosen = Counter(sizes), set()
    trees = list(descent.trees.values())
    cost = [sum(descent.reference[n].numel() for n in tree.tensors if n in descent.reference) for tree in trees]
    for number in sorted(order, key=lambda n: -cost[n]):
        size = descent.spec.groups[trees[number].root].size
        if wanted[size] > 0:
            wanted[size] -= 1
            chosen.add(number)
    return [number for number in order if number in chosen]


def peer(first: nn.Module, second: nn.Module, example: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Seconds that the ``rebasin`` package takes to set up, and for one sweep; the sizes of its groups."""
    from rebasin import PermutationCoordinateDescent

    began = now()
    descent = PermutationCoordinateDescent(first, second, example)
    ready = now()
    descent._calculate_permutations_step(range(1))
    done = now()
    sizes = [len(permutation.perm_indices) for permutation, _ in descent.pinit.model_graph.permutation_to_info]
    return ready - began, done - ready, sizes


def median(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(rows).median(dim=0).values


def seconds(value: torch.Tensor) -> dict[str, float]:
    return {"wall": round(float(value[0]), 3), "cpu": round(float(value[1]), 3)}


def measure(name: str, repeats: int, with_peer: bool) -> dict[str, object]:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, (args, kwargs) = MODELS[name]()
        models.append(randomised(model, seed))
    began = now()
    spec = infer_permutation_spec(models[0], args, kwargs, verify=False)
    inferred = now() - began
    a, b = ({k: v.detach() for k, v in m.state_dict().items()} for m in models)
    names = matched_names(spec, a, b)
    descent = Descent(spec, {n: a[n] for n in names}, {n: b[n] for n in names})
    order = torch.randperm(len(descent.trees), generator=torch.Generator().manual_seed(0)).tolist()
    sweep = median([sweep_seconds(descent, order) for _ in range(repeats)])
    pure = median([pure_sweep_seconds(descent, order) for _ in range(repeats)])
    ratio = sweep / pure
    print(f"{name}: spec of {len(spec.groups)} groups in {shown(inferred)}")
    print(f"    sweep {shown(sweep)}; pure products and assignments {shown(pure)}")
    print(f"    ratio {float(ratio[0]):.2f} ({float(ratio[1]):.2f} cpu)", flush=True)
    tuned = noisy(a, 0.1, 5)
    began = now()
    found = weight_matching(spec, a, tuned)
    pair = now() - began
    share = found.identity_share
    print(f"    fine-tuned pair, to the end: {shown(pair)}, {found.sweeps} sweep, identity {share:.3f}")
    result: dict[str, object] = {
        "trees": len(descent.trees),
        "spec": seconds(inferred),
        "sweep": seconds(sweep),
        "pure": seconds(pure),
        "sweep_over_pure": seconds(ratio),
        "fine_tuned_pair": {**seconds(pair), "sweeps": found.sweeps, "identity_share": share},
    }
    if with_peer:
        result["rebasin"] = beside(models, args[0], descent, order, sweep, repeats)
    return result


def beside(
    models: list[nn.Module],
    example: torch.Tensor,
    descent: Descent,
    order: list[int],
    sweep: torch.Tensor,
    repeats: int,
) -> dict[str, object]:
    """The ``rebasin`` package on the same models."""
    try:
        runs = [peer(models[0], models[1], example) for _ in range(repeats)]
    except Exception as error:
        print(f"    rebasin package: {type(error).__name__}: {str(error)[:100]}")
        return {"error": f"{type(error).__name__}: {str(error)[:100]}"}
    setup, theirs, sizes = median([run[0] for run in runs]), median([run[1] for run in runs]), runs[0][2]
    same = as_many(descent, order, sizes)
    part = median([sweep_seconds(descent, same) for _ in range(repeats)])
    print(f"    rebasin package: {len(sizes)} groups; set up {shown(setup)}, sweep {shown(theirs)}")
    print(f"    that is {float(theirs[0] / sweep[0]):.1f} x ours ({float(theirs[1] / sweep[1]):.1f} x cpu)")
    print(f"    ours over {len(same)} groups of the same sizes {shown(part)}")
    print(f"    that is {float(theirs[0] / part[0]):.1f} x ours ({float(theirs[1] / part[1]):.1f} x cpu)", flush=True)
    return {
        "groups": len(sizes),
        "set_up": seconds(setup),
        "sweep": seconds(theirs),
        "times_our_sweep": seconds(theirs / sweep),
        "our_groups_of_the_same_sizes": len(same),
        "our_sweep_over_these": seconds(part),
        "times_our_sweep_over_these": seconds(theirs / part),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet50,vgg16_bn,vit_b_16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-on", default="resnet50", help="models that the rebasin package is run on as well")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="results are added to this JSON, by threads and model"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, median of {options.repeats}")
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.models.split(","):
        load = os.getloadavg()[0]
        result = measure(name, options.repeats, name in options.peer_on.split(","))
        machine = {"torch": torch.__version__, "processors": os.cpu_count(), "load_before": round(load, 1)}
        known.setdefault(f"{options.threads} threads", {})[name] = {**machine, "repeats": options.repeats, **result}
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
