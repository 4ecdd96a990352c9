"""What :class:`RebasinCallback` and ``lit-wsl rebasin`` need of a model: its whole state, a spec, a repaired merge."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from lit_wsl.errors import RebasinError, listed, reason
from lit_wsl.rebasin.inference.additions import unused_tensors
from lit_wsl.rebasin.inference.infer import infer_permutation_spec
from lit_wsl.rebasin.inference.trace import ForwardError
from lit_wsl.rebasin.inference.verify import verify_permutation_spec
from lit_wsl.rebasin.job import MEAN_STATISTICS, AlignOptions, Matcher, RebasinReport, under_names_of
from lit_wsl.rebasin.matching.activations import best_matching
from lit_wsl.rebasin.matching.many import match_many
from lit_wsl.rebasin.matching.weights import MatchingResult, weight_matching_for_task_vectors
from lit_wsl.rebasin.merging.merge import FOLD, adapter_factors, is_continuous
from lit_wsl.rebasin.responses import reestimate_batchnorm
from lit_wsl.rebasin.spec.spec import PermutationSpec
from lit_wsl.structure.execution_order import callee
from lit_wsl.structure.running import Call, has_sharded_tensors, named_nested, ways_to_call

if TYPE_CHECKING:
    import lightning.pytorch as pl


Outputs: TypeAlias = Callable[[Any], Any]
INTERNAL = ("hidden_state", "hidden_states", "attentions", "past_key_values")
"""Last words of the names under which models return what happens inside of them beside their prediction."""


class MainOutputs:
    """Picks a model's answer from what it returns: all floating tensors, but hidden states only where nothing else is.

    A mapping or dataclass may carry hidden states, attention maps and caches beside the logits. If they had to stay as
    they are, no unit of the residual stream could be permuted. They are known by name and passed over, unless they are
    all there is (then they are the answer). Scalars, such as a loss, say nothing of the order of units.

    >>> import torch
    >>> pick = MainOutputs()
    >>> picked = pick({"loss": torch.tensor(1.0), "logits": torch.ones(2, 3), "hidden_states": (torch.ones(2, 4),)})
    >>> [tuple(t.shape) for t in picked], sorted(pick.ignored)
    ([(2, 3)], ['hidden_states'])
    >>> [tuple(t.shape) for t in pick((torch.ones(1, 2), {"last_hidden_state": torch.ones(1, 4)}))]
    [(1, 2)]

    Attributes:
        ignored: Names of what was passed over in the last call.
    """

    def __init__(self) -> None:
        self.ignored: set[str] = set()

    def __call__(self, output: Any) -> list[Tensor]:
        """The tensors that count."""
        found = [(names, t) for names, t in named_nested(output) if is_continuous(t) and t.ndim]
        inner = [any(name.endswith(INTERNAL) for name in names) for names, _ in found]
        if all(inner):
            self.ignored = set()
            return [tensor for _, tensor in found]
        self.ignored = {next(n for n in names if n.endswith(INTERNAL)) for (names, _), i in zip(found, inner) if i}
        return [tensor for (_, tensor), i in zip(found, inner) if not i]


def resolve_outputs(given: Outputs | str | None) -> Outputs | None:
    """The function that an import path names, ``package.module.name`` or ``package.module:name``.

    >>> resolve_outputs("operator.itemgetter") is __import__("operator").itemgetter
    True
    """
    if not isinstance(given, str):
        if given is not None and not callable(given):
            raise RebasinError(f"outputs={given!r} is neither a function nor the import path of one")
        return given
    try:
        found: Any = resolve_name(given)
    except (ImportError, AttributeError, ValueError) as error:
        raise RebasinError(f"outputs={given!r} cannot be imported: {error}") from error
    if not callable(found):
        raise RebasinError(f"outputs={given!r} is a {type(found).__name__}, not a function")
    return found


LITTLE = 0.5
UNPROVEN = "the permutation spec is not proven on this model"
SHARDED = (
    "the model is sharded, and its symmetries cannot be inferred on one rank alone. Infer them once on the whole "
    "model, infer_permutation_spec(model, (batch,)).to_json('spec.json'), and give spec='spec.json'"
)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, distributed tensors gathered (a collective call then), nothing shared with it."""
    for name, parameter in module.named_parameters():
        if (hasattr(parameter, "ds_id") and not parameter.numel()) or name.endswith("_flat_param"):
            raise RebasinError(
                f"{name} of shape {tuple(parameter.shape)} is one rank's part of a parameter (FSDPStrategy, DeepSpeed "
                "stage 3), whose whole is gone after the fit. Use ModelParallelStrategy, or run lit-wsl rebasin on the "
                "saved checkpoints."
            )
    state = {}
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            state[name] = whole.detach().cpu().clone()
    return state


