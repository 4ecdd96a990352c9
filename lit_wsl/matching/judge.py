"""Proof on data: the model's own loss decides what names and shapes leave open.

Decisions (:mod:`lit_wsl.matching.space`) are searched (:mod:`lit_wsl.matching.search`), what is found is tested: it is
taken only if every rival is worse in paired tests over the samples (:mod:`lit_wsl.matching.rivals`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from lit_wsl.errors import listed
from lit_wsl.matching.balance import MARGIN, Balance
from lit_wsl.matching.bench import DOUBT, GAIN, Bench, fresh_losses, mean, values
from lit_wsl.matching.changes import Choice, carried, questions
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
from lit_wsl.matching.rivals import LossJudge
from lit_wsl.matching.search import Search
from lit_wsl.matching.space import Space
from lit_wsl.matching.symmetries import Gradients, turnings
from lit_wsl.matching.trials import Budget, Trials
from lit_wsl.matching.witnesses import RISK, risk_of
from lit_wsl.plan.entries import Decided, Measured, PlanEntry, Proof, ProofBy
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription
from lit_wsl.structure.losses import LossMeter, NoDataError
from lit_wsl.structure.running import hindrance, shaken_state

PASSES = 60.0  # most forward passes of a whole batch that trials may take
KEPT = 4  # of them that are kept for what pieces of a batch can't tell
LITTLE = 8  # rivals to each that may be left open where it is less
REFUTED = "the loss on data refutes what names and shapes say, and does not say what is right"


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
    bench = Bench(tensors, meter, budget, fresh_losses(meter))
    if meter.is_biased:
        budget.passes -= KEPT
    settled, asks = _settled(plan, sides)
    if settled is not None and (bench.bears_out(settled) if asks else bench.falls(bench.losses(settled))):
        return _as_planned(settled, bench)
    judge, choice = _found(plan, sides, bench)
    trials = judge.trials
    better, risks = judge.test(choice)
    beaten: set[Choice] = set()
    while better not in (choice, *beaten) and budget.left():
        was_left = choice in judge.left
        beaten |= set() if was_left else {choice}
        found = better if was_left else Search(trials, 1.0).climb(better)  # by fewer samples than the test has seen
        choice = better if found in beaten else min(better, found, key=lambda c: trials.mean(c, trials.size))
        better, risks = judge.test(choice)
    risks = judge.confirmed(choice, risks)
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


def _settled(plan: TransferPlan, sides: tuple[ModelDescription, ModelDescription]) -> tuple[TransferPlan | None, bool]:
    """The plan where names leave nothing to choose, with all that only one thing can be done for; else nothing.

    And whether there is something to choose where names tell nothing: if not, no other mapping could be better.
    """
    if leaves_nothing_open(plan, *sides):
        return plan, True
    for trust in (False, True):
        space = Space(*sides, plan, wide=not trust, counts=not trust, trust=trust)
        if not space.is_open:
            return answered(plan, [entry for entry, _ in space.entries(space.first)], sides), trust
    return None, True


def _found(
    plan: TransferPlan, sides: tuple[ModelDescription, ModelDescription], bench: Bench
) -> tuple[LossJudge, Choice]:
    """What a search finds: among what names leave open, with what is rare, and where names tell nothing.

    The next is asked where training would not have stopped, or where nothing lowers the loss; names are doubted where
    it never was, and from the start where the weights hang together clearly better without them.
    """
    gradients = _gradients(bench.meter)
    turns = turnings(regions(sides[1]), gradients) if gradients else []
    judge = _judge_of(Space(*sides, plan, turns, counts=True), plan, bench, gradients)
    nameless = _judge_of(Space(*sides, plan, turns, counts=True, trust=False), plan, bench, gradients, judge)
    if _mislead(judge, nameless):
        judge = nameless
    choice = judge.search.find()
    restless = judge.unrest(choice) < math.inf and not judge.rests(choice)
    if restless or not bench.falls(judge.screened(choice)):
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
    choice = judge.search.renumbered(choice)
    return judge, judge.with_rows_as_they_are(judge.preferred(judge.leader(choice)))


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
    return LossJudge(trials, Moments(trials), mean(bench.fresh) - bench.spread)


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
        beaten = bench.falls(best) and (
            risk_of(losses, best) < RISK / trials.tried or bench.is_beaten(plan, trials.state(trials.best))
        )
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
