"""Command line of the refactor corpus."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.refactors.config import Config
from benchmarks.refactors.operators import REGIMES, Regime
from benchmarks.refactors.pair import Pair, Result, drawn_pair, run
from benchmarks.refactors.report import Summary, markdown, table_text
from benchmarks.refactors.shrink import differences, shrink
from benchmarks.refactors.structures import SPLITS, Split
from benchmarks.refactors.vocabulary import other, use_lexicon_of


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.refactors", description="Random refactors, truth known."
    )
    parser.add_argument("--split", choices=SPLITS, default="first")
    parser.add_argument("--regime", choices=(*REGIMES, "all"), default="all")
    parser.add_argument("--sample", action="store_true", help="give a sample call of the new model")
    parser.add_argument("--both", action="store_true", help="every regime without and with a sample")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--pairs", type=int, default=100, help="pairs per regime")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; the next pairs take the next ones")
    parser.add_argument("--structure", default="", help="only pairs of this structure")
    parser.add_argument("--operator", default="", help="only pairs with this operator")
    parser.add_argument("--shrink", action="store_true", help="make every wrong pair as small as it stays wrong")
    parser.add_argument("--show", type=int, default=10, help="how many wrong pairs to print; -1: all")
    parser.add_argument("--own-words", action="store_true", help="with the whole lexicon, these pairs' words included")
    parser.add_argument("--tables", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="write the counts, and every wrong pair, here")
    parser.add_argument("--replay", type=Path, metavar="JSON", help="run the configurations of such a file again")
    return parser.parse_args(argv)


def results(options: argparse.Namespace, regime: str, sample: bool) -> Iterator[Result]:
    """The pairs of one regime, in the order of their seeds."""
    use_lexicon_of(None if options.own_words else other(options.split))
    score = partial(_score, options.split, regime, sample, options.structure, options.operator)
    seeds = range(options.seed, options.seed + options.pairs)
    if options.workers < 2:
        found: Iterable[Result | None] = map(score, seeds)
        yield from (result for result in found if result is not None)
        return
    with multiprocessing.get_context("fork").Pool(options.workers, initializer=quiet) as pool:
        yield from (result for result in pool.imap(score, seeds, chunksize=5) if result is not None)


def _score(split: Split, regime: Regime, sample: bool, structure: str, operator: str, seed: int) -> Result | None:
    pair = drawn_pair(split, regime, seed, sample=sample)
    named = {change.operator for change in pair.config.changes}
    wanted = structure in ("", pair.config.structure) and (not operator or operator in named)
    return run(pair) if wanted else None


def quiet() -> None:
    """One thread, no warnings."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def replayed(path: Path) -> Iterator[Result]:
    for item in json.loads(path.read_text())["wrong"]:
        yield run(Pair(Config.from_dict(item["config"])))


def show(result: Result, small: bool) -> None:
    if small:
        result = run(Pair(shrink(result.config)))
    print(f"- {result.config.seed}: {len(result.wrong)} wrong; {differences(result.config)}")
    for tensor in result.wrong[:3]:
        kind = f" [{tensor.evidence}]" if tensor.evidence else ""
        print(
            f"    {tensor.name} <- {' + '.join(tensor.sources)} (wanted: {tensor.wanted}{', layout' * tensor.layout})"
            f" margin {tensor.margin:.2f}{kind}: {tensor.reason}"
        )


def main(argv: list[str] | None = None) -> int:
    """Score; 1 if anything was silently wrong."""
    options = parse(argv)
    quiet()
    written: dict[str, Any] = {"command": " ".join(["python -m benchmarks.refactors", *(argv or sys.argv[1:])])}
    written["regimes"] = {}
    bad: list[Result] = []
    regimes = REGIMES if options.regime == "all" else (options.regime,)
    samples = (False, True) if options.both else (options.sample,)
    for regime in ("replay",) if options.replay else regimes:
        for sample in samples:
            start, summary = time.perf_counter(), Summary()
            title = f"{regime}{', with a sample' * sample}"
            for result in replayed(options.replay) if options.replay else results(options, regime, sample):
                summary.add(result)
            seconds = time.perf_counter() - start
            print(f"{'' if options.replay else options.split} {title}: {seconds:.0f} s\n  {summary.line()}", flush=True)
            if options.tables:
                print("\n".join(["", *table_text(summary.by_structure, "structure"), ""]))
                print("\n".join([*table_text(summary.by_operator, "operator"), ""]), flush=True)
            for result in summary.bad if options.show < 0 else summary.bad[: options.show]:
                show(result, options.shrink)
            written["regimes"][title] = summary.to_dict()
            bad += summary.bad
            if options.json:
                written["wrong"] = [result.to_dict() for result in bad]
                options.json.write_text(json.dumps(written, indent=1) + "\n")
                options.json.with_suffix(".md").write_text(markdown(written))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
