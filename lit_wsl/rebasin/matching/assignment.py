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

Trees of nested groups are solved exactly, inside out (:class:`TreeSolver`): the worth of bringing unit ``j`` to
the place of unit ``i`` is the inner product of what both hold themselves plus, for every group nested in them, the
optimum of that group, computed only where a bound on it does not settle the matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from lit_wsl.rebasin.matching.objective import Similarity, Tree, worth
from lit_wsl.rebasin.spec.spec import PermutationSpec


def is_permutation(index: Tensor) -> bool:
    """Whether every value of ``0 .. n-1`` occurs once in a LongTensor ``(n,)``."""
    return bool((torch.bincount(index, minlength=index.numel()) == 1).all())


def assign(similarity: Tensor, potential: Tensor | None = None) -> tuple[Tensor, bool]:
    """The best permutation for a square similarity matrix.

    If the best column of every row is another one, these columns are the optimum, and no assignment problem has to be
    solved: the case of a planted permutation and of fine-tuned pairs. A potential makes the case more frequent. Taking
    ``potential[j]`` off column ``j`` changes no difference between permutations; with half the squared norm of what
    stands behind the column, "the largest inner product" becomes "the nearest neighbour".

    Rows that cannot be told apart are in the answer as the solver leaves them. With it comes whether the row-wise
    maxima were the answer.

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
    """The permutation of the largest sum ``S[i, p[i]]`` for a large finite matrix, on whose device all passes are."""
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
    by Bellman-Ford. The entries of row ``i`` begin at ``begin[i]``; ``gains`` are without prices.
    """
    v = start.copy()
    for _ in range(MAX_STEPS):
        lower = np.minimum(v[match], np.minimum.reduceat(v[columns] - gains, begin))
        settled = bool((v[match] - lower <= tolerance).all())
        v[match] = lower
        if settled:
            return v
    return None


@dataclass(frozen=True, eq=False)
class Solution:
    """Permutations of all groups of a tree, relative to the order in which the rows were compared."""

    permutations: dict[str, Tensor]  # group name -> permutation
    certain: bool  # whether every row-wise maximum was another one
    similarity: Similarity | None = None  # what the permutation of a lone group was read off


class TreeSolver:
    """Solves one tree from the similarities of its groups and coupled pairs of groups; some may have no evidence."""

    def __init__(self, spec: PermutationSpec, tree: Tree, similarities: Mapping[tuple[str, ...], Similarity]) -> None:
        self.spec, self.tree, self.similarities = spec, tree, similarities
        self.certain = True
        self._memo: dict[tuple[tuple[str, ...], int, int], tuple[float, dict[str, Tensor]]] = {}
        self._bounds: dict[tuple[str, ...], np.ndarray] = {}
        self._bundles: dict[str, list[tuple[str, ...]]] = {g: self._siblings(g) for g in tree.groups}

    def solve(self) -> Solution:
        """The joint optimum of the tree's groups (up to coupled siblings, which alternate)."""
        root = self.tree.root
        if len(self.tree.groups) == 1:
            own = self.similarities[(root,)]
            columns, certain = assign(own.block(0, 0), own.potential[0])
            return Solution({root: columns}, certain, own)
        result = {
            g: torch.arange(shape[-1]).expand(shape).clone()
            for g, shape in ((g, self.spec.permutation_shape(g)) for g in self.tree.groups)
        }
        self._unfold(root, 0, 0, result)
        return Solution(result, self.certain)

    def solve_inner(self) -> Solution:
        """The optimum of every group on its own, with the units of its ancestors left where they are."""
        result, certain = {}, True
        for group in self.tree.groups:
            own = self.similarities.get((group,))
            if own is None:
                continue
            rows = [assign(own.block(i, i), own.potential[i]) for i in range(own.ancestors)]
            certain &= all(sure for _, sure in rows)
            result[group] = torch.stack([columns for columns, _ in rows]).reshape(self.spec.permutation_shape(group))
        return Solution(result, certain)

    # ---- inside out --------------------------------------------------------------------------------------------------

    def _siblings(self, parent: str) -> list[tuple[str, ...]]:
        """Children of a group, bundled where they are coupled."""
        bundles = [{child} for child in self.spec.children(parent)]
        for key in self.similarities:
            if len(key) == 2 and self.spec.groups[key[0]].parent == parent:
                joined = [b for b in bundles if b & set(key)]
                bundles = [b for b in bundles if not b & set(key)] + [set().union(*joined)]
        order = {g: n for n, g in enumerate(self.tree.groups)}
        return sorted((tuple(sorted(b, key=order.__getitem__)) for b in bundles), key=lambda b: order[b[0]])

    def _unfold(self, group: str, i: int, j: int, result: dict[str, Tensor]) -> None:
        """Write the solution of a group between two ancestor units, and of all inside it, into ``result``."""
        columns = self._value((group,), i, j)[1][group]
        size = self.spec.groups[group].size
        result[group].reshape(-1, size)[i] = columns
        for bundle in self._bundles[group]:
            for unit in range(size):
                place, source = i * size + unit, j * size + int(columns[unit])
                if len(bundle) == 1:
                    self._unfold(bundle[0], place, source, result)
                    continue
                for member, inner in self._value(bundle, place, source)[1].items():
                    result[member].reshape(-1, self.spec.groups[member].size)[place] = inner

    def _value(self, bundle: tuple[str, ...], i: int, j: int) -> tuple[float, dict[str, Tensor]]:
        """Worth and permutations of the optimum of a group (or coupled siblings) between two ancestor units."""
        key = (bundle, i, j)
        if key not in self._memo:
            if len(bundle) > 1:
                self._memo[key] = Coupled(self.spec, self.similarities, bundle, i, j).solve()
            elif self._bundles[bundle[0]]:
                self._memo[key] = self._inner_node(bundle[0], i, j)
            else:
                self._memo[key] = self._leaf(bundle[0], i, j)
        return self._memo[key]

    def _leaf(self, group: str, i: int, j: int) -> tuple[float, dict[str, Tensor]]:
        own = self.similarities.get((group,))
        if own is None:
            return 0.0, {group: torch.arange(self.spec.groups[group].size)}
        block = own.block(i, j)
        columns, certain = assign(block, own.potential[j])
        if i == j:
            self.certain &= certain
        return worth(block, columns), {group: columns}

    def _inner_node(self, group: str, i: int, j: int) -> tuple[float, dict[str, Tensor]]:
        size = self.spec.groups[group].size
        rows, cols = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
        own = self.similarities.get((group,))
        base = np.zeros((size, size)) if own is None else own.block(i, j).double().cpu().numpy()
        upper = base + sum(self._bound(bundle)[rows, cols] for bundle in self._bundles[group])

        def value(u: int, v: int) -> float:
            inner = sum(self._value(bundle, i * size + u, j * size + v)[0] for bundle in self._bundles[group])
            return float(base[u, v]) + inner

        columns = assign_lazily(upper, value)
        total = sum(value(u, int(v)) for u, v in enumerate(columns))
        return total, {group: torch.from_numpy(columns).long()}

    def _bound(self, bundle: tuple[str, ...]) -> np.ndarray:
        """(ancestors, ancestors) upper bounds of :meth:`_value`, all pairs at once."""
        if bundle in self._bounds:
            return self._bounds[bundle]
        size = int(np.prod(self.spec.permutation_shape(bundle[0])[:-1]))
        bound = np.zeros((size, size))
        for key, own in self.similarities.items():
            if set(key) <= set(bundle):
                bound = bound + own.bounds()
        for group in bundle:
            for inner in self._bundles[group]:
                width = self.spec.groups[group].size
                below = self._bound(inner).reshape(size, width, size, width)
                bound = bound + below.max(axis=3).sum(axis=1)
        self._bounds[bundle] = bound
        return bound


