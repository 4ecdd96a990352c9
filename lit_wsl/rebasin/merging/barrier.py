"""Loss and accuracy along the straight line between two models, and the barrier in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics import Metric

from lit_wsl.rebasin.merging.merge import interpolate
from lit_wsl.rebasin.merging.merge import repair as repair_model
from lit_wsl.rebasin.responses import Forward, Responses, call_on_inputs, has_batch_statistics, reestimate_batchnorm
from lit_wsl.rebasin.spec.spec import PermutationSpec

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
            :func:`lit_wsl.rebasin.merging.merge.repair`).
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
            if spec is None or has_batch_statistics(probe):
                reestimate_batchnorm(probe, _moved(batches, device), forward=forward)
            else:
                moved = list(_moved(batches, device))
                repair_model(probe, (a, b), spec, moved, (1 - alpha, alpha), forward=forward)
        for batch in _moved(batches, device):
            metric.update(point, forward(probe, batch), batch[1])
    return metric.curve()


def _moved(batches: Iterable[Any], device: torch.device) -> Iterable[Any]:
    from lightning.pytorch.utilities import move_data_to_device

    return (move_data_to_device(batch, device) for batch in batches)
