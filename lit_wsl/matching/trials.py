"""What choices lose: each is measured once, within a budget of time and of forward passes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_wsl.matching.balance import Balance
from lit_wsl.matching.changes import Choice
from lit_wsl.matching.entries import filled
from lit_wsl.matching.space import Space
from lit_wsl.structure.losses import MANY, LossMeter

SCREEN = 8  # samples that candidates are compared on at last, fewer if each has many elements
BUSY = 3.0  # so many times as long may a search take where others compute, too
ASKED = 0.02  # seconds between two looks at the clock, which are no cheaper than a trial on some machines
OFF = -1
WHOLE = -1


@dataclass
class Budget:
    """What the trials may cost: time, and forward passes of a whole batch."""

    seconds: float
    passes: float
    meter: LossMeter
    started: float = field(default_factory=time.monotonic)
    computed: float = field(default_factory=time.thread_time)
    spent: float = 0.0
    asked: float = -math.inf

    def left(self, share: float = 1.0) -> bool:
        """Whether another trial may be made within a share of the budget."""
        return self.in_time(share) and self.meter.passes < share * self.passes

    @property
    def room(self) -> int:
        """Whole passes that are left."""
        return max(0, int(self.passes - self.meter.passes))

    def in_time(self, share: float = 1.0) -> bool:
        """Whether there is time for another trial.

        On a machine with other work only the seconds count in which this process came to compute, or a third of all, so
        that answers don't depend on who else is there.
        """
        now = time.monotonic()
        if now - self.asked > ASKED:
            self.asked, self.spent = now, max((now - self.started) / BUSY, time.thread_time() - self.computed)
        return self.spent < share * self.seconds


class Trials:
    """Measures what choices lose, each once.

    Args:
        space: The decisions.
        tensors: The checkpoint's tensors.
        meter: Measures losses; what one sample holds is known to it, since it has measured the fresh model.
        fixed: Values of what is not open, by name in the model.
        budget: What it may cost.
        before: How many choices were tried before, about other questions.
        depend: Whether what a sample loses depends on those beside it, so that few samples say little.
    """

    def __init__(
        self,
        space: Space,
        tensors: Mapping[str, Tensor],
        meter: LossMeter,
        fixed: Mapping[str, Tensor],
        budget: Budget,
        before: int = 0,
        *,
        depend: bool = False,
    ) -> None:
        self.before = before
        self.space, self.tensors, self.meter, self.fixed, self.budget = space, tensors, meter, fixed, budget
        self.balance: Balance | None = None  # what the weights tell without a pass, where gradients could be taken
        self.seen: dict[tuple[Choice, int, int], list[float]] = {}
        self._slopes: dict[tuple[Choice, int], list[tuple[list[float], Tensor]]] = {}
        self.size = meter.size(0)
        self.screen = min(self.size, SCREEN // 2 if meter.elements >= SCREEN else SCREEN)
        self.least = min(self.screen, 1 if meter.elements >= MANY else SCREEN // 4)
        if depend:
            self.least = self.screen = max(self.screen, self.size // 2)

    def more(self, samples: int) -> int:
        """The next number of samples to compare on, after some."""
        return self.least if samples == 0 else min(2 * samples, self.size)

    def state(self, choice: Choice) -> dict[str, Tensor]:
        """What a choice puts into the model; zeros for what is switched off."""
        out = dict(self.fixed)
        for entry, on in self.space.entries(choice):
            for name, value in filled(entry, self.tensors).items():
                out[name] = value if on else torch.zeros_like(value)
        return out

    def _measure(self, choice: Choice, batch: int, start: int, stop: int | None) -> list[float]:
        key = choice, batch, WHOLE if stop is None else start
        if key not in self.seen:
            try:
                self.seen[key] = self.meter.losses(self.state(choice), batch, start, stop)
            except (ValueError, RuntimeError):  # a candidate that can't run is no answer
                if not self.seen:
                    raise
                self.seen[key] = [math.inf]
        return self.seen[key]

    def losses(self, choice: Choice, samples: int = 0, batch: int = 0, at_once: bool = False) -> list[float]:
        """Losses of a choice on the first samples of the first batch, all by default, or on another batch.

        At once: on all samples of the first batch in the pieces that other models of the same batch are measured in.
        """
        if batch or (at_once and self.meter.in_pieces and not self.meter.is_biased):
            return self._measure(choice, batch, 0, None)
        found, done, samples = [], 0, samples or self.size
        while done < samples:
            stop = self.more(done)
            found += self._measure(choice, 0, done, stop)
            done = stop
        return found

    def known(self, choice: Choice, samples: int) -> bool:
        """Whether a choice was measured on so many samples."""
        start = 0
        while self.more(start) < samples:
            start = self.more(start)
        return (choice, 0, start) in self.seen

    def known_of(self, choice: Choice, batch: int, *, slopes: bool = False) -> bool:
        """Whether the losses of a choice on a batch were measured, or its gradients, too."""
        if (choice, batch) in self._slopes:
            return True
        whole = (choice, batch, WHOLE) in self.seen if batch else self.known(choice, self.size)
        return whole and not slopes

    def slopes(self, choice: Choice, batch: int, stop: int = 0) -> list[tuple[list[float], Tensor]]:
        """Losses and gradients of a choice on the pieces of a batch, or of its first samples, measured once."""
        if (choice, batch) in self._slopes:
            found = self._slopes[choice, batch]
            return found[: len(found) * stop // self.meter.size(batch)] if stop else found
        found = self.meter.slopes(self.state(choice), batch, stop)
        if not stop:
            self._slopes[choice, batch] = found
        return found

    def extent(self, choice: Choice) -> int:
        """All samples of the first batch if a choice was measured on them, else those of the screening."""
        return self.size if self.known(choice, self.size) else self.screen

    def mean(self, choice: Choice, samples: int) -> float:
        """Mean loss on some samples."""
        values = self.losses(choice, samples)
        mean = sum(values) / len(values)
        return mean if math.isfinite(mean) else math.inf

    def mean_if_known(self, choice: Choice, samples: int) -> float:
        """The same, infinite where it was not measured."""
        return self.mean(choice, samples) if self.known(choice, samples) else math.inf

    def score(self, choice: Choice) -> float:
        """Mean loss on all samples of the screening."""
        return self.mean(choice, self.screen)

    @property
    def reached(self) -> int:
        """Samples of the first batch that choices were compared on so far."""
        return max((self.more(start) for _, batch, start in self.seen if not batch and start != WHOLE), default=0)

    @property
    def tried(self) -> int:
        """How many choices were tried."""
        return self.before + len({choice for choice, _, _ in self.seen})

    @property
    def best(self) -> Choice:
        """The choice of the least loss among those that were measured on all samples of the screening."""
        return min(self.screened, key=self.score)

    @property
    def screened(self) -> list[Choice]:
        """The choices that were measured on all samples of the screening."""
        return sorted({choice for choice, _, _ in self.seen if self.known(choice, self.screen)})