def read_run(module: nn.Module, state: Mapping[str, Tensor], what: str, complete: bool = True) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the model's names and in its shapes.

    A file may hold one name of tensors that the model ties; the others are completed from it. Buffers may be absent.
    """
    own = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    if (factors := adapter_factors(state)) and not adapter_factors(own):
        raise RebasinError(
            f"{what} holds {len(factors)} factors of low-rank adapters that the model has no place for, such as "
            f"{factors[0]!r} of shape {tuple(state[factors[0]].shape)}; without them it is not the fine-tuning. {FOLD}"
        )
    found = under_names_of(own, state, what)
    tied: dict[int, list[str]] = {}
    for name, tensor in own.items():
        tied.setdefault(id(tensor), []).append(name)
    for names in tied.values():
        known = next((found[name] for name in names if name in found), None)
        if known is not None:
            found.update({name: known for name in names if name not in found})
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    absent = [name for name in own if name in parameters and name not in found]
    other = [name for name in own if name in found and found[name].shape != own[name].shape]
    if complete and absent:
        raise RebasinError(
            f"{what} lacks {len(absent)} parameters of the model, such as {absent[0]!r} of shape "
            f"{tuple(own[absent[0]].shape)}: is it a fine-tuning of the same architecture? Otherwise convert it first "
            "(lit-wsl map, lit-wsl convert)."
        )
    if complete and (wrong := [name for name in other if name in parameters]):
        raise RebasinError(
            f"{what}: {wrong[0]!r} has shape {tuple(found[wrong[0]].shape)}, in the model {tuple(own[wrong[0]].shape)} "
            f"({len(wrong)} parameters differ in shape). Only models of the same sizes can be aligned: resize it first "
            "(lit-wsl map --adapt), or build the model in its sizes."
        )
    return {name: found[name] for name in own if name in found and name not in other}


def find_spec(
    module: nn.Module,
    calls: Sequence[Call],
    outputs: Outputs | None,
    *,
    given: PermutationSpec | None = None,
    verify: bool = True,
) -> tuple[Call | None, PermutationSpec | None, str | None, tuple[str, ...]]:
    """The first call that works, the spec inferred or proven on it, why there is none, and remarks; never raises."""
    called, prefix = callee(module)
    pick = outputs or MainOutputs()
    reasons: list[tuple[float, str]] = []
    for args, kwargs in calls:
        try:
            if given is None:
                spec = infer_permutation_spec(called, args, kwargs, outputs=pick, verify=verify)
            else:
                bare = _without_prefix(given, prefix)
                spec = verify_permutation_spec(bare, called, args, kwargs, outputs=pick).spec
        except Exception as error:
            reasons.append(_reason(error))
            continue
        if spec.groups:
            return (args, kwargs), prefixed(spec, prefix), None, _remarks(spec, pick)
        if given is not None:
            return None, None, "all groups of the given spec break the function of this model", ()
        reasons.append((math.inf, _nothing_found(spec, outputs is None)))
    why = _furthest(reasons)
    if given is None:
        return None, None, why, ()
    return None, given, None, (f"the given spec is not proven on this model: {why}",)


def _reason(error: Exception) -> tuple[float, str]:
    """How far a call got (operations of the model; what fails later got further), and why it failed."""
    far = error.operations if isinstance(error, ForwardError) else math.inf
    return far, reason(error, 300)


def _furthest(reasons: Sequence[tuple[float, str]]) -> str:
    none = (0.0, "there is no sample of what the model takes")
    return max(reasons, key=lambda reason: reason[0], default=none)[1]  # the first of equals: the likeliest call


def _nothing_found(spec: PermutationSpec, default: bool) -> str:
    why = "no group of units of this model can be permuted"
    if spec.dropped:
        why += f" ({len(spec.dropped)} were found, but break the function)"
    return why + ("; outputs=... says which of its outputs have to stay as they are" if default else "")


def _remarks(spec: PermutationSpec, pick: Outputs) -> tuple[str, ...]:
    remarks = []
    if spec.proof is not None:
        remarks.append(
            f"the permutation spec is proven on a sample by {spec.proof.draws} draws; a wrong group passes with a "
            f"probability of at most {spec.proof.risk:.0e}"
        )
        if spec.proof.unseen:
            remarks.append(f"nothing is proven of groups that the sample does not use: {listed(spec.proof.unseen)}")
    else:
        remarks.append(UNPROVEN)
    if unused := sorted(unused_tensors(spec)):
        remarks.append(
            f"{len(unused)} tensors stay because the sample does not use them ({listed(unused)}); where other "
            "inputs do, give a sample of these"
        )
    ignored = sorted(pick.ignored) if isinstance(pick, MainOutputs) else []
    if ignored:
        remarks.append(
            f"of what the model returns, {', '.join(ignored)} may change under a permutation; outputs=... says what "
            "counts"
        )
    if spec.dropped:
        remarks.append(f"{len(spec.dropped)} groups were found, but break the function; they stay as they are")
    if spec.coverage < LITTLE:
        remarks.append(f"only {spec.coverage:.1%} of the parameters' elements can be permuted; spec.summary() says why")
    return tuple(remarks)


def prefixed(spec: PermutationSpec, prefix: str) -> PermutationSpec:
    """The spec of a submodule under the names of the whole model."""
    return _renamed(spec, lambda name: prefix + name) if prefix else spec


def _without_prefix(spec: PermutationSpec, prefix: str) -> PermutationSpec:
    """The spec of the whole model under the names of a submodule, which has all tensors that it speaks of."""
    if not prefix or not all(name.startswith(prefix) for name in spec.axes):
        return spec
    return _renamed(spec, lambda name: name.removeprefix(prefix))


def _renamed(spec: PermutationSpec, rename: Callable[[str], str]) -> PermutationSpec:
    return replace(
        spec,
        axes={rename(name): axes for name, axes in spec.axes.items()},
        shapes={rename(name): shape for name, shape in spec.shapes.items()},
        parameters=tuple(rename(name) for name in spec.parameters),
        frozen={rename(name): why for name, why in spec.frozen.items()},
    )


def repaired(
    module: nn.Module, report: RebasinReport, batches: Iterable[Any], call: Call | None, max_batches: int
) -> RebasinReport:
    """The report with batch norm statistics of the merged state dict estimated anew, and a note that says so."""
    merged = report.merged or {}
    probe = copy.deepcopy(module)
    probe.load_state_dict(merged, strict=False)
    called, _ = callee(probe)

    def forward(_: Any, batch: Any) -> None:
        call_like(called, batch, call)

    count = reestimate_batchnorm(probe, batches, forward=forward, max_batches=max_batches)
    own = probe.state_dict()
    note = f"batch norm statistics of the merged model were estimated on {count} training batches"
    notes = (*(n for n in report.notes if n != MEAN_STATISTICS), note)
    return replace(report, merged={n: own[n].detach().clone() for n in merged}, notes=notes)


def completed(report: RebasinReport, run: str, own: Mapping[str, Tensor]) -> RebasinReport:
    """The report, with what only this run has (and no other checkpoint) in its aligned weights and the merged ones."""
    models, merged = dict(report.models), report.merged
    state = models[run].state_dict
    if state is not None:
        models[run] = replace(models[run], state_dict={n: state.get(n, t) for n, t in own.items()})
    if merged is not None:
        merged = {n: merged.get(n, t) for n, t in own.items()}
    return replace(report, models=models, merged=merged)


def best_matcher(
    module: nn.Module,
    spec: PermutationSpec,
    options: AlignOptions,
    batches: Sequence[Any],
    call: Call | None,
    outputs: Outputs | None,
) -> Matcher:
    """Whole weights matched in the way that merges best on data, see :func:`best_matching` and :func:`match_many`."""
    if has_sharded_tensors(module):
        raise RebasinError("the model is sharded and cannot run on one rank")
    if not batches:
        raise RebasinError("there is no training batch")
    probe, pick = copy.deepcopy(module).eval(), outputs or MainOutputs()

    def forward(model: nn.Module, batch: Any) -> Any:
        return pick(call_like(callee(model)[0], batch, call))

    def match(states: Sequence[Mapping[str, Tensor]]) -> list[MatchingResult]:
        whole = [{**probe.state_dict(), **state} for state in states]
        settings = options.search()
        if len(whole) > 2:
            return match_many(spec, whole, model=probe, batches=batches, forward=forward, **settings)
        found = best_matching(spec, probe, whole[0], whole[1], batches, forward=forward, **settings)
        return [*weight_matching_for_task_vectors(spec, whole[:1]), found]

    with torch.no_grad():
        forward(probe, batches[0])  # a model that does not take a batch is known before the long work
    return match


def call_like(called: nn.Module, batch: Any, call: Call | None) -> Any:
    """Call the model on a batch in the way that worked for the sample."""
    errors = []
    for args, kwargs in ways_to_call(called, batch):
        if call is not None and (len(args), sorted(kwargs)) != (len(call[0]), sorted(call[1])):
            continue
        try:
            return called(*args, **kwargs)
        except Exception as error:
            errors.append(error)
    raise RebasinError(f"the model does not take a training batch: {errors[0] if errors else 'no way to call it'}")


def train_batches(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[Any]:
    """Training batches on the CPU, after the transfer hooks."""
    loaders = trainer.train_dataloader
    if loaders is None:
        raise RebasinError("the trainer has no training batches any more")
    for batch in loaders:
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield module._apply_batch_transfer_handler(batch, device=torch.device("cpu"), dataloader_idx=0)
