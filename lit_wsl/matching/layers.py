"""The layers of one side of a transfer, in regions: subtrees that are alike (blocks, towers), and what is outside."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_wsl.matching.tree import role_of, stem_of
from lit_wsl.structure.description import ModelDescription, ParameterInfo, Shape, core


@dataclass(frozen=True)
class Unit:
    """What moves together: the tensors of one layer, the largest first, over all copies.

    names[tensor][copy] is a tuple of names (several where copies are nested in the copy, such as experts).
    """

    path: str
    names: tuple[tuple[tuple[str, ...], ...], ...]
    shapes: tuple[Shape, ...]

    @property
    def times(self) -> int:
        """How many copies of it are nested in each copy."""
        return len(self.names[0][0])

    @property
    def is_listed(self) -> bool:
        """Whether the copies nested in each copy are counted, as experts are, and not named, as two attentions are."""
        own = [name.split(".") for name in self.names[0][0]]
        return all(len(set(words)) == 1 or all(w[-1:].isdigit() for w in words) for words in zip(*own))

    @property
    def is_weight(self) -> bool:
        """Whether its largest tensor is called a weight, as in torch's own layers."""
        return self.names[0][0][0].rpartition(".")[2] == "weight"

    @property
    def all_names(self) -> list[str]:
        """Names of all its tensors in all copies."""
        return [n for copies in self.names for own in copies for n in own]

    @property
    def main(self) -> Shape:
        """Shape of its largest tensor, with the copies that are nested in each copy in front."""
        return (self.times, *self.shapes[0]) if self.times > 1 else self.shapes[0]


@dataclass(frozen=True)
class Region:
    """Subtrees that are alike: the paths of the copies, and the layers of each."""

    copies: tuple[str, ...]
    units: tuple[Unit, ...]

    @property
    def names(self) -> set[str]:
        """Names of all that is in it."""
        return {n for u in self.units for n in u.all_names}

    @property
    def is_counted(self) -> bool:
        """Whether its copies are members of a list, not two towers."""
        words = [prefix.rstrip(".").split(".") for prefix in self.copies]
        apart = [own for own in zip(*words) if len(set(own)) > 1]
        return len({len(own) for own in words}) == 1 and all(word.isdigit() for own in apart for word in own)

    @property
    def elements(self) -> int:
        """Number of elements of one copy."""
        return sum(math.prod(s) * u.times for u in self.units for s in u.shapes)


def dissolved(region: Region, stacked: bool) -> list[Unit]:
    """The layers of a region without its copies: one by one, or each with those of all copies on top of each other."""
    if stacked:
        return [
            Unit(unit.path, tuple((tuple(n for own in copies for n in own),) for copies in unit.names), unit.shapes)
            for unit in region.units
        ]
    return [
        Unit(f"{prefix}{unit.path}", tuple((copies[k],) for copies in unit.names), unit.shapes)
        for k, prefix in enumerate(region.copies)
        for unit in region.units
    ]


def reordered(unit: Unit, order: Sequence[int]) -> Unit:
    """A layer with the copies that are nested in each copy in another order, if there are as many."""
    if unit.times != len(order):
        return unit
    return replace(unit, names=tuple(tuple(tuple(own[k] for k in order) for own in copies) for copies in unit.names))


def apart(unit: Unit) -> list[Unit]:
    """The copies that are nested in each copy as layers of their own."""
    return [
        Unit(
            unit.names[0][0][k].rpartition(".")[0] or unit.path,
            tuple(tuple((own[k],) for own in copies) for copies in unit.names),
            unit.shapes,
        )
        for k in range(unit.times)
    ]


def single(unit: Unit) -> list[Unit]:
    """The tensors of a layer as layers of their own."""
    if len(unit.shapes) == 1:
        return [unit]
    leaves = [copies[0][0].rpartition(".")[2] for copies in unit.names]
    return [
        Unit(f"{unit.path}.{leaf}", (copies,), (shape,)) for leaf, copies, shape in zip(leaves, unit.names, unit.shapes)
    ]


def lists(units: Sequence[Unit]) -> list[Region]:
    """Layers that are alike and counted, each list as the copies of one layer."""
    found: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        numbered = re.fullmatch(r"(.*?)\.(\d+)((?:\.\D[^.]*)*)", unit.path)
        if numbered and numbered[1]:
            found.setdefault((numbered[1], numbered[3]), []).append(unit)
    return [
        Region(
            tuple(f"{unit.path}." for unit in own),
            (Unit("", tuple(zip(*(tuple(n[0] for n in unit.names) for unit in own))), own[0].shapes),),
        )
        for own in found.values()
        if len(own) > 1 and len({unit.shapes for unit in own}) == 1
    ]


