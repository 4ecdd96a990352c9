"""Paired tests: is a rival worse than a candidate on the same samples, and at what risk of being wrong?

Three witnesses tell of a mapping, sample by sample: the loss; the norm of its gradient; and how far the mean gradient
is from zero, which it is only where training has stopped. The first is enough where it is significant. Where it is not,
all three together may be, if none speaks against it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from scipy.special import bdtr, stdtr
from torch import Tensor

RISK = 0.01  # of one wrong decision among all rivals tried
FEWEST = 8  # pieces that three witnesses are heard on
AS_MUCH = 0.05  # risk by the losses themselves at which their logarithms are heard
LITTLE = 0.1  # times the mean loss is little
SHORT = 1 << 16  # elements of a gradient that is copied
AGREES = 0.1  # risk at which each single witness has to agree


def risk_of(rival: Sequence[float], best: Sequence[float], floor: float = 0.0) -> float:
    """Risk of calling a rival worse although it is not.

    Three paired tests, one-sided: Student's t of the losses, and of their logarithms, which is heard where the first
    agrees; and the sign test, which a few samples with a loss far from the others' do not disturb. The harmonic mean
    of their risks counts: it holds however the tests depend on each other (Wilson, "The harmonic mean p-value for
    combining dependent tests", 2019).

    >>> risk_of([2.0, 2.1, 1.9, 2.2], [1.0, 1.2, 0.9, 1.1]) < 0.001
    True
    >>> risk_of([1.0, 1.0], [1.0, 1.0])
    1.0
    """
    gaps = [a - b for a, b in zip(rival, best)]
    n = len(gaps)
    if n < 3 or not all(map(math.isfinite, gaps)):
        return 0.0 if any(math.isinf(a) or math.isnan(a) for a in rival) and all(map(math.isfinite, best)) else 1.0
    mean, spread = _mean_and_spread(gaps)
    if mean <= floor:
        return 1.0
    spread = max(spread, floor, 1e-3 * mean)
    told = [g for g in gaps if abs(g) > floor]
    student = float(stdtr(n - 1, -mean / (spread / math.sqrt(n))))
    sign = float(bdtr(sum(g < 0 for g in told), len(told), 0.5)) if told else 1.0
    times = _risk_by_times(rival, best) if student < AS_MUCH else 1.0  # what is sure of more may still lose as much
    risks = [max(risk, 1e-300) for risk in (student, sign, times)]
    return min(1.0, len(risks) / sum(1 / risk for risk in risks))


def differ(some: Sequence[float], others: Sequence[float]) -> bool:
    """Whether losses of the same samples are others, by more than a hundredth."""
    floor = 1e-2 * abs(sum(others) / len(others))
    return min(risk_of(some, others, floor), risk_of(others, some, floor)) < RISK


def _risk_by_times(rival: Sequence[float], best: Sequence[float]) -> float:
    """Risk by how many times the losses of one are those of the other."""
    gaps = _times(rival, best)
    if not gaps:
        return 1.0
    mean, spread = _mean_and_spread(gaps)
    if mean <= 0:
        return 1.0
    return float(stdtr(len(gaps) - 1, -mean / (max(spread, 1e-3 * mean) / math.sqrt(len(gaps)))))


def _times(more: Sequence[float], less: Sequence[float]) -> list[float]:
    """Logarithms of how many times some losses are others; ones that hardly count are no less than some."""
    least = LITTLE * sum(less) / max(len(less), 1)
    if min((*more, *less), default=-1.0) < 0 or least <= 0 or not all(map(math.isfinite, (*more, least))):
        return []
    return [math.log((a + least) / (b + least)) for a, b in zip(more, less)]


def stepped_down(risks: Mapping[Hashable, float], share: float, many: int) -> dict[Any, float]:
    """Risks of several tests, of which each that tells leaves more of the risk to the others (Holm, 1979).

    Args:
        risks: Of each test alone.
        share: The number of times that as many are made.
        many: How many the risk is shared by, these among them.

    >>> stepped_down({"a": 0.001, "b": 0.02, "c": 0.01}, 1, 3)
    {'a': 0.003, 'c': 0.02, 'b': 0.02}
    """
    found: dict[Any, float] = {}
    least = 0.0
    for place, (name, risk) in enumerate(sorted(risks.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, share * (many - place) * risk))
        found[name] = least
    return found


def errors_apart(more: Sequence[float], less: Sequence[float]) -> float:
    """By how many standard errors some losses are more than others of the same samples."""
    gaps = [a - b for a, b in zip(more, less)]
    if len(gaps) < 2 or not all(map(math.isfinite, gaps)):
        return math.inf if gaps and not all(map(math.isfinite, more)) else 0.0
    mean, spread = _mean_and_spread(gaps)
    return mean / max(spread / math.sqrt(len(gaps)), 1e-12)


def times_apart(more: Sequence[float], less: Sequence[float]) -> float:
    """The same, or by how many times they are more, whichever tells more."""
    times = _times(more, less)
    return max(errors_apart(more, less), errors_apart(times, [0.0] * len(times)))


def _mean_and_spread(gaps: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two numbers, and their standard deviation (of a sample)."""
    mean = sum(gaps) / len(gaps)
    return mean, math.sqrt(sum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1))


