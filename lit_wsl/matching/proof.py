"""Proof by function: run the old and the new model on one sample, and compare what they compute.

Names and shapes can't tell the order of fused parts, interleaved heads or a square matrix from its transpose. The
functions can. Both models run with the *same perturbed weights* (the old one's, shaken, so that mistakes can't hide
behind ones and zeros), taken through the plan. Equal outputs prove the plan; different outputs refute it, and the first
module whose output differs says where. What the plan left open, or what stands just before the first difference, is
then tried in a bounded number of ways.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from lit_wsl.matching.alternatives import BY_FUNCTION, Variant, layout_variants, open_questions
from lit_wsl.matching.bench import values
from lit_wsl.matching.entries import answered, is_doubtful
from lit_wsl.matching.layouts import leave_open
from lit_wsl.matching.search import Search
from lit_wsl.matching.space import Space
from lit_wsl.matching.tree import role_of
from lit_wsl.matching.trials import Budget, Trials
from lit_wsl.matching.words import split_numbers
from lit_wsl.plan.entries import PlanEntry, Proof
from lit_wsl.plan.operations import run_operations
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, describe
from lit_wsl.structure.losses import LossMeter
from lit_wsl.structure.running import (
    Call,
    Run,
    close,
    comparable,
    hindrance,
    run_with,
    shaken_state,
    source_calls,
    tensors_in,
)

MAX_TRIALS = 256
MAX_ROUNDS = 4
SECONDS, PASSES, JOINT = 60.0, 1024.0, 1024  # most that a search by the distance of the outputs may take


def prove(
    plan: TransferPlan,
    old: nn.Module,
    new: nn.Module,
    samples: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]],
    *,
    unseen: Mapping[str, str] | None = None,
) -> TransferPlan:
    """Check a plan by function, and let the function decide what names and shapes could not.

    Args:
        plan: The plan, from the old module's state dict to the new module.
        old: The old module, the source.
        new: The new module, the target. Neither is changed.
        samples: Calls of the new module, ``(args, kwargs)``; the first that both modules take is used.
        unseen: First targets of entries that need a proof -> why (:func:`lit_wsl.matching.layouts.hidden_layouts`).
            Without one they become ambiguous.

    Returns:
        The plan with ``proof`` set to ``"proven"``, ``"refuted"`` or ``"not tested"``, with entries added or replaced
        where a trial proved them, and with a note of what was found.
    """
    judged, seen = _judge(plan, old, new, samples, set(unseen or ()))
    return leave_open(judged, {t: why for t, why in (unseen or {}).items() if t not in seen})


def _judge(
    plan: TransferPlan,
    old: nn.Module,
    new: nn.Module,
    samples: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]],
    unseen: set[str],
) -> tuple[TransferPlan, set[str]]:
    """The plan after all trials, and the first targets of what was seen to work, be the whole proven or not."""
    reason = hindrance(old) or hindrance(new) or _new_function(plan)
    if reason:
        return replace(plan, notes=(*plan.notes, f"function not tested: {reason}")), set()
    shaken = shaken_state(old)
    problem = ""
    for args, kwargs in samples:
        for theirs in source_calls(old, tuple(args), dict(kwargs)):
            try:
                reference = run_with(old, shaken, *theirs)
                prover = _Prover(old, new, shaken, reference, (tuple(args), dict(kwargs)))
                first = prover.run(plan.entries)
            except Exception as error:  # whatever a forward raises
                problem = problem or f"{type(error).__name__}: {error}".splitlines()[0][:120]
                continue
            judged, last = prover.decide(plan, first)
            return judged, prover.seen(judged, last, unseen)
    reason = f"no sample runs through both models ({problem})" if samples else "no sample to run"
    return replace(plan, notes=(*plan.notes, f"function not tested: {reason}")), set()


def _new_function(plan: TransferPlan) -> str:
    """Which adaptation, asked for by the user, makes the new model compute something else on purpose."""
    names = sorted({op.name for e in plan.entries for op in e.operations if not op.keeps_function})
    return f"{', '.join(names)} changes what the model computes" if names else ""


class _Prover:
    """Runs the new model under candidate plans and compares with the reference."""

    def __init__(
        self, old: nn.Module, new: nn.Module, shaken: Mapping[str, Tensor], reference: Run, call: Call
    ) -> None:
        self.old, self.new = old, new
        self.shaken = shaken
        self.reference = reference
        self.call = call
        self.budget = MAX_TRIALS
        own = {n: id(t) for n, t in new.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        twins: dict[int, list[str]] = {}
        for name, key in own.items():
            twins.setdefault(key, []).append(name)
        self.tied = {name: twins[key] for name, key in own.items()}

    @cached_property
    def sides(self) -> tuple[ModelDescription, ModelDescription]:
        """Both modules, described where a search needs it."""
        return describe(self.old), describe(self.new)

    def run(self, entries: Sequence[PlanEntry]) -> Run:
        """Run the new model with the shaken weights under a plan; what the plan leaves open is shaken too."""
        self.budget -= 1
        state = shaken_state(self.new, salt="target")
        for entry in entries:
            present = [state[name] for name in entry.targets]
            results = run_operations(entry.operations, [self.shaken[name] for name in entry.sources], present)
            for name, value in zip(entry.targets, results):
                filled = value.reshape(state[name].shape).to(state[name].dtype)
                for twin in self.tied[name]:
                    state[twin] = filled
        return run_with(self.new, state, *self.call)

    def decide(self, plan: TransferPlan, first: Run) -> tuple[TransferPlan, Run]:
        """Settle open questions one by one, then doubtful layouts, until the outputs agree or the trials are spent."""
        run = first
        changed: list[str] = []
        for _ in range(MAX_ROUNDS):
            before = len(changed)
            for variants in self._questions(plan, run):
                if self.proven(run) or self.budget <= 0:
                    break
                plan, run, why = self._best(plan, run, variants)
                changed += [why] if why else []
            if self.proven(run) or len(changed) == before:
                break
        if not self.proven(run):
            searched = self._search(plan)
            if searched is not None:
                plan, run = searched
                changed.append("decided by function: found by the distance of the outputs")
        judged, proof, note = self._verdict(plan, run)
        return replace(
            judged,
            proof=proof,
            proof_by="" if proof == "not tested" else "function",
            notes=(*judged.notes, *changed, note),
        ), run

    def _search(self, plan: TransferPlan) -> tuple[TransferPlan, Run] | None:
        """Let the distance of the outputs decide as the loss does, about the same questions; taken if it is none."""
        space = Space(*self.sides, plan)
        if not space.is_open:
            return None
        args, kwargs = self.call
        meter = LossMeter(self.new, _distance, [(args, kwargs, self.reference.outputs)])
        asked = {t for entry, _ in space.entries(space.first) for t in entry.targets}
        fixed = values((e for e in plan if not asked.intersection(e.targets)), self.shaken)

        def answer_with(choice: Sequence[int]) -> TransferPlan:
            entries = [e for e, _ in space.entries(choice)]
            return answered(plan, entries, self.sides, reason=BY_FUNCTION, refuted="the function refutes it")

        try:
            if not meter.has(0):
                return None
            with meter.session():
                meter.losses({}, 0)
                trials = Trials(space, self.shaken, meter, fixed, Budget(SECONDS, PASSES, meter))
                choice = Search(trials, 1.0, JOINT).find()
            found = answer_with(choice)
            run = self.run(found.entries)
            if not self.proven(run):
                return None
            for number in (k for k, answer in enumerate(choice) if answer):  # what no function tells stays as it is
                if self.budget <= 0:
                    break
                plain = (*choice[:number], 0, *choice[number + 1 :])
                plainer = answer_with(plain)
                trial = self.run(plainer.entries)
                if self.proven(trial):
                    choice, found, run = plain, plainer, trial
        except (RuntimeError, ValueError, TypeError):  # outputs that can't be compared
            return None
        return found, run

    def _verdict(self, plan: TransferPlan, run: Run) -> tuple[TransferPlan, Proof, str]:
        """The plan, without what may be to blame if it is refuted; its proof; and what was found, in words."""
        if self.proven(run):
            return plan, "proven", "function proven: both models compute the same on the sample"
        compared = list(self._comparisons(plan, run))
        order = list(run.trace)
        where = next((path for same, path in compared if not same), "")
        if not where and not comparable(self.reference.outputs, run.outputs):
            if compared and compared[-1][1] == order[-1]:
                return plan, "proven", "function proven: both models compute the same up to the model's last module"
            return plan, plan.proof, "function not compared to the end: the models return nothing of the same shape"
        unfilled = {_module(u.name) for u in plan.unmatched_target if u.kind == "parameter"}
        unfilled |= {_module(t) for a in plan.ambiguous for t in a.targets}
        upto = order.index(where) if where else len(order)
        if any(path in unfilled for path in order[: upto + 1]) or (unfilled and not unfilled.intersection(order)):
            return plan, plan.proof, "function not compared to the end: some parameters of the model stay as they are"
        note = f"function REFUTED: the outputs differ{f', first at module {where!r}' if where else ''}"
        earlier = self._before_agreement(plan, run)
        verified = {path for same, path in compared if same}
        verified |= {_module(t) for e in plan.entries for t in e.targets if _all_in(earlier, run, _module(t))}
        if where or not verified:  # where no module differs, what does lies between them, and no entry is to blame
            plan = _withdraw(plan, self._doubtful_modules(plan, run), verified, where)
        return plan, "refuted", note

    def proven(self, run: Run) -> bool:
        """Whether the outputs agree."""
        pairs = comparable(self.reference.outputs, run.outputs)
        return any(close(x, y) for x, y in pairs)

    def seen(self, plan: TransferPlan, run: Run, unseen: set[str]) -> set[str]:
        """First targets of the entries behind which the models agree.

        Behind: at a module that ran after all that belong to the parent of the entry's module, so that a projection
        of queries counts only when what the whole attention puts out was the same.
        """
        if self.proven(run):
            # A sample of one token proves nothing of queries and keys: what is proven must be missed when it is gone.
            without = [e for e in plan.entries if e.targets[0] not in unseen]
            missed = len(without) < len(plan.entries) and not self.proven(self.run(without))
            return {e.targets[0] for e in plan.entries} if missed else set()
        before = self._before_agreement(plan, run)
        return {e.targets[0] for e in plan.entries if _all_in(before, run, _module(_module(e.targets[0])))}

    def _agreeing(self, plan: TransferPlan, run: Run) -> list[str]:
        """The compared modules up to the first that differs."""
        return [path for _, path in takewhile(lambda compared: compared[0], self._comparisons(plan, run))]

    def _before_agreement(self, plan: TransferPlan, run: Run) -> set[str]:
        """Modules that ran before one that agreed, where nothing had differed until then."""
        agreeing, order = self._agreeing(plan, run), list(run.trace)
        return set(order[: order.index(agreeing[-1])] if agreeing else ())

    def _questions(self, plan: TransferPlan, run: Run) -> Iterator[list[Variant]]:
        yield from open_questions(plan)
        yield from layout_variants(plan, self._doubtful_modules(plan, run))

    def _best(self, plan: TransferPlan, run: Run, variants: list[Variant]) -> tuple[TransferPlan, Run, str]:
        """Take the variant that agrees furthest, if it agrees further than the plan does."""
        best, best_run, best_score, tie = plan, run, self._progress(plan, run), False
        chosen: Variant | None = None
        for variant in variants:
            if self.budget <= 0:
                break
            candidate = variant.apply(plan)
            try:
                trial = self.run(candidate.entries)
            except Exception:  # a variant that can't run is no answer
                continue
            score = self._progress(candidate, trial, set(candidate.entries) - set(plan.entries))
            if score > best_score:
                best, best_run, best_score, chosen, tie = candidate, trial, score, variant, False
            elif score == best_score and chosen is not None:
                tie = True
            if self.proven(trial):
                break
        if chosen is None or (tie and not self.proven(best_run)):
            return plan, run, ""
        return best, best_run, f"decided by function: {chosen.reason}"

    def _progress(self, plan: TransferPlan, run: Run, tried: Collection[PlanEntry] = ()) -> tuple[bool, int]:
        """How far two runs agree: the outputs, then the number of modules up to the first that differs.

        A module that is tried does not count: with the weights of any partner it computes what this partner computes.
        """
        own = {_module(t) for e in tried for t in e.targets}
        return self.proven(run), sum(path not in own for path in self._agreeing(plan, run))

    def _comparisons(self, plan: TransferPlan, run: Run) -> Iterator[tuple[bool, str]]:
        """Modules of the new model in order of execution, and whether their partner computed the same."""
        partner = _partners(plan)
        for path, own in run.trace.items():
            theirs = self.reference.trace.get(partner.get(path, "\0"))
            if theirs is not None and theirs.numel() == own.numel():
                yield close(theirs, own), path

    def _doubtful_modules(self, plan: TransferPlan, run: Run) -> list[str]:
        """Modules between the last that agrees and the first that differs, both included, nearest last."""
        verdicts = {path: same for same, path in self._comparisons(plan, run)}
        order = list(run.trace)
        wrong = next((k for k, path in enumerate(order) if verdicts.get(path) is False), len(order) - 1)
        right = max((k for k, path in enumerate(order[:wrong]) if verdicts.get(path)), default=0)
        start = max(0, min(right, wrong - 1) - 6)
        return order[start : wrong + 1]


def _distance(model: nn.Module, batch: tuple[tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]) -> Tensor:
    """How far a model's outputs are from those of the old one."""
    args, kwargs, outputs = batch
    pairs = comparable(outputs, tuple(tensors_in(model(*args, **kwargs))))
    if not pairs:
        raise ValueError("the models return nothing of the same shape")
    theirs, ours = pairs[0]
    return nn.functional.mse_loss(ours, theirs)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _all_in(paths: set[str], run: Run, above: str) -> bool:
    """Whether all modules that ran at and below a path are among some."""
    inside = [p for p in run.trace if not above or p == above or p.startswith(f"{above}.")]
    return bool(inside) and paths.issuperset(inside)


