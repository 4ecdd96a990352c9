"""What can be rescaled against each other in a model without a change of what it computes, seen in its gradients.

Scaling a row of one matrix up and what reads it down changes nothing, so the loss's gradient has no part along that
symmetry: the sum of weight times gradient over the row and over its reader are the same, at any weights and on any
data (Kunin et al., "Neural Mechanics", 2021). We call that sum the charge of a row. Rows with the same charge are
partners, wherever they stand: values and what reads them, queries and keys (of rotary planes, both rows together),
norms and the matrices behind them, up and down. One gradient shows which layers belong together and how a fused matrix
is laid out, without the code. Rows that meet in planes which turn with their position are queries and keys, whatever
they are called; :class:`Rotations` takes them to the other convention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby, product

import torch
from torch import Tensor

from lit_wsl.matching.formula import is_query_or_key
from lit_wsl.matching.layers import Region, Unit
from lit_wsl.matching.shapes import by_head
from lit_wsl.plan.operations import Concat, Operation, Rotary, Split, Transpose
from lit_wsl.structure.description import Shape

FEWEST = 6  # partners that a relation needs
SAME = 3e-3  # relative difference of what is the same but for rounding
FAINT = 0.02  # share of all charges that their sum is of, where it may be nothing
SLACK = 0.2  # by which the factors of a norm's readers may differ from one, as what stands before a norm does
COPIES = 2  # blocks whose charges are compared
MIXABLE = 1024  # rows whose products are compared with each other

Rows = tuple[tuple[int, ...], ...]
Way = tuple[int, int]  # rows of a head, and how many of them turn


@dataclass(frozen=True)
class View:
    """Rows of one tensor of a layer.

    Attributes:
        unit: Number of the layer in its region.
        tensor: Which of the layer's tensors.
        axes: Axes that the rows stand along; the rest is flattened.
        plus: What is added to the tensor before: one for a scale that is kept as what is added to one.
        rows: Which rows; those of each tuple count as one, such as the heads that read one head of values.
    """

    unit: int
    tensor: int = 0
    axes: tuple[int, ...] = (0,)
    plus: float = 0.0
    rows: Rows | None = None

    def of(self, value: Tensor) -> Tensor:
        """The rows, ``(n, m)``."""
        rest = [d for d in range(value.dim()) if d not in self.axes]
        count = math.prod(value.shape[d] for d in self.axes)
        out = value.permute(*self.axes, *rest).reshape(count, -1)
        return out if self.rows is None else out[torch.tensor(self.rows)].flatten(1)


@dataclass(frozen=True)
class Relation:
    """Two sets of rows that are scaled against each other, partner by partner, in all copies of a region."""

    region: int
    left: tuple[View, ...]
    right: tuple[View, ...]
    mixed: tuple[tuple[int, int], ...] = ()  # rows that can be mixed with each other, too, not only scaled

    @property
    def views(self) -> tuple[View, ...]:
        """Both sides."""
        return (*self.left, *self.right)


@dataclass(frozen=True)
class Turning:
    """Rows of queries or keys that turn with their position, plane by plane (rotary embeddings).

    Attributes:
        ways: How many rows a head may have, and how many of them turn, the first ones. Of neighbours that turn all
            through, no gradient shows how many make up a head. None where they meet row by row: then none turns.
        in_pairs: Whether a plane is two neighbouring rows, or one from each half.
        rows: By tensor the axis of its rows, and which of them are queries or keys.
    """

    ways: tuple[tuple[int, int], ...]
    in_pairs: bool
    rows: Mapping[str, tuple[int, frozenset[int]]]


@dataclass(frozen=True)
class Gradients:
    """Weights of a model, and gradients of its loss on some pieces of data, by name."""

    weights: Mapping[str, Tensor]
    slopes: Sequence[Mapping[str, Tensor]]

    def covers(self, unit: Unit) -> bool:
        """Whether all of a layer's tensors have a gradient."""
        return all(name in own for name in unit.all_names for own in (self.weights, *self.slopes))

    def charges(self, units: Sequence[Unit], view: View) -> Tensor:
        """The charges of rows, on all pieces and in all copies, ``(n, pieces * copies)``."""
        unit, found = units[view.unit], []
        for copy, slopes in product(range(min(COPIES, len(unit.names[0]))), self.slopes):
            weight = view.of(stacked(unit, view.tensor, copy, self.weights) + view.plus)
            found.append((weight * view.of(stacked(unit, view.tensor, copy, slopes))).sum(1))
        return torch.stack(found, 1)

    def products(self, units: Sequence[Unit], views: Sequence[View], left: bool) -> Tensor:
        """What mixing rows with each other changes, ``(n, n)``, on the first piece in the first copy."""
        total = torch.zeros(())
        for view in views:
            weight = view.of(stacked(units[view.unit], view.tensor, 0, self.weights) + view.plus)
            slope = view.of(stacked(units[view.unit], view.tensor, 0, self.slopes[0]))
            total = total + (slope @ weight.mT if left else weight @ slope.mT)
        return total


