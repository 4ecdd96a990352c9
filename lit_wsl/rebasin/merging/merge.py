"""Merge aligned models: average, interpolation on a line or an arc, task arithmetic, TIES; the barrier in between.

Nothing here aligns: give it state dicts whose units already stand in the same order. Running statistics of norms are
not weights: means of them are taken where models are averaged, but no sum of differences describes any data, so task
vectors leave those of the pretrained model alone.

REPAIR (Jordan et al. 2023): the mean of two units that respond alike, but not equally, varies less than either, and
layer by layer the responses of a merged network fade. Where batch norms follow, estimating their statistics anew undoes
it. Without them :func:`repair` scales and shifts each unit so that its mean and standard deviation over data are the
weighted means of the end points'; both fold into the layer's weight and bias.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics import Metric

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.responses import (
    Forward,
    Moments,
    Responses,
    call_on_inputs,
    channel_axis,
    has_batch_statistics,
    output_axis,
    reestimate_batchnorm,
)
from lit_wsl.rebasin.spec.spec import PermutationSpec
from lit_wsl.structure.description import require_state_dict, require_state_dicts


def is_continuous(tensor: Tensor) -> bool:
    """Whether a tensor can be averaged: floating point or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_statistic(name: str) -> bool:
    """Whether a tensor holds a running statistic of a norm, by the name that torch gives it."""
    return name.rpartition(".")[2].startswith("running_")


