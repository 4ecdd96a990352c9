"""What plans lose on the data, beside the fresh model and other random starts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from scipy.special import stdtr
from torch import Tensor, nn

from lit_wsl.matching.entries import filled
from lit_wsl.matching.trials import Budget
from lit_wsl.matching.witnesses import RISK, differ, products_of, risk_of, unrest_of
from lit_wsl.plan.entries import PlanEntry
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.losses import LossMeter

MOST = 64.0  # forward passes of a whole batch, with what else is measured
LAST = 3.0  # of them that the verdict may take
FEW = 8  # samples that are also measured without those beside them
RESTLESS = 1.0  # times the noise of its batch is a gradient where training has not stopped
FAR = 3.0  # times the noise of its batch is a gradient where training may not have been at all
STEPS = (0.01, 0.03)  # of descent, as shares of a tensor's norm; smaller ones gain where training swings about a valley
GAIN = 0.04  # share of the fall of the loss that one adds where training never was; elsewhere it was up to 0.026
DOUBT = GAIN / 2  # the same, where names are doubted

Halves = Sequence[tuple[list[float], dict[str, Tensor]]]  # losses and gradient, by name, on the halves of a batch


@dataclass(frozen=True)
class Bench:
    """What a plan is measured with, and what the fresh model lost."""

    tensors: Mapping[str, Tensor]
    meter: LossMeter
    budget: Budget
    fresh: Sequence[float]
    starts: list[float] = field(default_factory=list)  # what other random starts lose
    known: list[tuple[TransferPlan, list[float]]] = field(default_factory=list)
    fallen: dict[tuple[float, ...], bool] = field(default_factory=dict)  # of which losses it was asked, and the answer

    @cached_property
    def spread(self) -> float:
        """How much the samples of the fresh model differ."""
        average = mean(self.fresh)
        return math.sqrt(mean([(loss - average) ** 2 for loss in self.fresh]))

    @cached_property
    def depend(self) -> bool:
        """Whether what a sample loses depends on the samples beside it, as in contrastive losses."""
        if self.meter.in_pieces or self.meter.size(0) < 2 * FEW:
            return self.meter.is_biased
        alone = self.meter.losses({}, 0, 0, FEW)
        return differ(alone, list(self.fresh)[: len(alone)])

    def losses(self, plan: TransferPlan) -> list[float]:
        """The losses of the model that a plan fills."""
        found = next((losses for one, losses in self.known if one is plan), None)
        if found is None:
            found = self.meter.losses(values(plan, self.tensors), 0)
            self.known.append((plan, found))
        return found

    def is_beaten(self, plan: TransferPlan, state: Mapping[str, Tensor]) -> bool:
        """Whether other weights lose less than those of a plan on a batch that they were not chosen by."""
        if not self.meter.has(1) or self.meter.passes + 2 > MOST - 1:
            return False
        planned, other = (self.meter.losses(own, 1) for own in (values(plan, self.tensors), state))
        return risk_of(planned, other) < RISK

    def bears_out(self, plan: TransferPlan) -> bool:
        """Whether the loss of a plan falls, and training may have been there; in one pass if nothing speaks against it.

        The gradient on the halves of a batch tells whether it rests there.
        """
        state = values(plan, self.tensors)
        try:
            halves = list(self.meter.gradients(state, 0, 2))
        except (RuntimeError, ValueError):  # a loss without a gradient
            return self.falls(self.losses(plan))
        losses = [loss for own, _ in halves for loss in own]
        self.known.append((plan, losses if len(losses) == len(self.fresh) else self.meter.losses(state, 0)))
        if not self.falls(self.losses(plan)):
            return False
        restless = unrest_of(products_of([slopes for _, slopes in halves])) >= RESTLESS if len(halves) > 1 else True
        return not restless or self.gain(state, losses, halves) < DOUBT

    def gain(self, state: Mapping[str, Tensor], losses: Sequence[float], halves: Halves = ()) -> float:
        """What share of the fall of the loss a step down its gradient adds, which may be known on the halves."""
        fall = mean(self.fresh) - mean(losses)
        return self._gain(state, halves) / fall if fall > 0 else math.inf

    def _gain(self, state: Mapping[str, Tensor], halves: Halves) -> float:
        """By how much the loss on half of a batch falls after a step down its gradient on the other half."""
        meter, size = self.meter, self.meter.size(0)
        half = -(-size // 2)
        if meter.passes + (2 + len(STEPS)) / 2 + LAST > MOST:
            return math.inf
        _, slopes = halves[0] if halves else next(iter(meter.gradients(state, 0, 2)))
        weights = {name: p.detach() for name, p in meter.model.named_parameters(remove_duplicate=False)} | dict(state)
        found = [mean(halves[1][0] if len(halves) > 1 else meter.losses(state, 0, half, size))]
        for share in STEPS:
            steps = {n: share * weights[n].norm() / s.norm().clamp_min(1e-30) * s for n, s in slopes.items()}
            lower = {**state, **{n: weights[n] - step for n, step in steps.items()}}
            found.append(mean(meter.losses(lower, 0, half, size)))
            if found[-1] >= found[0]:  # a longer step gains no more
                break
        return found[0] - min(x for x in found if math.isfinite(x))

    def falls(self, best: Sequence[float]) -> bool:
        """Whether the loss falls by more than one random start differs from another.

        Where the fall is less than the samples of the fresh model differ, two more random starts, the fresh weights
        shuffled, tell how much that is; where these are too few, three further ones at a tenth of the risk. Losses that
        can't be negative are compared by how many times one is the other.
        """
        key = tuple(best)
        if key not in self.fallen:
            self.fallen[key] = self._falls(best)
        return self.fallen[key]

    def _falls(self, best: Sequence[float]) -> bool:
        before, after = mean(self.fresh), mean(best)
        if not math.isfinite(after) or after >= before or (len(self.fresh) > 2 and risk_of(self.fresh, best) > RISK):
            return False
        if before - after > self.spread:
            return True
        for count, risk in ((2, RISK), (5, RISK / 10)):
            more = max(0, count - len(self.starts))
            if more and self.meter.passes + more > MOST - 1:  # the last is for the verdict
                return False
            while len(self.starts) < count:
                start = _shuffled(self.meter.model, 1 + len(self.starts))
                self.starts.append(mean(self.meter.losses(start, 0)))
            starts = [before, *self.starts[:count]]
            *starts, end = map(math.log, (*starts, after)) if min(*starts, after) > 0 else (*starts, after)
            spread = statistics.stdev(starts) * math.sqrt(1 + 1 / len(starts))
            if float(stdtr(count, -(mean(starts) - end) / max(spread, 1e-12))) < risk:
                return True
        return False


def fresh_losses(meter: LossMeter) -> list[float]:
    """What the model loses as it is; in larger pieces where small ones lose something else than the whole does."""
    found = meter.losses({}, 0)
    if meter.in_pieces and len(found) > 2 and differ(found, [meter.at_first] * len(found)):
        meter.take_larger_pieces()
    return found


def values(entries: Iterable[PlanEntry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What entries put into the model; those that need the model's present values are left out."""
    plain = (e for e in entries if not any(op.needs_target for op in e.operations))
    return {name: value for entry in plain for name, value in filled(entry, tensors).items()}


def _shuffled(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The model's weights, each tensor's values in a random order: another start like the first."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach().reshape(-1)[torch.randperm(p.numel(), generator=generator).to(p.device)].reshape(p.shape)
        for name, p in model.named_parameters()
    }


def mean(values: Sequence[float]) -> float:
    """The mean; zero of nothing."""
    return sum(values) / max(len(values), 1)
