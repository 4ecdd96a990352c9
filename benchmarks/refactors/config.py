"""A pair as plain data: drawn from a seed, written to JSON, replayed, shrunk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import benchmarks.refactors.forms_fourth
import benchmarks.refactors.forms_third
import benchmarks.refactors.forms_validate
import benchmarks.refactors.operators_fourth
import benchmarks.refactors.operators_fourth_names
import benchmarks.refactors.operators_layout
import benchmarks.refactors.operators_names
import benchmarks.refactors.operators_places
import benchmarks.refactors.operators_third
import benchmarks.refactors.operators_third_names
import benchmarks.refactors.operators_validate
import benchmarks.refactors.operators_validate_names
import benchmarks.refactors.structures_fourth
import benchmarks.refactors.structures_fourth_more
import benchmarks.refactors.structures_more
import benchmarks.refactors.structures_third
import benchmarks.refactors.structures_validate
import benchmarks.refactors.structures_validate_more  # noqa: F401
from benchmarks.refactors.network import Side
from benchmarks.refactors.operators import OPERATORS, STAGES, Operator, Regime
from benchmarks.refactors.structures import STRUCTURES, Draft, Sizes, Split
from benchmarks.refactors.vocabulary import Words, draw_words

FileKind = Literal["state_dict", "sorted", "safetensors"]
SOURCE, TARGET = 0, 1
_LENGTH = ("prune_", "insert_")
# how seeds know the parts
_STREAM: dict[Split, str] = {
    "first": "fit",
    "second": "validate",
    "third": "third",
    "fourth": "fourth",
    "validate": "fifth",
}


@dataclass(frozen=True)
class Change:
    """One operator on one side."""

    operator: str
    side: int
    seed: int


@dataclass(frozen=True)
class Config:
    """Everything that makes a pair.

    Attributes:
        structure: The network.
        sizes: Its knobs.
        words: What each side calls the roles.
        changes: What was done to the sides.
        file: How the checkpoint arrives: in the order of registration, sorted, or as a safetensors file.
        sample: Whether a sample call of the new model is given.
        seed: Where it was drawn from, to find it again.
    """

    structure: str
    sizes: Sizes = field(default_factory=Sizes)
    words: tuple[Words, Words] = field(default_factory=lambda: ({}, {}))
    changes: tuple[Change, ...] = ()
    file: FileKind = "state_dict"
    sample: bool = False
    seed: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Config:
        first, second = data["words"]
        return cls(
            structure=data["structure"],
            sizes=Sizes(**data["sizes"]),
            words=(dict(first), dict(second)),
            changes=tuple(Change(**change) for change in data["changes"]),
            file=data["file"],
            sample=data["sample"],
            seed=data["seed"],
        )

    def reversed(self) -> Config:
        """Source and target exchanged."""
        changes = tuple(replace(change, side=1 - change.side) for change in self.changes)
        return replace(self, words=self.words[::-1], changes=changes)

    def sides(self) -> tuple[Side, Side]:
        """Both networks, refactored."""
        return self._side(SOURCE), self._side(TARGET)

    def plain_side(self, which: int) -> Side:
        """A side to which nothing was done but naming."""
        draft = Draft(self.sizes)
        STRUCTURES[self.structure].write(draft)
        return Side(draft.leaves, dict(self.words[which]))

    def _side(self, which: int) -> Side:
        side = self.plain_side(which)
        mine = [change for change in self.changes if change.side == which]
        for change in sorted(mine, key=lambda change: STAGES.index(OPERATORS[change.operator].stage)):
            OPERATORS[change.operator].apply(side, random.Random(change.seed))
        return side


def draw(split: Split, regime: Regime, seed: int, *, sample: bool = False, attempt: int = 0) -> Config:
    """A random pair of one part of the corpus. Attempts differ; some cannot be written (two names in one place)."""
    name = f"{_STREAM[split]}/{regime}/{seed}/{attempt}"
    rng = random.Random(name)
    structure = rng.choice(sorted((s for s in STRUCTURES.values() if s.split == split), key=lambda s: s.name))
    words: tuple[Words, Words] = ({}, {})
    for group in structure.groups:
        first = draw_words(group, split, rng)
        second = draw_words(group, split, rng) if rng.random() < 0.65 else first
        words[SOURCE].update(first)
        words[TARGET].update(second)
    plain = Config(structure.name, _draw_sizes(rng), words, file=_draw_file(regime, rng), sample=sample, seed=name)
    return replace(plain, changes=tuple(_draw_changes(plain, split, regime, rng)))


def _draw_sizes(rng: random.Random) -> Sizes:
    width = 8
    return Sizes(
        width=width,
        hidden=width * rng.choice([1, 2, 2, 3]),
        depth=rng.choice([1, 2, 2, 3, 4]) if rng.random() < 0.96 else 11,  # 10 comes before 2 in the alphabet
        stages=rng.choice([1, 2, 3]),
        experts=rng.choice([2, 3, 4]),
        kv=rng.choice([width, width, width // 2]),
        outputs=rng.choice([4, 4, 5, width]),
        bias=rng.random() < 0.75,
        same_heads=rng.random() < 0.6,
    )


def _draw_file(regime: Regime, rng: random.Random) -> FileKind:
    if regime == "safetensors":
        return rng.choice(["safetensors", "safetensors", "safetensors", "sorted"])  # type: ignore[return-value]
    if regime == "everything":
        return rng.choice(["state_dict", "state_dict", "sorted", "safetensors"])  # type: ignore[return-value]
    return "state_dict"


def _draw_changes(plain: Config, split: Split, regime: Regime, rng: random.Random) -> Iterator[Change]:
    """Some operators that have something to do, each on a side that it may happen on."""
    known = sorted(OPERATORS.values(), key=lambda op: op.name)
    possible = [op for op in known if op.split in (split, "both") and regime in op.regimes]
    orders = [op for op in possible if op.stage == "order"]
    others = [op for op in possible if op.stage != "order"]
    if plain.file != "state_dict":  # equal numbers confirm a direction, and without an order nothing shows the other
        others = [op for op in others if not op.name.startswith("count_down")]
    count = rng.choice([0, 1, 2, 2, 3, 4])
    yield from _sample(plain, others, count, rng)
    if orders and (regime == "shuffled" or rng.random() < 0.4):
        yield from _sample(plain, orders, rng.choice([1, 1, 2]), rng)


def _sample(plain: Config, operators: list[Operator], count: int, rng: random.Random) -> Iterator[Change]:
    """Draw without replacement, by weight."""
    pool = list(operators)
    while pool and count:
        (op,) = rng.choices(pool, [op.weight for op in pool])
        pool.remove(op)
        if op.name.startswith(_LENGTH):  # two of them could make both lists as long, and nobody would see it
            pool = [other for other in pool if not other.name.startswith(_LENGTH)]
        side = {"source": SOURCE, "target": TARGET}.get(op.where, rng.choice([SOURCE, TARGET]))
        change = Change(op.name, side, rng.randrange(10**6))
        if op.apply(plain.plain_side(side), random.Random(change.seed)):
            count -= 1
            yield change