class Coupled:
    """Siblings that move the same positions as a product, between one pair of ancestor units.

    The worth is a sum over the siblings plus a bilinear term for each coupled pair. It is maximised by alternating:
    one sibling at a time, exactly, until nothing improves; from every sibling as the first one, and the best kept.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        similarities: Mapping[tuple[str, ...], Similarity],
        bundle: tuple[str, ...],
        i: int,
        j: int,
    ) -> None:
        self.bundle = bundle
        self.sizes = {g: spec.groups[g].size for g in bundle}
        self.own = {g: similarities[(g,)].block(i, j).double().cpu() for g in bundle if (g,) in similarities}
        self.joint: dict[tuple[str, str], Tensor] = {}
        for key, own in similarities.items():
            if len(key) == 2 and set(key) <= set(bundle):
                first, second = self.sizes[key[0]], self.sizes[key[1]]
                block = own.block(i, j).double().cpu().reshape(first, second, first, second)
                self.joint[key[0], key[1]] = block.transpose(1, 2)  # (u, v, w, w')

    def solve(self) -> tuple[float, dict[str, Tensor]]:
        """Worth and permutations of the best alternation."""
        results = [self._alternate(first) for first in self.bundle]
        return max(results, key=lambda result: result[0])

    def _alternate(self, first: str) -> tuple[float, dict[str, Tensor]]:
        found: dict[str, Tensor] = {}
        order = [first] + [g for g in self.bundle if g != first]
        value = -np.inf
        while True:
            for group in order:
                found[group] = assign(self._given(group, found))[0]
            now = self._worth(found)
            if not now > value + 1e-12 * abs(value):
                return now, dict(found)
            value = now

    def _given(self, group: str, found: Mapping[str, Tensor]) -> Tensor:
        """(size, size) worth of each choice, given the others; unknown others are taken at their best for it."""
        size = self.sizes[group]
        matrix = self.own.get(group, torch.zeros(size, size, dtype=torch.float64)).clone()
        for (a, b), joint in self.joint.items():
            if group not in (a, b):
                continue
            if group == b:
                joint = joint.permute(2, 3, 0, 1)
            other = b if group == a else a
            if other in found:
                index = found[other].reshape(1, 1, -1, 1).expand(size, size, -1, 1)
                matrix += joint.gather(3, index).squeeze(3).sum(dim=2)
            else:
                matrix += joint.amax(dim=3).sum(dim=2)
        return matrix

    def _worth(self, found: Mapping[str, Tensor]) -> float:
        value = sum(worth(block, found[g]) for g, block in self.own.items())
        for (a, b), joint in self.joint.items():
            chosen = joint[torch.arange(self.sizes[a]), found[a]]  # (u, w, w')
            value += float(chosen.gather(2, found[b].reshape(1, -1, 1).expand(len(chosen), -1, 1)).sum())
        return value
