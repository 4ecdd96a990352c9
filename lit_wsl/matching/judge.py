"""Proof on data: the model's own loss decides what names and shapes leave open.

Decisions (:mod:`lit_wsl.matching.space`) are searched from the best guess: undecided layers are switched off first and
on again where they help most, so that what is wrong elsewhere does not drown what is right here. What is found is then
tested. All candidates see the same samples; one is taken only if every rival is worse in paired tests over the
samples, at a risk of ``RISK`` shared by all rivals that were tried; close rivals get more batches, and then a second
witness: the norm of the loss's gradient, which is small only where training has stopped.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from scipy.special import bdtr, stdtr
from torch import Tensor, nn

from lit_wsl.matching.entries import cast_between
from lit_wsl.matching.layouts import leave_open
from lit_wsl.matching.space import Space, is_doubtful
from lit_wsl.plan.entries import Ambiguity, Candidate, Decided, Measured, PlanEntry, Proof, ProofBy
from lit_wsl.plan.operations import run_operations
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription
from lit_wsl.structure.losses import LossMeter, NoDataError
from lit_wsl.structure.running import hindrance

RISK = 0.01  # of one wrong decision among all rivals tried
SCREEN = 8  # samples that rivals are compared on first
PASSES = 64.0  # most forward passes of a whole batch
OFF = -1
BY_LOSS = "the loss on data decides it"
REFUTED = "the loss on data refutes what names and shapes say, and does not say what is right"
STILL_OPEN = "the loss on data does not decide between the candidates"

Choice = tuple[int, ...]


def risk_of(rival: Sequence[float], best: Sequence[float], floor: float = 0.0) -> float:
    """Risk of calling a rival worse although it is not.

    The better of two paired tests, one-sided, counted as two: Student's t, and the sign test, which a few samples with
    a loss far from the others' do not disturb.

    Args:
        rival: Losses of the rival, sample by sample.
        best: Losses of the candidate on the same samples.
        floor: Differences below count as rounding.

    >>> risk_of([2.0, 2.1, 1.9, 2.2], [1.0, 1.2, 0.9, 1.1]) < 0.001
    True
    >>> risk_of([1.0, 1.0], [1.0, 1.0])
    1.0
    """
    gaps = [a - b for a, b in zip(rival, best)]
    n = len(gaps)
    if n < 3 or not all(map(math.isfinite, gaps)):
        return 0.0 if any(math.isinf(a) or math.isnan(a) for a in rival) and all(map(math.isfinite, best)) else 1.0
    mean = sum(gaps) / n
    spread = math.sqrt(sum((g - mean) ** 2 for g in gaps) / (n - 1))
    if mean <= floor:
        return 1.0
    spread = max(spread, floor, 1e-3 * mean)
    told = [g for g in gaps if abs(g) > floor]
    student = float(stdtr(n - 1, -mean / (spread / math.sqrt(n))))
    sign = float(bdtr(sum(g < 0 for g in told), len(told), 0.5)) if told else 1.0
    return min(1.0, 2 * student, 2 * sign)


def _silent(text: str) -> None:
    """Say nothing."""


@dataclass
class Budget:
    """What the trials may cost."""

    seconds: float
    passes: float
    meter: LossMeter
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> bool:
        """Whether the search may make another trial."""
        return self.in_time and self.meter.passes < self.passes

    @property
    def in_time(self) -> bool:
        """Whether there is time for another trial."""
        return time.monotonic() - self.started < self.seconds


class LossJudge:
    """Searches the decisions of a space by the loss, and tests what it finds.

    Args:
        space: The decisions.
        tensors: The checkpoint's tensors.
        meter: Measures losses.
        fixed: Values of what is not open, by name in the model.
        budget: What it may cost.
        tell: Told of every trial.
    """

    def __init__(
        self,
        space: Space,
        tensors: Mapping[str, Tensor],
        meter: LossMeter,
        fixed: Mapping[str, Tensor],
        budget: Budget,
        tell: Callable[[str], None] = _silent,
    ) -> None:
        self.space, self.tensors, self.meter, self.fixed, self.budget, self.tell = (
            space,
            tensors,
            meter,
            fixed,
            budget,
            tell,
        )
        self.seen: dict[tuple[Choice, int], list[float]] = {}
        self.screen = SCREEN // 2 if meter.elements >= SCREEN else SCREEN

    # -- measuring -------------------------------------------------------------------------------------------------

    def state(self, choice: Choice) -> dict[str, Tensor]:
        """What a choice puts into the model; zeros for what is switched off."""
        out = dict(self.fixed)
        for entry, on in self.space.entries(choice):
            values = run_operations(entry.operations, [self.tensors[s] for s in entry.sources])
            for name, value, shape in zip(entry.targets, values, entry.target_shapes):
                out[name] = value.reshape(shape).contiguous() if on else torch.zeros(shape, dtype=value.dtype)
        return out

    def losses(self, choice: Choice, batch: int = -1) -> list[float]:
        """Losses of a choice on a batch; on the samples of the screening for -1."""
        key = choice, batch
        if key not in self.seen:
            try:
                state = self.state(choice)
                self.seen[key] = self.meter.losses(state, max(batch, 0), self.screen if batch < 0 else None)
            except (ValueError, RuntimeError) as error:  # a candidate that can't run is no answer
                if not self.seen:
                    raise
                self.seen[key] = [math.inf] * len(next(iter(self.seen.values())))
                self.tell(str(error))
        return self.seen[key]

    def score(self, choice: Choice) -> float:
        """Mean loss on the screening."""
        values = self.losses(choice)
        mean = sum(values) / len(values)
        return mean if math.isfinite(mean) else math.inf

    # -- searching -------------------------------------------------------------------------------------------------

    def search(self) -> Choice:
        """The choice of the least loss that is found from several starts."""
        start = self.space.first
        total = math.prod(len(d.options) for d in self.space.decisions)
        if total <= 192:
            return min(self._all(), key=self.score, default=start)
        found = [self._climb(start), self._switch_on(start)]
        best = min(found, key=self.score)
        for _ in range(3):
            better = self._pairs(best)
            if self.score(better) >= self.score(best):
                break
            best = self._climb(better)
        return best

    def _all(self) -> list[Choice]:
        choices: list[Choice] = [()]
        for decision in self.space.decisions:
            choices = [(*c, o) for c in choices for o in range(len(decision.options))]
        return [c for c in choices if self.budget.left or (c, -1) in self.seen]

    def _neighbours(self, choice: Choice, decision: int) -> list[Choice]:
        return [
            (*choice[:decision], o, *choice[decision + 1 :])
            for o in range(len(self.space.decisions[decision].options))
            if o != choice[decision]
        ]

    def _climb(self, choice: Choice, among: Sequence[int] | None = None) -> Choice:
        """Change one decision after the other, the most decisive first, until nothing gets better."""
        places = range(len(choice)) if among is None else among
        while self.budget.left:
            table = sorted(
                (self.score(other), d, other[d])
                for d in places
                if choice[d] != OFF
                for other in self._neighbours(choice, d)
                if self.budget.left
            )
            before = self.score(choice)
            for score, d, option in table:
                if score >= before:
                    break
                other = (*choice[:d], option, *choice[d + 1 :])
                if self.score(other) < self.score(choice):
                    choice = other
            if self.score(choice) >= before:
                break
        return choice

    def _switch_on(self, start: Choice) -> Choice:
        """Begin with all undecided layers switched off, and switch on what helps most."""
        groups = self.space.switches
        choice = tuple(OFF if any(d == g[0] for g in groups) else o for d, o in enumerate(start))
        choice = self._climb(choice, self.space.others)
        waiting = list(groups)
        gains: dict[int, float] = {}
        while waiting and self.budget.left:
            order = sorted(waiting, key=lambda g: gains.get(g[0], -math.inf))
            best, best_group = None, order[0]
            for group in order:
                if best is not None and gains.get(group[0], -math.inf) > self.score(best) - self.score(choice):
                    break  # it was worse before, when less was decided
                lit = self._light(choice, start, group)
                gains[group[0]] = self.score(lit) - self.score(choice)
                if best is None or self.score(lit) < self.score(best):
                    best, best_group = lit, group
            assert best is not None
            choice = self._climb(best, self.space.others)
            waiting.remove(best_group)
        choice = tuple(start[d] if o == OFF else o for d, o in enumerate(choice))
        return self._climb(choice)

    def _light(self, choice: Choice, start: Choice, group: Sequence[int]) -> Choice:
        """The best way to switch one layer group on: its own decisions, jointly where they are few."""
        head = group[0]
        lit = [
            (*choice[:head], o, *choice[head + 1 :])
            for o in range(len(self.space.decisions[head].options))
            if self.budget.left
        ] or [(*choice[:head], start[head], *choice[head + 1 :])]
        second = next((d for d in group[1:] if len(self.space.decisions[d].options) > 2), None)
        if second is not None and len(lit) * len(self.space.decisions[second].options) <= 48:
            lit += [n for c in lit for n in self._neighbours(c, second) if self.budget.left]
        best = min(lit, key=self.score)
        return self._climb(best, group)

    def _pairs(self, choice: Choice) -> Choice:
        """The best change of two decisions of one group of layers, or of one and the numbering, at once."""
        best = choice
        for group in self.space.switches:
            for d, e in combinations([*group, *self.space.others], 2):
                if len(self.space.decisions[d].options) * len(self.space.decisions[e].options) > 30:
                    continue
                for other in self._neighbours(choice, d):
                    for both in self._neighbours(other, e):
                        if not self.budget.left:
                            return best
                        if self.score(both) < self.score(best):
                            best = both
        return best

    # -- testing ---------------------------------------------------------------------------------------------------

    def rivals(self, choice: Choice) -> dict[int, list[Choice]]:
        """The other options of each decision, the rest as chosen."""
        return {d: self._neighbours(choice, d) for d in range(len(choice)) if len(self.space.decisions[d].options) > 1}

    def test(self, choice: Choice) -> tuple[Choice, dict[Choice, float]]:
        """Compare a choice with its rivals on more and more batches, until all are worse or nothing is left.

        Returns:
            The choice, another one if a rival turned out better; the risk of each rival.
        """
        rivals = [r for group in self.rivals(choice).values() for r in group]
        trials = max(len(self.seen), len(rivals), 1)
        level = RISK / trials / 4
        rounding = 1e-6 * max(abs(self.score(choice)), 1e-6)
        risks: dict[Choice, float] = {}
        known: dict[Choice, list[float]] = {}
        close = list(rivals)
        for batch in (-1, *range(64)):
            if not close or (batch > 0 and not self.meter.has(batch)):
                break
            if not self.budget.in_time and batch >= 0:
                break
            for c in (choice, *close):
                fresh = self.losses(c, batch)
                known[c] = fresh if batch == 0 else [*known.get(c, []), *fresh]  # batch 0 holds the screening's samples
            means = {c: sum(known[c]) / len(known[c]) for c in close}
            least = min(close, key=lambda c: means[c])
            if risk_of(known[choice], known[least], rounding) < level:
                return least, {}
            for c in close:
                risks[c] = risk_of(known[c], known[choice], rounding)
            close = [c for c in close if risks[c] >= level]
        for c in close:
            if self.budget.in_time:
                risks[c] = min(risks[c], self._second_witness(choice, c, known, rounding))
        return choice, {c: min(1.0, risks.get(c, 1.0) * trials * 4) for c in rivals}

    def _second_witness(
        self, choice: Choice, rival: Choice, known: Mapping[Choice, list[float]], rounding: float
    ) -> float:
        """Risk by the norm of the gradient, where the loss does not speak for the rival."""
        if rival not in known or sum(known[rival]) <= sum(known[choice]) + rounding:
            return 1.0
        try:
            steep, flat = [], []
            for batch in range(4):
                if not self.meter.has(batch):
                    break
                steep += self.meter.gradients(self.state(rival), batch)
                flat += self.meter.gradients(self.state(choice), batch)
        except (RuntimeError, ValueError):  # no gradient here
            return 1.0
        if min((*steep, *flat), default=0.0) <= 0.0:
            return 1.0
        return risk_of([math.log(v) for v in steep], [math.log(v) for v in flat], 1e-4)


def judge_by_loss(
    plan: TransferPlan,
    sides: tuple[ModelDescription, ModelDescription],
    tensors: Mapping[str, Tensor],
    meter: LossMeter,
    *,
    seconds: float = 60.0,
    tell: Callable[[str], None] = _silent,
) -> TransferPlan:
    """Check a plan by the model's own loss, and let the loss decide what names and shapes leave open.

    Args:
        plan: The plan.
        sides: The checkpoint's side, the model's side.
        tensors: The checkpoint's tensors.
        meter: Measures the model's loss.
        seconds: Most time that trials may take.
        tell: Told of what goes on.

    Returns:
        The plan with what was decided, ``proof``, ``proof_by`` and ``measured``.
    """
    try:
        reason = hindrance(meter.model) or ("" if meter.has(0) else "there is no batch")
        return (
            _untested(plan, reason) if reason else _judge(plan, sides, tensors, meter, Budget(seconds, PASSES, meter))
        )
    except Exception as error:  # whatever a step raises
        kind = "" if isinstance(error, NoDataError) else f"{type(error).__name__}: "
        return _untested(plan, f"{kind}{error}".splitlines()[0][:160])


def _untested(plan: TransferPlan, reason: str) -> TransferPlan:
    return replace(plan, notes=(*plan.notes, f"not tested on data: {reason}"))


@dataclass(frozen=True)
class _Bench:
    """What a plan is measured with, and what the fresh model lost."""

    tensors: Mapping[str, Tensor]
    meter: LossMeter
    budget: Budget
    fresh: Sequence[float]

    def losses(self, plan: TransferPlan) -> list[float]:
        """The losses of the model that a plan fills."""
        return self.meter.losses(_values(plan, self.tensors), 0)


def _judge(
    plan: TransferPlan,
    sides: tuple[ModelDescription, ModelDescription],
    tensors: Mapping[str, Tensor],
    meter: LossMeter,
    budget: Budget,
) -> TransferPlan:
    space = Space(*sides, plan)
    asked = {t for entry, _ in space.entries(space.first) for t in entry.targets} if space.is_open else set()
    fixed = _values([e for e in plan if not asked.intersection(e.targets)], tensors)
    bench = _Bench(tensors, meter, budget, meter.losses({}, 0))
    if not space.is_open:
        return _as_planned(plan, bench, [e for e in plan if is_doubtful(e)])
    judge = LossJudge(space, tensors, meter, fixed, budget)
    questioned = [e for e in plan if asked.intersection(e.targets)]
    choice = judge.search()
    if not budget.left:
        return _as_planned(plan, bench, questioned, judge, "the trials were spent before an answer was found")
    risks: dict[Choice, float] = {}
    for _ in range(4):
        better, risks = judge.test(choice)
        if better == choice:
            break
        choice = better
    best = judge.losses(choice, 0)
    if not _falls(bench.fresh, best, meter):
        return _as_planned(plan, bench, questioned, judge)
    decisions = tuple(sorted(_decided(judge, choice, risks), key=lambda d: d.risk))
    judged = _with_answers(plan, judge, choice, risks, sides)
    final = best if all(d.taken for d in decisions) else bench.losses(judged)
    return _verdict(judged, bench, final, decisions)


def _as_planned(
    plan: TransferPlan,
    bench: _Bench,
    questioned: Sequence[PlanEntry],
    judge: LossJudge | None = None,
    remark: str = "",
) -> TransferPlan:
    """The verdict where no answer was found: what is in question is withdrawn if the data refutes it.

    Refuted: the best mapping that was tried lowers the loss, and does so significantly more than the plan; or the plan
    fills the whole model, and its loss is above the fresh model's.
    """
    losses, beaten = bench.losses(plan), False
    if judge is not None:
        best = judge.losses(min(judge.seen, key=lambda tried: judge.score(tried[0]))[0], 0)
        beaten = risk_of(losses, best) < RISK / len(judge.seen) and _falls(bench.fresh, best, bench.meter)
    rises = _mean(losses) > _mean(bench.fresh) + statistics.pstdev(bench.fresh) and not _unfilled(plan)
    if not questioned or not (beaten or rises):
        return _verdict(plan, bench, losses, (), remark)
    left = leave_open(plan, {e.targets[0]: REFUTED for e in questioned})
    shown = ", ".join(e.targets[0] for e in questioned[:3]) + (", ..." if len(questioned) > 3 else "")
    judged = _verdict(left, bench, bench.losses(left), (), remark)
    note = f"REFUTED on data: loss {_mean(bench.fresh):.4g} fresh, {_mean(losses):.4g} with {shown}: withdrawn"
    return replace(judged, proof="refuted", proof_by="data", notes=(*judged.notes, note))


def _unfilled(plan: TransferPlan) -> list[str]:
    """Parameters that the plan does not fill."""
    missing = [u.name for u in plan.unmatched_target if u.kind == "parameter"]
    return [*missing, *(t for a in plan.ambiguous for t in a.targets)]


def _values(entries: Iterable[PlanEntry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What entries put into the model; those that need the model's present values are left out."""
    out: dict[str, Tensor] = {}
    for entry in entries:
        if any(op.needs_target for op in entry.operations):
            continue
        values = run_operations(entry.operations, [tensors[s] for s in entry.sources])
        out.update((n, v.reshape(s).contiguous()) for n, v, s in zip(entry.targets, values, entry.target_shapes))
    return out


