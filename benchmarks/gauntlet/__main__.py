"""Command line of the gauntlet."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gauntlet import TruthError, all_pairs
from benchmarks.gauntlet.peers import PEERS
from benchmarks.gauntlet.report import differing_plans, totals, worse_with_sample, write
from benchmarks.gauntlet.score import MODES, Arena, Score


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gauntlet", description=__doc__)
    parser.add_argument("--pairs", default="", metavar="REGEX", help="only pairs whose name contains this")
    parser.add_argument("--mode", choices=[*MODES, "all"], default="state_dict", help="what a transfer is given")
    parser.add_argument("--json", type=Path, help="write scores here, and the tables beside it as .md")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="run the peers too")
    parser.add_argument("--proof", action=argparse.BooleanOptionalAction, default=True, help="prove each truth first")
    parser.add_argument("--prove-only", action="store_true", help="prove, score nothing")
    parser.add_argument(
        "--same-plans-as", type=Path, metavar="JSON", help="fail if a plan differs from an earlier run's"
    )
    parser.add_argument("--list", action="store_true", help="list the pairs and stop")
    parser.add_argument("-v", "--verbose", action="store_true", help="name what is wrong or missing")
    return parser.parse_args(argv)


def show(score: Score, verbose: bool) -> None:
    mark = "WRONG" if score.wrong_names else ("kept" if score.kept else "lost")
    buffers = "/".join(str(count) for count in score.buffers)
    print(
        f"  {mark:5} {score.method:22} {score.right:5d} right {score.wrong:4d} wrong {score.missing:4d} missing"
        f"  buffers {buffers:12} {score.seconds:6.2f} s {score.error[:200]}",
        flush=True,
    )
    if verbose and score.method.startswith("lit_wsl"):
        for label, names in (
            ("wrong", score.wrong_names),
            ("missing", score.missing_names),
            ("unlisted", score.unlisted),
        ):
            if names:
                print(f"        {label}: {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}")


def _by_pair(scores: Sequence[Score], remark: Callable[[Score], str]) -> list[str]:
    """One line for each pair: the modes it happened in, and a remark on the first."""
    modes: dict[str, list[Score]] = {}
    for score in scores:
        modes.setdefault(score.pair, []).append(score)
    return [
        f"{pair} ({', '.join(s.method.removeprefix('lit_wsl ') for s in found)}) {remark(found[0])}".rstrip()
        for pair, found in modes.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the gauntlet; 1 if a tensor is wrong, a truth is not proven or a transfer crashed, else 0."""
    options = parse(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(max(1, min(2, torch.get_num_threads())))
    pairs = [pair for pair in all_pairs() if re.search(options.pairs, pair.name)]
    if options.list:
        for pair in pairs:
            print(pair.name, "[permute]" if pair.permute else "", ", ".join(sorted(pair.tags)))
        return 0
    modes = MODES if options.mode == "all" else (options.mode,)
    scores: list[Score] = []
    failed: list[str] = []
    start = time.perf_counter()
    for number, pair in enumerate(pairs, 1):
        print(f"[{number}/{len(pairs)}] {pair.name}", flush=True)
        try:
            if options.prove_only:
                pair.prove()
                continue
            arena = Arena.of(pair, options.proof)
        except TruthError as error:
            print(f"  NOT PROVEN {error}", flush=True)
            failed.append(f"{pair.name}: not proven: {error}")
            continue
        for mode in modes:
            try:
                scores.append(arena.lit_wsl(mode))
            except Exception as error:  # a crash is a result, and the other pairs still count
                print(f"  CRASH {mode} {type(error).__name__}: {error}", flush=True)
                failed.append(f"{pair.name} ({mode}): {type(error).__name__}: {error}")
                arena = Arena.of(pair, prove=False)
            else:
                show(scores[-1], options.verbose)
        for name, peer in PEERS.items() if options.peers else ():
            scores.append(arena.peer(name, peer))
            show(scores[-1], options.verbose)
    print(f"\n{len(pairs)} pairs in {time.perf_counter() - start:.0f} s")
    for method, row in totals(scores, pairs).items():
        print(f"{method:24} " + ", ".join(f"{key} {value}" for key, value in row.items()))
    lost = worse_with_sample(scores)
    ours = [score for score in scores if score.method.startswith("lit_wsl")]
    wrong = [score for score in ours if score.wrong_names]
    changed = differing_plans(scores, options.same_plans_as) if options.same_plans_as else []
    for title, items in (
        ("PLAN DIFFERS", changed),
        ("NOT PROVEN OR CRASHED", failed),
        ("WORSE WITH MORE EVIDENCE", lost),
        ("WRONG", _by_pair(wrong, lambda score: ", ".join(score.wrong_names[:4]))),
        ("NOT KEPT", _by_pair([s for s in ours if not s.kept], lambda score: score.error[:100])),
        ("NOT LISTED", [f"{s.pair}: {s.unlisted[:3]}" for s in scores if s.unlisted]),
    ):
        if items:
            print(f"\n{title}\n  " + "\n  ".join(items))
    if options.json:
        arguments = " ".join(sys.argv[1:] if argv is None else argv)
        write(options.json, scores, pairs, f"python -m benchmarks.gauntlet {arguments}".strip())
    return 1 if failed or wrong or lost or changed else 0


if __name__ == "__main__":
    sys.exit(main())
