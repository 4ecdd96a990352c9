"""Proof on data: the model's own loss decides what names and shapes leave open.

Decisions (:mod:`lit_wsl.matching.space`) are searched (:mod:`lit_wsl.matching.search`), what is found is tested. All
candidates see the same samples; one is taken only if every rival is worse in paired tests over the samples
(:mod:`lit_wsl.matching.witnesses`), at a risk of ``RISK`` shared by all that was tried. Close rivals are compared on
batches that the search has not seen, with the loss's gradient as a second witness.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from lit_wsl.errors import listed
from lit_wsl.matching.balance import MARGIN, Balance
from lit_wsl.matching.bench import DOUBT, FAR, GAIN, Bench, mean, values
from lit_wsl.matching.changes import FEW_COVERS, Choice, carried, odd_ones, questions, twins_exchanged
from lit_wsl.matching.entries import (
    STILL_OPEN,
    answered,
    is_doubtful,
    is_only_renamed,
    leaves_nothing_open,
    what_it_does,
)
from lit_wsl.matching.layers import regions
from lit_wsl.matching.layouts import leave_open
from lit_wsl.matching.moments import Moments
from lit_wsl.matching.search import Search
from lit_wsl.matching.space import Space
from lit_wsl.matching.symmetries import Gradients, turnings
from lit_wsl.matching.trials import OFF, Budget, Trials
from lit_wsl.matching.witnesses import AGREES, RISK, risk_by_gradient, risk_of, together, unrest
from lit_wsl.plan.entries import Decided, Measured, PlanEntry, Proof, ProofBy
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription
from lit_wsl.structure.losses import LossMeter, NoDataError
from lit_wsl.structure.running import hindrance, shaken_state

PASSES = 60.0  # most forward passes of a whole batch that trials may take
FEW = 2  # rivals whose gradients are measured
RESTLESS = 1.0  # times the noise of its batch is a gradient where training has not stopped
LITTLE = 8  # rivals to each that may be left open where it is less
SEARCH = 0.7  # share of them that the search may take
REFUTED = "the loss on data refutes what names and shapes say, and does not say what is right"


def _exchanges(one: object, other: object) -> int:
    """How many members two orders of the same members have in other places; none if they are no such orders."""
    if not isinstance(one, tuple) or not isinstance(other, tuple):
        return 0
    orders = sorted(map(repr, one)) == sorted(map(repr, other)) == sorted(set(map(repr, one)))
    return sum(a != b for a, b in zip(one, other)) if orders and len(one) <= 4 else 0


class LossJudge:
    """Tests what a search has found."""

    def __init__(self, trials: Trials, moments: Moments | None = None) -> None:
        self.moments = moments  # what norms have recorded
        self.trials, self.space, self.score, self.budget = trials, trials.space, trials.score, trials.budget
        self.rounds, self.searched = 0, 0  # tests, and samples of the first batch that were looked at before
        self._unrest: dict[Choice, float] = {}
        self._gains: dict[Choice, float] = {}
        self._close: dict[Choice, list[Choice]] = {}  # rivals of what was tested that the search has come across
        self.rounding = 0.0  # differences of losses below count as none
        self.rows_are_free = False  # whether rows of queries and keys may stand in any order that both share

    @cached_property
    def search(self) -> Search:
        """The search for what it judges."""
        return Search(self.trials, SEARCH, rests=self.rests, arrange=self.moments.arranged if self.moments else None)

    def rivals(self, choice: Choice) -> dict[int, list[Choice]]:
        """The other options of each decision, the rest as chosen, that change least.

        What names have told and the loss bears out has none. What means the same is no rival, and what changes all that
        another rival does and more (three norms in a circle where two exchanged are worse) was compared in the search;
        but for two modules that change places as a whole, and what the search has seen to be about as good.
        """
        own = self.space.meaning(choice)
        out = {}
        for d, decision in enumerate(self.space.decisions):
            if (decision.told and choice[d] == 0) or (d == self.space.rotary and self.rows_are_free):
                continue  # what the search found better was taken
            others = [(*choice[:d], o, *choice[d + 1 :]) for o in range(len(decision.options)) if o != choice[d]]
            others = others if len(others) < FEW_COVERS else []
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
        for c in self.trials.screened:
            samples = min(self.trials.extent(c), self.trials.extent(choice))
            if OFF not in c and risk_of(self.trials.losses(c, samples), self.trials.losses(choice, samples)) >= RISK:
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

    def screened(self, choice: Choice) -> list[float]:
        """Losses on the samples that a search compares choices on."""
        return self.trials.losses(choice, self.trials.screen)

    def test(self, choice: Choice) -> tuple[Choice, dict[Choice, float]]:
        """Compare a choice with its rivals: on the batch that it was found on, then on fresh ones.

        The risk of one wrong answer is shared. A third goes to the first batch, where all that the search has tried
        could have been taken; the rest to the fresh batches, which only the remaining rivals are compared on.

        Returns:
            The choice, another one if a rival turned out better; the risk of each rival.
        """
        self.rounds += 1
        self.searched = self.trials.reached if self.rounds == 1 else self.trials.size
        self.rounding = 1e-6 * max(abs(self.score(choice)), 1e-6)
        self._close.setdefault(choice, self._as_good(choice))
        rivals = [r for group in self.rivals(choice).values() for r in group]
        better, risks = self._on_first_batch(choice, rivals)
        fresh: dict[Choice, _Seen] = {}
        close = [c for c in rivals if risks.get(c, 1.0) >= RISK]
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
        risks |= self._by_balance(choice, last, len(last), agreeing=False)
        return choice, {c: risks.get(c, 1.0) for c in rivals}

    def _on_first_batch(self, choice: Choice, rivals: Sequence[Choice]) -> tuple[Choice, dict[Choice, float]]:
        """Risks after more and more samples of the batch that the search has seen."""
        trials, samples, close = self.trials, 0, list(rivals)
        looks = 1 + math.ceil(math.log2(max(trials.size / trials.least, 1)))
        shares = 3 * looks * max(trials.tried, len(rivals), 1) * self._again
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
            least = min(close, key=lambda c: sum(known[c]), default=choice)
            if shares * risk_of(known[choice], known[least], self.rounding) < RISK:
                return least, {}
            risks |= {c: min(1.0, shares * risk_of(known[c], known[choice], self.rounding)) for c in close}
            close = [c for c in close if risks[c] >= RISK]
            if samples >= trials.screen:
                pairs = {c: (known[c], known[choice]) for c in close}
                risks |= self._by_balance(choice, pairs, len(rivals), agreeing=True)
                close = [c for c in close if risks[c] >= RISK]
        return choice, risks

    def _on_fresh_batches(
        self, choice: Choice, close: Sequence[Choice], known: dict[Choice, _Seen], again: int
    ) -> tuple[Choice, dict[Choice, float]]:
        """Risks after one, two, four, ... batches that the search has not seen; of the only batch if there is no other.

        Where a rival is ahead, so many passes are left to compare it with its own rivals then.

        What was measured of the first batch behind what the search has seen counts, too.
        The last look has three quarters of the risk, the k-th before it 1 / 2**(k + 2), each of two tests half of that.
        """
        has, first = self.trials.meter.has, int(self.trials.meter.has(1))
        if not self._has_room(choice, close, first):
            close = close[: max(0, self.budget.room - 1)]
        shares = 3 * (len(close) if first else self.trials.tried) * self._again
        unseen = self._unseen((choice, *close)) if first else {}
        known |= {c: _Seen(unseen.get(c, [])) for c in (choice, *close)}
        risks: dict[Choice, float] = {}
        number, looks = first, 0
        last = False
        while close and has(number) and not last and self._has_room(choice, close, number):
            slopes = len(close) <= FEW and self._has_room(choice, close, number, slopes=True)
            for c in (choice, *close):
                known[c].add(self.trials, c, number, slopes)
            number += 1
            seen = number - first
            ahead = min(sum(known[c].losses) for c in close) < sum(known[choice].losses)
            last = not (has(number) and self._has_room(choice, close, number, again if ahead else 0))
            if seen & (seen - 1) and not last:
                continue
            looks += 1
            if last and len(close) <= FEW:  # what was measured while there were more rivals
                late = [n for n in range(first, number) if n not in known[choice].steep]
                for n in late[: self.budget.room // (1 + len(close))]:
                    for c in (choice, *close):
                        known[c].add_slopes(self.trials, c, n)
            share = shares * (4 / 3 if last else 2 ** (looks + 2))
            least = min(close, key=lambda c: sum(known[c].losses))
            if share * risk_of(known[choice].losses, known[least].losses, self.rounding) < RISK:
                return least, {}
            risks |= {c: min(1.0, share * known[c].risk(known[choice], self.rounding)) for c in close}
            close = [c for c in close if risks[c] >= RISK]
        return choice, risks

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
        self, choice: Choice, pairs: Mapping[Choice, tuple[list[float], list[float]]], count: int, *, agreeing: bool
    ) -> dict[Choice, float]:
        """Risks by what training left in the weights, or norms have recorded, of rivals that it calls worse.

        It has a third of the risk, shared by those that are put to it: half where the loss agrees, before more samples
        are spent, half at last where the loss has not told: a quarter of that goes to what both say together, and all
        counts the less the more the loss speaks against it.
        """
        found = {}
        for c, (theirs, own) in pairs.items():
            if agreeing and risk_of(theirs, own) >= AGREES:
                continue
            risk = self._told_by_weights(c, choice, whole=not agreeing)
            if not agreeing:
                both = together(risk, risk_of(theirs, own, self.rounding))
                risk = min(4 / 3 * risk, 4 * both) / max(risk_of(own, theirs, self.rounding), 1e-300)
            found[c] = min(1.0, 6 * count * self._again * risk)
        return {c: risk for c, risk in found.items() if risk < RISK}

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

    def rests(self, choice: Choice) -> bool:
        """Whether there is no need to look far from a choice: training may have stopped there, or all norms agree."""
        return self.unrest(choice) < RESTLESS or (self.moments is not None and self.moments.hold(choice))

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

    def add(self, trials: Trials, choice: Choice, number: int, slopes: bool) -> None:
        """Measure another batch, with gradients or without."""
        told = self.add_slopes(trials, choice, number) if slopes else []
        self.losses += told or (trials.losses(choice, batch=number) if number else trials.losses(choice))

    def add_slopes(self, trials: Trials, choice: Choice, number: int) -> list[float]:
        """Take the gradients on a batch, and say what was lost; nothing where the loss has none."""
        if not trials.meter.has_slopes:
            return []
        try:
            measured = trials.slopes(choice, number)
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
            sides = [(torch.tensor(seen.pieces), torch.stack(seen.slopes)) for seen in (self, best)]
            risk = min(risk, risk_by_gradient(*sides))
        return risk


def judge_by_loss(
    plan: TransferPlan,
    sides: tuple[ModelDescription, ModelDescription],
    tensors: Mapping[str, Tensor],
    meter: LossMeter,
    *,
    seconds: float = 60.0,
) -> TransferPlan:
    """Check a plan by the model's own loss, and let the loss decide what names and shapes leave open.

    Returns:
        The plan with what was decided, ``proof``, ``proof_by`` and ``measured``.
    """
    try:
        reason = hindrance(meter.model) or ("" if meter.has(0) else "there is no batch")
        if reason:
            return _untested(plan, reason)
        with meter.session():
            return _judge(plan, sides, tensors, meter, Budget(seconds, PASSES, meter))
    except Exception as error:  # whatever a step raises
        kind = "" if isinstance(error, NoDataError) else f"{type(error).__name__}: "
        return _untested(plan, f"{kind}{error}".splitlines()[0][:160])


def _untested(plan: TransferPlan, reason: str) -> TransferPlan:
    return replace(plan, notes=(*plan.notes, f"not tested on data: {reason}"))


def _judge(
    plan: TransferPlan,
    sides: tuple[ModelDescription, ModelDescription],
    tensors: Mapping[str, Tensor],
    meter: LossMeter,
    budget: Budget,
) -> TransferPlan:
    bench = Bench(tensors, meter, budget, meter.losses({}, 0))
    is_settled = leaves_nothing_open(plan, *sides) or not Space(*sides, plan).is_open
    if is_settled and bench.bears_out(plan):
        return _as_planned(plan, bench)
    judge, choice = _found(plan, sides, bench)
    trials = judge.trials
    better, risks = judge.test(choice)
    beaten: set[Choice] = set()
    while better not in (choice, *beaten) and budget.left():
        beaten.add(choice)
        found = Search(trials, 1.0).climb(better)  # by fewer samples than the test has seen
        choice = better if found in beaten else min(better, found, key=lambda c: trials.mean(c, trials.size))
        better, risks = judge.test(choice)
    best = trials.losses(choice, at_once=True)
    is_open = better != choice or any(risk >= RISK for risk in risks.values())
    # Where much makes no difference, the search may have ended far from the truth, and all that was decided is void,
    # but for what names say, too; little may be left open if the gradient is not far from rest.
    # Where every tensor stands where it stood, order is trusted as long as nothing better is found.
    # And where all is decided, but the gradient is far from rest, the truth is not among what was asked.
    renamed, unrest = is_only_renamed(plan, *sides), judge.unrest(choice)
    much = better != choice or LITTLE * sum(risk >= RISK for risk in risks.values()) > len(risks)
    far = unrest < math.inf and judge.gain(choice, bench) >= GAIN
    keeps = not judge.rests(choice) and (much or far or unrest == math.inf) if is_open else far
    if (is_open and renamed) or (keeps and not renamed) or not bench.falls(best):
        told = None if renamed or not bench.falls(best) else judge.agreed(choice, risks)
        judged = _as_planned(plan, bench, Space(*sides, plan, counts=True, trust=False), judge.space, trials, told)
        note = f"the gradient there is {unrest:.0f} times its noise: training was short, or a part is mapped wrong"
        return judged if is_open or not keeps else replace(judged, notes=(*judged.notes, note))
    decisions = tuple(sorted(_decided(judge, choice, risks), key=lambda d: d.risk))
    agreed = judge.agreed(choice, risks)
    answers = [e for e, _ in judge.space.entries(choice)]
    judged = answered(plan, answers, sides, open_={t for e in answers for t in e.targets if t not in agreed})
    final = best if all(d.taken for d in decisions) else bench.losses(judged)
    return _verdict(judged, bench, final, decisions)


def _found(
    plan: TransferPlan, sides: tuple[ModelDescription, ModelDescription], bench: Bench
) -> tuple[LossJudge, Choice]:
    """What a search finds: among what names leave open, with what is rare, and where names tell nothing.

    The next is asked where training would not have stopped; names are doubted where it never was, and from the start
    where the weights hang together clearly better without them.
    """
    gradients = _gradients(bench.meter)
    turns = turnings(regions(sides[1]), gradients) if gradients else []
    judge = _judge_of(Space(*sides, plan, turns, counts=True), plan, bench, gradients)
    nameless = _judge_of(Space(*sides, plan, turns, counts=True, trust=False), plan, bench, gradients, judge)
    if _mislead(judge, nameless):
        judge = nameless
    choice = judge.search.find()
    if judge.unrest(choice) < math.inf and not judge.rests(choice):
        wide = Space(*sides, plan, turns, wide=True, counts=True, trust=judge.space.trust)
        if questions(wide) != questions(judge.space):
            start, judge = carried(choice, judge.space, wide), _judge_of(wide, plan, bench, gradients, judge)
            choice = judge.search.around(start)
    if not judge.rests(choice):
        choice = judge.search.widen(choice)
    doubtful = judge.gain(choice, bench) >= DOUBT or not bench.falls(judge.screened(choice))
    if doubtful and judge.space.trust and questions(nameless.space) != questions(judge.space):
        nameless.trials.before = judge.trials.tried
        start, judge = carried(choice, judge.space, nameless.space), nameless
        choice = judge.search.find(start)
        choice = choice if judge.rests(choice) else judge.search.widen(choice)
    return judge, judge.with_rows_as_they_are(judge.preferred(choice))


def _mislead(judge: LossJudge, nameless: LossJudge) -> bool:
    """Whether names mislead: without them the weights hang together clearly better."""
    balance = nameless.trials.balance
    if balance is None or questions(nameless.space) == questions(judge.space):
        return False
    told = carried(judge.search.balanced(judge.space.first), judge.space, nameless.space)
    return balance.lead(nameless.search.balanced(told), told) > MARGIN


def _judge_of(
    space: Space, plan: TransferPlan, bench: Bench, gradients: Gradients | None, judge: LossJudge | None = None
) -> LossJudge:
    """Who judges about a space, after another one has about the same models."""
    asked = {t for entry, _ in space.entries(space.first) for t in entry.targets}
    fixed = values([e for e in plan if not asked.intersection(e.targets)], bench.tensors)
    tried, depend = judge.trials.tried if judge else 0, bench.depend
    trials = Trials(space, bench.tensors, bench.meter, fixed, bench.budget, tried, depend=depend)
    trials.balance = _balance(trials, gradients, judge.trials.balance if judge else None)
    return LossJudge(trials, Moments(trials))


def _gradients(meter: LossMeter) -> Gradients | None:
    """Gradients of the model at weights that hide nothing."""
    try:
        weights = shaken_state(meter.model)
        return Gradients(weights, [slopes for _, slopes in meter.gradients(weights, 0)])
    except (RuntimeError, ValueError):  # a loss without a gradient
        return None


def _balance(trials: Trials, gradients: Gradients | None, known: Balance | None) -> Balance | None:
    """What the weights tell without a pass."""
    if gradients is None:
        return None
    try:
        in_time = partial(trials.budget.in_time, 0.5)
        return Balance(trials.space, trials.tensors, trials.fixed, gradients, in_time, known)
    except (RuntimeError, ValueError, KeyError):
        return None


def _as_planned(
    plan: TransferPlan,
    bench: Bench,
    everything: Space | None = None,
    space: Space | None = None,
    trials: Trials | None = None,
    agreed: Mapping[str, object] | None = None,
) -> TransferPlan:
    """The verdict where no answer was found: what is in question is withdrawn if the data refutes it.

    Refuted: the best mapping that was tried lowers the loss, and does so significantly more than the plan; or the plan
    has something for every parameter, and the loss of what it fills is above the fresh model's, significantly, or
    though some other mapping lowers it significantly. Then names may be wrong as well. Where names leave
    something open, and what is filled is not refuted, that is withdrawn on which names and the search do not agree.
    """
    losses, beaten, informs = bench.losses(plan), False, False
    if trials is not None:
        best = trials.losses(trials.best, at_once=True)
        beaten = risk_of(losses, best) < RISK / trials.tried and bench.falls(best)
        informs = risk_of(bench.fresh, best) < RISK / trials.tried  # the checkpoint knows of this data
    above = mean(losses) - mean(bench.fresh)
    rises = above > 0 and not _missing(plan)
    rises = rises and (informs or above > bench.spread or risk_of(losses, bench.fresh) < RISK)
    questioned = _questioned(plan, everything)
    if not questioned or not (beaten or rises):
        asked = _questioned(plan, space) if agreed is not None and informs and _unfilled(plan) else []
        doubted = {e.targets[0]: STILL_OPEN for e in asked if not _agrees(e, agreed or {})}
        left = leave_open(plan, doubted)
        judged = _verdict(left, bench, bench.losses(left) if doubted else losses, ())
        proven = judged.proof == "proven" and agreed is not None
        return replace(judged, proof="not tested", proof_by="") if proven else judged
    left = leave_open(plan, {e.targets[0]: REFUTED for e in questioned})
    shown = listed([e.targets[0] for e in questioned], 3)
    judged = _verdict(left, bench, bench.losses(left), ())
    note = f"REFUTED on data: loss {mean(bench.fresh):.4g} fresh, {mean(losses):.4g} with {shown}: withdrawn"
    return replace(judged, proof="refuted", proof_by="data", notes=(*judged.notes, note))


def _questioned(plan: TransferPlan, space: Space | None) -> list[PlanEntry]:
    """The entries of a plan that are doubtful, or that a space asks about."""
    asked = {t for entry, _ in space.entries(space.first) for t in entry.targets} if space is not None else set()
    return [e for e in plan if asked.intersection(e.targets) or is_doubtful(e)]


def _agrees(entry: PlanEntry, agreed: Mapping[str, object]) -> bool:
    """Whether a search and all that it left open say the same of an entry's targets, or say nothing of them."""
    return all(agreed.get(target) == what_it_does(entry) for target in entry.targets)