def together(one: float, other: float) -> float:
    """The risk of being wrong by two witnesses that know nothing of each other (Fisher's method).

    >>> round(together(0.01, 0.01), 6), together(1.0, 1.0)
    (0.001021, 1.0)
    """
    both = one * other
    return both * (1 - math.log(both)) if both > 0 else 0.0


def risk_by_gradient(rival: tuple[Tensor, Tensor], best: tuple[Tensor, Tensor]) -> float:
    """The same by loss, norm of the gradient and mean gradient together, each in units of its own spread.

    Args:
        rival: Losses ``(n,)`` and gradients ``(n, d)`` of the rival on n pieces of data.
        best: Those of the candidate on the same pieces.

    Returns:
        The risk by Student's t of the sum of the three, or of the first two, counted as two tests; one where a witness
        does not agree, or where the mean gradient speaks against it.
    """
    if len(rival[0]) < FEWEST:
        return 1.0
    gaps = _gaps(rival, best)
    risks = [_student(gap) if bool(gap.isfinite().all()) else 1.0 for gap in gaps]
    against = bool(gaps[-1].isfinite().all()) and _student(-gaps[-1]) < AGREES
    heard = [n for n in (2, 3) if max(risks[:n]) < AGREES and not against]
    return min((1.0, *(2 * _student(torch.stack(gaps[:n]).sum(0)) for n in heard)))


def is_ahead(rival: tuple[Tensor, Tensor], best: tuple[Tensor, Tensor]) -> bool:
    """Whether a rival looks better than a candidate by all three witnesses together, significantly or not."""
    gaps = [gap.nan_to_num() for gap in _gaps(rival, best)]
    return float(torch.stack(gaps).sum()) < 0


def _gaps(rival: tuple[Tensor, Tensor], best: tuple[Tensor, Tensor]) -> list[Tensor]:
    """By how much a rival is worse, witness by witness, each in units of its own spread over the pieces."""
    gaps = [
        rival[0].double() - best[0].double(),
        rival[1].double().norm(dim=1).log() - best[1].double().norm(dim=1).log(),
        _size_of_mean(_squared(rival[1])) - _size_of_mean(_squared(best[1])),
    ]
    return [gap / gap.std() for gap in gaps]


def unrest(slopes: Tensor) -> float:
    """How many times the noise of a batch's gradient the gradient itself is: below one where training has stopped.

    Args:
        slopes: Gradients ``(n, d)`` on the n pieces of a batch, whose mean has the n-th part of a piece's noise; see
            the noise scale of McCandlish et al., "An Empirical Model of Large-Batch Training" (2018).

    Returns:
        The ratio of the squared norms; infinite where the pieces are too few to tell.
    """
    return unrest_of(_squared(slopes)) if len(slopes) >= FEWEST else math.inf


def unrest_of(products: Tensor) -> float:
    """The same by the products ``(n, n)`` of the gradients."""
    count, own = len(products), float(products.trace())
    common = (float(products.sum()) - own) / (count * (count - 1))  # the mean of the jackknife's pseudo-values
    noise = (own / count - common) / count
    return common / noise if noise > 0 else math.inf


def products_of(slopes: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """All products ``(n, n)`` of some gradients, which may be too long to be copied."""
    flat = [[g.flatten().float() for g in own.values()] for own in slopes]
    if sum(g.numel() for g in flat[0]) <= SHORT:
        return _squared(torch.stack([*map(torch.cat, flat)]).cpu())
    found = [[torch.stack([*map(torch.dot, a, b)]).sum() for b in flat] for a in flat]
    return torch.stack([torch.stack(row) for row in found]).double().cpu()


def _size_of_mean(products: Tensor) -> Tensor:
    """Pseudo-values of the jackknife, ``(n,)``, whose mean is the squared norm of the expected gradient.

    The squared norm of a mean of samples is more than that, by their own spread; products of different samples are not.
    """
    others = (products.sum(1) - products.diagonal()) / (len(products) - 1)
    return 2 * others - others.mean()


def _squared(slopes: Tensor) -> Tensor:
    """All products ``(n, n)`` of gradients ``(n, d)``."""
    slopes = slopes.double()
    return slopes @ slopes.T


def _student(values: Tensor) -> float:
    n = len(values)
    spread = float(values.std()) / math.sqrt(n)
    return float(stdtr(n - 1, -float(values.mean()) / spread)) if spread > 0 else 1.0
