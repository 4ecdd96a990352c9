"""Coordinate descent over the trees of a permutation spec: the objective, passes over the trees, single steps.

A step costs what its matrix products and its assignment cost, and little else. No permuted copy of the other model is
kept. What a step gains is read off the similarity matrix that the assignment was solved
on; only where that gain is so small that rounding could explain it are the rows that would move compared in float64.
The objective is computed in float64 when somebody asks for it, not at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from torch import Tensor

from lit_wsl.rebasin.matching.assignment import Solution, TreeSolver
from lit_wsl.rebasin.matching.objective import Similarity, Term, Tree, build_trees, dot, norm, spread, tree_roots
from lit_wsl.rebasin.spec.spec import PermutationSpec, path_to, permute_axes


class Evidence:
    """Which trees are settled, and how much the settled ones say about the others.

    The evidence for a tree is the number of entries per unit that can be compared: those of the tensors it moves whose
    other coordinates nothing moves, or only settled trees do.
    """

    def __init__(self, spec: PermutationSpec, trees: Mapping[str, Tree], tensors: Mapping[str, Tensor]) -> None:
        self.trees = trees
        self.roots = tree_roots(spec)
        self.axes = {name: spec.axes[name] for name in tensors}
        self.open = dict.fromkeys(trees)
        self.free = {
            (name, axis): (axis_spec.coords < 0).reshape(-1, axis_spec.length).all(dim=0)
            for name, axes in self.axes.items()
            for axis, axis_spec in axes.items()
        }
        self.sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._strength = {root: self._measure(root) for root in trees}
        self._neighbours = {name: [r for r in trees if name in trees[r].tensors] for name in tensors}

    def strongest(self) -> str:
        """The open tree with the most evidence; the first of the spec among equals."""
        return max(self.open, key=self._strength.__getitem__)

    def settle(self, root: str) -> None:
        """Count a tree as settled."""
        del self.open[root]
        again: dict[str, None] = {}
        for name in self.trees[root].tensors:
            if name not in self.axes:
                continue
            for axis, axis_spec in self.axes[name].items():
                if any(self.roots[g] == root for g in axis_spec.groups):
                    self.free[name, axis] = self._free(name, axis)
            again.update(dict.fromkeys(self._neighbours[name]))
        for other in again:
            if other in self.open:
                self._strength[other] = self._measure(other)

    def _free(self, name: str, axis: int) -> Tensor:
        axis_spec = self.axes[name][axis]
        free = torch.ones(axis_spec.length, dtype=torch.bool)
        for row, group in enumerate(axis_spec.groups):
            if self.roots[group] in self.open:
                free &= (axis_spec.coords[row] < 0).reshape(-1, axis_spec.length).all(dim=0)
        return free

    def terms(self, root: str) -> list[tuple[Term, dict[int, Tensor]]]:
        """Terms of a tree that can be used now, with the limits on other axes."""
        usable = []
        for term in self.trees[root].terms:
            if any(tree in self.open for tree in term.trees) or (term.quadratic and term.units[0] != 1):
                continue
            limits = {}
            for axis in self.axes[term.tensor]:
                if axis in (term.axis, term.outer_axis) or axis in term.only:
                    continue
                free = self.free[term.tensor, axis]
                if not bool(free.all()):
                    limits[axis] = torch.nonzero(free).flatten()
            if all(index.numel() for index in limits.values()):
                usable.append((term, limits))
        return usable

    def _measure(self, root: str) -> float:
        strength = 0.0
        for term, limits in self.terms(root):
            entries = float(math.prod(self.sizes[term.tensor]))
            for axis, index in {**term.only, **limits}.items():
                entries *= index.numel() / self.sizes[term.tensor][axis]
            share = 1.0 if term.positions is None else term.positions.numel() / self.sizes[term.tensor][term.axis]
            strength += entries * share / math.prod(term.units)
        return strength


class PresentOrder:
    """Tensors as they came, and the permutations that they stand under.

    No permuted copy is kept: what a step compares is gathered when it is compared, along the axes that were moved so
    far. Besides the tensors themselves only index vectors live on.
    """

    def __init__(self, spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self.tensors = tensors
        self._roots = tree_roots(spec)
        self._roots_on = {
            (name, axis): tuple(dict.fromkeys(self._roots[g] for g in axis_spec.groups))
            for name in tensors
            for axis, axis_spec in spec.axes[name].items()
        }
        self.permutations: dict[str, Tensor] = {}
        self._indices: dict[tuple[str, int], Tensor | None] = {}
        self.reset()

    def reset(self) -> None:
        """Back to the order in which the tensors came."""
        self.permutations = self.spec.identity()
        self._indices = dict.fromkeys(self._roots_on)

    def move(self, permutations: Mapping[str, Tensor]) -> None:
        """Replace the permutations of some groups."""
        roots = {self._roots[group] for group in permutations}
        self.permutations.update({group: p.to("cpu", torch.long) for group, p in permutations.items()})
        for key, on_axis in self._roots_on.items():
            if not roots.isdisjoint(on_axis):
                self._indices.pop(key, None)

    def tensor(self, name: str) -> Tensor:
        """One tensor in the present order."""
        return self._permuted(name, self.spec.axes[name])

    def behind(self, term: Term) -> Tensor:
        """The tensor of a term in the present order, except that the term's own group stands as it came.

        Only for groups without ancestors whose tree moves no other axis of the tensor: the unit that a row belongs to
        is then the one the row came from, however often the group was moved.
        """
        name, own = term.tensor, term.axis
        indices = {
            axis: index
            for axis in self.spec.axes[name]
            if axis != own
            if (index := self._index(name, axis)) is not None
        }
        tensor = permute_axes(self.spec, name, self.tensors[name], indices)
        if not term.trees:  # nobody else moves the group's positions
            return tensor
        others = {g: p for g, p in self.permutations.items() if g not in term.groups}
        index = self.spec.index(others, name, own)
        return permute_axes(self.spec, name, tensor, {own: index})

    def followed_by(self, groups: Iterable[str], later: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Permutations of groups (with all their ancestors) that further ones follow."""
        result = {}
        for group in groups:
            family = (*self.spec.ancestors(group), group)
            if any(member in later for member in family):
                own = self.permutations[group]
                result[group] = own[path_to(later, family, own.shape)]
        return result

    def _permuted(self, name: str, axes: Iterable[int]) -> Tensor:
        indices = {axis: index for axis in axes if (index := self._index(name, axis)) is not None}
        return permute_axes(self.spec, name, self.tensors[name], indices)

    def _index(self, name: str, axis: int) -> Tensor | None:
        """Positions that an axis takes from; None where it stands as it came."""
        key = (name, axis)
        if key not in self._indices:
            index = self.spec.index(self.permutations, name, axis)
            moved = not bool((index == torch.arange(index.shape[-1])).all())
            self._indices[key] = index.to(self.tensors[name].device) if moved else None
        return self._indices[key]


