"""The search for the mapping of the least loss, among all that is open about a pair of models.

Layers that share a decision are one question whatever the depth: all blocks are tried together. Undecided layers are
switched off first and on again where they help most, so that what is wrong elsewhere does not drown what is right here;
the decisions of one layer group are tried jointly. Candidates meet in rounds: all on a few samples, the better ones on
more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations, product

from lit_wsl.matching.balance import MARGIN, Balance
from lit_wsl.matching.changes import (
    Choice,
    blocks_exchanged,
    options_of,
    part_of,
    shared,
    twins_exchanged,
    unlisted,
)
from lit_wsl.matching.parts import Part
from lit_wsl.matching.trials import OFF, Trials
from lit_wsl.matching.witnesses import errors_apart, times_apart

RANKED = 1.5  # times the cost of the first look at a few samples is that of all that are ranked
JOINT = 320  # most candidates that are tried jointly
KEPT = 4  # candidates that stay to the end, unless they lose clearly more
TELLING = 4  # losses that tell whether they do
WIDE = 2048  # the same, where the weights tell most of them without a pass
CHEAP = 40  # ways to change two decisions that are tried before more is
SWEEPS = 3  # over all layer groups, to find what hangs together
MOST = 8192  # choices that are looked at without a pass, to see whether those that hang together can all be tried
REORDERED = 2  # orders of blocks that are looked at on a whole batch, each time
CLEARLY, HARDLY = 3.5, 1.5  # standard errors by which they have to be better, by how many times and by how much
STARTS = 6  # ways to assign layers that are started from, where they are too many to look at each
FEW_TWINS = 6  # pairs of modules of which two are exchanged at once
UNTOLD = 24  # most choices that hang together as well and are all looked at, as many again with modules exchanged
SETTLED = 0.1  # share of the time after which nothing that hangs together better is looked for among exchanges
SAME = 1e-3  # difference of how well two choices hang together that is none
MAX_STARTS = 24  # orders of norms that are started from
IN_STEP = 0.6  # share of its budget after which nothing else is tried where gates in one order were


def _typical(losses: Sequence[float]) -> float:
    """The geometric mean of some losses, as a log, which a single sample that is far off does not rule."""
    return sum(math.log(max(loss, 1e-3)) for loss in losses) / len(losses)


class Search:
    """Finds the choice of the least loss.

    Args:
        trials: Measures choices.
        share: The share of the budget that the search may spend.
        joint: Most choices that are tried one and all.
        rests: Whether a choice is where training may have stopped, so that nothing far from it is sought.
        arrange: Makes more of a start without looking at the loss, and says whether it is sure of all that is open.
    """

    def __init__(
        self,
        trials: Trials,
        share: float,
        joint: int = JOINT,
        rests: Callable[[Choice], bool] = lambda choice: False,
        arrange: Callable[[Choice], tuple[Choice, bool]] | None = None,
    ) -> None:
        self.joint, self.rests, self.arrange = joint, rests, arrange
        self.trials, self.space, self.score, self.share = trials, trials.space, trials.score, share
        self.confirmed: set[int] = set()  # layer groups of which alone and together the same looks best

    @property
    def left(self) -> bool:
        """Whether the search may go on."""
        return self.trials.budget.left(self.share)

    def find(self, *starts: Choice) -> Choice:
        """The best choice, from some starts besides its own, and what is better with two modules exchanged."""
        share, choice, before = self.share, self._found(*starts), None
        self.share = share
        while choice != before and self.left:
            twins = twins_exchanged(self.space, choice)
            if len(twins) <= FEW_TWINS:  # three in a circle
                twins += [other for one in twins for other in twins_exchanged(self.space, one)]
            twins.append(self.balanced(choice))  # what moved as the loss of few samples told
            before, choice = choice, self._better(choice, list(dict.fromkeys(twins)))
        return choice

    def _found(self, *starts: Choice) -> Choice:
        start = self.balanced(self.space.first)
        every = self._every()
        if every:
            return self._ranked(every, self.trials.size)[0]
        start = self._best([start, self.space.first, *starts, *self.space.in_order(start)])
        arranged, sure = self.arrange(start) if self.arrange else (start, False)
        if sure:
            return arranged
        start = self._best([start, arranged])
        start = min(start, self._in_step(start), key=self.score)
        tops = [start]
        if self.rests(start):
            tops.append(self.climb(start))
            if self.rests(tops[-1]):
                return tops[-1]
        if self.space.alike:
            tops.append(self._improve(start))
            if self.rests(tops[-1]):
                return tops[-1]
            self.share *= IN_STEP
        if not self.rests(start):
            start = self._untold(start)
            tops.append(self.climb(start) if self.rests(start) else start)
            if self.rests(tops[-1]):
                return tops[-1]
        groups = self._groups()
        dark = list(start)
        for part in (p for group in groups for p in group):
            dark[part.which] = OFF
        none = tuple(dark)
        tops.append(self._improve(self._switch_on(none, groups)))
        if not groups or self.score(tops[-1]) >= self.score(none):  # nothing can be seen where layers are switched off
            tops.append(self._improve(start))
        least = self.trials.losses(min(tops, key=self.score), self.trials.screen)
        near = [c for c in tops if errors_apart(self.trials.losses(c, self.trials.screen), least) < MARGIN]
        return self._ranked(near, self.trials.size)[0]

    def _untold(self, choice: Choice) -> Choice:
        """The best of what hangs together as well: numbers of blocks, what no balance reaches, modules exchanged."""
        balance = self.trials.balance
        if balance is None:
            return choice
        total, found, before = balance.total(choice), [choice], None
        ways = [[c for c in self._with(choice, d) if abs(balance.total(c) - total) < SAME] for d in range(len(choice))]
        for d, own in sorted(enumerate(ways), key=lambda way: len(way[1])):
            options = {c[d] for c in own if c[:d] + c[d + 1 :] == choice[:d] + choice[d + 1 :]} | {choice[d]}
            if len(options) > 1 and len(found) * len(options) <= UNTOLD:
                found = [(*c[:d], o, *c[d + 1 :]) for c in found for o in sorted(options)]
        twins = [(c, twins_exchanged(self.space, c)) for c in found]
        choice = self._best([c for one, others in twins for c in (one, *others)][: 2 * UNTOLD])
        while choice != before and self.left:
            before, choice = choice, self._best([choice, *twins_exchanged(self.space, choice)])
        return choice

    def around(self, start: Choice) -> Choice:
        """The best choice around one, or around that which hangs together best."""
        return self._improve(self._ranked([start, self.balanced(start)], self.trials.size)[0])

    def renumbered(self, choice: Choice) -> Choice:
        """A choice with two blocks exchanged, and two more, as long as that is clearly better on two batches.

        Of many blocks not all orders can be tried, and what names or counting say stands unless it is refuted.
        """
        before = None
        while choice != before and self.left:
            before = choice
            for numbering in unlisted(self.space):
                for other in self._ranked(blocks_exchanged(self.space, choice, numbering))[:REORDERED]:
                    if self.left and self._clearly(other, choice):
                        choice = other
                        break
        return choice

    def _clearly(self, better: Choice, choice: Choice) -> bool:
        """Whether a choice is better by how many times it loses less, and no less by how much."""
        trials, fresh = self.trials, self.trials.meter.has(1)
        one, other = (trials.losses(c) + (trials.losses(c, batch=1) if fresh else []) for c in (choice, better))
        return errors_apart(one, other) > HARDLY and times_apart(one, other) > CLEARLY

    def _every(self) -> list[Choice]:
        """All choices, as far as the weights hang together, where they can all be tried."""
        if any(part.grows for part in self.space.parts):
            return []
        if math.prod(len(d.options) for d in self.space.decisions) <= self.joint:
            return self._plausible([tuple(c) for c in product(*(range(len(d.options)) for d in self.space.decisions))])
        if self.trials.balance is None:
            return []
        pool = [self.space.first]
        for region in range(len(self.space.regions)):  # norms first: what they feed hangs together with the right ones
            parts = sorted((p for p in self.space.parts if p.region == region), key=lambda p: p.has_matrices)
            for part in parts:
                room = MOST // len(pool)
                pool = [c for one in pool for c in self._product(one, part, room, room)] if self.left else []
                if not pool:
                    return []
            pool = self._plausible(pool)
            if len(pool) > self.joint:
                return []
        for d in shared(self.space):
            pool = [c for one in pool for c in self._with(one, d)]
            if len(pool) > MOST:
                return []
            pool = self._plausible(pool)
        return pool if len(pool) <= self.joint else []

    def widen(self, choice: Choice, most: int | None = None) -> Choice:
        """What changes of any two decisions at once make better, the cheapest first, until nothing does.

        Args:
            choice: To begin with.
            most: Options of both decisions together; as many as can be tried if it is not given.
        """
        opened = [d for d, decision in enumerate(self.space.decisions) if len(decision.options) > 1]
        before, most = None, most or (self.joint if self.trials.balance is None else WIDE)
        while choice != before and self.left and not self.rests(choice):
            before = choice
            wide = {d: len(self._with(choice, d)) for d in opened}
            for one, other in sorted(combinations(opened, 2), key=lambda both: wide[both[0]] * wide[both[1]]):
                if not self.left or wide[one] * wide[other] > most:
                    break
                choice = self._better(choice, [c for o in self._with(choice, one) for c in self._with(o, other)])
        return choice

    def _in_step(self, choice: Choice) -> Choice:
        """The best choice in which what has as many parts has them in the same order."""
        for own in self.space.alike:
            same = [
                tuple(o if d in own else c for d, c in enumerate(choice))
                for o in range(len(self.space.decisions[own[0]].options))
            ]
            choice = self._best(same)
        return choice

    def balanced(self, choice: Choice) -> Choice:
        """The choice that hangs together best, from each order of the norms, one layer group after the other."""
        balance = self.trials.balance
        if balance is None:
            return choice
        for region in range(len(self.space.regions)):  # what is in one says nothing about another
            parts = sorted((p for p in self.space.parts if p.region == region), key=lambda p: not p.has_matrices)
            starts = [choice]
            for part in (part for part in parts if not part.has_matrices):
                covers: Sequence[int] = range(len(part.covers))
                if len(starts) * len(covers) > MAX_STARTS:
                    covers = [part.numbers[cover] for cover in part.in_order({}) if cover in part.numbers]
                if len(starts) * len(covers) <= MAX_STARTS:
                    starts = [(*s[: part.which], o, *s[part.which + 1 :]) for s in starts for o in covers] or starts
            settled = list(dict.fromkeys(self._settled(start, parts, balance) for start in starts))
            turned = self._turned(max(settled, key=balance.total), parts)
            settled += [c for c in [self._settled(turned, parts, balance)] if c not in settled]
            tops = sorted(settled, key=balance.total)[-2:]
            settled = list(dict.fromkeys([*settled, *(self._rearranged(top, parts, balance) for top in tops)]))
            top = max(settled, key=balance.total)
            same = [c for c in settled if abs(balance.total(c) - balance.total(top)) < SAME]
            choice = self._best(same) if len(same) > 1 else top  # where pairs change places together
        return choice

    def _settled(self, choice: Choice, parts: Sequence[Part], balance: Balance) -> Choice:
        for _ in range(SWEEPS):
            before = choice
            for part in parts:
                choice = max([choice, *self._jointly(choice, part)], key=balance.total)
            if choice == before or not self.left:
                break
        return choice

    def _turned(self, choice: Choice, parts: Sequence[Part]) -> Choice:
        """A choice with all squares the other way round."""
        turns = {d for part in parts for d in part.turns.values()}
        return tuple(1 - o if d in turns and o in (0, 1) else o for d, o in enumerate(choice))

    def _rearranged(self, choice: Choice, parts: Sequence[Part], balance: Balance) -> Choice:
        """What hangs together better with two norms exchanged, and with them what they feed, until nothing does."""
        norms = [part for part in parts if not part.has_matrices]
        rest, before = [part for part in parts if part.has_matrices], None
        in_time = partial(self.trials.budget.in_time, SETTLED)
        while choice != before and norms and in_time():
            before = choice
            for other in (c for part in norms for c in self.space.exchanges(before, part)):
                if not in_time():
                    break
                choice = max(choice, self._exchanged(other, rest, balance), key=balance.total)
        return choice

    def _exchanged(self, choice: Choice, parts: Sequence[Part], balance: Balance) -> Choice:
        """What one change of a layer group, or of two of its layers, makes hang together better, until none does."""
        before = None
        while choice != before and self.left:
            before = choice
            for part in parts:
                choice = max([choice, *self._near(choice, part)], key=balance.total)
        return choice

    def _plausible(self, choices: Sequence[Choice]) -> list[Choice]:
        balance = self.trials.balance
        return list(choices) if balance is None else balance.plausible(choices)

    def _improve(self, choice: Choice) -> Choice:
        """A choice that no change of one decision, or of those of one layer group, makes better, or one at rest."""
        choice = self.climb(choice)
        if not self.rests(choice):
            choice = self.widen(choice, CHEAP)
        if self.rests(choice):
            return choice
        for group in self._groups():
            if self.left and len(group) == 1 and group[0].which not in self.confirmed:
                choice = self._better(choice, self._jointly(choice, group[0]))
        rotary = self.space.rotary
        for part in self.space.parts if rotary is not None else ():
            if self.left and rotary in self.space.others_of(part):  # its rows may hide behind a matrix that is turned
                choice = self._better(choice, [c for o in self._jointly(choice, part) for c in self._with(o, rotary)])
        return choice

    def _better(self, choice: Choice, among: Sequence[Choice]) -> Choice:
        """The best of some choices, and what is better around it; the first if none is better."""
        better = self._best([choice, *self._plausible([choice, *among])[: self.joint]])
        return self.climb(better) if self._gains(better, choice) else choice

    def _gains(self, better: Choice, choice: Choice) -> bool:
        """Whether a choice loses less than another, and by more than the weights speak against it.

        Both are counted in standard errors, since on a few samples what is wrong may lose a little less by chance.
        """
        if self.score(better) >= self.score(choice):
            return False
        balance = self.trials.balance
        against = 0.0 if balance is None else balance.lead(choice, better)
        if against <= 0.0:
            return True
        screen, size = self.trials.screen, self.trials.size
        lead = errors_apart(self.trials.losses(choice, screen), self.trials.losses(better, screen))
        if lead <= against < lead * math.sqrt(size / screen):  # more samples may tell
            lead = errors_apart(self.trials.losses(choice), self.trials.losses(better))
        return lead > against

    def _groups(self) -> list[list[Part]]:
        """Layers that are switched on together: of repeated blocks, if there are any, those that leave nothing open."""
        parts = [part for part in self.space.parts if part.has_matrices]
        parts = [p for p in parts if self.space.copies(p) > 1] or parts
        opened = [p for p in parts if any(len(self.space.decisions[d].options) > 1 for d in p.decisions)]
        settled: dict[int, list[Part]] = {}
        for part in (p for p in parts if p not in opened):
            settled.setdefault(part.region, []).append(part)
        return [*settled.values(), *([p] for p in opened)]

    def _ranked(self, candidates: Iterable[Choice], most: int = 0) -> list[Choice]:
        """The best of some candidates, the very best first: all meet on a few samples, the better ones on more."""
        trials, samples = self.trials, self.trials.least
        candidates = list(candidates)
        pool = self._plausible(list(dict.fromkeys(c for c in candidates if self.space.is_consistent(c))) or candidates)
        while len(pool) > 1:
            scores = {c: trials.mean(c, samples) for c in pool if self.left or trials.known(c, samples)}
            pool = sorted(scores, key=scores.__getitem__) or pool
            if samples >= (most or trials.screen) or not scores:
                break
            least = trials.losses(pool[0], samples)
            kept = max(KEPT, -(-len(pool) // 4))
            typical = sorted(pool, key=lambda c: _typical(trials.losses(c, samples)))[: kept // 2]  # but for one sample
            pool = [*pool[:kept], *(c for c in typical if c not in pool[:kept])]
            if len(least) >= TELLING:
                pool = [c for c in pool if errors_apart(trials.losses(c, samples), least) < MARGIN]
            samples = trials.more(samples)
        return pool

    def _best(self, candidates: Iterable[Choice]) -> Choice:
        return self._ranked(candidates)[0]

    def _with(self, choice: Choice, decision: int) -> list[Choice]:
        return options_of(self.space, choice, decision)

    def climb(self, choice: Choice, among: Sequence[int] | None = None) -> Choice:
        """Change one decision after the other until nothing gets better.

        What was among the worse half of a decision's options is not looked at again.
        """
        places = [
            d
            for d in (range(len(self.space.decisions)) if among is None else among)
            if len(self.space.decisions[d].options) > 1
        ]
        poor: set[tuple[int, Choice]] = set()
        own = {d: [d, *(part.order.values() if (part := part_of(self.space, d)) else ())] for d in places}
        since = 0
        while places and self.left:
            for d in places:
                since += 1
                if choice[d] == OFF or not self.left:
                    continue
                said = {c: (d, tuple(c[k] for k in own[d])) for c in self._with(choice, d)}
                pool = [choice, *(c for c, key in said.items() if key not in poor)]
                better = self._best(pool)
                looked = sorted(said.keys() & set(pool), key=lambda c: self.trials.mean_if_known(c, self.trials.least))
                poor |= {said[c] for c in looked[max(2, -(-len(looked) // 2)) :] if c not in (choice, better)}
                if better != choice and self._gains(better, choice):
                    choice, since = better, 0
            if since >= len(places):
                break
        return choice

    def _switch_on(self, choice: Choice, groups: Sequence[list[Part]]) -> Choice:
        """Look at each layer group with all others off, then switch them on, the one that helps most first."""
        lit_parts = {part.which for group in groups for part in group}
        choice = self.climb(choice, [d for d in range(len(choice)) if d not in lit_parts])
        alone = [self._ranked(lit) for lit in self._all_lit(choice, groups)]
        for number in sorted(range(len(groups)), key=lambda k: self.score(alone[k][0])):
            group, own = groups[number], {d for part in groups[number] for d in part.decisions}
            meant = [tuple(o[d] if d in own else c for d, c in enumerate(choice)) for o in alone[number][:KEPT]]
            choice = self._best([*meant, *self._beside(meant, group)])
            choice = self.climb(choice, self.space.others_of(group[0]))
            if all(choice[d] == alone[number][0][d] for d in own):
                self.confirmed.add(group[0].which)
        return choice

    def _all_lit(self, choice: Choice, groups: Sequence[list[Part]]) -> list[list[Choice]]:
        """All ways to switch each layer group on: so many that there are passes for all groups."""
        most, lit = self.joint, [self._lit(choice, group) for group in groups]
        while most > 1 and sum(map(len, lit)) > self._affordable:
            most //= 2
            lit = [self._lit(choice, group, most) if len(own) > most else own for group, own in zip(groups, lit)]
        return lit

    @property
    def _affordable(self) -> float:
        """How many choices can be looked at."""
        budget, trials = self.trials.budget, self.trials
        return (self.share * budget.passes - trials.meter.passes) * trials.size / trials.least / RANKED

    def _lit(self, choice: Choice, group: Sequence[Part], most: int | None = None) -> list[Choice]:
        """All ways to switch a layer group on, with what its region decides where that is little."""
        lit = [choice]
        for part in group:
            lit = [c for one in lit for c in self._jointly(one, part, most)]
        return self._beside(lit, group)

    def _beside(self, choices: list[Choice], group: Sequence[Part]) -> list[Choice]:
        """Some choices with all that the region of a layer group decides, where that is little."""
        numbering = self.space.numbering.get(group[0].region)
        for d in self.space.others_of(group[0]):
            options = self._with(choices[0], d)
            if d == numbering and len(choices) * len(options) > JOINT // 4:  # the same, or counted backwards
                ends = {0, self.space.backwards(d)}
                if len(choices) * len(ends) * self.trials.least <= 2 * JOINT:
                    choices = [c for one in choices for c in self._with(one, d) if c[d] in ends]
            elif len(choices) * len(options) <= JOINT // 4:
                choices = [c for one in choices for c in self._with(one, d)]
        return choices

    def _jointly(self, choice: Choice, part: Part, most: int | None = None) -> list[Choice]:
        """All that a layer group's own decisions can mean, each once, as far as the weights hang together."""
        balance, most = self.trials.balance, most or self.joint
        if balance is None:
            return self._product(choice, part, most)
        if part.grows:
            return self._around(choice, part, balance)
        found = self._product(choice, part, WIDE, WIDE)
        if not found:
            return self._around(choice, part, balance)
        found = balance.plausible(found)
        if len(found) > most:  # the weights tell little
            found = balance.plausible(self._product(choice, part, max(1, most // len(part.covers))))
        return found

    def _product(self, choice: Choice, part: Part, most: int, total: float = math.inf) -> list[Choice]:
        """All ways to assign a layer group, each with at most so many for the rest; none if there are more in total."""
        found: list[Choice] = []
        for option, cover in enumerate(part.covers):
            own = part.decisions_of(cover)
            sizes = [len(self.space.decisions[d].options) for d in own]
            while math.prod(sizes) > most:  # the rest is left to the climb
                own, sizes = own[:-1], sizes[:-1]
            if len(found) + math.prod(sizes) > total:
                return []
            for options in product(*map(range, sizes)):
                made = list(choice)
                made[part.which] = option
                for d, o in zip(own, options):
                    made[d] = o
                found.append(tuple(made))
        return found

    def _near(self, one: Choice, part: Part) -> list[Choice]:
        """Choices that differ in one decision of a layer group, or in two of its layers."""
        own = part.decisions_of(part.covers[one[part.which]])
        changed = [(*one[:d], o, *one[d + 1 :]) for d in own for o in range(len(self.space.decisions[d].options))]
        return [*changed, *self.space.exchanges(one, part)]

    def _around(self, choice: Choice, part: Part, balance: Balance) -> list[Choice]:
        """The plausible choices around those that hang together best, where there are too many to look at each."""
        step, which = max(1, len(part.covers) // STARTS), part.which
        every = [(*choice[:which], option, *choice[which + 1 :]) for option in range(len(part.covers))]
        tops = set()
        for one in dict.fromkeys((*every[::step], *sorted(every, key=balance.total)[-STARTS:])):
            while self.left:
                better = max([one, *self._near(one, part)], key=balance.total)
                if balance.total(better) <= balance.total(one):
                    break
                one = better
            tops.add(one)
        best = balance.plausible(sorted(tops))
        return balance.plausible(list(dict.fromkeys(c for one in best for c in (one, *self._near(one, part)))))