def _withdraw(plan: TransferPlan, modules: Sequence[str], verified: set[str], where: str) -> TransferPlan:
    """Take out of a refuted plan what may have caused the first difference, with its like in the other blocks.

    To blame is what stands before the difference, and what nothing but order decided; not what was seen to compute the
    same, nor what has no rival: where no other tensor fits, it is the models that differ, not the mapping.
    """
    open_ = [e for e in plan.entries if e.kind == "parameter" and _module(e.targets[0]) not in verified]
    suspects = [e for e in open_ if is_doubtful(e) or any(_module(t) in modules for t in e.targets)]
    left_over = [(u.name, u.shape) for u in (*plan.unmatched_source, *plan.unmatched_target) if u.kind == "parameter"]
    rivals = Counter(_fits(e.targets[0], e.target_shapes[0]) for e in open_)
    rivals.update(_fits(name, shape) for name, shape in left_over)
    families = {split_numbers(e.targets[0])[0] for e in suspects if _could_differ(e, rivals)}
    out = [e for e in open_ if split_numbers(e.targets[0])[0] in families]
    reason = f"refuted by function: the models differ at {where or 'their outputs'}"
    return leave_open(plan, {e.targets[0]: reason for e in out})


def _fits(name: str, shape: Sequence[int]) -> tuple[str, int]:
    """What two tensors have in common if one may stand in the other's place."""
    return role_of(name), math.prod(shape)


def _could_differ(entry: PlanEntry, rivals: Mapping[tuple[str, int], int]) -> bool:
    """Whether something else could be done for a target: another tensor, another layout, the matrix turned."""
    shape = entry.target_shapes[0]
    layouts = len(entry.sources) > 1 or len(entry.targets) > 1 or any(op.name != "cast" for op in entry.operations)
    square = len(shape) == 2 and shape[0] == shape[1]
    return layouts or square or rivals[_fits(entry.targets[0], shape)] > 1


def _partners(plan: TransferPlan) -> dict[str, str]:
    """Module of the target -> module of the source, where one matrix or norm became another as a whole."""
    found: dict[str, str] = {}
    for entry in plan.entries:
        if len(entry.sources) == len(entry.targets) == 1 and entry.kind == "parameter":
            found.setdefault(_module(entry.targets[0]), _module(entry.sources[0]))
    return found