@dataclass
class Progress:
    """Handle on a bar that is refilled stage by stage."""

    bar: RichProgress
    task: TaskID

    def start(self, description: str, total: int) -> None:
        """Begin a stage of so many steps."""
        self.bar.reset(self.task, description=description, total=total)

    def advance(self) -> None:
        """One step done."""
        self.bar.advance(self.task)


@contextmanager
def progress_bar(enabled: bool | None = None) -> Iterator[Progress]:
    """A transient progress bar on stderr."""
    console = Console(stderr=True)
    disable = not console.is_terminal if enabled is None else not enabled
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=console, transient=True, disable=disable) as bar:
        yield Progress(bar, bar.add_task("", total=None))


#: Gains below this share of the objective's scale are rounding of float64.
TOLERANCE = 1e-12

#: Gains below this share of their tree's scale could be rounding of float32 products.
DOUBT = 1e-6

#: Entries that are converted to float64 at a time.
CHUNK = 2**22


class Descent:
    """The other model in its present order, against the reference: those of their tensors that count."""

    def __init__(
        self,
        spec: PermutationSpec,
        reference: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        device: torch.device | str | None = None,
    ) -> None:
        self.spec = spec
        self.reference = {n: t.detach().to(device or t.device) for n, t in reference.items()}
        self.other = {n: t.detach().to(self.reference[n].device) for n, t in other.items()}
        self.order = PresentOrder(spec, self.other)
        self.trees = build_trees(spec, self.reference)
        self._lone = {root: _is_lone(spec, tree) for root, tree in self.trees.items()}
        self._scales: dict[str, float] = {}
        self._spreads: dict[str, float] = {}
        self._potentials: dict[str, Tensor] = {}
        self._initial_dots: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        """Back to the order in which the other model came."""
        self.order.reset()
        self._dots = dict(self._initial_dots)
        self._clock = 0
        self._changed = dict.fromkeys(self.reference, 0)
        self._solved = dict.fromkeys(self.trees, -1)
        self._sure = dict.fromkeys(self.trees, False)

    @property
    def permutations(self) -> dict[str, Tensor]:
        """The permutations that the other model stands under."""
        return self.order.permutations

    @property
    def objective(self) -> float:
        """Inner product of the reference with the other model in its present order, in float64."""
        value = math.fsum(self._dot(name) for name in self.reference)
        if self._clock == 0:
            self._initial_dots = dict(self._dots)
        return value

    @property
    def certain(self) -> bool:
        """Whether the last solution of every tree was its row-wise maxima."""
        return all(self._sure.values())

    def move(self, permutations: Mapping[str, Tensor]) -> None:
        """Start from given permutations instead of the order in which the other model came."""
        self.reset()
        self._clock += 1
        self._changed = dict.fromkeys(self.reference, self._clock)
        self._dots = {}
        self.order.move(permutations)

    # ---- passes ------------------------------------------------------------------------------------------------------

    def identity_is_optimal(self, seed: int, bar: Progress) -> bool:
        """Whether, at every tree, the units' best partners are where they stand. Stops at the first that is not."""
        generator = torch.Generator().manual_seed(seed)
        names = list(self.trees)
        for number in torch.randperm(len(names), generator=generator).tolist():
            tree = self.trees[names[number]]
            for solution in self._solutions(tree):
                if not solution.certain or self._moved(tree, solution):
                    return False
            self._solved[tree.root] = self._clock
            self._sure[tree.root] = True
            bar.advance()
        return True

    def sweep(self, order: Sequence[int], bar: Progress) -> bool:
        """One step for every tree that can have something to gain; whether any gained."""
        gained = False
        names = list(self.trees)
        for number in order:
            tree = self.trees[names[number]]
            if any(self._changed[n] > self._solved[tree.root] for n in tree.tensors if n in self._changed) or (
                self._solved[tree.root] < 0
            ):
                gained |= self.step(tree)
            bar.advance()
        return gained

    def step(self, tree: Tree) -> bool:
        """Solve one tree with everything else fixed, and keep the solution if the objective grows."""
        gained, sure = False, True
        for solution in self._solutions(tree):
            sure &= solution.certain
            gained |= self._accept(tree, solution)
        # A linear step leaves its own tree at the optimum; a quadratic one only looked at the neighbourhood.
        linear = not any(term.quadratic for term in tree.terms)
        self._solved[tree.root] = self._clock if linear or not gained else -1
        self._sure[tree.root] = sure
        return gained

    def resolve_first(self, bar: Progress) -> None:
        """Settle all trees in the order of the evidence at hand, see :mod:`lit_wsl.rebasin.matching.weights`."""
        bar.start("matching: resolved first", len(self.trees))
        evidence = Evidence(self.spec, self.trees, self.reference)
        while evidence.open:
            root = evidence.strongest()
            tree = self.trees[root]
            terms = evidence.terms(root) or [(term, {}) for term in tree.terms if not term.quadratic]
            found = self._similarities(tree, terms, normalise=True)
            if found and (len(tree.groups) > 1 or (root,) in found):
                after = self._moved(tree, TreeSolver(self.spec, tree, found).solve())
                if after:
                    self._keep(tree, after)
            evidence.settle(root)
            bar.advance()

    # ---- one tree ----------------------------------------------------------------------------------------------------

    def _solutions(self, tree: Tree) -> Iterator[Solution]:
        """The solutions of one tree; the second is computed only after the first was dealt with."""
        for solve in (self.solve_joint, self.solve_inner):
            solution = solve(tree)
            if solution is not None:
                yield solution

    def solve_joint(self, tree: Tree) -> Solution | None:
        """Optimum of the whole tree, without the terms that are not linear in it (except at a lone group)."""
        terms = [t for t in tree.terms if not t.quadratic or t.units[0] == 1]
        found = self._similarities(tree, [(t, {}) for t in terms])
        if not found or (len(tree.groups) == 1 and (tree.root,) not in found):
            return None
        return TreeSolver(self.spec, tree, found).solve()

    def solve_inner(self, tree: Tree) -> Solution | None:
        """Optimum of each group alone, with the terms that couple it to others of its tree taken at their present."""
        if len(tree.groups) == 1 or not any(t.quadratic and t.units[0] > 1 for t in tree.terms):
            return None
        found = self._similarities(tree, [(t, {}) for t in tree.terms if len(t.groups) == 1 and t.units[0] > 1])
        return TreeSolver(self.spec, tree, found).solve_inner()

    def _similarities(
        self, tree: Tree, terms: Sequence[tuple[Term, Mapping[int, Tensor]]], normalise: bool = False
    ) -> dict[tuple[str, ...], Similarity]:
        lone = self._lone[tree.root]
        plain = lone and not normalise
        found: dict[tuple[str, ...], Similarity] = {}
        for term, only in terms:
            weight = 1.0
            if normalise:
                deviation = self._spread(term.tensor)
                if not deviation > 0:
                    continue
                weight = 1.0 / deviation
            if term.groups not in found:
                potential = self._potential(tree) if plain else None
                found[term.groups] = Similarity(term.units[0], math.prod(term.units[1:]), potential)
            a = term.rows(self.reference[term.tensor], only)
            other = self.order.behind(term) if lone else self.order.tensor(term.tensor)
            found[term.groups].add(a, term.rows(other, only), weight)
        return found

    def _potential(self, tree: Tree) -> Tensor:
        """(1, size) half the squared norms behind the units of a lone group, in the order in which they came."""
        if tree.root not in self._potentials:
            squares = [term.squares(self.other[term.tensor]) for term in tree.terms]
            self._potentials[tree.root] = torch.stack(squares).sum(dim=0).mul_(0.5)[None]
        return self._potentials[tree.root]

    def _spread(self, name: str) -> float:
        """Product of both standard deviations of a tensor, which no permutation changes."""
        if name not in self._spreads:
            self._spreads[name] = spread(self.reference[name]) * spread(self.other[name])
        return self._spreads[name]

    def _scale(self, name: str) -> float:
        """Product of both norms of a tensor, which no permutation changes."""
        if name not in self._scales:
            self._scales[name] = norm(self.reference[name]) * norm(self.other[name])
        return self._scales[name]

    # ---- what a solution is worth ------------------------------------------------------------------------------------

    def _moved(self, tree: Tree, solution: Solution) -> dict[str, Tensor]:
        """The permutations of a tree that a solution leads to; empty if it changes none."""
        if self._lone[tree.root]:  # the solution says which unit, as it came, goes where
            after = dict(solution.permutations)
        else:  # the solution continues from the present order
            after = self.order.followed_by(tree.groups, solution.permutations)
        if all(torch.equal(p, self.permutations[group]) for group, p in after.items()):
            return {}
        return after

    def _keep(self, tree: Tree, after: Mapping[str, Tensor], dots: Mapping[str, float] | None = None) -> None:
        """Move a tree."""
        self.order.move(after)
        self._clock += 1
        for name in tree.tensors:
            if name in self._changed:
                self._changed[name] = self._clock
                self._dots.pop(name, None)
        self._dots.update(dots or {})

    def _accept(self, tree: Tree, solution: Solution) -> bool:
        """Move a tree if the objective grows by it; whether it was moved."""
        after = self._moved(tree, solution)
        if not after:
            return False
        if solution.similarity is not None and self._lone[tree.root]:
            now, then = self.permutations[tree.root], after[tree.root]
            gain = solution.similarity.worth(then) - solution.similarity.worth(now)
            scale = sum(self._scale(term.tensor) for term in tree.terms)
            if not gain > DOUBT * scale:
                gain = self._exact_gain(tree, now, then)
            if not gain > TOLERANCE * scale:
                return False
            self._keep(tree, after)
            return True
        names = [name for name in tree.tensors if name in self.reference]
        before = {group: self.permutations[group] for group in after}
        value = math.fsum(self._dot(name) for name in names)
        self.order.move(after)
        dots = {name: dot(self.reference[name], self.order.tensor(name)) for name in names}
        if math.fsum([*dots.values(), -value]) > TOLERANCE * sum(self._scale(name) for name in names):
            self._keep(tree, after, dots)
            return True
        self.order.move(before)
        return False

    def _exact_gain(self, tree: Tree, now: Tensor, then: Tensor) -> float:
        """What a lone group gains, from the rows that would move alone, in float64."""
        rows = torch.nonzero(now != then).flatten()
        gain = 0.0
        for term in tree.terms:
            a = term.rows(self.reference[term.tensor])[0]
            b = term.rows(self.order.behind(term))[0]
            step = max(1, CHUNK // a.shape[1])
            for part in rows.split(step):
                change = b[then[part].to(b.device)].double() - b[now[part].to(b.device)].double()
                gain += float((a[part.to(a.device)].double() * change).sum())
        return gain

    def _dot(self, name: str) -> float:
        """Share of one tensor in the objective."""
        if name not in self._dots:
            self._dots[name] = dot(self.reference[name], self.order.tensor(name))
        return self._dots[name]


def _is_lone(spec: PermutationSpec, tree: Tree) -> bool:
    """Whether a tree is one group that enters every tensor's share in the objective linearly.

    Its units can then be compared as they came, wherever they stand now.
    """
    return len(tree.groups) == 1 and not any(
        term.quadratic or any(axis.outer_axis == term.axis for axis in spec.axes[term.tensor].values())
        for term in tree.terms
    )
