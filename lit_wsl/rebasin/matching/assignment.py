"""Exact linear assignment: maximise ``sum_i S[i, p[i]]`` over permutations ``p``.

Large problems are solved on a small core: of the n^2 entries hardly more than a dozen per row can be part of the best
permutation. Which ones, prices tell: entry (i, j) is worth a look only if ``S[i, j] - v[j]`` is nearly the largest of
its row. Good prices are those of the entropic relaxation of the problem, a few rescalings of rows and columns
(Sinkhorn; Cuturi 2013), at a temperature of the order of the gaps between a row's best entries.

The problem on the core is solved (``scipy.sparse.csgraph.min_weight_full_bipartite_matching``). Shortest paths from
the prices give its dual variables, ``u[i] + v[j] >= S[i, j]`` with equality on the permutation. Where all of the matrix
obeys, the permutation is the best of the whole matrix, whatever the prices were worth. Entries that do not obey join
the core, and it is solved again. Where that does not end soon, a dense solver starts from the prices.

The sparse solver lets rows outbid each other, and where entries nearly tie it raises prices by their tiny differences,
for ever. So it sees them rounded, coarsely first, then finer on what the duals of the coarse solution leave (cost
scaling; Goldberg and Kennedy 1995). The answer is an optimum up to ``2**-24`` temperatures per row, which is finer than
the entries of a float32 product are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor


def is_permutation(index: Tensor) -> bool:
    """Whether every value of ``0 .. n-1`` occurs once in a LongTensor ``(n,)``."""
    return bool((torch.bincount(index, minlength=index.numel()) == 1).all())


def assign(similarity: Tensor, potential: Tensor | None = None) -> tuple[Tensor, bool]:
    """The best permutation for a square similarity matrix.

    If the best column of every row is another one, these columns are the optimum, and no assignment problem has to be
    solved: the case of a planted permutation and of fine-tuned pairs. A potential makes the case more frequent. Taking
    ``potential[j]`` off column ``j`` changes no difference between permutations; with half the squared norm of what
    stands behind the column, "the largest inner product" becomes "the nearest neighbour".

    Rows that cannot be told apart are in the answer as the solver leaves them.

    Args:
        similarity: (n, n), any device and floating dtype.
        potential: (n,), taken off the columns.

    Returns:
        LongTensor (n,) on the CPU with the column of each row, and whether the row-wise maxima were the answer.

    >>> assign(torch.tensor([[1.0, 5.0], [2.0, 3.0]]))
    (tensor([1, 0]), False)
    """
    best = (similarity if potential is None else similarity - potential).argmax(dim=1)
    if is_permutation(best):
        return best.cpu(), True
    if len(similarity) >= MIN_SIZE:
        return assign_large(similarity.detach()), False
    # The solver starts with prices of zero. Prices at the columns' maxima are closer to the optimal ones, and it needs
    # half the time; prices at half the squared norms would cost it several times as much.
    reduced = similarity - similarity.amax(dim=0)
    solved = linear_sum_assignment(reduced.detach().cpu().numpy(), maximize=True)[1]
    return torch.from_numpy(solved).long(), False


def assign_lazily(upper: np.ndarray, value: Callable[[int, int], float]) -> np.ndarray:
    """The best permutation where the entries are expensive, each an optimum of its own, but cheap to bound.

    Solve with the upper bounds; put the exact values of the chosen entries in their place; solve again; until all
    chosen entries are exact. The last solution is then an optimum of the exact matrix, because no other permutation
    can be worth more than its bound says. Usually little more than one exact value per row is computed.

    Args:
        upper: (n, n) float64, no entry smaller than its value.
        value: the exact entry at a row and column.

    Returns:
        (n,) the column of each row.
    """
    matrix = upper.copy()
    exact = np.zeros(matrix.shape, dtype=bool)
    rows = np.arange(len(matrix))
    while True:
        columns = linear_sum_assignment(matrix, maximize=True)[1]
        open_rows = rows[~exact[rows, columns]]
        if len(open_rows) == 0:
            return columns
        for row in open_rows:
            matrix[row, columns[row]] = min(matrix[row, columns[row]], value(int(row), int(columns[row])))
            exact[row, columns[row]] = True


#: Below this size a dense solver is as fast.
MIN_SIZE = 768
#: Temperature, as share of the gap between the best and the fourth best entry of a row.
WARMTH = 0.3
#: Rescalings of rows and columns.
RESCALINGS = 5
#: Entries join the core down to so many temperatures below the best of their row; the first width that is thin enough.
WIDTHS = (8.0, 4.0, 2.0)
#: Entries per row that a core may have.
MAX_PER_ROW = 48
#: What makes sure that there is an answer at all costs so many temperatures, and an answer with it is none.
LAST_RESORT = 16.0
MAX_ROUNDS = 6
MAX_STEPS = 1000
#: Entries that are looked at together: what they become on the way stays in the cache.
CHUNK = 2**17
#: Costs are rounded to these shares of the temperature, one after the other.
STAGES = (2.0**-8, 2.0**-18, 2.0**-28)
#: Differences below this share of the temperature do not count.
TOLERANCE = 2.0**-24

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def assign_large(similarity: Tensor) -> Tensor:
    """The permutation of the largest sum ``S[i, p[i]]`` for a large matrix.

    Passes over the whole matrix are on its device; what is on the CPU is the core.

    Args:
        similarity: (n, n), any device, float32 or float64, finite.

    Returns:
        LongTensor (n,) on the CPU with the column of each row.
    """
    priced = _soft_prices(similarity)
    if priced is None:
        return _solve_dense(similarity, similarity.amax(dim=0))
    prices, level, temperature = priced
    match = _solve_on_core(similarity, prices, level, temperature)
    return _solve_dense(similarity, prices) if match is None else torch.from_numpy(match)


def _solve_dense(similarity: Tensor, prices: Tensor) -> Tensor:
    """By scipy, which starts from prices of zero: the closer ours are to the best ones, the less it searches."""
    cost = (prices - similarity).double().cpu().numpy()
    return torch.from_numpy(linear_sum_assignment(cost)[1]).long()


def _solve_on_core(similarity: Tensor, prices: Tensor, level: Tensor, temperature: float) -> Ints | None:
    """The best permutation, proven; None where no small core has it."""
    size = len(similarity)
    limit = MAX_PER_ROW * size
    cores = (_entries_above(similarity, prices, level - width * temperature, limit) for width in WIDTHS)
    core = next((found for found in cores if found is not None), None)
    v, u = (x.double().cpu().numpy() for x in (prices, level))
    # The diagonal makes sure that some permutation is in the core. What is bad there is raised to the last resort, so
    # that rows do not outbid each other for long to avoid it.
    diagonal = np.arange(size) * (size + 1)
    last_resort = v + u - LAST_RESORT * temperature
    for _ in range(MAX_ROUNDS):
        if core is None:
            return None
        core = np.union1d(core, diagonal)
        rows, columns, values = core // size, core % size, _values(similarity, core)
        at = np.searchsorted(core, diagonal)
        raised = values[at] < last_resort
        values[at] = np.maximum(values[at], last_resort)
        begin = np.searchsorted(rows, np.arange(size))
        match = _solve_core(begin, rows, columns, (v[columns] - values) / temperature)
        if match is None:
            return None
        chosen = values[np.searchsorted(core, np.arange(size) * size + match)]
        dual = _dual_prices(begin, columns, values - chosen[rows], match, v, TOLERANCE * temperature)
        if dual is None:
            return None
        v = dual
        joining = _entries_that_disobey(similarity, chosen - v[match], v, TOLERANCE * temperature, limit)
        if joining is not None and not np.setdiff1d(joining, core, assume_unique=True).size:
            return None if (raised & (match == np.arange(size))).any() else match
        core = None if joining is None else np.union1d(core, joining)
    return None


def _soft_prices(similarity: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """Prices of columns, the level of each row above which entries count, and the temperature."""
    size = len(similarity)
    tops = similarity.amax(dim=0)
    kernel = similarity - tops
    best = kernel.amax(dim=1)
    sample = kernel[torch.linspace(0, size - 1, min(size, 128)).long().to(kernel.device)]
    gaps = best.new_tensor(0.0) + sample.topk(4, dim=1).values[:, [0, 3]].diff(dim=1).neg().flatten()
    temperature = WARMTH * float(gaps.quantile(0.4))
    if not (temperature > 0 and np.isfinite(temperature)):
        return None
    # exp(-60) is far from what float32 cannot hold, also after the rescalings
    kernel.sub_(best[:, None]).mul_(1.0 / temperature).clamp_(min=-60.0).exp_()
    column = torch.ones_like(tops)
    for _ in range(RESCALINGS):
        row = 1.0 / (kernel @ column)
        column = 1.0 / (row @ kernel)
    row = 1.0 / (kernel @ column)
    prices, level = tops - temperature * column.log(), best - temperature * row.log()
    if not (bool(prices.isfinite().all()) and bool(level.isfinite().all())):
        return None
    return prices, level, temperature


def _entries_above(similarity: Tensor, prices: Tensor, level: Tensor, limit: int) -> Ints | None:
    """Flat indices, ascending, of the entries with ``S[i, j] - prices[j] > level[i]``; None if they are too many."""
    size = len(similarity)
    step = max(1, CHUNK // size) if similarity.device.type == "cpu" else max(1, 2**26 // size)
    parts, count = [], 0
    for start in range(0, size, step):
        above = similarity[start : start + step] - prices > level[start : start + step, None]
        parts.append(above.flatten().nonzero().flatten() + start * size)
        count += len(parts[-1])
        if count > limit:
            return None
    return torch.cat(parts).cpu().numpy()


def _entries_that_disobey(similarity: Tensor, u: Floats, v: Floats, tolerance: float, limit: int) -> Ints | None:
    """Flat indices of the entries with ``S[i, j] > u[i] + v[j]``; None if they are too many."""
    size, dtype, device = len(similarity), similarity.dtype, similarity.device
    prices, level = (torch.from_numpy(x).to(device, dtype) for x in (v, u))
    slack = 4.0 * torch.finfo(dtype).eps * float(2 * np.abs(v).max() + np.abs(u).max())
    near = _entries_above(similarity, prices, level - slack, limit)  # in the matrix's own precision, with room to spare
    if near is None:
        return None
    return near[_values(similarity, near) - u[near // size] - v[near % size] > tolerance]


def _values(similarity: Tensor, entries: Ints) -> Floats:
    index = torch.from_numpy(entries).to(similarity.device)
    return similarity.flatten()[index].double().cpu().numpy()


def _solve_core(begin: Ints, rows: Ints, columns: Ints, cost: Floats) -> Ints | None:
    """The permutation of the lowest cost (in temperatures) over the entries of the core; None if it was not found."""
    size = len(begin)
    v = np.zeros(size)
    match = None
    for grain in STAGES:
        rest = cost - v[columns]
        rest -= np.minimum.reduceat(rest, begin)[rows]
        rounded = np.floor(rest / grain) * grain
        graph = csr_array((rounded + 1.0, (rows, columns)), shape=(size, size))  # zero would count as no entry
        match = min_weight_full_bipartite_matching(graph)[1].astype(np.int64)
        chosen = np.empty(size)
        own = columns == match[rows]
        chosen[rows[own]] = rounded[own]
        change = _dual_prices(begin, columns, chosen[rows] - rounded, match, np.zeros(size), 0.0)
        if change is None:
            return None
        v -= change
    return match


def _dual_prices(
    begin: Ints, columns: Ints, gains: Floats, match: Ints, start: Floats, tolerance: float
) -> Floats | None:
    """The highest prices up to ``start`` under which no entry beats the permutation; None if they don't settle.

    A row's own column may cost no more than the cheapest alternative, ``v[match[i]] <= v[j] - gain``: shortest paths,
    by Bellman-Ford.

    Args:
        begin: where the entries of each row begin.
        columns: the column of each entry.
        gains: what a row would gain by each entry, without prices.
        match: (n,) the permutation.
        start: (n,) prices.
        tolerance: changes that do not count.
    """
    v = start.copy()
    for _ in range(MAX_STEPS):
        lower = np.minimum(v[match], np.minimum.reduceat(v[columns] - gains, begin))
        settled = bool((v[match] - lower <= tolerance).all())
        v[match] = lower
        if settled:
            return v
    return None
