"""What each kind of evidence is worth: decisions counted right and wrong on the parts of the corpus to look at.

    python -m benchmarks.refactors.calibrate            writes lit_wsl/matching/risks.json

Every entry of a plan names the kind of its evidence. Entries of one family (names without their numbers) are one
decision. The first two parts are judged with the words of each other. The limit of risk is lifted first, so that every
kind is counted; then what is loaded is counted again, with the limit that these counts give.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import multiprocessing
import pkgutil
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch

import lit_wsl.matching
from benchmarks.refactors.operators import REGIMES, Regime
from benchmarks.refactors.pair import Result, drawn_pair, run
from benchmarks.refactors.report import upper_bound
from benchmarks.refactors.structures import Split
from benchmarks.refactors.vocabulary import other, use_lexicon_of
from lit_wsl.matching import risks

TABLE = Path(lit_wsl.matching.__file__).with_name("risks.json")
GATE = "may_load"  # what asks whether a kind of evidence is trusted
PARTS: tuple[Split, ...] = ("first", "second", "third", "fourth")
Cells = dict[str, Counter[str]]


def decisions(result: Result) -> Iterable[tuple[str, str]]:
    """The kind of evidence and the verdict of every decision of a pair: ``wrong`` if any of its tensors is."""
    families: dict[tuple[str, str], set[str]] = defaultdict(set)
    for tensor in result.tensors:
        if tensor.evidence and tensor.verdict in ("right", "wrong"):
            families[tensor.evidence, re.sub(r"\d+", "#", tensor.name)].add(tensor.verdict)
    return [(evidence, "wrong" if "wrong" in verdicts else "right") for (evidence, _), verdicts in families.items()]


@contextlib.contextmanager
def without_limit() -> Iterator[None]:
    """Let every kind of evidence decide."""
    with contextlib.ExitStack() as stack:
        for found in pkgutil.iter_modules(lit_wsl.matching.__path__):
            module = importlib.import_module(f"lit_wsl.matching.{found.name}")
            if hasattr(module, GATE):
                stack.enter_context(mock.patch.object(module, GATE, return_value=True))
        yield


def count(pairs: int, seed: int, workers: int) -> Cells:
    """Decisions over all parts and all regimes, with and without a sample."""
    cells: Cells = defaultdict(Counter)
    seeds = range(seed, seed + pairs)
    for split in PARTS:
        use_lexicon_of(other(split))
        wanted = [(split, regime, sample, number) for regime in REGIMES for sample in (False, True) for number in seeds]
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for found in pool.imap_unordered(_decided, wanted, chunksize=10):
                for evidence, verdict in found:
                    cells[evidence][verdict] += 1
    return cells


def _decided(wanted: tuple[Split, Regime, bool, int]) -> list[tuple[str, str]]:
    split, regime, sample, number = wanted
    return list(decisions(run(drawn_pair(split, regime, number, sample=sample))))


def table_of(cells: Cells) -> dict[str, dict[str, int]]:
    return {name: {"right": counts["right"], "wrong": counts["wrong"]} for name, counts in sorted(cells.items())}


def use(table: dict[str, dict[str, int]]) -> None:
    """Let the matching judge by these counts, in this process and those that it starts."""
    risks.table = lambda: table  # type: ignore[assignment]
    for known in (risks.counted, risks.weakest):
        known.cache_clear()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refactors.calibrate", description=__doc__)
    parser.add_argument("--pairs", type=int, default=120, help="pairs per part and regime, with and without a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with without_limit():
        every = count(options.pairs, options.seed, options.workers)
    use(table_of(every))
    # what follows from a decision that is not taken says nothing about those that are, so these are counted as they are
    cells = count(options.pairs, options.seed, options.workers)
    cells |= {name: counts for name, counts in every.items() if name not in cells}
    print(f"{'evidence':48} {'right':>7} {'wrong':>6} {'bound 95 %':>11}")
    for evidence, counts in sorted(cells.items(), key=lambda item: -item[1].total()):
        bound = upper_bound(counts["wrong"], counts.total())
        print(f"{evidence:48} {counts['right']:7} {counts['wrong']:6} {bound:11.2%}")
    if not options.dry:
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table_of(cells).items())
        TABLE.write_text("{\n" + rows + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