def merged(regions: Sequence[Region]) -> Region:
    """Lists of as many copies as one: what stands at one number belongs together."""
    units = []
    for region in regions:
        home = re.sub(r"\.?\d+\.$", "", region.copies[0])
        units += [replace(unit, path=f"{home}.{unit.path}".rstrip(".")) for unit in region.units]
    return Region(regions[0].copies, tuple(units))


def regions(side: ModelDescription) -> list[Region]:
    """Sets of subtrees that are alike, with what is in them, and what stands outside of all."""
    shapes = {i.name: i.shape for i in side.parameters if i.kind == "parameter"}
    tree: dict = {}
    for name in shapes:
        node = tree
        *above, leaf = name.split(".")
        for part in above:
            node = node.setdefault(part, {})
        node[leaf] = name
    found: list[Region] = []
    outside: list[str] = []

    def walk(node: dict) -> None:
        groups, spare = _with_more(node, _alike(node, shapes), shapes)
        outside.extend(spare)
        inside = {k for members in groups for k in members}
        for members in groups:
            prefixes = [_prefix(node[m]) for m in members]
            least = min(members, key=lambda m: len(list(_names(node[m]))))
            units = _units(node[least], shapes, prefixes, _prefix(node[least]))
            found.append(Region(tuple(prefixes), tuple(units)))
        for key, child in node.items():
            if key in inside:
                continue
            if isinstance(child, dict):
                walk(child)
            else:
                outside.append(child)

    walk(tree)
    units = [
        Unit(path, tuple(((n,),) for n in names), tuple(shapes[n] for n in names))
        for path, names in _layers(outside, shapes)
    ]
    return [Region(("",), tuple(units)), *found]


def _names(node: Any) -> Iterator[str]:
    """Names below a node of the tree of names."""
    if isinstance(node, str):
        yield node
    else:
        for child in node.values():
            yield from _names(child)


def _prefix(node: Any) -> str:
    """Common path of a subtree's names, with its dot."""
    return common_path(_names(node))


def common_path(names: Iterable[str]) -> str:
    """The modules that all names begin with, with a dot behind.

    >>> common_path(["a.0.norm.weight", "a.0.fc.weight"])
    'a.0.'
    """
    parts = [n.split(".") for n in names]
    depth = 0
    while all(len(p) > depth + 1 and p[depth] == parts[0][depth] for p in parts):
        depth += 1
    return ".".join(parts[0][:depth]) + "."


def _alike(node: dict, shapes: Mapping[str, Shape]) -> list[list[str]]:
    """Subtrees with the same in them; what is counted is no copy of what is named, such as an expert that is shared."""
    groups: dict = {}
    for key, child in node.items():
        if not isinstance(child, dict):
            continue
        prefix = _prefix(child)
        names = list(_names(child))
        if not any(len(core(shapes[n])) >= 2 for n in names):
            continue
        rel = key.isdigit(), *sorted((n[len(prefix) :], shapes[n]) for n in names)
        if len(_layers(names, shapes)) >= 2:
            groups.setdefault(rel, []).append(key)
    return [members for members in groups.values() if len(members) >= 2]


def _with_more(
    node: dict, groups: Sequence[list[str]], shapes: Mapping[str, Shape]
) -> tuple[list[list[str]], list[str]]:
    """Groups of subtrees with members that hold a little more (T5's first block, the relative positions), and what."""
    held: dict[str, set[tuple[str, Shape]]] = {}
    for key, child in node.items():
        if key.isdigit() and isinstance(child, dict) and len(_layers(list(_names(child)), shapes)) >= 2:
            held[key] = {(name[len(_prefix(child)) :], shapes[name]) for name in _names(child)}
    found, spare = [list(members) for members in groups], []
    for key in [key for key in held if not any(key in members for members in found)]:
        least = [
            other for other in held if held[other] < held[key] and 4 * len(held[key] - held[other]) <= len(held[key])
        ]
        if not least or any(key in members for members in found):
            continue
        own = next((members for members in found if least[0] in members), None)
        if own is None:
            found.append(own := [least[0]])
        own.append(key)
        own.sort(key=list(node).index)
        spare += [_prefix(node[key]) + name for name, _ in sorted(held[key] - held[least[0]])]
    return found, spare


