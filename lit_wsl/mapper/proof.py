"""Proof by function: run the old and the new model on one sample, and compare what they compute.

Names and shapes can't tell the order of fused parts, interleaved heads or a square matrix from its transpose. The
functions can. Both models run with the *same perturbed weights* (the old one's, shaken, so that mistakes can't hide
behind ones and zeros), taken through the plan. Equal outputs prove the plan; different outputs refute it, and the first
module whose output differs says where. What the plan left open, or what stands just before the first difference, is
then tried in a bounded number of ways.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_wsl.mapper.classes import ORDER_WEIGHT
from lit_wsl.mapper.names import split_numbers
from lit_wsl.mapper.variants import Variant, open_questions, suspicions
from lit_wsl.structure.preserving import undisturbed
from lit_wsl.transfer.operations import run_operations
from lit_wsl.transfer.plan import Ambiguity, Candidate, PlanEntry, TransferPlan

TOLERANCE = 1e-3
MAX_TRIALS = 256
MAX_ROUNDS = 4
Call = tuple[tuple[Any, ...], dict[str, Any]]
Trace = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """One run of a model.

    Attributes:
        outputs: The floating-point tensors it returned, in order.
        trace: Sorted values of the first output of each leaf module, in order of execution. Sorted, so that layouts
            (channels first or last, a token axis before or after a batch axis) compare equal.
    """

    outputs: tuple[Tensor, ...]
    trace: Trace


def prove(
    plan: TransferPlan,
    old: nn.Module,
    new: nn.Module,
    samples: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]],
    *,
    max_trials: int = MAX_TRIALS,
) -> TransferPlan:
    """Check a plan by function, and let the function decide what names and shapes could not.

    Args:
        plan: The plan, from the old module's state dict to the new module.
        old: The old module, the source.
        new: The new module, the target. Neither is changed.
        samples: Calls of the new module, ``(args, kwargs)``; the first that both modules take is used.
        max_trials: Most runs of the new module.

    Returns:
        The plan with ``proof`` set to ``"proven"``, ``"refuted"`` or ``"not tested"``, with entries added or replaced
        where a trial proved them, and with a note of what was found.
    """
    hindrance = _hindrance(old) or _hindrance(new) or _new_function(plan)
    if hindrance:
        return replace(plan, notes=(*plan.notes, f"function not tested: {hindrance}"))
    shaken = _shaken(old)
    problem = ""
    for args, kwargs in samples:
        for theirs in _source_calls(old, tuple(args), dict(kwargs)):
            try:
                reference = _run(old, shaken, *theirs)
                prover = _Prover(new, shaken, reference, (tuple(args), dict(kwargs)), max_trials)
                first = prover.run(plan.entries)
            except Exception as error:  # whatever a forward raises
                problem = problem or f"{type(error).__name__}: {error}".splitlines()[0][:120]
                continue
            return prover.decide(plan, first)
    reason = f"no sample runs through both models ({problem})" if samples else "no sample to run"
    return replace(plan, notes=(*plan.notes, f"function not tested: {reason}"))


def _new_function(plan: TransferPlan) -> str:
    """Which adaptation, asked for by the user, makes the new model compute something else on purpose."""
    names = sorted({op.name for e in plan.entries for op in e.operations if not op.keeps_function})
    return f"{', '.join(names)} changes what the model computes" if names else ""


def _hindrance(module: nn.Module) -> str:
    """Why a module cannot be run here, if so."""
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
            return "a lazy module has no shapes yet"
        if isinstance(tensor, Tensor) and tensor.is_meta:
            return "a model on the meta device cannot run"
        if hasattr(tensor, "device_mesh"):
            return "a model spread over several processes is not run by one of them"
    return ""


class _Prover:
    """Runs the new model under candidate plans and compares with the reference."""

    def __init__(self, new: nn.Module, shaken: Mapping[str, Tensor], reference: Run, call: Call, budget: int) -> None:
        self.new = new
        self.shaken = shaken
        self.reference = reference
        self.call = call
        self.budget = budget
        own = {n: id(t) for n, t in new.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        twins: dict[int, list[str]] = {}
        for name, key in own.items():
            twins.setdefault(key, []).append(name)
        self.tied = {name: twins[key] for name, key in own.items()}

    def run(self, entries: Sequence[PlanEntry]) -> Run:
        """Run the new model with the shaken weights under a plan; what the plan leaves open is shaken too."""
        self.budget -= 1
        state = _shaken(self.new, salt="target")
        for entry in entries:
            present = [state[name] for name in entry.targets]
            results = run_operations(entry.operations, [self.shaken[name] for name in entry.sources], present)
            for name, value in zip(entry.targets, results):
                filled = value.reshape(state[name].shape).to(state[name].dtype)
                for twin in self.tied[name]:
                    state[twin] = filled
        return _run(self.new, state, *self.call)

    def decide(self, plan: TransferPlan, first: Run) -> TransferPlan:
        """Settle open questions one by one, then suspicions, until the outputs agree or the trials are spent."""
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
        if self.proven(run):
            note = "function proven: both models compute the same on the sample"
            return replace(plan, proof="proven", notes=(*plan.notes, *changed, note))
        where = self._first_difference(plan, run)
        if not where and not _comparable(self.reference.outputs, run.outputs):
            compared = [path for _, path in self._comparisons(plan, run)]
            if compared and compared[-1] == list(run.trace)[-1]:
                note = "function proven: both models compute the same up to the model's last module"
                return replace(plan, proof="proven", notes=(*plan.notes, *changed, note))
            note = "function not compared to the end: the models return nothing of the same shape"
            return replace(plan, notes=(*plan.notes, *changed, note))
        unfilled = {_module(u.name) for u in plan.unmatched_target if u.kind == "parameter"}
        unfilled |= {_module(t) for a in plan.ambiguous for t in a.targets}
        order = list(run.trace)
        upto = order.index(where) if where else len(order)
        if any(path in unfilled for path in order[: upto + 1]) or (unfilled and not unfilled.intersection(order)):
            note = "function not compared to the end: some parameters of the model stay as they are"
            return replace(plan, notes=(*plan.notes, *changed, note))
        note = f"function REFUTED: the outputs differ{f', first at module {where!r}' if where else ''}"
        verified = {path for same, path in self._comparisons(plan, run) if same}
        if not where and verified:  # no module differs: what does lies between them, and no entry is to blame
            return replace(plan, proof="refuted", notes=(*plan.notes, *changed, note))
        plan = _withdraw(plan, self._doubtful_modules(plan, run), verified, where)
        return replace(plan, proof="refuted", notes=(*plan.notes, *changed, note))

    def proven(self, run: Run) -> bool:
        """Whether the outputs agree."""
        pairs = _comparable(self.reference.outputs, run.outputs)
        return any(_close(x, y) for x, y in pairs)

    def _questions(self, plan: TransferPlan, run: Run) -> Iterator[list[Variant]]:
        yield from open_questions(plan)
        yield from suspicions(plan, self._doubtful_modules(plan, run))

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
            score = self._progress(candidate, trial)
            if score > best_score:
                best, best_run, best_score, chosen, tie = candidate, trial, score, variant, False
            elif score == best_score and chosen is not None:
                tie = True
            if self.proven(trial):
                break
        if chosen is None or (tie and not self.proven(best_run)):
            return plan, run, ""
        return best, best_run, f"decided by function: {chosen.reason}"

    def _progress(self, plan: TransferPlan, run: Run) -> tuple[bool, int]:
        """How far two runs agree: the outputs, then the number of modules up to the first that differs."""
        agreed = 0
        for same, _ in self._comparisons(plan, run):
            if not same:
                break
            agreed += 1
        return self.proven(run), agreed

    def _comparisons(self, plan: TransferPlan, run: Run) -> Iterator[tuple[bool, str]]:
        """Modules of the new model in order of execution, and whether their partner computed the same."""
        partner = _partners(plan)
        for path, values in run.trace.items():
            theirs = self.reference.trace.get(partner.get(path, "\0"))
            if theirs is not None and theirs.numel() == values.numel():
                yield _close(theirs, values), path

    def _first_difference(self, plan: TransferPlan, run: Run) -> str:
        return next((path for same, path in self._comparisons(plan, run) if not same), "")

    def _doubtful_modules(self, plan: TransferPlan, run: Run) -> list[str]:
        """Modules between the last that agrees and the first that differs, both included, nearest last."""
        verdicts = {path: same for same, path in self._comparisons(plan, run)}
        order = list(run.trace)
        wrong = next((k for k, path in enumerate(order) if verdicts.get(path) is False), len(order) - 1)
        right = max((k for k, path in enumerate(order[:wrong]) if verdicts.get(path)), default=0)
        start = max(0, min(right, wrong - 1) - 6)
        return order[start : wrong + 1]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _withdraw(plan: TransferPlan, modules: Sequence[str], verified: set[str], where: str) -> TransferPlan:
    """Take out of a refuted plan what stands before the first difference, with its like in the other blocks.

    What nothing but order decided goes too, unless its module was seen to compute the same.
    """
    suspects = {e.targets[0] for e in plan.entries for t in e.targets if _module(t) in modules}
    suspects |= {
        e.targets[0] for e in plan.entries if e.margin <= ORDER_WEIGHT and _module(e.targets[0]) not in verified
    }
    families = {split_numbers(name)[0] for name in suspects}
    out = [e for e in plan.entries if split_numbers(e.targets[0])[0] in families]
    reason = f"refuted by function: the models differ at {where or 'their outputs'}"
    doubts = tuple(
        Ambiguity((t,), (Candidate(e.sources, e.score, e.operations),), shape, reason)
        for e in out
        for t, shape in zip(e.targets, e.target_shapes)
    )
    kept = tuple(e for e in plan.entries if e not in set(out))
    return replace(plan, entries=kept, ambiguous=(*plan.ambiguous, *doubts))


def _source_calls(old: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    """Ways to give the old module what the new one takes: the same call, by position, by the old names, and bare."""
    yield args, kwargs
    values = [*args, *kwargs.values()]
    yield tuple(values), {}
    names = [n for n in inspect.signature(old.forward).parameters if n not in ("args", "kwargs", "self")]
    yield (), dict(zip(names, values))
    tensors = [v for v in values if isinstance(v, Tensor)]
    if tensors:
        yield (tensors[0],), {}


def _partners(plan: TransferPlan) -> dict[str, str]:
    """Module of the target -> module of the source, where one matrix or norm became another as a whole."""
    found: dict[str, str] = {}
    for entry in plan.entries:
        if len(entry.sources) == len(entry.targets) == 1 and entry.kind == "parameter":
            found.setdefault(entry.targets[0].rpartition(".")[0], entry.sources[0].rpartition(".")[0])
    return found


def _run(module: nn.Module, state: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run:
    """Run a module functionally, in eval mode, and record its leaf modules."""
    trace: Trace = {}
    with undisturbed(module), torch.no_grad(), _recorded(module, trace):
        module.eval()
        result = functional_call(module, dict(state), tuple(args), dict(kwargs), tie_weights=True)
    return Run(tuple(_tensors(result)), trace)


@contextmanager
def _recorded(module: nn.Module, trace: Trace) -> Iterator[None]:
    def hook(path: str) -> Callable[..., None]:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = next(iter(_tensors(output)), None)
            if tensor is not None and path not in trace:
                trace[path] = tensor.detach().flatten().double().sort().values

        return record

    leaves = [
        (path, sub)
        for path, sub in module.named_modules()
        if any(True for _ in sub.parameters(recurse=False)) and not any(True for _ in sub.children())
    ]
    handles = [sub.register_forward_hook(hook(path)) for path, sub in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _comparable(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The largest outputs of equal shape; models may return more than they have in common."""
    pairs = [(x, y) for x in a for y in b if x.shape == y.shape and x.numel() > 1]
    largest = max((x.numel() for x, _ in pairs), default=0)
    return [(x, y) for x, y in pairs if x.numel() == largest]


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.double().flatten(), b.double().flatten()
    scale = float(a.abs().max()) if a.numel() else 0.0
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()) or scale == 0.0:
        return bool(torch.equal(a, b)) and scale != 0.0
    return float((a - b).abs().max()) <= TOLERANCE * scale


def _shaken(module: nn.Module, salt: str = "source") -> dict[str, Tensor]:
    """The module's state, perturbed the same way every time: no ones, no zeros, no two alike."""
    shaken: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        if not tensor.is_floating_point():
            shaken[name] = tensor.detach()
            continue
        if id(tensor) not in known:
            seed = int.from_bytes(hashlib.sha256(f"{salt}/{name}".encode()).digest()[:4], "little")
            generator = torch.Generator().manual_seed(seed)
            value = tensor.detach().to("cpu", torch.float32)
            spread = 0.1 * float(value.std()) if value.numel() > 1 else 0.0
            noise = torch.randn(value.shape, generator=generator) * (spread or 0.05)
            moved = value + noise
            kept = moved.abs().clamp_min(0.05) if name.endswith("var") else moved
            known[id(tensor)] = kept.to(tensor.device, tensor.dtype)
        shaken[name] = known[id(tensor)]
    return shaken