def _decided(judge: LossJudge, choice: Choice, risks: Mapping[Choice, float]) -> Iterator[Decided]:
    for d, rivals in judge.rivals(choice).items():
        decision = judge.space.decisions[d]
        rival = min(rivals, key=judge.score)
        risk = max(risks.get(r, 1.0) for r in rivals)
        labels = decision.labels[choice[d]], decision.labels[rival[d]]
        yield Decided(
            decision.text, labels[0], judge.score(choice), labels[1], judge.score(rival), risk, taken=risk < RISK
        )


def _with_answers(
    plan: TransferPlan,
    judge: LossJudge,
    choice: Choice,
    risks: Mapping[Choice, float],
    sides: tuple[ModelDescription, ModelDescription],
) -> TransferPlan:
    """The plan with the answers: what all remaining candidates agree on is filled, the rest stays as it was."""
    source, target = sides
    chosen = {e.targets: e for e, _ in judge.space.entries(choice)}
    open_: set[str] = set()
    possible = {_what(e) for e in chosen.values()}
    for rivals in judge.rivals(choice).values():
        for rival in rivals:
            if risks.get(rival, 1.0) >= RISK:
                others = {e.targets: e for e, _ in judge.space.entries(rival)}
                possible |= {_what(e) for e in others.values()}
                open_ |= {t for ts, e in chosen.items() if _what(others.get(ts)) != _what(e) for t in ts}
                open_ |= {t for ts, e in others.items() if _what(chosen.get(ts)) != _what(e) for t in ts}
    before = {e.targets: e for e in plan}
    taken: list[PlanEntry] = []
    notes: list[str] = []
    for targets, entry in chosen.items():
        if open_.intersection(targets):
            continue
        known = before.get(targets)
        if known is not None and _what(known) == _what(entry):
            taken.append(known)
            continue
        if known is not None:
            notes.append(f"replaced, since the loss refutes it: {known.sources[0]} -> {targets[0]}")
        cast = cast_between(source[entry.sources[0]], target[targets[0]])
        taken.append(replace(entry, operations=(*entry.operations, *cast), reason=BY_LOSS))
    filled = {t for e in taken for t in e.targets}
    used = {s for e in taken for s in e.sources}
    asked = {t for ts in chosen for t in ts}
    kept = [e for e in plan if not filled.intersection(e.targets)]
    kept = [
        e
        for e in kept
        if not asked.intersection(e.targets) or (_what(e) in possible and not used.intersection(e.sources))
    ]
    entries = [*kept, *taken]
    filled, used = {t for e in entries for t in e.targets}, {s for e in entries for s in e.sources}
    place = {info.name: info.index for info in target.parameters}
    listed = {t for a in plan.ambiguous for t in a.targets} | filled
    doubts = tuple(
        Ambiguity(e.targets, (Candidate(e.sources, 1.0, e.operations),), e.target_shapes[0], STILL_OPEN)
        for ts, e in chosen.items()
        if open_.intersection(ts) and not listed.intersection(ts)
    )
    shown = notes if len(notes) <= 3 else [*notes[:3], f"and {len(notes) - 3} more like these"]
    return replace(
        plan,
        entries=tuple(sorted(entries, key=lambda e: place.get(e.targets[0], 0))),
        ambiguous=(*(a for a in plan.ambiguous if not set(a.targets) <= filled), *doubts),
        unmatched_target=tuple(u for u in plan.unmatched_target if u.name not in filled),
        unmatched_source=tuple(u for u in plan.unmatched_source if u.name not in used),
        notes=(*plan.notes, *shown),
    )