def stacked(unit: Unit, tensor: int, copy: int, of: Mapping[str, Tensor]) -> Tensor:
    """A layer's tensor in one copy, in double precision; those of nested copies on top of each other."""
    values = [of[name] for name in unit.names[tensor][copy]]
    return (torch.stack(values) if len(values) > 1 else values[0]).detach().cpu().double()


def relations(regions: Iterable[Region], gradients: Gradients) -> list[Relation]:
    """All that can be rescaled against each other inside the copies of a model's regions."""
    return [relation for finder in _finders(regions, gradients) for relation in finder.find()]


def turnings(regions: Iterable[Region], gradients: Gradients) -> list[Turning]:
    """All queries and keys of a model, and how they turn, where nothing stands between them and their products."""
    found = []
    for finder in _finders(regions, gradients):
        finder.find()
        found += finder.turnings
    return found


def _finders(regions: Iterable[Region], gradients: Gradients) -> Iterator[_Finder]:
    for number, region in enumerate(regions):
        if all(map(gradients.covers, region.units)):
            yield _Finder(number, region.units, gradients)


class _Finder:
    """Finds the relations inside a region.

    Args:
        number: Of the region.
        units: Its layers.
        gradients: Of the model.
    """

    def __init__(self, number: int, units: Sequence[Unit], gradients: Gradients) -> None:
        self.number, self.units, self.gradients = number, units, gradients
        self.sides = [(view, self._charges(view)) for view in self._matrix_sides()]
        self.outs = [out for view, charges in self.sides for out in self._with_bias(view, charges)]
        self.related: set[tuple[int, int]] = set()
        self.turnings: list[Turning] = []

    def find(self) -> list[Relation]:
        """Norms, partners, queries and keys."""
        partners = list(self._partners())
        found = [*self._norms(), *partners, *self._queries_and_keys(partners)]
        self.turnings += self._no_products()
        return found

    def _charges(self, *views: View) -> Tensor:
        return sum((self.gradients.charges(self.units, view) for view in views), torch.zeros(()))

    def _length(self, view: View) -> int:
        unit = self.units[view.unit]
        shape = (unit.times, *unit.shapes[view.tensor]) if unit.times > 1 else unit.shapes[view.tensor]
        return math.prod(shape[d] for d in view.axes)

    def _matrix_sides(self) -> Iterator[View]:
        """All axes of all matrices, and pairs of axes where matrices are stacked."""
        for k, unit in enumerate(self.units):
            shape = unit.main
            pairs = [(0, 1), (0, 2)] if len(shape) == 3 else []
            for axes in [*pairs, *((d,) for d in range(min(len(shape), 3)))] if len(shape) > 1 else []:
                if math.prod(shape[d] for d in axes) >= FEWEST:
                    yield View(k, 0, axes)

    def _with_bias(self, view: View, charges: Tensor) -> Iterator[tuple[tuple[View, ...], Tensor]]:
        """What a matrix puts out along an axis, without a bias and with one."""
        yield (view,), charges
        unit = self.units[view.unit]
        for j in range(1, len(unit.shapes)):
            bias = View(view.unit, j, (0, 1) if len(view.axes) == 2 and unit.times > 1 else (0,))
            if self._length(bias) == len(charges):
                yield (view, bias), charges + self._charges(bias)

    def _norms(self) -> Iterator[Relation]:
        """For each norm the matrices whose charges add up to its own: what reads it, or what stands before it."""
        for k, unit in enumerate(self.units):
            if len(unit.shapes[0]) != 1 or unit.shapes[0][0] < FEWEST:
                continue
            axes = (0, 1) if unit.times > 1 else (0,)
            for plus in (0.0, 1.0):
                own = (View(k, 0, axes, plus), *(View(k, j, axes) for j in range(1, len(unit.shapes))))
                charges = self._charges(*own)
                readers = self._readers(charges, len(axes)) or self._part(charges)
                if readers:
                    yield Relation(self.number, own, readers)
                    break

    def _readers(self, charges: Tensor, axes: int) -> tuple[View, ...]:
        """Whole matrices whose charges add up to a norm's, along as many axes."""
        fitting = [(v, c.flatten()) for v, c in self.sides if len(v.axes) == axes and len(c) == len(charges)]
        if not fitting:
            return ()
        shares = _shares(torch.stack([c for _, c in fitting], 1), charges.flatten())
        reads = (shares - 1).abs() < SLACK
        chosen = [side for side, one in zip(fitting, reads.tolist()) if one]
        if not chosen or not bool((reads | (shares.abs() < SLACK)).all()):
            return ()
        return tuple(v for v, _ in chosen) if _is_near(sum(c for _, c in chosen), charges.flatten()) else ()

    def _part(self, charges: Tensor) -> tuple[View, ...]:
        """The rows of a fused matrix that stand before a norm, such as that of queries."""
        for view, among in self.sides:
            if len(view.axes) != 1 or len(among) <= len(charges):
                continue
            for groups in (g for g in range(1, len(charges) // 2 + 1) if not (len(charges) % g or len(among) % g)):
                width, rows = len(charges) // groups, torch.arange(len(among)).reshape(groups, -1)
                for start in range(0, rows.shape[1] - width + 1, width):
                    own = rows[:, start : start + width].reshape(-1, 1)
                    if _is_near(_added(among, own), charges):
                        return (replace(view, rows=_tuples(own)),)
        return ()

    def _partners(self) -> Iterator[Relation]:
        """Pairs of layers of which all rows of one have the charges of rows of the other."""
        for (views, left), (reader, right) in product(self.outs, self.sides):
            pair = views[0].unit, reader.unit
            if pair[0] == pair[1] or pair in self.related or len(reader.axes) != len(views[0].axes):
                continue
            for groups in _groupings(len(right), len(left)):
                rows = _same_rows(_added(right, groups), left)
                if rows is not None:
                    self.related |= {pair, pair[::-1]}
                    own = None if rows == tuple(range(len(left))) else tuple((r,) for r in rows)
                    chosen = tuple(replace(v, rows=own) for v in views)
                    relation = self._mixed(Relation(self.number, chosen, (replace(reader, rows=_tuples(groups)),)))
                    if relation.mixed and reader.axes == views[0].axes:  # rows with rows: they meet in products
                        self.turnings += [Turning((), False, self._rows_of([v], [])) for v in (views[0], reader)]
                    yield relation
                    break

    def _queries_and_keys(self, partners: Sequence[Relation]) -> Iterator[Relation]:
        """Rows that meet in products of one with the other: alone, or in rotary planes, by head."""
        values: dict[int, set[int]] = {}
        for relation in partners:
            for view in relation.left:
                if view.rows is not None and view.tensor == 0:
                    values[view.unit] = {r for rows in view.rows for r in rows}
        outs = [(v, c) for v, c in self.outs if len(v[0].axes) == 1]
        for (views, left), (others, right) in product(outs, outs):
            a, b = views[0], others[0]
            if (a.unit, b.unit) in self.related or (a.unit == b.unit and views != others):
                continue
            splits: Iterable[tuple[list[int], list[int]]]
            if a.unit == b.unit:
                splits = _splits(len(left), values[a.unit]) if a.unit in values else _thirds(len(left))
            else:
                splits = [([*range(len(left))], [*range(len(right))])]
            meeting = next((found for split in splits for found in _turning(left, right, *split)), None)
            if meeting is None:
                continue
            self.related |= {(a.unit, b.unit), (b.unit, a.unit)}
            ways, in_pairs, both = meeting
            if ways or both[0][0].shape[1] == 1:
                rows = self._rows_of(views, [q for q, _ in both]), self._rows_of(others, [k for _, k in both])
                self.turnings += [Turning(ways, in_pairs, own) for own in rows]
            for q, k in both:
                if len(q) >= FEWEST:
                    sides = [tuple(replace(v, rows=_tuples(r)) for v in side) for side, r in ((views, q), (others, k))]
                    relation = Relation(self.number, sides[0], sides[1])
                    yield self._mixed(relation) if k.shape[1] == 1 else relation

    def _no_products(self) -> Iterator[Turning]:
        """Layers called after queries or keys that meet in no product, turned or not: all charges of none add up alike.

        Behind a norm they would add up to nothing.
        """
        totals = [(v[0].unit, c.sum(0), c.norm(dim=1).sum()) for v, c in self.outs if len(v[0].axes) == 1]
        for k in {k for k, _, _ in totals if is_query_or_key(self.units[k].path)}:
            pairs = [(a, size, b) for (i, a, size), (j, b, _) in product(totals, totals) if i == k != j]
            if pairs and all(float(a.norm()) > FAINT * size and not _is_near(b, a) for a, size, b in pairs):
                yield Turning((), False, self._rows_of([View(k)], []))

    def _rows_of(self, views: Sequence[View], rows: Sequence[Tensor]) -> dict[str, tuple[int, frozenset[int]]]:
        """By tensor, in all copies, which rows some views are of."""
        found = frozenset(int(row) for some in rows for row in some.flatten())
        units = ((self.units[view.unit].names[view.tensor], view.axes[0]) for view in views)
        return {name: (axis, found) for names, axis in units for own in names for name in own}

    def _mixed(self, relation: Relation) -> Relation:
        """The relation with the pairs of rows whose mixing changes nothing, as inside a head of values."""
        left = self.gradients.products(self.units, relation.left, left=True)
        if len(left) > MIXABLE:
            return relation
        right = self.gradients.products(self.units, relation.right, left=False)
        near = [(left - other).abs() < SAME * left.abs().mean() for other in (right, right.mT)]
        can = max((torch.triu(one & one.mT, 1) for one in near), key=lambda one: int(one.sum()))
        if float(can.diagonal(1).double().mean()) < 0.5:  # single pairs are chance; in a head all neighbours can
            return relation
        return replace(relation, mixed=tuple((i, j) for i, j in can.nonzero().tolist()))


def _shares(every: Tensor, own: Tensor) -> Tensor:
    """With which factors columns add up to another; the same columns share alike."""
    squares = every.mT @ every
    ridge = 1e-6 * squares.diagonal().mean() * torch.eye(len(squares), dtype=squares.dtype)
    return torch.linalg.solve(squares + ridge, every.mT @ own)


def _is_near(some: Tensor | float, other: Tensor) -> bool:
    """Whether two vectors of charges are nearly the same: a norm binds its rows to each other by a little."""
    return float((some - other).norm() / other.norm().clamp_min(1e-30)) ** 2 < SLACK / 2


def _added(charges: Tensor, rows: Tensor | None) -> Tensor:
    return charges if rows is None else charges[rows].sum(1)


def _tuples(rows: Tensor | None) -> Rows | None:
    return None if rows is None else tuple(map(tuple, rows.tolist()))


def _groupings(count: int, most: int) -> Iterator[Tensor | None]:
    """Ways to add up the heads that read one head of values, the row of each that reads the same."""
    if count <= most:
        yield None
    for repeats in range(2, min(count, 64) // FEWEST + 1):
        for heads in range(1, count // repeats // FEWEST + 1) if count % repeats == 0 else ():
            if count % (repeats * heads) == 0 and count // repeats <= most:
                yield torch.arange(count).reshape(heads, repeats, -1).transpose(1, 2).reshape(-1, repeats)


def _same_rows(some: Tensor, among: Tensor) -> tuple[int, ...] | None:
    """For each row of one matrix the row of another that is the same, if there is one for each."""
    if not FEWEST <= len(some) <= len(among):
        return None
    if float((among - some[0]).norm(dim=1).min()) > SAME * float(some.norm()) / math.sqrt(len(some)):
        return None
    direction = torch.randn(some.shape[1], generator=torch.Generator().manual_seed(0), dtype=some.dtype)
    direction = direction / torch.cat([some, among]).norm(dim=0).clamp_min(1e-30)
    a, b = some @ direction, among @ direction
    order = b.argsort()
    place = torch.searchsorted(b[order].contiguous(), a.contiguous()).clamp(1, len(b) - 1)
    lower, upper = order[place - 1], order[place]
    found = torch.where((a - b[lower]).abs() < (a - b[upper]).abs(), lower, upper)
    is_same = _is_same(some, among[found]) and len(set(found.tolist())) == len(some)
    return tuple(found.tolist()) if is_same else None


def _is_same(some: Tensor, others: Tensor) -> bool:
    """Whether two matrices are the same row by row, and not nothing."""
    scale = _scale(some)
    return scale > 0 and float((some - others).norm(dim=1).max()) < SAME * scale


# ---- queries and keys ------------------------------------------------------------------------------------------------


def _splits(count: int, values: set[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Ways in which the rows of a fused matrix that are no values can be queries and keys, group by group."""
    rest = [r for r in range(count) if r not in values]
    queries = len(rest) - len(values)
    for groups in range(1, len(values) + 1):
        if len(values) % groups or len(rest) % groups or queries < len(values):
            continue
        rows = torch.tensor(rest).reshape(groups, -1)
        width = len(values) // groups
        yield rows[:, :-width].flatten().tolist(), rows[:, -width:].flatten().tolist()
        yield rows[:, width:].flatten().tolist(), rows[:, :width].flatten().tolist()


def _thirds(count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Ways in which the rows of a fused matrix can be queries and keys where nothing tells which are values."""
    for groups in (g for g in range(1, count // 3 + 1) if count % (3 * g) == 0):
        parts = [own.flatten().tolist() for own in torch.arange(count).reshape(groups, 3, -1).unbind(1)]
        yield from combinations(parts, 2)


def _turning(
    left: Tensor, right: Tensor, queries: list[int], keys: list[int]
) -> Iterator[tuple[tuple[tuple[int, int], ...], bool, list[list[Tensor]]]]:
    """How rows of queries and keys meet, if they do: the planes that turn, and the rows that don't.

    Yields:
        How many rows a head may have and how many of them turn, whether in pairs, and the rows that meet.
    """
    if len(queries) % len(keys) or len(keys) < FEWEST:
        return
    if not _is_same(left[queries].sum(0)[None], right[keys].sum(0)[None]):
        return
    repeats = len(queries) // len(keys)
    for width in (w for w in range(len(keys), 3, -1) if len(keys) % w == 0 and w <= 256):
        q = torch.tensor(queries).reshape(-1, repeats, width)
        k = torch.tensor(keys).reshape(-1, 1, width)
        for turned in dict.fromkeys((0, width, width // 2, width // 4)):
            for in_pairs in (False, True) if turned >= 2 and turned % 2 == 0 else (False,) * (turned == 0):
                planes = torch.arange(turned).reshape((-1, 2) if in_pairs else (2, -1))
                planes = planes if in_pairs else planes.mT
                found = [
                    [side[:, :, own].transpose(1, 2).flatten(2).flatten(0, 1) for side in (q, k)]
                    for own in (planes, torch.arange(turned, width)[:, None])
                    if len(own)
                ]
                if all(_is_same(_added(left, a), _added(right, b)) for a, b in found):
                    ways: tuple[tuple[int, int], ...] = ((width, turned),) if turned else ()
                    if in_pairs and repeats == 1:
                        ways = _ways((left[queries] - right[keys]).norm(dim=1) < SAME * _scale(left[queries]))
                    yield ways, in_pairs, found


def _ways(still: Tensor) -> tuple[tuple[int, int], ...]:
    """Sizes of heads, and how many of their rows turn, by which rows do not."""
    rows = len(still)
    found = []
    for width in (w for w in range(4, min(rows, 256) + 1, 2) if rows % w == 0):
        for turned in (w for w in dict.fromkeys((width, width // 2, width // 4)) if w % 2 == 0):
            if bool((still.reshape(-1, width) == (torch.arange(width) >= turned)).all()):
                found.append((width, turned))
    return tuple(found)


def _scale(some: Tensor) -> float:
    return float(some.norm()) / math.sqrt(len(some))


class Rotations:
    """What turns in the model to be filled, by name of the tensor.

    Args:
        turnings: As its gradient shows.
    """

    def __init__(self, turnings: Iterable[Turning]) -> None:
        self._by_name: dict[str, tuple[Turning, int, frozenset[int]]] = {}
        self.still: set[str] = set()  # tensors whose queries and keys don't turn
        for turning in turnings:
            if not turning.ways:
                self.still.update(turning.rows)
                continue
            for name, (axis, rows) in turning.rows.items():
                known = self._by_name[name][2] if name in self._by_name else frozenset()
                self._by_name[name] = turning, axis, rows | known

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def ways(self) -> list[tuple[int, int]]:
        """How many rows a head may have, and how many of them turn, as far as all agree."""
        every = [turning.ways for turning, _, _ in self._by_name.values()]
        return [way for way in every[0] if all(way in ways for ways in every)] if every else []

    def convert(self, name: str, shape: Shape, way: Way) -> tuple[Operation, ...]:
        """What takes the rows of a whole tensor from the other convention to the model's; nothing if none turn."""
        if name not in self:
            return ()
        _, axis, rows = self._by_name[name]
        kinds = [row in rows for row in range(shape[axis])]
        if all(kinds):
            return _by_rows(axis, (self._rotary(name, way),))
        runs = [(kind, len(list(own))) for kind, own in groupby(kinds)]
        groups = next(g for g in range(len(runs), 0, -1) if len(runs) % g == 0 and runs == runs[: len(runs) // g] * g)
        period = runs[: len(runs) // groups]
        sizes = tuple(length * groups for _, length in period)
        only = tuple(place for place, (kind, _) in enumerate(period) if kind)
        length = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        if groups > 1 and by_head(length, sizes, groups, True, 0) is None:
            return ()
        apart = by_head(length, sizes, groups, False, 0) or (Split(0, sizes),)
        joined = by_head(length, sizes, groups, True, 0) or (Concat(0, sizes),)
        return _by_rows(axis, (*apart, self._rotary(name, way, only), *joined))

    def convert_parts(self, name: str, sizes: Sequence[int], groups: int, axis: int, way: Way) -> tuple[Operation, ...]:
        """What takes those parts of a whole to the model's convention that turn in it.

        Args:
            name: Of the whole.
            sizes: Of the parts in their order, along the axis.
            groups: How often they take turns.
            axis: Along which they are joined.
            way: Rows of a head, and how many of them turn.
        """
        if name not in self:
            return ()
        rows = self._by_name[name][2]
        starts = [sum(sizes[:place]) // groups for place in range(len(sizes))]
        only = tuple(place for place, start in enumerate(starts) if start in rows)
        if not only or any(sizes[place] % way[0] for place in only):
            return ()
        return _by_rows(axis, (self._rotary(name, way, only),))

    def convert_each(self, names: Sequence[str], shapes: Sequence[Shape], way: Way) -> tuple[Operation, ...]:
        """What takes those of some tensors to the model's convention that turn as wholes."""
        only = tuple(k for k, (name, shape) in enumerate(zip(names, shapes)) if self._turns(name, shape))
        first = names[only[0]] if only else ""
        return _by_rows(self._by_name[first][1], (self._rotary(first, way, only),)) if only else ()

    def _turns(self, name: str, shape: Shape) -> bool:
        return name in self and len(self._by_name[name][2]) == shape[self._by_name[name][1]]

    def _rotary(self, name: str, way: Way, only: tuple[int, ...] = ()) -> Rotary:
        return Rotary(*way, self._by_name[name][0].in_pairs, only)


def _by_rows(axis: int, operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """Operations on rows, also where these stand along the second axis."""
    return (Transpose(), *operations, Transpose()) if axis else operations