def linear_combination(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum(w * t)`` accumulated in double precision and rounded once, to the dtype of the first tensor."""
    first = tensors[0]
    wide = torch.complex128 if any(tensor.is_complex() for tensor in tensors) else torch.float64
    result = torch.zeros(first.shape, dtype=wide, device=first.device)
    for tensor, weight in zip(tensors, weights):
        result.add_(tensor.detach().to(device=first.device, dtype=wide), alpha=weight)
    return result.to(first.dtype)


def average(state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Weighted mean of aligned state dicts, buffers included.

    Args:
        state_dicts: at least one, with the same names and shapes.
        weights: one per state dict, used as given; by default all equal and summing to one.

    Returns:
        A new state dict. Entries that are not floating point (counters) come from the first one.

    Raises:
        RebasinError: names, shapes or the number of weights don't fit, or weights below zero make a variance negative.
    """
    require_state_dicts(state_dicts, "state_dicts")
    if not state_dicts:
        raise RebasinError("nothing to average: give at least one state dict")
    weights = _one_for_each("state dicts", len(state_dicts), weights, 1.0 / len(state_dicts))
    first = state_dicts[0]
    for number, other in enumerate(state_dicts[1:], start=1):
        _check_same_layout(first, other, f"state dict {number}")
    merged = {
        name: linear_combination([sd[name] for sd in state_dicts], weights)
        if is_continuous(tensor)
        else tensor.detach().clone()
        for name, tensor in first.items()
    }
    return _with_valid_variances(merged)


def _one_for_each(what: str, count: int, weights: Sequence[float] | None, default: float) -> list[float]:
    given = [default] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise RebasinError(f"{count} {what} but {len(given)} weights")
    return given


def interpolate(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """``(1 - alpha) a + alpha b``.

    >>> interpolate({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, 0.25)
    {'w': tensor([1.])}
    """
    return average([a, b], [1.0 - alpha, alpha])


def task_arithmetic(
    pretrained: Mapping[str, Tensor], task_vectors: Sequence[Mapping[str, Tensor]], scale: float | Sequence[float] = 1.0
) -> dict[str, Tensor]:
    """``pretrained + sum(scale_i * task_vector_i)`` (Ilharco et al. 2023, "Editing Models with Task Arithmetic").

    Args:
        pretrained: the state dict that the task vectors were taken from.
        task_vectors: differences by name; a name without an entry is left as pretrained.
        scale: one for all, or one per task vector.

    Returns:
        A new state dict. Running statistics are the pretrained model's: estimate them anew on data
        (:func:`~lit_wsl.rebasin.reestimate_batchnorm`).

    Raises:
        RebasinError: a task vector has a name or shape that the pretrained model lacks, or the scales don't fit.
    """
    scales = [float(scale)] * len(task_vectors) if isinstance(scale, (int, float)) else [float(s) for s in scale]
    if len(scales) != len(task_vectors):
        raise RebasinError(f"{len(task_vectors)} task vectors but {len(scales)} scales")
    _check_task_vectors(pretrained, task_vectors)
    merged = {}
    for name, tensor in pretrained.items():
        parts = [(vector[name], s) for vector, s in zip(task_vectors, scales) if name in vector]
        if parts and is_continuous(tensor) and not is_statistic(name):
            merged[name] = linear_combination([tensor, *(p[0] for p in parts)], [1.0, *(p[1] for p in parts)])
        else:
            merged[name] = tensor.detach().clone()
    return _with_valid_variances(merged)


def ties(
    pretrained: Mapping[str, Tensor],
    task_vectors: Sequence[Mapping[str, Tensor]],
    *,
    density: float = 0.2,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Trim, elect sign, merge (Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models").

    Of each task vector the largest elements are kept. At each place the sign with the larger sum of magnitudes is
    elected, and the mean of the values of that sign, zeros not counted, is added to the pretrained model. Real and
    imaginary parts are elements of their own.

    Args:
        pretrained: the state dict that the task vectors were taken from.
        task_vectors: differences by name; a name without an entry counts as zero.
        density: share of the elements of each task vector that is kept, by magnitude over all its tensors, in (0, 1].
        scale: factor of the merged task vector.
        weights: how much each task vector counts in the election and in the mean; equally by default.

    Returns:
        A new state dict; running statistics are the pretrained model's.

    Raises:
        RebasinError: a task vector has a name or shape that the pretrained model lacks, or an option is out of range.
    """
    if not 0 < density <= 1:
        raise RebasinError(f"density={density} is not a share: choose it above 0 and at most 1")
    weights = _one_for_each("task vectors", len(task_vectors), weights, 1.0)
    if not task_vectors or min(weights) < 0 or sum(weights) <= 0:
        raise RebasinError("ties needs one task vector at least, and weights that are not negative and not all zero")
    _check_task_vectors(pretrained, task_vectors)
    trimmed = [_trimmed(vector, density) for vector in task_vectors]
    merged = {}
    for name, tensor in pretrained.items():
        parts = [(vector[name], w) for vector, w in zip(trimmed, weights) if name in vector]
        if not parts:
            merged[name] = tensor.detach().clone()
            continue
        values = torch.stack([part.to(tensor.device, torch.float64) for part, _ in parts])
        counts = torch.tensor([w for _, w in parts], dtype=torch.float64, device=tensor.device)
        counts = counts.reshape(-1, *[1] * (values.ndim - 1))
        agrees = (values.sign() == (values * counts).sum(dim=0).sign()) & (values != 0)
        mean = (values * counts * agrees).sum(dim=0) / (counts * agrees).sum(dim=0).clamp_min(1e-300)
        change = torch.view_as_complex(scale * mean) if tensor.is_complex() else scale * mean
        merged[name] = (tensor.detach().to(change.dtype) + change).to(tensor.dtype)
    return _with_valid_variances(merged)


def _trimmed(vector: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """The weights of a task vector, complex ones as pairs, with all but the largest elements set to zero."""
    kept = {n: t.detach() for n, t in vector.items() if is_continuous(t) and not is_statistic(n)}
    kept = {n: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for n, t in kept.items()}
    if density == 1 or not kept:
        return kept
    sizes = torch.cat([t.abs().flatten().float() for t in kept.values()])
    keep = max(1, round(density * sizes.numel()))
    least = sizes.kthvalue(sizes.numel() - keep + 1).values
    return {n: torch.where(t.abs() >= least.to(t.device), t, torch.zeros_like(t)) for n, t in kept.items()}


def slerp(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Tensor by tensor along the arc between two models (Shoemake 1985, "Animating rotation with quaternion curves").

    Where a straight line passes through the inside of the sphere and weights shrink, the arc turns the direction of
    each tensor at an even rate, and its length goes evenly from that in ``a`` to that in ``b``. Tensors of the same or
    of opposite direction, zeros and running statistics are interpolated on the line.

    Args:
        a: a state dict, the result at 0.
        b: another one of the same names and shapes, the result at 1.
        alpha: position, in [0, 1].

    Returns:
        A new state dict. Entries that are neither floating point nor complex come from ``a``.

    Raises:
        RebasinError: names or shapes differ, or ``alpha`` is outside of [0, 1].

    >>> half = slerp({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}, 0.5)["w"]
    >>> round(float(half.norm()), 6)
    1.0
    """
    if not 0 <= alpha <= 1:
        raise RebasinError(f"alpha={alpha} is not on the arc: choose it from 0 to 1")
    line = interpolate(a, b, alpha)
    return {
        name: _on_arc(a[name], b[name], alpha, tensor)
        if is_continuous(tensor) and not is_statistic(name) and 0 < alpha < 1
        else tensor
        for name, tensor in line.items()
    }


def _on_arc(a: Tensor, b: Tensor, alpha: float, line: Tensor) -> Tensor:
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = a.detach().to(wide), b.detach().to(device=a.device, dtype=wide)
    sizes = float(torch.linalg.vector_norm(x)), float(torch.linalg.vector_norm(y))
    if not min(sizes) > 0:
        return line
    cosine = float(torch.vdot(x.flatten(), y.flatten()).real) / (sizes[0] * sizes[1])
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if not 1e-6 < angle < math.pi - 1e-6:
        return line
    first, second = (math.sin(share * angle) / math.sin(angle) for share in (1 - alpha, alpha))
    size = (1 - alpha) * sizes[0] + alpha * sizes[1]
    return ((x * (first / sizes[0]) + y * (second / sizes[1])) * size).to(a.dtype)


def _check_task_vectors(pretrained: Mapping[str, Tensor], task_vectors: Sequence[Mapping[str, Tensor]]) -> None:
    require_state_dict(pretrained, "pretrained")
    require_state_dicts(task_vectors, "task_vectors")
    for number, vector in enumerate(task_vectors):
        for name, delta in vector.items():
            if name not in pretrained:
                raise RebasinError(f"task vector {number} has {name!r}, which the pretrained model lacks")
            if delta.shape != pretrained[name].shape:
                shapes = f"{tuple(delta.shape)}, pretrained {tuple(pretrained[name].shape)}"
                raise RebasinError(f"task vector {number}: {name!r} has shape {shapes}")
    names = [{n for n, delta in vector.items() if bool(delta.any())} for vector in task_vectors]
    if len(task_vectors) > 1:
        _refuse_adapters(set().union(*names), pretrained)


_FACTOR = re.compile(r"(.*(?:^|[._])lora_?(?:embedding_)?)(a|b|down|up)((?:[._].*)?)", re.IGNORECASE)
_BARE = re.compile(r"((?:.*[._])?)(a|b)((?:\.weight)?)", re.IGNORECASE)

#: What to do with adapters, as the rest of a message.
FOLD = (
    "Fold the adapters into the base weights first (peft: model.merge_and_unload(); by hand: W + scale * B @ A), and "
    "take those."
)


def adapter_factors(names: Iterable[str]) -> list[str]:
    """The names that low-rank adapters give their factors."""
    return [name for name in names if _FACTOR.fullmatch(name)]


def _refuse_adapters(changed: Collection[str], model: Mapping[str, Tensor]) -> None:
    """Refuse low-rank adapters of which both factors differ: a mean of factors is no mean of their products.

    They are known by their names. Two weights called A and B with a larger one beside them of their product's shape are
    most likely such, too; that is only said.
    """
    both = _pairs(_FACTOR, changed)
    likely = [pair for parent, pair in _pairs(_BARE, changed) if _fits(pair, parent, model)] if not both else []
    if both or likely:
        count, (one, two) = len(both or likely), both[0][1] if both else likely[0]
        told = (
            f"{one!r} and {two!r} are factors of a low-rank adapter, and {count} adapters differ in both: the mean of "
            f"factors is not the mean of their products. {FOLD}"
        )
        if both:
            raise RebasinError(told)
        warnings.warn(told.replace("are factors", "look like factors", 1), stacklevel=4)


def _pairs(names: re.Pattern[str], changed: Collection[str]) -> list[tuple[str, tuple[str, str]]]:
    """Where both factors are among the names: what is in front of theirs, and the two."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(changed):
        if match := names.fullmatch(name):
            found.setdefault((match[1], match[3]), []).append(name)
    return [(parent, (pair[0], pair[1])) for (parent, _), pair in found.items() if len(pair) == 2]


def _fits(pair: tuple[str, str], parent: str, model: Mapping[str, Tensor]) -> bool:
    """Whether a weight beside two factors has the shape of their product, which is of a lower rank."""
    if any(model[name].ndim != 2 for name in pair):
        return False
    (rank, width), (height, same) = (model[name].shape for name in pair)
    shapes = {tuple(tensor.shape) for name, tensor in model.items() if name.startswith(parent)}
    return rank == same and rank < min(height, width) and (height, width) in shapes


def _with_valid_variances(merged: dict[str, Tensor]) -> dict[str, Tensor]:
    """The merged state dict, unless a variance in it is negative: its square root would make every output NaN."""
    for name, tensor in merged.items():
        if name.rpartition(".")[2] == "running_var" and tensor.numel() and float(tensor.min()) < 0:
            raise RebasinError(
                f"{name!r} of shape {tuple(tensor.shape)} would become negative ({float(tensor.min()):.3g}), and a "
                "variance cannot be: take weights that are not negative, or leave the statistics out and estimate "
                "them anew with lit_wsl.rebasin.reestimate_batchnorm"
            )
    return merged


def _check_same_layout(first: Mapping[str, Tensor], other: Mapping[str, Tensor], which: str) -> None:
    apart = sorted(set(first) ^ set(other))
    if apart:
        raise RebasinError(f"{which} and the first differ in {len(apart)} names, such as {apart[0]!r}")
    for name, tensor in first.items():
        if tensor.shape != other[name].shape:
            shapes = f"{tuple(other[name].shape)}, in the first {tuple(tensor.shape)}"
            raise RebasinError(f"{name!r} has shape {shapes} in {which}")
    _refuse_adapters({n for n, t in first.items() if is_continuous(t) and not torch.equal(t, other[n].to(t))}, first)


Statistics = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def repair(
    model: nn.Module,
    endpoints: Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    batches: Iterable[Any],
    weights: Sequence[float] | None = None,
    *,
    forward: Forward = call_on_inputs,
) -> int:
    """Repair a merged model in place.

    With batch norms their statistics are estimated anew. Without, the linear and convolution layers that write hidden
    units (those that some permutation group moves) are rescaled, one after the other in the order in which they run;
    that takes one pass over the batches for each of them. The output layer is not touched.

    Args:
        model: the merged model, of which ``endpoints`` were aligned and averaged.
        endpoints: the aligned state dicts that were merged.
        spec: permutation spec of the architecture.
        batches: a list or loader; iterated several times.
        weights: how much each end point counts; equally by default.
        forward: how to call the model on a batch.

    Returns:
        The number of layers that were repaired (batch norms or rescaled layers).

    Raises:
        RebasinError: there is no batch, or the weights don't fit.
    """
    if has_batch_statistics(model):
        reestimate_batchnorm(model, batches, forward=forward)
        return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    weights = _one_for_each("end points", len(endpoints), weights, 1.0 / len(endpoints))
    layers, data = _hidden_layers(model, spec), Responses(model, batches, forward)
    wanted = [_statistics(data, endpoint, layers) for endpoint in endpoints]
    for name in wanted[0]:  # in the order of execution
        now = _statistics(data, model.state_dict(), [name])[name]
        mean = sum(w * found[name][0] for w, found in zip(weights, wanted))
        std = sum(w * found[name][1] for w, found in zip(weights, wanted))
        _fold(model.get_submodule(name), now, (torch.as_tensor(mean), torch.as_tensor(std)))
    return len(wanted[0])


def _hidden_layers(model: nn.Module, spec: PermutationSpec) -> list[str]:
    """Layers with a weight of two axes or more whose outputs some permutation group moves."""
    names = []
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2 and output_axis(model, name) in spec.axes.get(name, {}):
            names.append(path)
    return names


def _statistics(data: Responses, state_dict: Mapping[str, Tensor], layers: Sequence[str]) -> Statistics:
    """Mean and standard deviation of every output channel of the layers over the batches, by first execution."""
    moments: dict[str, Moments] = {}

    def listen(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            moments.setdefault(name, Moments()).add(output.movedim(channel_axis(module, output), 0))

    for _ in data.run(state_dict, {name: partial(listen, name) for name in layers}):
        pass
    if layers and not moments:
        raise RebasinError("none of the merged model's hidden layers ran, so it cannot be repaired")
    return {name: (torch.as_tensor(found.mean), found.variance().sqrt()) for name, found in moments.items()}


def _fold(module: nn.Module, now: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Scale and shift the outputs of a layer by its weight and bias."""
    weight = module.get_parameter("weight")
    # A unit that is silent in the merged network has nothing to be scaled up.
    scale = torch.where(now[1] > 1e-12, wanted[1] / now[1].clamp_min(1e-12), 1.0)
    axis = output_axis(module, "weight")
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    weight.copy_(weight.double() * scale.reshape(shape))
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.copy_((bias.double() - now[0]) * scale + wanted[0])


LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class InterpolationCurve:
    """Loss and accuracy at points of the line ``(1 - alpha) a + alpha b``.

    Attributes:
        alphas: positions, from 0 (first model) to 1 (second model).
        losses: mean loss at every position.
        accuracies: share of right answers at every position, in [0, 1].
    """

    alphas: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def loss_barrier(self) -> float:
        """``max_alpha L(alpha) - ((1 - alpha) L(0) + alpha L(1))`` (Frankle et al. 2020); never below 0."""
        return max(value - chord for value, chord in zip(self.losses, self._chord(self.losses)))

    @property
    def accuracy_barrier(self) -> float:
        """The largest loss of accuracy against the straight line between the end points; never below 0."""
        return max(chord - value for value, chord in zip(self.accuracies, self._chord(self.accuracies)))

    def _chord(self, values: tuple[float, ...]) -> list[float]:
        return [
            values[i] if alpha in (0.0, 1.0) else (1 - alpha) * values[0] + alpha * values[-1]
            for i, alpha in enumerate(self.alphas)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "alphas": list(self.alphas),
            "losses": list(self.losses),
            "accuracies": list(self.accuracies),
            "loss_barrier": self.loss_barrier,
            "accuracy_barrier": self.accuracy_barrier,
        }


class InterpolationBarrier(Metric):
    """Accumulates predictions at the points of a line and computes both barriers.

    ``update(point, logits, target)`` adds a batch at the point of that number; ``compute()`` returns a dict of
    ``loss_barrier`` and ``accuracy_barrier``, and ``curve()`` the :class:`InterpolationCurve`.

    Args:
        points: number of points, evenly spaced from 0 to 1, both included.
        loss_fn: mean loss of a batch from outputs and targets.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    loss_sum: Tensor
    correct: Tensor
    count: Tensor
    answers: Tensor

    def __init__(self, points: int = 11, loss_fn: LossFunction = F.cross_entropy, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if points < 3:
            raise ValueError(f"a barrier needs at least 3 points, got {points}")
        self.points = points
        self.loss_fn = loss_fn
        for name in ("loss_sum", "correct", "count", "answers"):
            self.add_state(name, torch.zeros(points, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, point: int, logits: Tensor, target: Tensor) -> None:
        """Add the outputs for one batch at one point of the line."""
        self.loss_sum[point] += self.loss_fn(logits, target).double() * len(target)
        self.count[point] += len(target)
        if not target.is_floating_point() and logits.ndim == target.ndim + 1:  # classes on axis 1, as torch has it
            self.correct[point] += (logits.argmax(1) == target).sum()
            self.answers[point] += target.numel()

    def curve(self) -> InterpolationCurve:
        """Mean loss and accuracy at every point (accuracy is nan where the target is no class)."""
        alphas = tuple(i / (self.points - 1) for i in range(self.points))
        losses = (self.loss_sum / self.count).tolist()
        accuracies = (self.correct / self.answers).tolist()
        return InterpolationCurve(alphas, tuple(losses), tuple(accuracies))

    def compute(self) -> dict[str, Tensor]:
        """``loss_barrier`` and ``accuracy_barrier`` as float64 scalars."""
        curve = self.curve()
        values = {"loss_barrier": curve.loss_barrier, "accuracy_barrier": curve.accuracy_barrier}
        return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}


@torch.no_grad()
def interpolation_curve(
    model: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    points: int = 11,
    loss_fn: LossFunction = F.cross_entropy,
    repair: bool = True,
    spec: PermutationSpec | None = None,
    forward: Forward = call_on_inputs,
) -> InterpolationCurve:
    """Loss and accuracy on the line between two state dicts.

    Args:
        model: gives the architecture; it is copied and not changed.
        a: state dict at 0.
        b: state dict at 1.
        batches: pairs of inputs and targets; iterated once for every point (and once more for the statistics), so a
            dataloader or a list, not a generator.
        points: number of points, the ends included.
        loss_fn: mean loss of a batch from outputs and targets.
        repair: re-estimate batch norm statistics at the inner points (see :func:`reestimate_batchnorm`).
        spec: with ``repair``, lets models without batch norms be repaired too, by rescaling their hidden units (see
            :func:`repair`).
        forward: how to call the model on a batch; the target is the batch's second part.
    """
    metric = InterpolationBarrier(points, loss_fn)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    metric.to(device)
    responses = Responses(model, batches, forward)
    for point in range(points):
        alpha = point / (points - 1)
        probe = responses.under(interpolate(a, b, alpha))
        if repair and 0 < point < points - 1:
            _repair_point(probe, (a, b), alpha, spec, _moved(batches, device), forward)
        for batch in _moved(batches, device):
            metric.update(point, forward(probe, batch), batch[1])
    return metric.curve()


def _repair_point(
    probe: nn.Module,
    ends: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    alpha: float,
    spec: PermutationSpec | None,
    batches: Iterable[Any],
    forward: Forward,
) -> None:
    """Give a model between two others the statistics of its own batch norms, or of the ends' hidden units."""
    if spec is None or has_batch_statistics(probe):
        reestimate_batchnorm(probe, batches, forward=forward)
    else:
        repair(probe, ends, spec, list(batches), (1 - alpha, alpha), forward=forward)


def _moved(batches: Iterable[Any], device: torch.device) -> Iterable[Any]:
    from lightning.pytorch.utilities import move_data_to_device

    return (move_data_to_device(batch, device) for batch in batches)
