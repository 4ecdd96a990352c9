"""Tests of what a search has found: are all its rivals significantly worse?

All candidates see the same samples. A risk of ``RISK`` is shared by all that was tried, all rivals and all looks. Close
rivals are compared on batches that the search has not seen, with the loss's gradient as a second witness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lit_wsl.matching.bench import FAR, RESTLESS, Bench
from lit_wsl.matching.changes import (
    FEW_BLOCKS,
    FEW_COVERS,
    Choice,
    blocks_exchanged,
    odd_ones,
    twins_exchanged,
    unlisted,
)
from lit_wsl.matching.entries import what_it_does
from lit_wsl.matching.moments import Moments
from lit_wsl.matching.search import Search
from lit_wsl.matching.trials import OFF, Trials
from lit_wsl.matching.witnesses import (
    AGREES,
    FEWEST,
    RISK,
    differ,
    errors_apart,
    is_ahead,
    risk_by_gradient,
    risk_of,
    stepped_down,
    together,
    unrest,
)
from lit_wsl.plan.entries import PlanEntry

RUNNERS = 3  # of what is about as good, how many are compared before one is tested
MANY = 16  # most rivals whose gradients are measured
AHEAD = 2.0  # standard errors by which a rival is ahead that is tested in place of what was found
CLEAR = 5.0  # standard errors that rivals have to be apart on all samples that the search may have seen
NEAR = 2.0  # times the noise of its batch is a gradient where a test is worth more than a further search
EARLY, CLOSE, LAST = "early", "close", "last"  # when the weights are asked
SHARES = {EARLY: 7.5, CLOSE: 30.0, LAST: 6.0}  # one by what each has of the risk
SEARCH = 0.7  # share of them that the search may take


def _exchanges(one: object, other: object) -> int:
    """How many members two orders of the same members have in other places; none if they are no such orders."""
    if not isinstance(one, tuple) or not isinstance(other, tuple):
        return 0
    orders = sorted(map(repr, one)) == sorted(map(repr, other)) == sorted(set(map(repr, one)))
    return sum(a != b for a, b in zip(one, other)) if orders and len(one) <= 4 else 0


class LossJudge:
    """Tests what a search has found."""

    def __init__(self, trials: Trials, moments: Moments | None = None, least: float = -math.inf) -> None:
        self.moments = moments  # what norms have recorded
        self.least = least  # what no random start loses as little as
        self.trials, self.space, self.score, self.budget = trials, trials.space, trials.score, trials.budget
        self.parts = (
            3  # of the risk: the first batch's, that of fresh ones, and that of the weights if they say anything
        )
        self.rounds, self.searched = 0, 0  # tests, and samples of the first batch that were looked at before
        self._unrest: dict[Choice, float] = {}
        self._gains: dict[Choice, float] = {}
        self._tested: set[Choice] = set()  # rivals that the search has not come across
        self.left: set[Choice] = set()  # what was left for a rival that was ahead, without being told worse
        self._close: dict[Choice, list[Choice]] = {}  # rivals of what was tested that the search has come across
        self.rounding = 0.0  # differences of losses below count as none
        self.rows_are_free = False  # whether rows of queries and keys may stand in any order that both share

    @cached_property
    def search(self) -> Search:
        """The search for what it judges."""
        return Search(self.trials, SEARCH, rests=self.settles, arrange=self.moments.arranged if self.moments else None)

    def rivals(self, choice: Choice) -> dict[int, list[Choice]]:
        """The other options of each decision, the rest as chosen, that change least.

        What names have told and the loss bears out has none. What means the same is no rival, and what changes all that
        another rival does and more (three norms in a circle where two exchanged are worse) was compared in the search;
        but for two modules that change places as a whole, and what the search has seen to be about as good.
        """
        own, many = self.space.meaning(choice), unlisted(self.space)
        out = {}
        for d, decision in enumerate(self.space.decisions):
            told = decision.told and choice[d] == 0 and not self.trials.meter.is_biased
            if told or (d == self.space.rotary and self.rows_are_free):
                continue  # what the search found better was taken
            most = FEW_BLOCKS if d in many else len(decision.options)  # what was only looked at is none
            others = [(*choice[:d], o, *choice[d + 1 :]) for o in range(most) if o != choice[d]]
            others = others if len(others) < FEW_COVERS else []
            others += blocks_exchanged(self.space, choice, d) if d in many and choice[d] >= most else []
            others += [c for part in self.space.parts if part.which == d for c in self.space.exchanges(choice, part)]
            changed = {c: own ^ self.space.meaning(c) for c in others if self.space.is_consistent(c)}
            places = {c: {t for e in both for t in e.targets} for c, both in changed.items() if both}
            near = {c for c in places if _exchanges(decision.options[c[d]], decision.options[choice[d]]) <= 2}
            out[d] = [c for c in places if c in near and not any(places[o] < places[c] for o in places)]
        known = {self.space.meaning(c) for others in out.values() for c in others} | {own}
        for c in dict.fromkeys([*twins_exchanged(self.space, choice), *self._close.get(choice, [])]):
            if self.space.meaning(c) not in known:
                out.setdefault(next(d for d in range(len(c)) if c[d] != choice[d]), []).append(c)
        for d, c in odd_ones(self.space, choice):
            out.setdefault(d, []).append(c)
        return {d: others for d, others in out.items() if others}

    def _as_good(self, choice: Choice) -> list[Choice]:
        """What the search has tried on as many samples and found not significantly worse."""
        found: dict[frozenset[PlanEntry], Choice] = {}
        many = unlisted(self.space)
        for c in self.trials.screened:
            if any(c[d] != choice[d] and c[d] >= FEW_BLOCKS for d in many):  # that was not clearly better
                continue
            samples = min(self.trials.extent(c), self.trials.extent(choice))
            if (
                OFF not in c
                and c not in self._tested
                and risk_of(self.trials.losses(c, samples), self.trials.losses(choice, samples)) >= RISK
            ):
                if self.space.rotary is not None and self.rows_are_free:
                    c = (*c[: self.space.rotary], choice[self.space.rotary], *c[self.space.rotary + 1 :])
                found.setdefault(self.space.meaning(c), c)
        return list(found.values())

    def with_rows_as_they_are(self, choice: Choice) -> Choice:
        """A choice without rotary rows if these make no difference to any sample, and the gradient shows none."""
        rotary = self.space.rotary
        if rotary is None or self.space.shows_turns or self.trials.balance is None or not self.budget.left():
            return choice
        options = [o for o in range(len(self.space.decisions[rotary].options)) if o != choice[rotary]]
        plain = (*choice[:rotary], 0, *choice[rotary + 1 :])
        other = (*choice[:rotary], options[0] if choice[rotary] == 0 else 0, *choice[rotary + 1 :])
        own, theirs = self.trials.losses(choice), self.trials.losses(other)
        most = 1e-5 * max(map(abs, own))
        self.rows_are_free = all(abs(a - b) <= most for a, b in zip(own, theirs))
        return plain if self.rows_are_free else choice

    def preferred(self, choice: Choice) -> Choice:
        """A choice, or a rival of it that hangs together clearly better where the loss hardly tells them apart."""
        balance, seen = self.trials.balance, {choice}
        while balance is not None and self.budget.left():
            rivals = [r for group in self.rivals(choice).values() for r in group]
            near = [r for r in rivals if r not in seen and balance.risk(choice, r) < RISK]
            near = [r for r in near if risk_of(self.screened(r), self.screened(choice)) > AGREES]
            if not near:
                break
            choice = max(near, key=lambda r: balance.lead(r, choice))
            seen.add(choice)
        return choice

    def leader(self, choice: Choice) -> Choice:
        """The best of a choice and what is about as good, by loss and gradient on a batch that the search has not seen.

        A test of the wrong one would take many passes, and then all would have to be tested again.
        """
        meter = self.trials.meter
        near = [c for c in self._as_good(choice) if self.space.meaning(c) != self.space.meaning(choice)]
        near = sorted(near, key=lambda c: self.trials.mean(c, self.trials.screen))[:RUNNERS]
        if not (near and meter.has(1) and self.budget.room > 4 * (1 + len(near)) and self.budget.left()):
            return choice
        seen = {c: _Seen() for c in (choice, *near)}
        for c, own in seen.items():
            own.add(self.trials, c, 1, slopes=True)
        for c in near:
            own, best = seen[c], seen[choice]
            if not own.slopes or not best.slopes:
                choice = c if sum(own.losses) < sum(best.losses) else choice
            elif is_ahead(own.sides, best.sides):
                choice = c
        return choice

    def screened(self, choice: Choice) -> list[float]:
        """Losses on the samples that a search compares choices on."""
        return self.trials.losses(choice, self.trials.screen)

    def test(self, choice: Choice) -> tuple[Choice, dict[Choice, float]]:
        """Compare a choice with its rivals: on the batch that it was found on, then on fresh ones.

        The risk of one wrong answer is shared. A third goes to the first batch, where all that the search has tried
        could have been taken; one to the fresh batches, which only the remaining rivals are compared on; one to the
        weights. Where these can say nothing the other two have a half each.

        Returns:
            The choice, another one if a rival turned out better; the risk of each rival.
        """
        self.rounds += 1
        self.searched = self.trials.reached if self.rounds == 1 else self.trials.size
        self.rounding = 1e-6 * max(abs(self.score(choice)), 1e-6)
        self._close.setdefault(choice, self._as_good(choice))
        rivals = [r for group in self.rivals(choice).values() for r in group]
        self._tested |= {*rivals} - {*self._close[choice]}
        self.parts = 3 if any(self._is_told(rival, choice) for rival in rivals) else 2
        better, risks = self._on_first_batch(choice, rivals)
        fresh: dict[Choice, _Seen] = {}
        close = [c for c in rivals if risks.get(c, 1.0) >= RISK]
        if better == choice:
            pairs = {
                c: (self.screened(c), self.screened(choice)) for c in close if self.trials.known(c, self.trials.screen)
            }
            risks |= self._by_balance(choice, pairs, len(close), CLOSE)
            close = [c for c in close if risks.get(c, 1.0) >= RISK]
        if better == choice and close:
            close.sort(key=lambda c: risks.get(c, 1.0))
            again = math.ceil(
                len(rivals) * self.trials.screen / self.trials.size
            )  # what a test of another choice takes
            better, told = self._on_fresh_batches(choice, close, fresh, again)
            risks |= told
        if better != choice:
            return better, {}
        last = {}
        for c in (c for c in rivals if risks.get(c, 1.0) >= RISK):
            if c in fresh and fresh[c].losses:
                last[c] = fresh[c].losses, fresh[choice].losses
            elif self.trials.known(c, self.trials.size) or self.budget.left():
                last[c] = self.trials.losses(c), self.trials.losses(choice)
        risks |= self._by_balance(choice, last, len(last), LAST)
        return choice, {c: risks.get(c, 1.0) for c in rivals}

    def confirmed(self, choice: Choice, risks: Mapping[Choice, float]) -> dict[Choice, float]:
        """Risks of the rivals; of those that lose no more than a choice on a whole batch it is one.

        Where samples are compared with each other, pieces of a batch lose something else than the whole, and what is
        best for pieces need not be best.
        """
        meter, told = self.trials.meter, [c for c, risk in risks.items() if risk < RISK]
        if not meter.in_pieces or not told:
            return dict(risks)
        own, pieces = meter.whole(self.trials.state(choice)), self.trials.losses(choice)
        if not meter.is_biased and not differ(pieces, [own] * len(pieces)):
            return dict(risks)
        if self.budget.room < len(told):
            return dict.fromkeys(risks, 1.0)
        others = [meter.whole(self.trials.state(c)) for c in told]
        return {**risks, **{c: 1.0 for c, loss in zip(told, others) if loss <= own or own >= meter.at_first}}

    def _on_first_batch(self, choice: Choice, rivals: Sequence[Choice]) -> tuple[Choice, dict[Choice, float]]:
        """Risks after more and more samples of the batch that the search has seen."""
        trials, samples, close = self.trials, 0, list(rivals)
        looks = 1 + math.ceil(math.log2(max(trials.size / trials.screen, 1)))  # fewer samples can tell nothing
        shares = self.parts * looks * max(trials.tried, len(rivals), 1) * self._again
        risks: dict[Choice, float] = {}
        while close and samples < trials.size:
            samples = trials.more(samples)
            known: dict[Choice, list[float]] = {}
            for c in (choice, *close):
                if trials.known(c, samples) or self.budget.left():
                    known[c] = trials.losses(c, samples)
            if choice not in known:
                break
            close = [c for c in close if c in known]
            if samples < trials.screen:
                continue
            least = min(close, key=lambda c: sum(known[c]), default=choice)
            if shares * risk_of(known[choice], known[least], self.rounding) < RISK:
                return least, {}
            risks |= {c: min(1.0, shares * risk_of(known[c], known[choice], self.rounding)) for c in close}
            close = [c for c in close if risks[c] >= RISK]
            if samples >= trials.screen:
                pairs = {c: (known[c], known[choice]) for c in close}
                risks |= self._by_balance(choice, pairs, len(rivals), EARLY)
                more = math.sqrt(trials.size / samples)
                apart = {c: errors_apart(known[c], known[choice]) for c in close if risks[c] >= RISK}
                fresh = (
                    trials.meter.has(1) and trials.meter.has_slopes
                )  # where less has to be told, and gradients do, too
                scarce = fresh and self.budget.room < 2 * (1 + len(apart))
                close = [
                    c for c, by in apart.items() if not scarce or by * more > CLEAR or trials.known(c, trials.size)
                ]
        return choice, risks

    def _on_fresh_batches(
        self, choice: Choice, close: Sequence[Choice], known: dict[Choice, _Seen], again: int
    ) -> tuple[Choice, dict[Choice, float]]:
        """Risks after one, two, four, ... batches that the search has not seen; of the only batch if there is no other.

        Where there is no room for a whole batch, as many samples are looked at as there is room for. Where a rival is
        ahead, so many passes are left to compare it with its own rivals then.

        What was measured of the first batch behind what the search has seen counts, too.
        The k-th look has 1 / 2**(k + 2) of the risk, the look where nothing else can be measured the other three
        quarters.
        """
        has, first = self.trials.meter.has, int(self.trials.meter.has(1))
        if not self._has_room(choice, close, first) and not self._part(len(close), first):
            close = close[: max(0, self.budget.room - 1)]
        unseen = self._unseen((choice, *close)) if first else {}
        known |= {c: _Seen(unseen.get(c, [])) for c in (choice, *close)}
        risks: dict[Choice, float] = {}
        number, looks, kept, at_last = first, 0, 0, False
        while close:
            fits = has(number) and self._has_room(choice, close, number, kept)
            stop = self._part(len(close), number, kept) if has(number) and not fits else 0
            if fits or stop:
                slopes = len(close) <= MANY and self._has_room(choice, close, number, slopes=True)
                for c in (choice, *close):
                    known[c].add(self.trials, c, number, slopes or bool(stop), stop)
                number += 1
                seen = number - first
                kept = again if min(sum(known[c].losses) for c in close) < sum(known[choice].losses) else 0
                kept += (
                    len(close) if self.moments is not None and self.moments.norms else 0
                )  # to hear what norms recorded
                if seen & (seen - 1) and not stop:
                    continue
                looks += 1
                share = float(2 ** (looks + 2))
            elif number > first and not at_last:
                at_last, share = True, 4 / 3
                self._add_late(choice, close, known, range(first, number))
            else:
                break
            better, told = self._looked(choice, close, known, share, len(close) if first else self.trials.tried)
            if better != choice:
                return better, {}
            risks |= told
            close = [c for c in close if risks[c] >= RISK]
        return choice, risks

    def _add_late(
        self, choice: Choice, close: Sequence[Choice], known: Mapping[Choice, _Seen], numbers: Sequence[int]
    ) -> None:
        """Take the gradients that were not taken while there were more rivals."""
        late = [n for n in numbers if n not in known[choice].steep] if len(close) <= MANY else []
        for n in late[: self.budget.room // (1 + len(close))]:
            for c in (choice, *close):
                known[c].add_slopes(self.trials, c, n)

    def _looked(
        self, choice: Choice, close: Sequence[Choice], known: Mapping[Choice, _Seen], share: float, many: int
    ) -> tuple[Choice, dict[Choice, float]]:
        """The choice, or a rival that is better or ahead; and the risks of all rivals at one look.

        The rivals that are left share the risk of a look, fewer the more of them it drops (Holm's method).
        """
        share *= self.parts * self._again
        own, least = known[choice], min(close, key=lambda c: sum(known[c].losses))
        if many * share * risk_of(own.losses, known[least].losses, self.rounding) < RISK:
            return least, {}
        if not self.left and errors_apart(own.losses, known[least].losses) > AHEAD:
            self.left.add(choice)
            return least, {}
        return choice, stepped_down({c: known[c].risk(own, self.rounding) for c in close}, share, many)

    def _part(self, rivals: int, number: int, kept: int = 0) -> int:
        """How many samples of a batch there is room for, if gradients tell something on so few."""
        meter = self.trials.meter
        if not meter.has_slopes or not self.budget.left():
            return 0
        samples = int(meter.size(number) * (self.budget.passes - meter.passes - kept) / (1 + rivals)) // 2 * 2
        return min(samples, meter.size(number)) if samples >= 2 * FEWEST else 0

    def _has_room(
        self, choice: Choice, close: Sequence[Choice], number: int, kept: int = 0, *, slopes: bool = False
    ) -> bool:
        """Whether another batch may be looked at, or was before."""
        if all(self.trials.known_of(c, number, slopes=slopes) for c in (choice, *close)):
            return True
        return self.budget.room > len(close) + kept and self.budget.left()

    def _unseen(self, choices: Sequence[Choice]) -> dict[Choice, list[float]]:
        """Losses of those samples of the first batch that the search has not compared choices on."""
        trials = self.trials
        if trials.meter.in_pieces or not all(trials.known(c, trials.size) for c in choices):
            return {}
        losses = {c: trials.losses(c) for c in choices}
        return {c: own[len(own) * self.searched // trials.size :] for c, own in losses.items()}

    def _by_balance(
        self,
        choice: Choice,
        pairs: Mapping[Choice, tuple[list[float], list[float]]],
        count: int,
        when: str,
    ) -> dict[Choice, float]:
        """Risks by what training left in the weights, or norms have recorded, of rivals that it calls worse.

        It has a third of the risk, shared by those that are put to it: two fifths where the loss agrees, before more
        samples are spent, a tenth before fresh ones are, half at last. Of the last two a quarter goes to what both say
        together, and they count the less the more the loss speaks against them.
        """
        found = {}
        for c, (theirs, own) in pairs.items():
            if when == EARLY and risk_of(theirs, own) >= AGREES:
                continue
            risk = self._told_by_weights(c, choice, whole=when == LAST)
            if when != EARLY:
                both = together(risk, risk_of(theirs, own, self.rounding))
                risk = min(4 / 3 * risk, 4 * both) / max(risk_of(own, theirs, self.rounding), 1e-300)
            found[c] = min(1.0, SHARES[when] * count * self._again * risk)
        return {c: risk for c, risk in found.items() if risk < RISK}

    def _is_told(self, rival: Choice, choice: Choice) -> bool:
        """Whether the weights can say anything of a rival."""
        records = self.moments is not None and bool(self.moments.norms)
        return records or (self.trials.balance is not None and self.trials.balance.risk(rival, choice) < 1.0)

    def _told_by_weights(self, rival: Choice, choice: Choice, *, whole: bool) -> float:
        """The risk by balances and by records; by both, each of them has half of it."""
        balance, moments = self.trials.balance, self.moments
        risks = [balance.risk(rival, choice)] if balance is not None else []
        risks += [moments.risk(rival, choice, whole=whole)] if moments is not None and moments.norms else []
        return len(risks) * min(risks, default=1.0)

    def agreed(self, choice: Choice, risks: Mapping[Choice, float]) -> dict[str, object]:
        """What fills the targets that a choice and all its remaining rivals agree on."""
        found, *others = (
            {t: what_it_does(e) for e, _ in self.space.entries(c) for t in e.targets}
            for c in (choice, *(r for rs in self.rivals(choice).values() for r in rs if risks.get(r, 1.0) >= RISK))
        )
        return {t: does for t, does in found.items() if all(other.get(t) == does for other in others)}

    def rests(self, choice: Choice, most: float = RESTLESS) -> bool:
        """Whether training may have stopped at a choice, or all norms agree with it."""
        return self.unrest(choice) < most or (self.moments is not None and self.moments.hold(choice))

    def settles(self, choice: Choice) -> bool:
        """Whether there is no need to look far from a choice: it is tested, and what is not far from it."""
        return self.rests(choice) or (self.rests(choice, NEAR) and self.score(choice) < self.least)

    def unrest(self, choice: Choice) -> float:
        """How far from a place where training could have stopped a choice is; infinite if the gradient can't tell."""
        if choice not in self._unrest:
            try:
                slopes = torch.stack([s for _, s in self.trials.slopes(choice, 0)])
                self._unrest[choice] = unrest(slopes)
            except (RuntimeError, ValueError):
                self._unrest[choice] = math.inf
        return self._unrest[choice]

    def gain(self, choice: Choice, bench: Bench) -> float:
        """What a step down the gradient gains at a choice, which is far from rest if that is much, else nothing."""
        if self.rests(choice) or self.unrest(choice) < FAR:
            return 0.0
        if choice not in self._gains:
            self._gains[choice] = bench.gain(self.trials.state(choice), self.trials.losses(choice))
        return self._gains[choice]

    @property
    def _again(self) -> int:
        """How the risk is shared by repeated tests, should a rival turn out better: a half, a sixth, ..."""
        return self.rounds * (self.rounds + 1) // 2


@dataclass
class _Seen:
    """What was measured of a choice on some batches, piece by piece."""

    losses: list[float] = field(default_factory=list)
    pieces: list[float] = field(default_factory=list)  # what gradients were taken of
    slopes: list[Tensor] = field(default_factory=list)
    steep: list[int] = field(default_factory=list)  # batches that gradients were taken on

    def add(self, trials: Trials, choice: Choice, number: int, slopes: bool, stop: int = 0) -> None:
        """Measure another batch, or its first samples, with gradients or without."""
        told = self.add_slopes(trials, choice, number, stop) if slopes else []
        self.losses += told or (trials.losses(choice, batch=number) if number else trials.losses(choice))

    def add_slopes(self, trials: Trials, choice: Choice, number: int, stop: int = 0) -> list[float]:
        """Take the gradients on a batch, or on its first samples; say what was lost, nothing where there are none."""
        if not trials.meter.has_slopes:
            return []
        try:
            measured = trials.slopes(choice, number, stop)
        except (RuntimeError, ValueError):
            trials.meter.has_slopes = False
            return []
        self.pieces += [sum(losses) / len(losses) for losses, _ in measured]
        self.slopes += [slope for _, slope in measured]
        self.steep.append(number)
        return [loss for losses, _ in measured for loss in losses]

    def risk(self, best: _Seen, rounding: float) -> float:
        """Risk of calling this one worse than another, by the loss or by all witnesses."""
        risk = risk_of(self.losses, best.losses, rounding)
        if self.slopes and len(self.slopes) == len(best.slopes):
            risk = min(risk, risk_by_gradient(self.sides, best.sides))
        return risk

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Losses and gradients, piece by piece."""
        return torch.tensor(self.pieces), torch.stack(self.slopes)
