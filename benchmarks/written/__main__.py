"""``make written``: totals per family; on standard error, as they come, the cases with wrong tensors.

Cases that are made of tables are thinned out: every n-th variant of an idea is run, and from idea to idea another one.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.written import groups, manners, moves, replaced, siblings
from benchmarks.written.case import FOLDER, Case, text_cases
from benchmarks.written.measure import measure
from benchmarks.written.report import as_json, kinds, table, totals

EVERY = (
    (siblings.abbreviations, 5),
    (siblings.buffers, 3),
    (siblings.scalars, 4),
    (siblings.letters, 11),
    (siblings.marks, 7),
    (siblings.beside, 5),
    (siblings.words, 13),
    (groups.orders, 7),
    (groups.towers, 5),
    (groups.copies, 1),
    (groups.averages, 2),
    (groups.translators, 1),
    (moves.norms, 3),
    (moves.numbers, 2),
    (moves.descending, 3),
    (moves.attentions, 4),
    (moves.pairs, 3),
    (moves.gates, 3),
    (moves.lists, 2),
    (manners.blocks, 1),
    (replaced.parts, 1),
    (replaced.lists, 1),
)
"""What yields ideas, each as the list of its variants; of so many variants one is run."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.written", description="Renamings written by hand, truth known."
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="only cases with one of these parts in their names")
    parser.add_argument("--all", action="store_true", help="all variants of every idea, about six times as many")
    parser.add_argument("--kinds", action="store_true", help="group the wrong tensors by reason, one example each")
    parser.add_argument("--json", type=Path, help="write the totals, and every wrong tensor, here")
    return parser.parse_args(argv)


def cases(whole: bool = False) -> Iterator[Case]:
    """The cases, or the whole products that they are taken from."""
    for file in sorted(FOLDER.glob("cases/*.txt")):
        yield from text_cases(file.stem)
    for function, every in EVERY:
        for turn, variants in enumerate(function()):
            yield from variants if whole else variants[turn % every :: every]


def main(argv: list[str] | None = None) -> int:
    """Measure; 1 if anything but a liar was loaded wrongly."""
    options = parse(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = []
    wanted = [case for case in cases(options.all) if not options.parts or any(p in case.name for p in options.parts)]
    twice = [name for name, count in Counter(case.name for case in wanted).items() if count > 1]
    if twice:
        raise ValueError(f"names of more than one case: {twice}")
    for case in wanted:
        result = measure(case)
        results.append(result)
        if result.wrong or result.errors:
            counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(result.counts.items()))
            print(f"{case.name}{' (liar)' if case.liar else ''}: {counts}", *result.errors, file=sys.stderr, flush=True)
    if options.kinds:
        print("\n".join([*kinds(results), ""]))
    print("\n".join(table(totals(results))))
    print(f"{sum(result.seconds for result in results):.0f} s of processor time")
    if options.json:
        options.json.write_text(json.dumps(as_json(results), indent=1) + "\n")
    return int(any(result.wrong for result in results if not result.case.liar))


if __name__ == "__main__":
    sys.exit(main())
