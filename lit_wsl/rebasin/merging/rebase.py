"""Rebase: what a fine-tuning changed, carried to another release of its pretrained model.

``new_base + moved(finetuned - old_base)``: what moves the units of the old base to those of the new one is found on the
bases and applied to the task vector (Rinaldi et al. 2025, "Update Your Transformer to the Latest Release: Re-Basin of
Task Vectors", permute). Beyond permuting, a task vector may be turned, and fitted to unlabelled data
(:mod:`lit_wsl.rebasin.merging.fitting`). How much of it arrives needs no labels either: the outputs of the fine-tuned
model differ from the old base's, and those of the result from the new base's should alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_wsl.errors import RebasinError, Summarised
from lit_wsl.rebasin.matching.activations import best_matching, joint_matching, midpoint_gap
from lit_wsl.rebasin.matching.weights import MatchingResult, matched_names, weight_matching
from lit_wsl.rebasin.merging.fitting import SAMPLES, Maps, Samples, fit_task_vector, layers, procrustes, turn_tensor
from lit_wsl.rebasin.merging.merge import is_continuous, is_statistic, task_arithmetic
from lit_wsl.rebasin.responses import Forward, Responses, call_on_inputs, channel_axis, drawn, output_axis
from lit_wsl.rebasin.spec.axis import Permutations
from lit_wsl.rebasin.spec.spec import PermutationSpec, permute_axes

Method = Literal["auto", "add", "permute", "turn", "fit"]
StateDict = Mapping[str, Tensor]

#: Share of the outputs' change that may go wrong before ``auto`` looks for more than adding or permuting.
WELL = 0.1
#: Share of units that stay from which on they count as in place; two trainings of their own have next to none.
MOST = 0.5
#: Midpoint gap from which on two bases have little in common.
APART = 0.3


@dataclass(frozen=True, eq=False)
class RebaseResult(Summarised):
    """A fine-tuning on its new base.

    Attributes:
        state_dict: the new base with the carried task vector (and fresh tensors) in it.
        task_vector: the carried task vector, without statistics of norms.
        matching: the permutations of the old base's units to the new base's.
        gap: :func:`~lit_wsl.rebasin.midpoint_gap` between the matched bases; None without data.
        method: ``"add"``, ``"permute"``, ``"turn"`` or ``"fit"``: what was done.
        missed: share of the change of the outputs that went wrong: ``sum |result - wanted|^2 / sum |wanted|^2`` over
            batches, 0 where all of it arrived; None without data.
        warnings: what to know before it is used.
    """

    state_dict: dict[str, Tensor]
    task_vector: dict[str, Tensor]
    matching: MatchingResult
    gap: float | None
    method: str
    missed: float | None
    warnings: tuple[str, ...]

    def summary(self) -> str:
        """How the task vector was carried, and what to know before the result is used."""
        lines = [f"method: {self.method}"]
        if self.missed is not None:
            lines.append(f"outputs' change that went wrong: {self.missed:.1%}")
        if self.gap is not None:
            lines.append(f"midpoint gap of the bases: {self.gap:.4g}")
        lines.append(f"tensors: {len(self.state_dict)}, of which the fine-tuning changed {len(self.task_vector)}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def __repr__(self) -> str:
        told = "" if self.missed is None else f", {self.missed:.0%} of the outputs' change missed"
        return f"RebaseResult(method={self.method!r}{told}, {len(self.warnings)} warnings)"


def rebase(
    spec: PermutationSpec,
    task_vector: StateDict,
    old_base: StateDict,
    new_base: StateDict,
    *,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    alpha: float = 1.0,
    method: Method = "auto",
    fresh: StateDict | None = None,
    max_batches: int = 32,
    seed: int = 0,
    forward: Forward = call_on_inputs,
    progress: bool | None = None,
) -> RebaseResult:
    """Carry a fine-tuning to another release of its pretrained model.

    It is carried in one of these ways:

    - ``"add"``: the task vector as it is; right where the new base is the old one trained on.
    - ``"permute"``: by the permutations that bring the old base's units into the order of the new base's.
    - ``"turn"``: permuted, then turned by orthogonal maps, found on weights, and on responses where there are batches.
      Approximate; weights themselves are never turned.
    - ``"fit"``: turned, then each changed layer fitted so that its responses change as in the fine-tuned model. Needs
      batches, best of what the fine-tuning is for; labels are not used.
    - ``"auto"``: without batches add where units are in place, else permute. With batches the simplest of these if at
      least nine tenths of the outputs' change arrive by it; else the best of all, judged on batches that nothing was
      fitted to (if there are two at least). Measured, this is better than choosing by the midpoint gap: 0.56 of a
      fine-tuning arrive on a transformer of another seed instead of 0.22 (``benchmarks/rebase.py``).

    Args:
        spec: permutation spec of the architecture.
        task_vector: fine-tuned minus old base; statistics of norms in it are left out.
        old_base: state dict that the fine-tuning started from.
        new_base: state dict of the new release, of the same names and shapes (map another implementation first).
        model: the fine-tuned architecture; needed with ``batches``. It is copied.
        batches: unlabelled batches that the model takes, or pairs whose first part it takes.
        alpha: factor of the task vector.
        method: how to carry it, see above.
        fresh: tensors that the fine-tuned model has and the bases lack (a new head): carried whole, with the axes moved
            that read or write hidden units.
        max_batches: use so many batches at most.
        seed: of the matching and of the positions drawn from responses.
        forward: how to call the model on a batch.
        progress: show a progress bar; by default only on a terminal.

    Raises:
        RebasinError: names or shapes do not fit, or a method lacks what it needs.

    Example:
        >>> from lit_wsl.rebasin import apply_permutation, infer_permutation_spec
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> spec = infer_permutation_spec(net, (torch.ones(1, 3),))
        >>> old = net.state_dict()
        >>> new = apply_permutation(spec, spec.random_permutations(seed=0), old)
        >>> tuned = {name: tensor + 0.1 for name, tensor in old.items()}
        >>> vector = {name: tuned[name] - old[name] for name in old}
        >>> rebase(spec, vector, old, new).method
        'permute'
    """
    if method not in get_args(Method):
        raise RebasinError(f"method={method!r} is not known: choose one of {', '.join(get_args(Method))}")
    if not isinstance(spec, PermutationSpec):
        raise RebasinError(f"spec is a {type(spec).__name__}: give the PermutationSpec first, then the task vector")
    for what, given in (("task_vector", task_vector), ("old_base", old_base), ("new_base", new_base)):
        if not isinstance(given, Mapping):
            raise RebasinError(f"{what} is a {type(given).__name__}, not a state dict: give model.state_dict()")
    if batches is not None and model is None:
        raise RebasinError("batches say nothing without the model that takes them: give model=")
    if method == "fit" and batches is None:
        raise RebasinError(
            "method='fit' fits layers to data: give unlabelled batches (model=, batches=; on the command line --data), "
            "or take method='turn'"
        )
    fresh = dict(fresh or {})
    vector = {n: t for n, t in task_vector.items() if is_continuous(t) and not is_statistic(n) and n not in fresh}
    old, new = ({n: t for n, t in base.items() if n not in fresh} for base in (old_base, new_base))
    known = _Known(spec, vector, old, new, fresh, seed)
    _check(known)
    matching = weight_matching(spec, new, old, seed=seed, progress=progress)
    in_place = matching.identity_share > MOST
    carrier = _Carrier(known, _scales(spec, model), matching)
    gap = missed = None
    if model is not None and batches is not None:
        data = Responses(model, list(islice(batches, max_batches)), forward)
        carrier = _JudgingCarrier(known, data, matching, in_place, progress)
        gap = carrier.gap()
    chosen, carried = _choose(carrier, method, "add" if in_place else "permute")
    carried = _Carried({n: alpha * t for n, t in carried.vector.items()}, carried.fresh)
    state = {**task_arithmetic(new, [carried.vector]), **carried.fresh}
    if isinstance(carrier, _JudgingCarrier):
        missed = carrier.missed(carried)
        state = carrier.data.with_statistics({n: state.get(n, t) for n, t in carrier.new.items()})
    stale = gap is None and any(is_statistic(n) for n in state)
    return RebaseResult(
        state, carried.vector, carrier.matching, gap, chosen, missed, _warnings(chosen, gap, missed, stale)
    )


def _choose(carrier: _Carrier, method: str, plain: str) -> tuple[str, _Carried]:
    """The way that was asked for, or the one that carries best."""
    if method != "auto":
        return method, getattr(carrier, method)()
    simple = getattr(carrier, plain)()
    if not isinstance(carrier, _JudgingCarrier) or carrier.missed(simple) <= WELL:
        return plain, simple
    ways = {plain: simple, "turn": carrier.turn()}
    if layers(carrier.data.model):
        ways["fit"] = carrier.fit()
    best = min(ways, key=lambda way: carrier.missed(ways[way]))
    return best, ways[best]


@dataclass(frozen=True, eq=False)
class _Carried:
    """A task vector on the way, and the fresh tensors."""

    vector: dict[str, Tensor]
    fresh: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Known:
    """What a rebase is given: the spec, the task vector, both bases, fresh tensors, the seed of all that is drawn."""

    spec: PermutationSpec
    vector: StateDict
    old: StateDict
    new: StateDict
    fresh: StateDict
    seed: int

    def permuted(self, permutations: Permutations, tensors: StateDict) -> dict[str, Tensor]:
        """Tensors with their units in the new base's order."""
        return {n: _permuted(self.spec, permutations, n, t) for n, t in tensors.items()}


