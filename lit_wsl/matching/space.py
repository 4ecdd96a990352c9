"""What two descriptions leave open, as decisions with complete sets of options, and the entries that a choice means.

The layers of both sides are gathered in regions: sets of subtrees that are alike (blocks, towers), and what stands
outside of all. Layers that could take one another's place, alone or as parts of a whole, make a group with a decision
of its own (which goes where), and further ones where shapes leave more open: the order of the parts, whether they
alternate head by head, which way round squares stand, rotary rows, the gates of recurrent cells, the numbering of
blocks. A decision holds for all copies in a region: if one block has it so, all have.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from lit_wsl.matching.entries import leaves_nothing_open
from lit_wsl.matching.formula import is_query_or_key
from lit_wsl.matching.gathering import gathered
from lit_wsl.matching.layers import (
    Region,
    Unit,
    buffers_of,
    cells_of,
    home_of,
    is_fused,
    is_square,
    may_turn,
    recorded,
    regions,
)
from lit_wsl.matching.layouts import rotating_towers
from lit_wsl.matching.parts import (
    MAX_OPTIONS,
    CoverPair,
    Part,
    agree_most,
    fits,
    groups_of,
    joins,
    numberings,
    paired_lists,
    share_words,
    spell_parts,
    taken_apart,
    trimmed,
    vector_axis,
    with_dissolved,
)
from lit_wsl.matching.shapes import (
    by_head,
    first_of_parts,
    groupings,
    in_one_copy,
    is_turn,
    laid_out,
    layouts_of,
    listed,
    squeezed,
    transpose_shape,
    transposed,
    turned,
    turns,
)
from lit_wsl.matching.symmetries import Rotations, Turning
from lit_wsl.plan.entries import PlanEntry
from lit_wsl.plan.operations import Concat, Operation, Reorder, Rotary, Split, Stack, Transpose, Unstack
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, Shape

Pick = Callable[["int | None"], Any]


@dataclass
class Decision:
    """One thing that is open."""

    text: str
    options: list  # of anything; the first is the best guess
    labels: list[str]
    told: bool = False  # names say that it is the first, which stands unless another one is significantly better


class Space:
    """All that is open about a pair of models, and what a choice means.

    Args:
        source: The checkpoint's side.
        target: The model's side.
        plan: What names and structure say. What it is sure of is no question.
        turnings: Rows that turn with their position, as the model's gradient shows.
        wide: Whether what is rare is asked, too: two parts that alternate, head by head or row by row.
        counts: Whether the numbers of blocks are asked about even where names tell what is in them.
        trust: Whether names tell anything.

    Attributes:
        decisions: What is open; some may have one option only.
    """

    def __init__(
        self,
        source: ModelDescription,
        target: ModelDescription,
        plan: TransferPlan,
        turnings: Sequence[Turning] = (),
        *,
        wide: bool = False,
        counts: bool = False,
        trust: bool = True,
    ) -> None:
        self.source, self.target, self.wide, self.counts, self.trust = source, target, wide, counts, trust
        self.decisions: list[Decision] = []
        self.parts: list[Part] = []
        self.numbering: dict[int, int] = {}
        self.inner: dict[int, int] = {}  # the same of what is nested in the copies of a region, such as experts
        self.rotary: int | None = None
        self.gates: int | None = None
        self._all: dict[int, list[int]] = {}
        self._known: dict[tuple[int, tuple[int, ...]], list[PlanEntry]] = {}
        self._pieces: dict[tuple[Any, ...], list[PlanEntry]] = {}
        self._buffers = buffers_of(source), buffers_of(target)
        self._buffers_too = not plan.excludes_buffers
        self._claims = {t: set(e.sources) for e in plan for t in e.targets}
        self._filled = set(self._claims)  # what is not among these is open anyhow
        for doubt in plan.ambiguous:
            if len({c.sources for c in doubt.candidates}) == 1:  # where it comes from is known, how it is laid out not
                self._claims.update({t: set(doubt.candidates[0].sources) for t in doubt.targets})
        self._turned = {t for e in plan for t in e.targets if any(map(is_turn, e.operations))}
        self._orders = {frozenset(names): names for e in plan if (names := first_of_parts(e))}
        self._told: set[str] = set()  # targets whose names, or whose place in the same code, tell their source
        self._rotations = Rotations(turnings)
        self.shows_turns, self._still = bool(self._rotations), self._rotations.still
        self._rotates = rotating_towers(source, target)
        if self._rotations:
            self._rotates = lambda name: True
        self._turning = False  # whether rows of queries and keys are asked about
        self.hidden, self._gate_count = 0, 0
        self.regions: list[tuple[Region, Region]] = []
        if trust and leaves_nothing_open(plan, source, target):
            return
        self.hidden, self._gate_count = cells_of(source, target)
        self.regions = self._pair_regions(*gathered(regions(source), regions(target)))
        units = [unit for _, ours in self.regions for unit in ours.units]
        called = [u for u in units if is_query_or_key(u.path) and len(u.shapes[0]) == 2]
        if not all(self._turns(u) or self._still.issuperset(u.names[0][0]) for u in called):
            self._rotations = Rotations(())  # names know of more
        self._widths = Counter(size for unit in units for size in {n for shape in unit.shapes for n in shape})
        parts_of = [[Part(k, s, t) for s, t in groups_of(a.units, b.units)] for k, (a, b) in enumerate(self.regions)]
        for part in (part for parts in parts_of for part in parts if not part.grows):
            sides = part.source, part.target
            part.covers = [c for c in part.covers if recorded(c, sides, self._buffers)] or part.covers
        told = {k: bool(sum(map(self._tell, parts_of[k]))) for k in range(1, len(parts_of))}
        orders = {k: self._orders_of(k, told[k]) for k in told}
        # Where lists have other names and any order, the numbers of what stands beside them tell as little.
        counted = all(told[k] or len(orders[k]) == 1 or share_words(*self.regions[k]) for k in orders)
        for part in parts_of[0]:
            self._tell(part, counted)
        for k, parts in enumerate(parts_of):
            if k:
                labels = [listed(o) for o in orders[k]]
                self.numbering[k] = self._add(
                    f"numbering of {self.regions[k][1].copies[0]}", orders[k], labels, told[k]
                )
            self._count_inner(k, parts)
            layers = [(u, t) for part in parts for u in (*part.source, *part.target) for t in part.target]
            self._turning |= self._still.isdisjoint(self.regions[k][1].names) and any(
                len(u.shapes[0]) == 2 and self._turns(u) and self._open(t) and self._rotates(t.all_names[0])
                for u, t in layers
            )
            for part in parts:
                self._part(part)
        self._add_rotary()
        self._add_gates()

    def _add(self, text: str, options: list[Any], labels: list[str], told: bool = False) -> int:
        self.decisions.append(Decision(text, options, labels, told))
        return len(self.decisions) - 1

    def _pair_regions(self, theirs: list[Region], ours: list[Region]) -> list[tuple[Region, Region]]:
        """Regions of both sides that stand for each other; the layers of others are among those outside of all."""
        pairs = []
        free, lonely = list(ours[1:]), []
        for a in theirs[1:]:
            fitting = [b for b in free if len(b.copies) == len(a.copies) and b.elements == a.elements]
            known = [b for b in fitting if any(self._claims.get(n, set()) & a.names for n in b.names)]
            if fitting:
                b = (known or fitting)[0]
                free.remove(b)
                pairs.append((a, b))
            else:
                lonely.append(a)
        outer, inner = paired_lists((theirs[0], *lonely), (ours[0], *free))
        (a, *lonely), (b, *free) = outer
        outside = with_dissolved(a, lonely, b), with_dissolved(b, free, a)
        pairs = [outside, *inner, *pairs]
        return [
            (Region(a.copies, taken_apart(a.units, b.units)), Region(b.copies, taken_apart(b.units, a.units)))
            for a, b in pairs
        ]

    def _orders_of(self, k: int, told: bool) -> list[tuple[int, ...]]:
        """Which copy goes where: as their names tell, as they are counted in a family of names, or open."""
        copies = [side.copies for side in self.regions[k]]
        same = tuple(range(len(copies[0])))
        names = [[p.rstrip(".").rpartition(".")[2] for p in side] for side in copies]
        if all(n.isdigit() for side in names for n in side):
            return [same] if told and not self.counts else numberings(len(same))
        spoken = len(set(names[0])) == len(same) and set(names[0]) == set(names[1])
        return [tuple(map(names[0].index, names[1]))] if spoken else numberings(len(same))

    def _count_inner(self, k: int, parts: Sequence[Part]) -> None:
        """Ask about the numbers of copies that are nested in those of a region."""
        nested = [(max(u.times for u in (*p.source, *p.target)), p) for p in parts]
        times = {count for count, _ in nested if count > 1}
        if self.counts and len(times) == 1:
            orders = numberings(*times)
            told = self._told.issuperset(n for count, p in nested if count > 1 for u in p.target for n in u.all_names)
            labels = [listed(o) for o in orders]
            self.inner[k] = self._add(f"numbering inside of {self.regions[k][1].copies[0]}", orders, labels, told)

    def _tell(self, part: Part, counted: bool = True) -> bool:
        """Keep the covers that agree with what names tell, and numbers, if these do; whether sizes don't tell it."""
        alone = len(part.covers) == 1
        if not self.trust and not alone:
            part.covers.sort(key=lambda c: sum(not self._claimed(*part.units(pair)) for pair in c))
            return False
        told = [
            (i, j)
            for j, t in enumerate(part.target)
            for i, s in enumerate(part.source)
            if fits(s, t) is not None
            and self._claimed([s], [t])
            and agree_most(s, t, part.source, part.target, counted)
        ]
        spelled = [
            cover
            for c in part.covers
            for cover in c
            if len(cover[0]) + len(cover[1]) > 2
            and self._claimed(*part.units(cover))
            and spell_parts(*part.units(cover))
        ]
        if part.grows:
            part.covers = part.in_order({j: i for i, j in told})
            part.fixed = frozenset(i if part.joins else j for i, j in told)
        sure = [((i,), (j,)) for i, j in told] + [(tuple(g), tuple(h)) for g, h in spelled]
        keeping = [c for c in part.covers if all(pair in c for pair in sure)]
        part.covers = keeping or part.covers
        part.covers.sort(key=lambda c: sum(not self._claimed(*part.units(pair)) for pair in c))
        for pair in sure if keeping else []:
            self._told.update(n for u in part.units(pair)[1] for n in u.all_names)
        if alone and part.covers and all(len(g) == len(h) == 1 for g, h in part.covers[0]):
            self._told.update(n for u in part.target for n in u.all_names)
        return bool(sure) and not alone

    def _claimed(self, sources: Sequence[Unit], targets: Sequence[Unit]) -> bool:
        """Whether the plan takes these layers to those, or says nothing of them."""
        names = {n for u in sources for n in u.all_names}
        return all(self._claims.get(n, names) <= names for u in targets for n in u.all_names)

    def _part(self, part: Part) -> None:
        """Add a group of layers with its decisions, unless nothing is open about it."""
        if not 0 < len(part.covers) <= MAX_OPTIONS:
            return
        settled = not any(self._open(u) or self._may_be_laid_out(u, part) for u in part.target)
        squares, fusions = part.squares, part.fusions
        doubted = bool(self._turned or self.counts or part.renames)
        guessed = bool(fusions or (squares and doubted))
        settled = settled and not guessed  # the order of parts and the orientation of squares are never quite sure
        numbering = self.numbering.get(part.region)
        counted = numbering is None or len(self.decisions[numbering].options) == 1
        if settled and counted and (part.region not in self.inner or not part.is_nested):
            return
        shown = ", ".join(u.path for u in part.target[:4])
        part.which = self._add(shown, part.covers, [part.describe(c) for c in part.covers])
        self.parts.append(part)
        for cover in fusions:
            if part.key(cover) not in part.order:
                self._fusion(part, cover)
        told, part.each = not part.renames and not any(map(self._open, squares)), self.wide
        if squares and (doubted or fusions or not told):
            guess = any(n in self._turned for u in squares for n in u.all_names)
            labels = ["transposed" if turn else "as they are" for turn in (guess, not guess)]
            for manner in part.manners:
                part.turns[manner] = self._add(f"squares of {shown}", [guess, not guess], labels, told)
        fused = [u for u in part.target if self._may_be_laid_out(u, part)]
        if fused:
            part.layout = self._add(f"layout of {fused[0].path}", *layouts_of(min(fused[0].shapes[0])))

    def _may_be_laid_out(self, unit: Unit, part: Part) -> bool:
        """Whether queries, keys and values in one may stand otherwise: other names, and the shape tells nothing."""
        like = [s for s in part.source if fits(s, unit) is not None]
        if any(re.search(r"_[hi]h(_|$)", name) for u in (unit, *like) for name in u.all_names):
            return False  # rows of gates
        names = {s.path.rpartition(".")[2] for s in like}
        as_wide = self._widths[min(unit.shapes[0], default=0)] > 1  # what goes in is as wide as other layers
        return is_fused(unit) and as_wide and bool(names) and names != {unit.path.rpartition(".")[2]}

    def _fusion(self, part: Part, cover: tuple[Sequence[int], Sequence[int]]) -> None:
        key, parts = part.key(cover), part.parts(cover)
        orders = list(permutations(range(key[1])))
        guess = self._orders.get(frozenset(p.names[0][0][0] for p in parts), ())
        known = tuple(next(k for k, p in enumerate(parts) if p.names[0][0][0] == name) for name in guess)
        orders.sort(key=lambda o: o != known)
        told = bool(known) and not any(map(self._open, part.units(cover)[1]))
        part.order[key] = self._add(f"order of the parts of {key[0]}", orders, [listed(o) for o in orders], told)
        whole = part.target[cover[1][0]] if len(cover[0]) > 1 else part.source[cover[0][0]]
        axis, turn = joins(whole, parts) or (0, False)
        if key[1] != 3 and not self.wide:
            return
        groups = groupings(min((transpose_shape(u.shapes[0]) if turn else u.shapes[0])[axis] for u in parts), key[1])
        labels = ["one after another", *(f"by {g} groups of heads" for g in groups[1:])]
        part.heads[key] = self._add(f"heads of {key[0]}", groups, labels, told)

    def _open(self, unit: Unit) -> bool:
        if (self.hidden and unit.shapes[0][:1] == (self.hidden,)) or (self._turning and self._turns(unit)):
            return True
        return not all(known.issuperset(unit.all_names) for known in (self._told, self._filled))

    def _turns(self, unit: Unit) -> bool:
        """Whether there are queries or keys in a layer, as the model's gradient shows, or else its name."""
        if self._rotations:
            return any(name in self._rotations for name in unit.all_names)
        return is_query_or_key(unit.path)

    def _add_rotary(self) -> None:
        if self._rotations and self._turning:
            ways = self._rotations.ways
            labels = ["as they are", *(f"to the other convention, {r} of {w} rows" for w, r in ways)]
            self.rotary = self._add("rotary rows of queries and keys", [None, *ways], labels)
            return
        rows = [
            u.shapes[0][0]
            for part in self.parts
            for u in (*part.source, *part.target)
            if self._turning and len(u.shapes[0]) == 2 and is_query_or_key(u.path)
        ]
        least = min(rows, default=0)
        widths = [w for w in range(4, min(least, 256) + 1, 2) if least % w == 0]
        options: list[Any] = [None]
        for w in sorted(widths, reverse=True):
            for r in (w, w // 2, w // 4):
                if r % 2 == 0 and r >= 4:
                    options += [(w, r, True), (w, r, False)][: 2 if r > 4 else 1]  # of four rows both are one order
        if len(options) > 1:
            labels = ["as they are"]
            labels += [f"{'halves to pairs' if p else 'pairs to halves'}, {r} of {w} rows" for w, r, p in options[1:]]
            self.rotary = self._add("rotary rows of q and k", options, labels)

    def _add_gates(self) -> None:
        pairs = [(p, pair) for p in self.parts for cover in p.covers for pair in cover]
        alone = {p.target[h[0]].shapes[0][:1] for p, (g, h) in pairs if len(g) == len(h) == 1}
        if self.hidden and (self.hidden,) in alone:
            orders = list(permutations(range(self._gate_count)))
            self.gates = self._add("order of the gates", orders, [listed(o) for o in orders])

    # -- what a choice means ---------------------------------------------------------------------------------------

    @property
    def first(self) -> tuple[int, ...]:
        """The best guess."""
        return (0,) * len(self.decisions)

    @property
    def is_open(self) -> bool:
        """Whether there is anything to decide."""
        return any(len(d.options) > 1 for d in self.decisions)

    @property
    def alike(self) -> list[list[int]]:
        """Decisions about the order of as many parts inside one region, as of the gates of a cell."""
        found: dict[tuple[int, int], list[int]] = {}
        for part in self.parts:
            for (_, count), d in part.order.items():
                found.setdefault((part.region, count), []).append(d)
        return [own for own in found.values() if len(own) > 1]

    def others_of(self, part: Part) -> list[int]:
        """Decisions beside its own that change what a group of layers does: its region's numbering, norms, rows."""
        found = [self.numbering.get(part.region), self.inner.get(part.region) if part.is_nested else None, self.gates]
        if any(map(self._turns, (*part.source, *part.target))):
            found.append(self.rotary)
        norms = [d for p in self.parts if p.region == part.region and not p.has_matrices for d in p.decisions]
        return [d for d in (*found, *norms) if d is not None and len(self.decisions[d].options) > 1]

    def copies(self, part: Part) -> int:
        """How many blocks a group of layers stands in."""
        return len(self.regions[part.region][0].copies)

    def in_order(self, choice: Sequence[int]) -> list[tuple[int, ...]]:
        """A choice with all layers outside of regions as they stand on both sides, and all the other way round."""
        found = [list(choice), list(choice)]
        for part in (p for p in self.parts if self.copies(p) == 1 and len(p.source) == len(p.target)):
            for made, cover in zip(found, part.in_order({})):
                made[part.which] = part.numbers.get(cover, made[part.which])
        return [tuple(made) for made in found]

    def backwards(self, numbering: int) -> int:
        """The option of a numbering that counts blocks from the end."""
        options = self.decisions[numbering].options
        return options.index(options[0][::-1]) if options[0][::-1] in options else 0

    def is_consistent(self, choice: Sequence[int]) -> bool:
        """Whether rotary rows turn within the heads that a fusion alternates by."""
        if self.rotary is None or not choice[self.rotary] or self._rotations:
            return True
        width = self.decisions[self.rotary].options[choice[self.rotary]][0]
        for part in self.parts:
            for pair in self.decisions[part.which].options[max(choice[part.which], 0)]:
                d = part.heads.get(part.key(pair)) if len(pair[0]) + len(pair[1]) > 2 else None
                groups = 1 if d is None else self.decisions[d].options[choice[d]]
                if groups > 1 and width * groups != min(min(u.shapes[0]) for u in part.parts(pair)):
                    return False
        return True

    def exchanges(self, choice: Sequence[int], part: Part, *, wholes: bool = False) -> Iterator[tuple[int, ...]]:
        """A choice with any two layers of a group exchanged, or only wholes; the places of the others as they are."""
        if choice[part.which] < 0:
            return
        orders = {key: self.decisions[d].options[choice[d]] for key, d in part.order.items()}
        found = list(part.exchanges(part.covers[choice[part.which]], orders, only_wholes=wholes))
        labels = self.decisions[part.which].labels
        labels += [part.describe(cover) for cover in part.covers[len(labels) :]]
        for number, changed in found:
            made = list(choice)
            made[part.which] = number
            for key, order in changed.items():
                made[part.order[key]] = self.decisions[part.order[key]].options.index(tuple(order))
            yield tuple(made)

    def all_of(self, number: int) -> list[int]:
        """All decisions that say what becomes of a group of layers."""
        if number not in self._all:
            part = self.parts[number]
            inner = self.inner.get(part.region) if part.is_nested else None
            shared = (self.numbering.get(part.region), inner, self.rotary, self.gates)
            self._all[number] = [d for d in (*part.decisions, *shared) if d is not None]
        return self._all[number]

    def entries_of(self, number: int, choice: Sequence[int]) -> list[PlanEntry]:
        """The entries that a choice means for a group of layers; the same objects wherever it means the same."""
        key = number, tuple(choice[d] for d in self.all_of(number))
        if key not in self._known:
            self._known[key] = self._entries_of(number, choice)
        return self._known[key]

    def meaning(self, choice: Sequence[int]) -> frozenset[PlanEntry]:
        """What a choice does; several may mean the same."""
        return frozenset(entry for entry, _ in self.entries(choice))

    def entries(self, choice: Sequence[int]) -> Iterator[tuple[PlanEntry, bool]]:
        """The entries that a choice means, and whether they are switched on."""
        odd = tuple(choice[len(self.decisions) :])
        for number, part in enumerate(self.parts):
            entries, on = self.entries_of(number, choice), choice[part.which] >= 0
            if odd and odd[0] == number:
                entries = in_one_copy(entries, part.target[odd[2]], part.target[odd[3]], odd[1])
            yield from ((entry, on) for entry in entries)

    def _entries_of(self, number: int, choice: Sequence[int]) -> list[PlanEntry]:
        def pick(decision: int | None) -> Any:
            return None if decision is None else self.decisions[decision].options[max(choice[decision], 0)]

        part = self.parts[number]
        copies = len(self.regions[part.region][0].copies)
        order = pick(self.numbering.get(part.region)) or tuple(range(copies))
        inner = pick(self.inner.get(part.region)) if part.is_nested else None
        entries: list[PlanEntry] = []
        for cover in pick(part.which):
            whole = part.key(cover)
            alone = len(cover[0]) == len(cover[1])
            own, fill = (
                ((part.layout,), self._one) if alone else ((part.order[whole], part.heads.get(whole)), self._several)
            )
            turn = part.turns.get(part.manner(cover))
            said = inner, *(pick(d) for d in (turn, *own, self.rotary, self.gates))
            if (number, cover, order, said) not in self._pieces:
                self._pieces[number, cover, order, said] = [
                    entry for k in range(copies) for entry in fill(part.numbered(inner), cover, order[k], k, pick)
                ]
            entries += self._pieces[number, cover, order, said]
        return entries

    def _row_ops(self, s: Unit, t: Unit, tensor: int, pick: Pick) -> tuple[Operation, ...]:
        """Rotary and gate operations on the rows of one tensor."""
        ops: list[Operation] = []
        shape = s.shapes[tensor]
        named = not self._rotations and (is_query_or_key(s.path) or is_query_or_key(t.path))
        if named and pick(self.rotary) is not None:
            w, r, pairs = pick(self.rotary)
            if shape and shape[0] % w == 0:
                ops.append(Rotary(w, r, pairs))
        if self.gates is not None and shape and shape[0] == self.hidden:
            perm = pick(self.gates)
            if perm != tuple(sorted(perm)):
                ops.append(Reorder(perm))
        return tuple(ops)

    def _one(self, part: Part, cover: CoverPair, a: int, b: int, pick: Pick) -> list[PlanEntry]:
        """Entries of one layer that becomes another as a whole, from copy ``a`` to copy ``b``."""
        s, t, turn = part.source[cover[0][0]], part.target[cover[1][0]], bool(pick(part.turns.get(part.manner(cover))))
        layout = pick(part.layout) if is_fused(t) else None
        out = []
        for i, j in fits(s, t) or []:
            names_s, names_t = s.names[i][a], t.names[j][b]
            rows = self._row_ops(s, t, i, pick)
            if s.times == t.times:
                for x, y in zip(names_s, names_t):
                    way = pick(self.rotary)
                    last = self._rotations.convert(y, t.shapes[j], way) if way else ()
                    laid = laid_out(t.shapes[j], layout) if max(t.shapes[j]) == max(t.shapes[0]) else ()
                    ops = (*rows, *turned(s.shapes[i], t.shapes[j], turn), *laid, *last)
                    out.append(PlanEntry((x,), (y,), ops, (s.shapes[i],), (t.shapes[j],)))
            elif t.times == 1:  # experts into a stack
                turned_too = len(s.shapes[i]) == 2 and turns((s.times, *s.shapes[i]), t.shapes[j], turn)
                ops = (*rows, *((Transpose(),) if turned_too else ()), Stack(0, s.times))
                out.append(PlanEntry(names_s, names_t, ops, (s.shapes[i],) * s.times, (t.shapes[j],)))
            else:
                whole = (t.times, *t.shapes[j])
                ops = (Unstack(0, t.times), *((Transpose(),) if turns(s.shapes[i], whole, turn) else ()))
                out.append(PlanEntry(names_s, names_t, ops, (s.shapes[i],), (t.shapes[j],) * t.times))
        out += self._statistics(s, t, a, b)
        return out

    def _statistics(self, s: Unit, t: Unit, a: int, b: int) -> list[PlanEntry]:
        """The buffers beside a layer, which go where it goes."""
        if not self._buffers_too or s.times != t.times:
            return []
        homes = ((home_of(x), home_of(y)) for x, y in zip(s.names[0][a], t.names[0][b]))
        return [
            PlanEntry((i.name,), (j.name,), (), (i.shape,), (j.shape,), kind="buffer")
            for theirs, ours in homes
            for j in self._buffers[1].get(ours, ())
            for i in self._buffers[0].get(theirs, ())
            if i.leaf == j.leaf and i.shape == j.shape
        ]

    def _several(self, part: Part, cover: CoverPair, a: int, b: int, pick: Pick) -> list[PlanEntry]:
        """Entries of a fusion, from copy ``a`` to copy ``b``: weights, biases."""
        join, key, parts = len(cover[0]) > 1, part.key(cover), part.parts(cover)
        parts = [parts[i] for i in pick(part.order[key])]
        heads = pick(part.heads.get(key)) or 1
        whole = part.target[cover[1][0]] if join else part.source[cover[0][0]]
        found = joins(whole, parts)
        assert found is not None
        stacked = parts[0].times if parts[0].times > whole.times else 1
        out = []
        for j, whole_shape in enumerate(whole.shapes):
            given = [p.shapes[j] for p in parts]
            flat, shapes = trimmed(whole_shape, given)
            axis, turn = found if j == 0 else (vector_axis(whole.shapes[0], whole_shape), False)
            if j == 0 and part.turns and all(map(is_square, parts)) and may_turn(shapes[0]):
                turn = bool(pick(part.turns[part.manner(cover)]))
            sizes = tuple((transpose_shape(s) if turn else s)[axis] for s in shapes)
            first: tuple[Operation, ...] = self._rotary_of(parts, shapes, pick)
            last: tuple[Operation, ...] = ()
            lead = int(stacked > 1 or (j == 0 and axis > 0 and len(flat) == 3) or (j > 0 and axis > 0))
            axis += stacked > 1
            alternating = by_head(flat, sizes, heads, join, axis, lead)
            turn = turn if alternating is None or axis == lead else not turn  # by head they are joined by rows
            side = transposed(shapes[0]) if turn else ()
            chain = alternating or ((Concat(axis, sizes),) if join else (Split(axis, sizes),))
            way = pick(self.rotary) if self._rotations and not lead else None
            if way and join:
                turns, along = (heads, 0) if alternating else (1, axis)
                last = self._rotations.convert_parts(whole.names[j][b][0], sizes, turns, along, way)
            elif way:
                last = self._rotations.convert_each([p.names[j][b][0] for p in parts], shapes, way)
            before = (*first, *side, Stack(0, stacked)) if stacked > 1 else (*first, *side, *last)
            after = (Unstack(0, stacked), *side, *first) if stacked > 1 else (*side, *first, *last)
            ends = tuple(s for s in given for _ in range(stacked))
            for x in range(whole.times):
                own = [p.names[j][a if join else b] for p in parts]
                names = tuple(n for copies in own for n in (copies if stacked > 1 else copies[x : x + 1]))
                name = (whole.names[j][b if join else a][x],)
                ops = (*squeezed(given[0], shapes[0]), *before, *chain, *squeezed(flat, whole_shape))
                back = (*squeezed(whole_shape, flat), *chain, *after, *squeezed(shapes[0], given[0]))
                sides = (names, name, ops, ends, (whole_shape,)) if join else (name, names, back, (whole_shape,), ends)
                out.append(PlanEntry(*sides))
        return out

    def _rotary_of(self, parts: Sequence[Unit], shapes: Sequence[Shape], pick: Pick) -> tuple[Operation, ...]:
        """What turns the rows of queries and keys among some parts."""
        rows = pick(self.rotary)
        if rows is None or self._rotations:
            return ()
        only = tuple(k for k, p in enumerate(parts) if is_query_or_key(p.path))
        if not only or any(shapes[k][0] % rows[0] for k in only):
            return ()
        width, rotated, to_pairs = rows
        return (Rotary(width, rotated, to_pairs, only),)