def _units(node: dict, shapes: Mapping[str, Shape], prefixes: Sequence[str], own: str) -> list[Unit]:
    """Layers inside one of some copies; nested copies become layers of several."""
    nested: dict[str, tuple[str, ...]] = {}
    skip: set[str] = set()

    def walk(n: dict) -> None:
        for members in _alike(n, shapes):
            inner = [_prefix(n[m]) for m in members]
            for name in _names(n[members[0]]):
                nested[name] = tuple(p + name[len(inner[0]) :] for p in inner)
            skip.update(name for m in members[1:] for name in _names(n[m]))
        for child in n.values():
            if isinstance(child, dict):
                walk(child)

    walk(node)
    names = [n for n in _names(node) if n not in skip]
    out = []
    for path, members in _layers(names, shapes):
        table = tuple(
            tuple(tuple(p + full[len(own) :] for full in nested.get(n, (n,))) for p in prefixes) for n in members
        )
        out.append(Unit(path[len(own) :] if path.startswith(own) else path, table, tuple(shapes[n] for n in members)))
    return out


def _layers(names: Sequence[str], shapes: Mapping[str, Shape]) -> list[tuple[str, list[str]]]:
    """Names grouped into layers: a weight and its bias."""
    modules: dict[str, list[str]] = {}
    for n in names:
        modules.setdefault(n.rpartition(".")[0], []).append(n)
    found: list[tuple[str, list[str]]] = []
    for path, members in modules.items():
        groups: dict[str, list[str]] = {}
        for n in members:
            leaf = n.rpartition(".")[2]
            groups.setdefault(stem_of(leaf), []).append(n)
        big = [n for n in members if len(core(shapes[n])) >= 2]
        if len(groups) > 1 and len(big) == 1 and path:
            dims = set(shapes[big[0]])
            rest = [n for n in members if n not in big]
            if all(len(core(shapes[n])) == 1 and core(shapes[n])[0] in dims for n in rest) and _told_apart(
                rest, shapes
            ):
                groups = {"": members}
        for stem, group in groups.items():
            group = sorted(group, key=lambda n: (-math.prod(shapes[n]), role_of(n) == "bias"))
            found.append((f"{path}.{stem}" if stem and path else path or stem, group))
    return found


def _told_apart(vectors: Sequence[str], shapes: Mapping[str, Shape]) -> bool:
    """Whether no two vectors beside a matrix have the same shape, but for a bias that is called so and another one."""
    alike: dict[Shape, list[str]] = {}
    for name in vectors:
        alike.setdefault(core(shapes[name]), []).append(role_of(name))
    return all(len(roles) == 1 or (len(roles) == 2 and roles.count("bias") == 1) for roles in alike.values())


def home_of(name: str) -> str:
    """Path of the module that holds a tensor."""
    return name.rpartition(".")[0]


def buffers_of(side: ModelDescription) -> dict[str, list[ParameterInfo]]:
    """The buffers of each module."""
    found: dict[str, list[ParameterInfo]] = {}
    for info in side.parameters:
        if info.kind == "buffer":
            found.setdefault(info.module_path, []).append(info)
    return found


def cells_of(source: ModelDescription, target: ModelDescription) -> tuple[int, int]:
    """Rows of the matrices of recurrent cells and the number of their gates, if only one side has torch's order."""
    found = [
        [i.shape for i in side.parameters if "weight_hh" in i.leaf and len(i.shape) == 2 and i.shape[1]]
        for side in (source, target)
    ]
    shapes = {shape for side in found for shape in side}
    if all(found) or len(shapes) != 1:
        return 0, 0
    ((rows, width),) = shapes
    return (rows, rows // width) if rows // width in (3, 4) else (0, 0)


def recorded(
    cover: Sequence[tuple[Sequence[int], Sequence[int]]],
    sides: tuple[Sequence[Unit], Sequence[Unit]],
    buffers: Sequence[Container[str]],
) -> bool:
    """Whether layers with statistics beside them, such as batch norms, go to such layers in a cover."""
    theirs, ours = ([home_of(unit.names[0][0][0]) in own for unit in units] for units, own in zip(sides, buffers))
    return all(theirs[i] == ours[j] for g, h in cover for i in g for j in h)


def is_fused(unit: Unit) -> bool:
    """Whether a matrix has the shape of queries, keys and values in one, as it is or turned."""
    shape = unit.shapes[0]
    return len(shape) == 2 and max(shape) == 3 * min(shape) and min(shape) > 1


def is_square(unit: Unit) -> bool:
    """Whether its largest tensor is a square, or a stack of squares."""
    shape = core(unit.shapes[0])
    return may_turn(shape) and shape[-1] == shape[-2]


def may_turn(shape: Shape) -> bool:
    """Whether it is a matrix, or a stack of some; those of a convolution stand the same way in all code."""
    return len(shape) == 2 or (len(shape) > 2 and not is_kernel(shape))


def is_kernel(shape: Shape) -> bool:
    """Whether three axes or more are those of a convolution, not of a stack of matrices."""
    return min(shape[-2:]) < 8
