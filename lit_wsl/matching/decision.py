"""The decision: what earns a pair its place against all its rivals, and what stays open.

A *class* is a set of items of one size below two corresponding modules, any of which could be any other by its shape.
Its pairs are decided by kinds of evidence, the strongest first. How much of a kind there is does not count, since that
does not carry over to other code; whether it is there does (:mod:`lit_wsl.matching.risks` counts how often each kind
was right):

1. **path**: the same path with equal sets of numbers along it; never given away.
2. **words**: the words that tell an item from its rivals lead over every rival, from both sides.
3. **alone**: the only one of its size, where both sides hold the same number of elements.
4. **numbers**: members of a family are paired by number, if both sides have the same, or by their place.
5. **exclusion**: the last one left, where everything else was decided by the steps before.
6. **order**: what is left goes by its place among the decided siblings of the same module, if the source has an order
   and nothing on its level dissents.

Everything else stays open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lit_wsl.matching.dissent import (
    NAMELESS_ORDER,
    NEIGHBOUR,
    OTHER_LETTER,
    OTHER_MAKE,
    OUT_OF_ORDER,
    STRONG,
    against,
    are_opposite,
    letters_apart,
)
from lit_wsl.matching.learned import FEW, Learned, are_partners, ascending
from lit_wsl.matching.likeness import (
    ALL_OR_NONE,
    BLOCKS,
    ENDS,
    HALF_WORDS,
    INITIALS,
    LAYER_ONLY,
    LAYERS,
    NEAR_WORDS,
    SHORT_WORDS,
    SIDES,
    WEAK,
    WORDS,
    Shared,
    leads,
    liken,
    own_words,
    paired_by_initials,
)
from lit_wsl.matching.numbers import (
    NUMBERS,
    counted_down,
    in_count,
    known_for_roles,
    number_map,
    runs_apart,
    runs_otherwise,
)
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.order import MOVED, ORDER, ORDER_ALONE, is_moved
from lit_wsl.matching.regions import Decision, Pair, Region, Sides, Tie, other_name
from lit_wsl.matching.replaced import (
    RENAMED_ALONE,
    are_kept_apart,
    are_of_one_role,
    are_others,
    other_head,
    renamed_alone,
)
from lit_wsl.matching.risks import may_load, refusal
from lit_wsl.matching.shapes import TRANSPOSED, PairCosts, cut_by_shapes, transpose_shape
from lit_wsl.matching.tree import (
    Family,
    Item,
    evened,
    families_of,
    is_strong,
    literal_if_needed,
    relative,
    role_of,
    words_apart,
)
from lit_wsl.matching.tree import literal as _literal
from lit_wsl.matching.words import plain_words
from lit_wsl.structure.description import core

PATH, TIED, ALONE, DISTINCT = "path", "tied", "alone", "distinct shape"
ROLE, COUNT = "as in other blocks", "both count"
OTHER_WORDS = "the last ones left of their size, but their names fit others better"
TURNED = "the shapes fit as they are, but the names say that matrices are stored the other way round"
MIRRORED = "the blocks of one list stand the other way round, so that the list may be counted from its other end"
NUMBERED_OTHERWISE = "numbered differently on the two sides, and it is unknown which numbers correspond"
OTHER_HEAD = "they would fit, but their names mean different things: it may be another head"
EXCLUSION, KNOWN = "exclusion", "known for one role"


def is_named(cell: str) -> bool:
    """Whether names decided."""
    return cell.startswith((PATH, TIED, WORDS, SHORT_WORDS, HALF_WORDS, INITIALS, "open"))


class ClassSolver:
    """Decides classes.

    Args:
        options: How to match; ``shape_only`` ignores names.
        costs: What pairs cost by structure and shapes.
        sides: What is known of the two sides as wholes.
        learned: What the pass before learned.
    """

    def __init__(self, options: MatchingOptions, costs: PairCosts, sides: Sides, learned: Learned) -> None:
        self.learned = learned
        self.names = options.strategy != "shape_only"
        self.costs = costs
        self.ties, self.heads, self.ordered, self.written = sides.ties, sides.heads, sides.ordered, sides.written
        self.backwards, self.sources_of, self.moved = sides.backwards, sides.sources_of, sides.moved

    def solve(self, s: list[Item], t: list[Item], region: Region) -> Decision:
        """Decide a class: members in registration order, and where they stand."""
        out = self._solve(s, t, region)
        found = [self.judge(p, region) for p in out.pairs]
        out.pairs = [p for p, why in found if not why]
        refused = [(p, why) for p, why in found if why]
        if refused:  # what was the last one left is so no more
            refused += [(p, "") for p in out.pairs if p.cell.startswith(EXCLUSION)]
            out.pairs = [p for p in out.pairs if not p.cell.startswith(EXCLUSION)]
        joint = [p for p, why in refused if why in ("", NEIGHBOUR, OUT_OF_ORDER)]
        if len(joint) > 1 and len({p.source.profile_key for p in joint}) == 1:
            fs = families_of([p.source for p in joint], region.source)
            ft = families_of([p.target for p in joint], region.target)
            self._tie(_literal(fs), _literal(ft), out)
            refused = [(p, why) for p, why in refused if why not in ("", NEIGHBOUR, OUT_OF_ORDER)]
        out.ties += [Tie.of(p.source, p.target, region, why or OTHER_WORDS) for p, why in refused]
        return out

    def judge(self, p: Pair, region: Region) -> tuple[Pair, str]:
        """A pair with its cell, and why it is not loaded, if so: something speaks against it, or too little for it."""
        if p.cell == TIED:
            return p, ""
        cell = self.judged(p, region)
        why = self._against(p, cell, region) or ("" if may_load(cell) else refusal(cell))
        return (p if cell == p.cell else replace(p, cell=cell)), why

    def judged(self, p: Pair, region: Region) -> str:
        """The cell of a pair, by whether names and order agree with it too."""
        if p.cell in (PATH, TIED) or not self.names or min(region.source.level, region.target.level) < 2:
            return p.cell
        kind = other_name(p.source, p.target, region)
        if kind and max(p.source.level, p.target.level) < 2:
            kind = "" if are_of_one_role(p.source, p.target) else kind + self._around(p, region)
        named = is_named(p.cell) or p.cell.startswith(ORDER)
        order = "" if named else self.learned.rows.agree(region, p.source, p.target) if self.ordered else "unordered"
        return ", ".join(filter(None, (p.cell, kind, order)))

    def _against(self, p: Pair, cell: str, region: Region) -> str:
        """What speaks against a pair, for or against which names may speak at all."""
        if p.cell in (PATH, TIED) or not self.names:
            return OTHER_LETTER if p.cell == PATH and self.names and letters_apart(p.source, p.target, region) else ""
        if is_moved(p, self.moved):
            return MOVED
        if p.cell.startswith(ORDER_ALONE) and ", other" in cell:
            return NAMELESS_ORDER
        head = p.target.start in self.heads
        half = p.cell.startswith(f"open {HALF_WORDS}") or (p.cell.startswith(DISTINCT) and ", other name" in cell)
        at_end = (p.cell.startswith(ORDER) and " at an end" in cell) or (half and head)
        if at_end or (head and " at a head" in cell and not self.learned.renames.are_all(p.source, p.target)):
            return OTHER_HEAD
        if not is_named(p.cell) and not p.cell.startswith(COUNT):
            kept = ", other name" in cell and " among kept" in cell
            beside = kept and (" among kept siblings" in cell or p.cell.startswith(ROLE))
            if beside or renamed_alone(p, region, self.learned):
                return RENAMED_ALONE
        alone, last = p.cell.startswith(ALONE), p.cell.startswith(EXCLUSION)
        agree = self.learned.rows.agree(region, p.source, p.target) if self.ordered else ""
        if agree == "out of line" and (last or (p.cell.startswith(COUNT) and " among kept" in cell)):
            return OUT_OF_ORDER
        if last and ("module name" in cell or " at an end" in cell) and agree not in ("in order", "in line"):
            return OTHER_WORDS  # what is left of two towers or two heads, where the name of one was hardly known
        weak = is_named(p.cell) and p.cell.startswith(WEAK) and not region.have_word_alone(p.source, p.target)
        if self.learned.renumbered.deny(p.source.children, p.target.children):
            return MIRRORED
        why = against(p, region, agree, certain=alone, weak=last or weak)
        return "" if why == OTHER_MAKE and p.source.main.path in self.ties else why  # a table and the last layer

    def _is_other_head(self, s: Item, t: Item) -> bool:
        """Whether a last layer has another name than that of any other; the only one may have, where everything has."""
        return other_head(s, t, self.heads) and (len(self.heads) > 1 or not self.learned.renames.are_all(s, t))

    def _around(self, p: Pair, region: Region) -> str:
        """What makes another name telling: units at an end may be other heads, and siblings that kept theirs."""
        end = ""
        if p.source.rank >= 2 and not any(c.isdigit() for i in (p.source, p.target) for c in i.path):
            heads = [own_words(i) <= ENDS for i in (p.source, p.target)]
            end = " at a head" if heads[0] != heads[1] else " at an end"
        renamed, kept = self.learned.renames.siblings(region, p.source, p.target)
        if kept > 1 and not renamed:
            return f"{end} among kept siblings"
        renamed, kept = self.learned.renames.others(p.source, p.target)
        return end + " among kept" * (kept > renamed + FEW)

    def _solve(self, s: list[Item], t: list[Item], region: Region) -> Decision:
        tied = len(s) == 1 < len(t) <= self.ties.get(s[0].main.path, 1)
        if tied and all(self.costs.of(s[0], i) == 0.0 for i in t):
            return Decision([Pair(s[0], i, TIED) for i in t])
        out = Decision()
        sides = (s, region.source), (t, region.target)
        if self._are_mirrored(s, t, [root.path.rpartition(".")[2] for _, root in sides]) and all(
            relative(i, root).partition(".")[0].isdigit() for items, root in sides for i in items
        ):
            fs, ft = (families_of(items, root) for items, root in sides)
            out.ties.append(Tie.between(fs, ft, MIRRORED))
            return out
        parts = cut_by_shapes(s, t, exact=not self.costs.turned, by_core=region.by_core)
        if len(parts) > 1 and self.names and self._named_turned(s, t, region):
            left = [list(x) for x in self._by_path(s, t, region, out)]
            if all(left):
                fs, ft = (families_of(x, r) for x, r in zip(left, (region.source, region.target)))
                out.ties.append(Tie.between(fs, ft, TURNED))
            return out
        for a, b, balanced in parts:
            self._solve_part(a, b, balanced, region, out)
        if len(parts) > 1 and self.names and not self.costs.turned:
            self._leave_turned(out, region)
        return out

    def _are_mirrored(self, s: Sequence[Item], t: Sequence[Item], names: Sequence[object]) -> bool:
        """Whether blocks of a list of another name stand the other way round: then so may the list."""
        if not (self.learned.mirrored and self.written and names[0] != names[1] and len(s) > 1):
            return False
        ours, theirs = ({i.structure for i in side} for side in (s, t))
        return any(a in ours and b in theirs for a, b in self.learned.mirrored)

    def _leave_turned(self, out: Decision, region: Region) -> None:
        """Leave open what would fit crosswise if one side stored its matrices the other way round.

        Of a feed-forward (24, 8) and (8, 24) fit theirs as they are and each the other's turned; names tell, or order.
        """
        nameless: dict[tuple[int, ...], list[Pair]] = {}
        for p in out.pairs:
            shape = p.target.main.shape
            shape = shape if len(shape) == len(p.source.main.shape) else core(shape)  # a matrix that became a kernel
            if p.source.level < 2 and len(shape) in (2, 3) and not (is_named(p.cell) or p.cell == ROLE):
                nameless.setdefault(shape, []).append(p)
        for shape, mine in nameless.items():
            others = nameless.get(transpose_shape(shape), [])
            if shape[-2] <= shape[-1] or len(others) != len(mine):
                continue  # two up and one down fit only one way
            pairs = [*mine, *others]
            fs = families_of([p.source for p in pairs], region.source)
            ft = families_of([p.target for p in pairs], region.target)
            partners = {id(p.source): id(p.target) for p in pairs}
            told = all(partners[id(f.members[0])] == id(g.members[0]) for f, g in in_count(fs, ft))
            firsts = [min((p.source.start, p.target.start) for p in some) for some in (mine, others)]
            kept_make = all(len({role_of(i.main.path) for i in (p.source, p.target)}) == 1 for p in pairs)
            agree = {self.learned.rows.agree(region, p.source, p.target) for p in pairs}
            in_order = self.ordered and ascending(sorted(firsts)) and agree <= {"", "in order", "in line"}
            if told and kept_make and in_order:
                continue
            out.pairs = [p for p in out.pairs if id(p.source) not in partners]
            out.ties.append(Tie.between(fs, ft, TURNED))

    def _named_turned(self, s: list[Item], t: list[Item], region: Region) -> bool:
        """Whether names single out a partner that would have to be transposed, where the shapes say another."""
        if not any(len(i.main.shape) == 2 and i.level < 2 for i in s):
            return False
        theirs = {relative(i, region.source): i for i in s}
        twins = ((theirs.get(relative(i, region.target)), i) for i in t)
        if any(twin is not None and self.costs.of(twin, i) == TRANSPOSED for twin, i in twins):
            return True
        fs, ft = families_of(s, region.source), families_of(t, region.target)
        shared, *_ = self._likenesses(fs, ft, region)
        return any(self.costs.of_families(fs[i], ft[j]) == TRANSPOSED for i, j in leads(shared))

    def _solve_part(self, s: list[Item], t: list[Item], balanced: bool, region: Region, out: Decision) -> None:
        if len(s) == len(t) == 1:
            self._single(s[0], t[0], region, out)
            return
        alone = len(s), len(t)
        s, t = self._by_path(s, t, region, out)
        if not s or not t or not self.names:
            if s and t and balanced and region.complete:
                self._tie(_literal(families_of(s, region.source)), _literal(families_of(t, region.target)), out)
            return
        sure = region.complete or all(is_strong(i) for i in (*s, *t))
        fs, ft = families_of(s, region.source), families_of(t, region.target)
        if len(s) == len(t) and sure:
            fs, ft = evened(fs, ft)
            if sorted(len(f.members) for f in fs) != sorted(len(f.members) for f in ft):
                fs, ft = _literal(fs), _literal(ft)
        else:
            fs, ft = literal_if_needed(fs, ft)
        self._by_words(fs, ft, region, sure and len(s) == len(t), out, fixed=(len(s), len(t)) != alone)

    # the only one ------------------------------------------------------------------------------------------------

    def _single(self, s: Item, t: Item, region: Region, out: Decision) -> None:
        if self.costs.of(s, t) is None:
            return
        if self.names and self._is_other_head(s, t):
            out.ties.append(Tie.of(s, t, region, OTHER_HEAD))
            return
        paths = relative(s, region.source), relative(t, region.target)
        if not any(paths) and self.names and are_opposite(s, t, region):
            return
        if paths[0] == paths[1] and region.same_numbers(paths[0]) and region.alike(s, t):
            cell = PATH
        elif region.complete and (region.alike(s, t) or max(s.level, t.level) < 2):
            cell = ALONE
        elif region.complete and max(s.level, t.level) == 2:
            telling = [tuple(w for w in plain_words(p) if w not in ENDS) for p in paths]
            ours, theirs = telling if any(telling) else map(plain_words, paths)
            likeness = liken(ours, theirs)
            blocks = all(path.rpartition(".")[2].isdigit() for path in paths)  # the only ones of two lists
            if paths[0] != paths[1] and not blocks and (likeness.best < 2 or likeness.only_layers):
                return
            cell = ALONE + ", other inside"
        elif is_strong(s) and region.alike(s, t):
            cell = STRONG
        else:
            likeness = liken(plain_words(paths[0]), plain_words(paths[1]))
            if likeness.shared and likeness.kind in (WORDS, HALF_WORDS):
                cell = f"open {likeness.kind}"
            elif region.whole and s.rank >= 2 and region.alike(s, t) and region.holds_once(s, t):
                cell = DISTINCT
            else:
                return
        if may_load(cell):
            out.pairs.append(Pair(s, t, cell))

    # the same path -----------------------------------------------------------------------------------------------

    def _by_path(self, s: list[Item], t: list[Item], region: Region, out: Decision) -> tuple[list[Item], list[Item]]:
        theirs = {relative(i, region.source): i for i in s}
        starts = {i.start: i for i in s if not i.virtual}
        taken: set[int] = set()
        names = region.source.path.rpartition(".")[2], region.target.path.rpartition(".")[2]
        short, long = sorted((f".{region.source.path}", f".{region.target.path}"), key=len)
        if names[0] != names[1] and names in self.backwards:
            return s, t
        if self.written and not long.endswith(short) and runs_apart(s, t, region):
            return s, t
        for i in t:
            path = relative(i, region.target)
            twin = theirs.get(path) or self._wrapped_twin(i, starts) or starts.get(region.wrapped.get(i.start, -1))
            if twin is None or counted_down(twin, i, region) or self.costs.of(twin, i) is None:
                continue
            if not region.count_alike(relative(twin, region.source), path):
                continue
            out.pairs.append(Pair(twin, i, PATH, first=not path or path[-1] in "0" or not path[-1].isdigit()))
            taken |= {id(twin), id(i)}
        return [i for i in s if id(i) not in taken], [i for i in t if id(i) not in taken]

    def _wrapped_twin(self, t: Item, starts: Mapping[int, Item]) -> Item | None:
        """What has the path of an item, but for a module around all of the model on one side."""
        twin = starts.get(self.sources_of.get(t.start, -1))
        if twin is None or t.virtual:
            return None
        short, long = sorted((f".{twin.path}", f".{t.path}"), key=len)
        return twin if long.endswith(short) else None

    # words -------------------------------------------------------------------------------------------------------

    def _by_words(
        self, fs: list[Family], ft: list[Family], region: Region, sure: bool, out: Decision, fixed: bool
    ) -> None:
        n, m = len(fs), len(ft)
        if n == m == 1:
            if sure or fs[0].pattern == ft[0].pattern:
                if are_others(fs[0].members[0], ft[0].members[0], region, self.learned.renames, fixed=fixed):
                    out.ties.append(Tie.between(fs, ft, OTHER_WORDS))
                    return
                cell = ("" if sure else "open ") + (EXCLUSION if fixed else ALONE if region.complete else STRONG)
                if any(self._is_other_head(a, b) for a, b in zip(fs[0].members, ft[0].members)):
                    out.ties.append(Tie.between(fs, ft, OTHER_HEAD))
                elif may_load(cell):
                    self._zip(fs[0], ft[0], cell, out, region)
            return
        shared, kinds, initials = self._likenesses(fs, ft, region)
        open_s, open_t = set(range(n)), set(range(m))
        by_role = self._by_role(fs, ft, region) if sure else []
        for i, j in by_role:
            self._zip(fs[i], ft[j], ROLE, out, region)
            open_s.discard(i)
            open_t.discard(j)
            shared[i] = [-1.0] * m
            for row in shared:
                row[j] = -1.0
        leading = [(i, j) for i, j in initials if shared[i][j] >= 0] or leads(shared)
        complete = len(leading) == n == m
        for i, j in leading:
            cell = kinds[i][j] if complete or kinds[i][j] not in ALL_OR_NONE else ""
            if not cell or (cell == INITIALS and not sure):
                continue
            cell = ("" if sure else "open ") + ALL_OR_NONE.get(cell, cell)
            if not may_load(cell) or (fixed and are_kept_apart(fs[i].members[0], ft[j].members[0])):
                continue
            self._zip(fs[i], ft[j], cell, out, region)
            open_s.discard(i)
            open_t.discard(j)
        if not sure or not open_s or not open_t:
            return
        left_s, left_t = [fs[i] for i in sorted(open_s)], [ft[j] for j in sorted(open_t)]
        otherwise = runs_otherwise(left_t, region.target) or (self.ordered and runs_otherwise(left_s, region.source))
        ways = () if otherwise else ((in_count(left_s, left_t), COUNT), (known_for_roles(left_s, left_t), KNOWN))
        for paired, cell in ways:
            for f, g in paired:
                self._zip(f, g, cell, out, region)
            if paired:
                return
        if len(left_s) == len(left_t) == 1 and len(left_s[0].members) == len(left_t[0].members):
            i, j = next(iter(open_s)), next(iter(open_t))
            s, t = left_s[0].members[0], left_t[0].members[0]
            better = max(*shared[i], *(row[j] for row in shared)) > shared[i][j]
            named = any(kinds[a][b] in (WORDS, SHORT_WORDS) for a, b in leading)  # so these would have kept theirs, too
            words = (words_apart(fs, ft)[i], words_apart(ft, fs)[j]) if named else ((), ())
            apart = are_others(s, t, region, self.learned.renames, fixed=fixed, told=bool(leading), words=words)
            head = any(self._is_other_head(a, b) for a, b in zip(left_s[0].members, left_t[0].members))
            if better or apart or head:
                out.ties.append(Tie.between(left_s, left_t, OTHER_HEAD if head else OTHER_WORDS))
            else:  # if all others stand as in other blocks, there is more to it than their names
                cell = ROLE + ", last" if len(by_role) == n - 1 else EXCLUSION
                self._zip(left_s[0], left_t[0], cell, out, region)
            return
        self._tie(left_s, left_t, out)

    def _by_role(self, fs: list[Family], ft: list[Family], region: Region) -> list[tuple[int, int]]:
        """Pairs that were partners wherever else blocks of this list were certain of them, and had no other partner."""
        known = self.learned.roles.elsewhere(region)
        found = [
            (i, j)
            for i, f in enumerate(fs if known else ())
            for j, g in enumerate(ft)
            if self.costs.of(f.members[0], g.members[0]) is not None
            and are_partners(known, region, f.members[0], g.members[0])
        ]
        times = [Counter(side) for side in zip(*found)]
        return [
            (i, j)
            for i, j in found
            if times[0][i] == times[1][j] == 1 == len(fs[i].members) == len(ft[j].members)
            and may_load(self.judged(Pair(fs[i].members[0], ft[j].members[0], ROLE), region))
        ]

    def _likenesses(
        self, fs: list[Family], ft: list[Family], region: Region
    ) -> tuple[Shared, list[list[str]], list[tuple[int, int]]]:
        """How much names share, of which kind that is, and which are paired by initials; -1 where shapes do not fit."""
        words_s, words_t = words_apart(fs, ft), words_apart(ft, fs)
        near_s, near_t = (region.neighbours_words((fs, ft), side) for side in (0, 1))
        shared = [[-1.0] * len(ft) for _ in fs]
        kinds = [[""] * len(ft) for _ in fs]
        for i, f in enumerate(fs):
            for j, g in enumerate(ft):
                if self.costs.of_families(f, g) is None:
                    continue
                blocks = min(m.level for m in (f.members[0], g.members[0])) == 2
                likeness = liken(words_s[i], words_t[j], near_s, near_t, BLOCKS if blocks else LAYERS)
                apart = likeness.shared > 0 and letters_apart(f.members[0], g.members[0], region)
                shared[i][j] = 0.0 if apart else likeness.shared
                elsewhere = likeness.only_near and (region.loose or SIDES & set(f.words) != SIDES & set(g.words))
                kinds[i][j] = NEAR_WORDS if elsewhere else likeness.kind
                if likeness.only_layers and kinds[i][j] in (WORDS, SHORT_WORDS):
                    kinds[i][j] = LAYER_ONLY
        initials = paired_by_initials(words_s, words_t)
        initials = initials if all(shared[i][j] >= 0 for i, j in initials) else []
        for i, j in initials:
            kinds[i][j] = INITIALS
        return shared, kinds, initials

    # families and ties --------------------------------------------------------------------------------------------

    def _zip(self, f: Family, g: Family, cell: str, out: Decision, region: Region) -> None:
        """Pair the members of two families by number."""
        if len(f.members) == 1:
            out.pairs.append(Pair(f.members[0], g.members[0], cell))
            return
        mirrored = self._are_mirrored(f.members, g.members, [f.pattern, g.pattern])
        written = self.written and self.learned.rows.allow(region, f.members, g.members)
        found = None if mirrored else number_map(f, g, self.ordered, written, self.backwards)
        if found is None or self.learned.renumbered.deny(f.members, found[0]):
            why = MIRRORED if mirrored else NUMBERED_OTHERWISE
            out.ties.append(Tie.between([f], [g], why))
            return
        members, kind = found
        for k, (a, b) in enumerate(zip(f.members, members)):
            out.pairs.append(Pair(a, b, cell if kind == NUMBERS else f"{cell}, {kind}", k == 0, by_number=True))

    def _tie(self, left_s: list[Family], left_t: list[Family], out: Decision) -> None:
        """Leave families open that fit together; order may decide."""
        if sorted(len(f.members) for f in left_s) != sorted(len(f.members) for f in left_t):
            left_s, left_t = _literal(left_s), _literal(left_t)
        if len(left_s) == len(left_t):
            out.ties.append(Tie(tuple(left_s), tuple(left_t)))