class _Carrier:
    """The ways of carrying a task vector without data."""

    def __init__(self, known: _Known, scales: set[str], matching: MatchingResult) -> None:
        self.known, self.scales, self.matching = known, scales, matching

    def add(self) -> _Carried:
        """As it is."""
        return _Carried(dict(self.known.vector), dict(self.known.fresh))

    def permute(self) -> _Carried:
        """By the permutations between the bases."""
        known = self.known
        return _Carried(*(known.permuted(self.matching, tensors) for tensors in (known.vector, known.fresh)))

    def turn(self) -> _Carried:
        """Permuted and turned."""
        permuted = self.permute()
        return _Carried(self._turned(permuted.vector), self._turned(permuted.fresh))

    def _turned(self, tensors: StateDict) -> dict[str, Tensor]:
        return {
            n: turn_tensor(self.known.spec, self.maps, n, t, scale=n in self.scales) if t.is_floating_point() else t
            for n, t in tensors.items()
        }

    @cached_property
    def maps(self) -> Maps:
        """What turns the permuted old base's units into the new base's."""
        return procrustes(self.known.spec, *self.weights(), self.scales)

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights of both bases that say how units correspond, the old base's permuted."""
        known = self.known
        names = [n for n in matched_names(known.spec, known.new, known.old) if known.new[n].is_floating_point()]
        return {n: known.new[n] for n in names}, known.permuted(self.matching, {n: known.old[n] for n in names})


