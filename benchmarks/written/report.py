"""Totals per family, and groups of what was loaded wrongly."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.written.measure import Result, Wrong

HEADS = ("cases", "with wrong", "right", "wrong", "missing", "kept", "error")
ALL = "all but liars"


def totals(results: Sequence[Result]) -> dict[str, Counter[str]]:
    """The counts of every family, and of all but the liars together."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        own = result.counts + Counter({"cases": 1, "with wrong": int(bool(result.wrong))})
        for family in (result.case.family, *([] if result.case.liar else [ALL])):
            found[family].update(own)
    return {family: found[family] for family in sorted(found, key=lambda name: (name == ALL, name))}


def table(counts: dict[str, Counter[str]]) -> Iterator[str]:
    yield f"{'family':14}" + "".join(f"{head:>11}" for head in HEADS)
    for family, own in counts.items():
        yield f"{family:14}" + "".join(f"{own[head]:11,}" for head in HEADS)


def kinds(results: Sequence[Result]) -> Iterator[str]:
    """Wrong tensors of cases that are no liars, by what belongs there, evidence and reason, with an example each."""
    groups: dict[tuple[str, str, str], list[tuple[Result, Wrong]]] = defaultdict(list)
    for result in results:
        for wrong in [] if result.case.liar else result.wrong:
            what = "another" if wrong.wanted else "nothing"
            reason = re.sub(r" \(wrong in.*?\)", "", wrong.reason)
            groups[what, wrong.evidence, reason].append((result, wrong))
    for (what, evidence, reason), found in sorted(groups.items(), key=lambda group: -len(group[1])):
        result, wrong = found[0]
        cases = len({id(other) for other, _ in found})
        yield f"{len(found)} tensors of {cases} cases, {what} belongs there, by {evidence or 'no evidence'}: {reason}"
        yield f"    {result.case.name}: {wrong.tensor} <- {wrong.loaded} (wanted: {wrong.wanted or 'nothing'})"


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """The totals, and every case with an error or a wrong tensor."""
    return {
        "totals": totals(results),
        "wrong": [
            {
                **asdict(result.case),
                "counts": result.counts,
                "errors": result.errors,
                "tensors": [asdict(wrong) for wrong in result.wrong],
            }
            for result in results
            if result.wrong or result.errors
        ],
    }
