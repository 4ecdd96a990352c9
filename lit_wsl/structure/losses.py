"""What a model's own loss is under lent weights, sample by sample, without leaving a trace."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lit_wsl.structure.running import WriteGuard, cuda_devices, lendable, lent_to, seed, undisturbed

Loss = Callable[[nn.Module, Any], Tensor]
PIECES = 4  # of a sample of many elements, and of a batch whose gradients show a model's symmetries
RUNS = 8  # pieces of a batch whose loss can't be told sample by sample
FOLD = 1 << 14  # elements of a gradient that is kept
MANY = 32  # elements of a sample that is told in pieces


class NoDataError(Exception):
    """There is no data, or no loss, to measure; the reason in words."""


class LossMeter:
    """Losses of one model under other weights, on batches that are taken when they are first needed.

    All candidates see the same samples and the same random numbers, so their losses can be compared pair by pair. The
    model is put back after every pass, whatever the loss does; ``watch`` is told the number of passes so far.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, batches: Iterable[Any], watch: Callable[[float], None] | None = None
    ) -> None:
        self.model, self.loss, self.watch = model, loss, watch
        self.passes = 0.0
        self.elements = 1  # losses of one sample that the model's is the mean of
        self._source = iter(batches)
        self._batches: list[Any] = []
        self.in_pieces = False
        self.least = 2  # samples of a piece; more where small pieces lose something else than the whole
        self.at_first = math.nan  # loss of the whole batch that was measured in pieces at first
        self._uneven = False  # the loss is over some places of the samples, in the order of the samples
        self.has_slopes = True  # until the loss was seen to have no gradient
        self._guarded = True  # until a whole pass was seen to write to none of the model's tensors
        self._idle = False  # whether that pass left the modules' attributes alone, too
        self._draws = False  # until it was seen to draw a number of Python's or of NumPy's
        self._tensors: list[tuple[str, Tensor]] | None = None  # during a session

    def has(self, number: int) -> bool:
        """Whether there is a batch of this number."""
        while len(self._batches) <= number:
            batch = next(self._source, None)
            if batch is None:
                return False
            self._batches.append(batch)
        return True

    def size(self, number: int) -> int:
        """Samples of a batch."""
        return batch_size(self._batches[number]) if self.has(number) else 0

    @property
    def is_biased(self) -> bool:
        """Whether pieces were seen to lose something else than the whole batch, as where samples are compared."""
        return self.least > 2

    def take_larger_pieces(self) -> None:
        """Measure the pieces of a whole batch, and none that are smaller, from now on."""
        self.least = max(3, self.size(0) // RUNS)

    def whole(self, state: Mapping[str, Tensor]) -> float:
        """The loss of the first batch as a whole."""
        batch, size = self._batches[0], self.size(0)
        (value,), _ = self._run(state, cut(batch, 0, size, size), 0, _place(0, 0))
        self._spend(1.0)
        return value

    def losses(self, state: Mapping[str, Tensor], number: int, start: int = 0, stop: int | None = None) -> list[float]:
        """The losses of samples ``start`` to ``stop`` of a batch, or of pieces where the loss is no mean over samples.

        Samples of many elements (tokens, pixels) give several losses each.
        """
        batch, size = self._batches[number], self.size(number)
        stop = size if stop is None else min(stop, size)
        count = stop - start
        seen = None
        if not self.in_pieces:
            values, seen = self._run(state, cut(batch, start, stop, size), count, _place(number, start))
            self._spend(count / max(size, 1))
            if len(values) > 1 or count < 2 or self._uneven:
                return values
            self.in_pieces, self.at_first = True, values[0]
            if count < 2 * RUNS:
                return values
        found, elements = [], 0
        for first, last in pieces(count, RUNS, self.least):
            value, piece = self._run(
                state, cut(batch, start + first, start + last, size), 0, _place(number, start + first)
            )
            found += value
            elements += piece.elements
            self._spend((last - first) / max(size, 1))
        if seen is not None and seen.elements / 2 < elements < 2 * seen.elements:  # no pairs of samples
            told = seen.by_sample(values[0], count, uneven=True)
            if told:
                self.in_pieces, self._uneven = False, True
                return told
        return found

    def slopes(self, state: Mapping[str, Tensor], number: int, stop: int = 0) -> list[tuple[list[float], Tensor]]:
        """Losses and gradient, folded if it is long, of the smallest pieces of a batch or of its first samples."""
        found = self.gradients(state, number, self.size(number), stop)
        return [(losses, folded(slopes.values())) for losses, slopes in found]

    def gradients(
        self, state: Mapping[str, Tensor], number: int, most: int = PIECES, stop: int = 0
    ) -> Iterator[tuple[list[float], dict[str, Tensor]]]:
        """Losses and gradient, by name of the parameter, of so many pieces of a batch or of its first samples."""
        batch, size = self._batches[number], self.size(number)
        named = self.model.named_parameters(remove_duplicate=False)
        weights = {name: p for name, p in named if p.is_floating_point()}
        for start, end in pieces(stop or size, most, self.least):
            part = cut(batch, start, end, size)
            with self._ready(state, _place(number, start)), torch.enable_grad():
                for weight in weights.values():
                    weight.requires_grad_(True)
                with _Elements() as seen:
                    value = self.loss(self.model, part)
                slopes = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                total = float(value.detach())
                found = {
                    name: torch.zeros_like(weight) if slope is None else slope.detach()
                    for (name, weight), slope in zip(weights.items(), slopes)
                }
            self._spend((end - start) / max(size, 1))
            yield seen.by_sample(total, end - start, self._uneven) or [total], found

    def _spend(self, passes: float) -> None:
        self.passes += passes
        if self.watch is not None:
            self.watch(self.passes)

    def _run(self, state: Mapping[str, Tensor], batch: Any, samples: int, place: int) -> tuple[list[float], _Elements]:
        with self._ready(state, place), torch.no_grad(), _Elements() as seen:
            value = self.loss(self.model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"the loss must be one number, not {type(value).__name__}")
        found = seen.by_sample(float(value.detach()), samples, self._uneven)
        self.elements = seen.elements // samples if found else 1
        return found or [float(value.detach())], seen

    @contextmanager
    def session(self) -> Iterator[None]:
        """One guard around many measurements: those of a loss that changes nothing need little of their own."""
        with undisturbed(self.model, guard=False) as world:
            self._tensors, self._devices = lendable(self.model), cuda_devices(self.model)
            self._numbers, self._changed, self._put_back = world.numbers, world.changed, world.put_back
            try:
                yield
            finally:
                self._tensors = None

    @contextmanager
    def _ready(self, state: Mapping[str, Tensor], place: int) -> Iterator[None]:
        """The model in eval mode with lent weights and the random numbers of a place in the data."""
        if self._tensors is None:
            with self.session(), self._ready(state, place):
                yield
            return
        if self._draws:
            random.setstate(self._numbers[0])
            numpy.random.set_state(self._numbers[1])
        seed(place, self._devices)
        try:
            with lent_to(self._tensors, state), self._watched() if self._guarded else nullcontext():
                yield
        finally:
            if not self._idle:
                self._put_back()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """See whether a pass writes to the model's tensors, which are put back, or to its modules' attributes."""
        writes = WriteGuard(self.model)
        try:
            with writes:
                yield
        finally:
            writes.restore()
            self._draws = not _same_numbers(self._numbers, (random.getstate(), numpy.random.get_state()))
        self._guarded = writes.wrote
        self._idle = not self._guarded and not self._changed()


def _place(number: int, start: int) -> int:
    """A number for the samples of a batch from one on: noise that all pieces share looks like what they agree on."""
    return number + (start << 16)


def _same_numbers(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Whether two states of Python's and NumPy's generators are the same."""
    return one[0] == other[0] and one[1][2:] == other[1][2:] and numpy.array_equal(one[1][1], other[1][1])


def folded(slopes: Iterable[Tensor]) -> Tensor:
    """A gradient as one vector of at most ``FOLD`` elements: chunks of it added up with random signs.

    Products of two folded gradients are those of the gradients, but for an error of mean zero (count sketch).
    """
    flat = torch.cat([g.flatten() for g in slopes])
    if flat.numel() > FOLD:
        rows = nn.functional.pad(flat, (0, -flat.numel() % FOLD)).view(-1, FOLD)
        signs = torch.randint(2, (len(rows), 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
        flat = (rows * signs.to(rows)).sum(0)
    return flat.float().cpu()


class _Elements(TorchFunctionMode):
    """Keep the elements of every loss that torch reduces to one number: what ``reduction="none"`` would have given."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[float, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        signature = _signature(func)
        if signature is not None and isinstance(result, Tensor) and result.dim() == 0:
            bound = signature.bind(*args, **kwargs)
            if bound.arguments.get("reduction", "mean") in ("mean", "sum"):
                bound.arguments["reduction"] = "none"
                try:
                    with torch.no_grad():
                        elements = func(*bound.args, **bound.kwargs)
                except Exception:  # a loss that knows no elements
                    return result
                self._seen.append((float(result.detach()), elements.double()))
        return result

    @property
    def elements(self) -> int:
        """How many elements there were."""
        return sum(e.numel() for _, e in self._seen)

    def by_sample(self, total: float, samples: int, uneven: bool = False) -> list[float]:
        """The losses of single samples, if the total is made of reduced losses alone.

        Uneven: samples have other numbers of elements, such as masked tokens; then those of as many equal pieces.
        """
        fits = (lambda n: n >= samples) if uneven else (lambda n: n and n % samples == 0)
        usable = [(value, e) for value, e in self._seen if samples and fits(e.numel())]
        if not usable or len(usable) != len(self._seen):
            return []
        whole = sum(value for value, _ in usable)
        for scale in (1.0, 1.0 / len(usable)):
            if math.isclose(whole * scale, total, rel_tol=1e-4, abs_tol=1e-8):
                parts = samples * (PIECES if all(_divides(e.numel() / samples) for _, e in usable) else 1)
                shares = (_shares(value * scale, _in_parts(e, parts)) for value, e in usable)
                return list(map(sum, zip(*shares)))
        return []


def _divides(elements: float) -> bool:
    """Whether a sample of so many elements is told in pieces."""
    return elements >= MANY and elements % PIECES == 0


def _in_parts(elements: Tensor, parts: int) -> list[float]:
    """Means of as many parts of some elements, in their order."""
    if elements.numel() % parts:
        return [float(part.mean()) for part in elements.flatten().tensor_split(parts)]
    return (elements.flatten() if elements.numel() == parts else elements.reshape(parts, -1).mean(1)).tolist()


def _shares(value: float, means: Sequence[float]) -> list[float]:
    """What each sample gives to a reduced loss, so that their mean is the loss."""
    total = sum(means) / len(means)
    return [mean * (value / total) for mean in means] if total else list(means)


@lru_cache(maxsize=512)
def _signature(func: Any) -> inspect.Signature | None:
    """What a loss takes that torch reduces to one number; ``None`` for other functions."""
    if getattr(func, "__module__", "") != "torch.nn.functional":
        return None
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):
        return None
    return signature if "reduction" in signature.parameters else None


def batch_size(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor."""
    if type(batch) in (list, tuple) and batch and isinstance(batch[0], Tensor) and batch[0].dim():
        return len(batch[0])
    return next((len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), 1)


def cut(batch: Any, start: int, stop: int, size: int) -> Any:
    """Some samples of a batch, copied, so that a step may change what it is given."""

    def part(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value[start:stop] if value.dim() and len(value) == size else value).clone()

    if type(batch) in (list, tuple) and all(type(value) is Tensor for value in batch):  # as a tree it takes long
        return type(batch)(map(part, batch))
    return tree_map(part, batch)


def pieces(count: int, most: int = PIECES, least: int = 2) -> Sequence[tuple[int, int]]:
    """Where to cut a batch; no piece has fewer samples than the least."""
    step = max(least, -(-count // most))
    starts = range(0, count, step)
    return [(start, min(start + step, count)) for start in starts if count - start >= least or start == 0]