class _JudgingCarrier(_Carrier):
    """The ways of carrying a task vector with data, and their judge."""

    def __init__(
        self, known: _Known, data: Responses, matching: MatchingResult, in_place: bool, progress: bool | None
    ) -> None:
        batches = list(data.batches)
        self.quota = max(1, SAMPLES // max(1, len(batches)))
        self.data, self.fitted, self.judging = data, data, data
        if len(batches) > 1:  # every fourth judges, the others are fitted to
            kept = [batch for number, batch in enumerate(batches) if number % 4 != 1]
            self.fitted = Responses(data.model, kept, data.forward)
            self.judging = Responses(data.model, batches[1::4], data.forward)
        tuned = task_arithmetic(known.old, [known.vector])
        states = (self._whole(state, known.fresh) for state in (known.new, known.old, tuned))
        self.new, self.old, self.tuned = (data.with_statistics(state) for state in states)
        if not in_place and not matching.certain:
            # With a fresh head there are no outputs to judge by: the head itself has to be moved first.
            match = joint_matching if known.fresh else best_matching
            parameters = tuple(n for n in known.spec.parameters or known.spec.axes if n not in known.fresh)
            spec = replace(known.spec, parameters=parameters)
            options: dict[str, Any] = {"seed": known.seed, "forward": data.forward, "progress": progress}
            matching = match(spec, data.model, self.new, self.old, data.batches, **options)
        super().__init__(known, _scales(known.spec, data.model), matching)

    def gap(self) -> float:
        """The midpoint gap of the matched bases."""
        new = {**self.new, **self.permute().fresh}
        old = self.known.permuted(self.matching, self.old)
        return midpoint_gap(self.data.model, self.known.spec, new, old, self.data.batches, forward=self.data.forward)

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights of both bases, and what their layers get and answer."""
        a, b = super().weights()
        old = self.known.permuted(self.matching, self.old)
        return {**a, **self._shown(self.new)}, {**b, **self._shown(old)}

    @cached_property
    def maps(self) -> Maps:
        """What turns the permuted old base's units into the new base's, by weights and responses."""
        a, b = self.weights()
        spec = self.known.spec
        axes = {n: {0: spec.axes[n.partition(" ")[0]][int(n[-1])]} for n in a if " " in n}
        shapes = {n: tuple(a[n].shape) for n in axes}
        spec = replace(spec, axes={**spec.axes, **axes}, shapes={**spec.shapes, **shapes})
        return procrustes(spec, a, b, self.scales)

    def fit(self) -> _Carried:
        """Turned, then fitted layer by layer."""
        known, turned = self.known, self.turn()
        samples = Samples(self.fitted, self.quota, known.seed)
        old, tuned = (known.permuted(self.matching, state) for state in (self.old, self.tuned))
        states = ({**self.new, **turned.fresh}, old, tuned)
        fitted = fit_task_vector(known.spec, samples, states, self.maps, turned.vector, known.fresh)
        heads = {n: t + fitted[n].to(t) if n in fitted else t for n, t in turned.fresh.items()}
        return _Carried({n: t for n, t in fitted.items() if n not in heads}, heads)

    def missed(self, carried: _Carried) -> float:
        """Share of the outputs' change that goes wrong, on the batches that judge."""
        state = {**task_arithmetic(self.new, [carried.vector]), **carried.fresh}
        result = self.judging.outputs(self.data.with_statistics(state))
        wanted, known = self._outputs
        wrong = scale = 0.0
        for got, tuned, old, new in zip(result, *wanted, known):
            if self.known.fresh:  # no base has outputs to change
                got, want = got - tuned, tuned - tuned.mean(dim=0, keepdim=True)
            else:
                got, want = got - new - (tuned - old), tuned - old
            wrong, scale = wrong + float(got.square().sum()), scale + float(want.square().sum())
        return wrong / scale if scale > 0 else wrong

    @cached_property
    def _outputs(self) -> tuple[tuple[list[Tensor], list[Tensor]], list[Tensor]]:
        tuned, old, new = (self.judging.outputs(state) for state in (self.tuned, self.old, self.new))
        return (tuned, old), new

    def _whole(self, state: StateDict, fresh: StateDict) -> dict[str, Tensor]:
        """A base as a state dict of the model, fresh tensors in it."""
        own = self.data.model.state_dict()
        whole = {**state, **fresh}
        lacking = [n for n, t in own.items() if n not in whole and is_continuous(t)]
        if lacking:
            raise RebasinError(
                f"{lacking[0]!r} of shape {tuple(own[lacking[0]].shape)} ({len(lacking)} tensors of the model in all) "
                "is in no base: give what the fine-tuned model has for itself in fresh={name: tensor}"
            )
        return {n: whole.get(n, t) for n, t in own.items()}

    def _shown(self, state: StateDict) -> dict[str, Tensor]:
        """Centred inputs and responses of layers by ``"<weight> axis <n>"``, the axis that is moved alike."""
        spec = self.known.spec
        kept: dict[str, list[Tensor]] = {}

        def listen(name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            out = 1 if isinstance(module, nn.Embedding) else output_axis(self.data.model, name)
            shown = {out: output}
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and arguments:
                shown[1] = arguments[0]
            for axis, tensor in shown.items():
                axis_spec = spec.axes[name].get(axis)
                if axis_spec is None or not isinstance(tensor, Tensor) or axis_spec.outer_axis is not None:
                    continue
                columns = tensor.movedim(channel_axis(module, tensor), 0).flatten(1).float()
                if len(columns) == axis_spec.length:
                    parts = kept.setdefault(f"{name} axis {axis}", [])
                    parts.append(drawn(columns, self.quota, self.known.seed + len(parts)))

        paths = [path for path, _ in self.data.model.named_modules() if path and f"{path}.weight" in spec.axes]
        self.data.listen(state, {path: partial(listen, f"{path}.weight") for path in paths})
        found = {name: torch.cat(parts, dim=1) for name, parts in kept.items()}
        return {name: rows - rows.mean(dim=1, keepdim=True) for name, rows in found.items()}


def _scales(spec: PermutationSpec, model: nn.Module | None = None) -> set[str]:
    """Names of the tensors that multiply units one by one: gains of norms, filters of depthwise convolutions."""
    scales = {n for n in spec.axes if len(spec.shapes.get(n, ())) == 1 and "bias" not in n.rpartition(".")[2]}
    for path, module in model.named_modules() if model is not None else ():
        groups = getattr(module, "groups", 1)
        if groups > 1 and groups == getattr(module, "out_channels", 0):
            scales.add(f"{path}.weight")
    return scales


def _permuted(spec: PermutationSpec, permutations: Permutations, name: str, tensor: Tensor) -> Tensor:
    """A tensor permuted on the axes that the spec moves; its other axes may be longer or shorter than the spec's."""
    axes = spec.axes.get(name, {})
    for axis, axis_spec in axes.items():
        if axis >= tensor.ndim or tensor.shape[axis] != axis_spec.length:
            raise RebasinError(
                f"{name!r} has shape {tuple(tensor.shape)}, the permutation spec moves {axis_spec.length} positions on "
                f"its axis {axis}"
            )
    indices = {axis: spec.index(permutations, name, axis) for axis in axes}
    return permute_axes(spec, name, tensor, indices) if indices else tensor


def _check(known: _Known) -> None:
    """Refuse what does not fit together, by name."""
    for name, delta in known.vector.items():
        for what, base in (("old", known.old), ("new", known.new)):
            if name not in base:
                raise RebasinError(
                    f"{name!r} of the task vector is missing in the {what} base: bring it to the same names first "
                    "(lit-wsl map, lit-wsl convert), or give what no base has in fresh="
                )
            if base[name].shape != delta.shape:
                shapes = f"{tuple(delta.shape)} in the task vector, {tuple(base[name].shape)} in the {what} base"
                raise RebasinError(
                    f"{name!r} has shape {shapes}; a tensor that the fine-tuning made anew goes in fresh="
                )
    for name, tensor in known.fresh.items():
        if tensor.ndim > 1 and name not in known.spec.shapes and name not in known.spec.axes:
            raise RebasinError(
                f"the permutation spec does not know the fresh tensor {name!r} of shape {tuple(tensor.shape)}, so not "
                "which of its axes read hidden units: infer the spec from the fine-tuned model"
            )


def _warnings(method: str, gap: float | None, missed: float | None, statistics: bool) -> tuple[str, ...]:
    """What to know before the result is used."""
    told = []
    if gap is None:
        told.append(
            "quality unknown: there was no data; unlabelled batches (model=, batches=; on the command line --data) "
            "measure it"
        )
    elif gap > APART:
        told.append(
            f"the bases have little in common (midpoint gap {gap:.2f}): expect little; use it as a start of a "
            "fine-tuning"
        )
    if missed is not None and missed > WELL:
        told.append(f"{min(missed, 1):.0%} of what the fine-tuning changes in the outputs did not arrive")
    if gap is None or gap > APART or (missed is not None and missed > WELL):
        told.append("the fine-tuned model itself may be better: compare both on labelled data")
    if method in ("turn", "fit"):
        told.append(f"approximate: the task vector was {'turned' if method == 'turn' else 'turned and fitted to data'}")
    if statistics:
        told.append(
            "norm statistics are those of the new base, which do not describe the result: estimate them anew with "
            "lit_wsl.rebasin.reestimate_batchnorm, or give batches (model=, batches=; on the command line --data)"
        )
    return tuple(told)