def _missing(plan: TransferPlan) -> list[str]:
    """Parameters that the plan has nothing for, such as those of a new head."""
    return [u.name for u in plan.unmatched_target if u.kind == "parameter"]


def _unfilled(plan: TransferPlan) -> list[str]:
    """Parameters that the plan does not fill."""
    return [*_missing(plan), *(t for a in plan.ambiguous for t in a.targets)]


def _decided(judge: LossJudge, choice: Choice, risks: Mapping[Choice, float]) -> Iterator[Decided]:
    for d, rivals in judge.rivals(choice).items():
        decision = judge.space.decisions[d]
        rival = min(rivals, key=judge.score)
        risk = max(risks.get(r, 1.0) for r in rivals)
        labels = decision.labels[choice[d]], decision.labels[rival[d]]
        yield Decided(
            decision.text, labels[0], judge.score(choice), labels[1], judge.score(rival), risk, taken=risk < RISK
        )


def _verdict(plan: TransferPlan, bench: Bench, final: Sequence[float], decisions: tuple[Decided, ...]) -> TransferPlan:
    """The plan with its proof: does the loss fall, and is nothing left open?"""
    fresh = bench.fresh
    falls = bench.falls(final)
    seconds = time.monotonic() - bench.budget.started
    spent = round(bench.meter.passes, 2), round(seconds, 2), bench.spread
    measured = Measured(mean(fresh), mean(final), *spent, decisions)
    text = f"loss {measured.fresh:.4g} fresh, {measured.transferred:.4g} transferred"
    proof: Proof
    unfilled = _unfilled(plan)
    if falls:
        proof = "not tested" if unfilled else "proven"
        note = f"proven on data: {text}" if not unfilled else f"confirmed on data, as far as it is filled: {text}"
    else:
        proof, note = "not tested", f"not tested on data: the loss does not clearly fall ({text})"
    proof_by: ProofBy = "" if proof == "not tested" else "data"
    if plan.proof != "not tested" and proof == "not tested":
        proof, proof_by = plan.proof, plan.proof_by
    return replace(plan, proof=proof, proof_by=proof_by, measured=measured, notes=(*plan.notes, note))