def _what(entry: PlanEntry | None) -> object:
    """What an entry does, without a change of data type."""
    return entry and (entry.sources, entry.targets, tuple(op for op in entry.operations if op.name != "cast"))


def _falls(fresh: Sequence[float], best: Sequence[float], meter: LossMeter) -> bool:
    """Whether the loss falls by more than one random start differs from another.

    Where the fall is less than the samples of the fresh model differ, two more random starts, the fresh weights
    shuffled, tell how much that is.
    """
    before, after = _mean(fresh), _mean(best)
    if not math.isfinite(after) or after >= before or (len(fresh) > 2 and risk_of(fresh, best) > RISK):
        return False
    if before - after > statistics.pstdev(fresh):
        return True
    starts = [before, *(_mean(meter.losses(_shuffled(meter.model, seed), 0)) for seed in (1, 2))]
    spread = statistics.stdev(starts) * math.sqrt(1 + 1 / len(starts))
    return float(stdtr(len(starts) - 1, -(_mean(starts) - after) / max(spread, 1e-12))) < RISK


def _shuffled(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The model's weights, each tensor's values in a random order: another start like the first."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach().reshape(-1)[torch.randperm(p.numel(), generator=generator).to(p.device)].reshape(p.shape)
        for name, p in model.named_parameters()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _verdict(
    plan: TransferPlan, bench: _Bench, final: Sequence[float], decisions: tuple[Decided, ...], remark: str = ""
) -> TransferPlan:
    """The plan with its proof: does the loss fall, and is nothing left open?"""
    fresh = bench.fresh
    falls = _falls(fresh, final, bench.meter)
    seconds = time.monotonic() - bench.budget.started
    spent = round(bench.meter.passes, 2), round(seconds, 2), statistics.pstdev(fresh)
    measured = Measured(_mean(fresh), _mean(final), *spent, decisions)
    text = f"loss {measured.fresh:.4g} fresh, {measured.transferred:.4g} transferred"
    proof: Proof
    unfilled = _unfilled(plan)
    if remark:
        proof, note = "not tested", f"not tested on data: {remark} ({text})"
    elif falls:
        proof = "not tested" if unfilled else "proven"
        note = f"proven on data: {text}" if not unfilled else f"confirmed on data, as far as it is filled: {text}"
    else:
        proof, note = "not tested", f"not tested on data: the loss does not fall ({text})"
    proof_by: ProofBy = "" if proof == "not tested" else "data"
    if plan.proof != "not tested" and proof == "not tested":
        proof, proof_by = plan.proof, plan.proof_by
    return replace(plan, proof=proof, proof_by=proof_by, measured=measured, notes=(*plan.notes, note))
