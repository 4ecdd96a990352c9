"""What training leaves in the weights themselves: what can be rescaled against each other is balanced.

Along a symmetry (:mod:`lit_wsl.matching.symmetries`) the loss does not change, so training keeps the difference of the
two squared norms as it was (Du, Hu and Lee, "Algorithmic Regularization in Learning Deep Homogeneous Models", 2018):
rows that grew have partners that grew. Where rows can be mixed with each other, as inside a head, the same holds for
their products. Under a wrong mapping, partners have nothing to do with each other. So one gradient of the model to be
filled, and the checkpoint's tensors, say how well a mapping hangs together, and no pass is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from scipy.special import ndtr
from torch import Tensor

from lit_wsl.matching.entries import filled
from lit_wsl.matching.space import Space
from lit_wsl.matching.symmetries import FEWEST, Gradients, Relation, View, relations, stacked
from lit_wsl.plan.entries import PlanEntry

COPIES = 4  # blocks that are looked at
MARGIN = 3.0  # standard errors by which a choice that is dropped hangs together worse than the best
HELD = 1 << 26  # elements of what was filled that are kept


def likeness(a: Tensor, b: Tensor) -> float:
    """Correlation of the ranks in two vectors as a number of standard errors (Fisher's z, after Fieller)."""
    if len(a) < FEWEST or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return 0.0
    a, b = (x.argsort().argsort().double() - (len(x) - 1) / 2 for x in (a, b))
    return math.atanh(max(-0.999, min(0.999, float(a @ b / (a.norm() * b.norm()))))) * math.sqrt((len(a) - 3) / 1.06)


def agreement(relation: Relation, left: Tensor, right: Tensor) -> float:
    """How well the norms of partners go together, and the products of those that can be mixed, in standard errors."""
    found = likeness(left.norm(dim=1), right.norm(dim=1))
    if relation.mixed:
        i, j = torch.tensor(relation.mixed).unbind(1)
        found += likeness((left[i] * left[j]).sum(1), (right[i] * right[j]).sum(1))
    return found


class Balance:
    """Says of each choice how well the norms of partners agree.

    Args:
        space: The decisions.
        tensors: The checkpoint's tensors.
        fixed: Values of what is not open, by name in the model.
        gradients: Of the model to be filled.
        in_time: Whether there is time to look at more.
        known: The same of another space of the same models.
    """

    def __init__(
        self,
        space: Space,
        tensors: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        gradients: Gradients,
        in_time: Callable[[], bool],
        known: Balance | None = None,
    ) -> None:
        self.space, self.tensors, self.fixed, self.in_time = space, tensors, fixed, in_time
        self.regions = [ours for _, ours in space.regions]
        self.relations: list[Relation] = relations(self.regions, gradients) if known is None else known.relations
        parts = {t: number for number in range(len(space.parts)) for t in self._targets(number)}
        self._places = []
        for relation in self.relations:
            units = self.regions[relation.region].units
            for copy in range(min(COPIES, len(self.regions[relation.region].copies))):
                names = [name for v in relation.views for name in units[v.unit].names[v.tensor][copy]]
                if all(name in parts or name in fixed for name in names):
                    own = sorted({parts[name] for name in names if name in parts})
                    self._places.append((relation, copy, names, own))
        self._told = [1 + bool(relation.mixed) for relation, *_ in self._places]  # correlations that are added up
        self._known: dict[tuple[int, ...], float] = {}
        self._tables: dict[tuple[int, tuple[int, ...]], dict[str, PlanEntry]] = {}
        self._looked: dict[tuple[Any, ...], float] = {}
        self._values: dict[int, dict[str, Tensor]] = {}
        self._held = 0
        self._said: dict[tuple[int, ...], list[float]] = {}

    def _targets(self, number: int) -> set[str]:
        return {name for unit in self.space.parts[number].target for name in unit.all_names}

    def of(self, choice: Sequence[int]) -> list[float]:
        """The agreement of all pairs of partners in all copies, in standard errors; zero where one is not filled."""
        choice = tuple(choice)
        if choice not in self._said:
            self._said[choice] = self._look(choice)
        return self._said[choice]

    def _look(self, choice: Sequence[int]) -> list[float]:
        space = self.space
        said = [tuple(choice[d] for d in space.all_of(number)) for number in range(len(space.parts))]
        found = []
        for place, (_, _, _, parts) in enumerate(self._places):
            key = place, *(said[number] for number in parts)
            if key not in self._looked:
                self._looked[key] = self._at(place, choice)
            found.append(self._looked[key])
        return found

    def _at(self, place: int, choice: Sequence[int]) -> float:
        """The agreement at one place; zero where a layer is switched off, or where there is no time to look."""
        relation, copy, names, parts = self._places[place]
        if any(choice[self.space.parts[number].which] < 0 for number in parts):
            return 0.0
        tables = [self._table(number, choice) for number in parts]
        entries = {n: table[n] for n in names for table in tables if n in table}
        key = place, *(id(entries.get(name)) for name in names)
        if key not in self._known and self.in_time():
            self._known[key] = self._agreement(relation, copy, names, entries)
        return self._known.get(key, 0.0)

    def _table(self, number: int, choice: Sequence[int]) -> dict[str, PlanEntry]:
        """The entries that fill a group of layers, by target."""
        key = number, tuple(choice[d] for d in self.space.all_of(number))
        if key not in self._tables:
            self._tables[key] = {t: e for e in self.space.entries_of(number, choice) for t in e.targets}
        return self._tables[key]

    def _agreement(
        self, relation: Relation, copy: int, names: Sequence[str], entries: Mapping[str, PlanEntry]
    ) -> float:
        units = self.regions[relation.region].units
        values = {n: self._filled(entries[n])[n] if n in entries else self.fixed[n] for n in names}

        def side(views: Sequence[View]) -> Tensor:
            return torch.cat([v.of(stacked(units[v.unit], v.tensor, copy, values) + v.plus) for v in views], 1)

        return agreement(relation, side(relation.left), side(relation.right))

    def _filled(self, entry: PlanEntry) -> dict[str, Tensor]:
        if id(entry) not in self._values:
            if self._held > HELD:
                self._values.clear()
                self._held = 0
            self._values[id(entry)] = filled(entry, self.tensors)
            self._held += sum(value.numel() for value in self._values[id(entry)].values())
        return self._values[id(entry)]

    def total(self, choice: Sequence[int]) -> float:
        """How well a choice hangs together as a whole."""
        return sum(self.of(choice))

    def lead(self, one: Sequence[int], other: Sequence[int]) -> float:
        """By how many standard errors a choice hangs together better than another, where they differ."""
        gaps = [(a - b, told) for a, b, told in zip(self.of(one), self.of(other), self._told) if a != b]
        return sum(gap for gap, _ in gaps) / math.sqrt(2 * sum(told for _, told in gaps)) if gaps else 0.0

    def plausible(self, choices: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Those that do not hang together clearly worse than the best."""
        if not self._places or len(choices) < 2:
            return list(choices)
        best = max(choices, key=self.total)
        return [c for c in choices if self.lead(best, c) < MARGIN]

    def risk(self, rival: Sequence[int], choice: Sequence[int]) -> float:
        """Risk of calling a rival worse by what training left in the weights.

        It is heard only where the weights that both agree on show that training left balances at all.
        """
        alike = [(a, told) for a, b, told in zip(self.of(choice), self.of(rival), self._told) if a == b and a]
        if not alike or sum(a for a, _ in alike) / math.sqrt(sum(told for _, told in alike)) < MARGIN:
            return 1.0
        return float(ndtr(-self.lead(choice, rival)))
