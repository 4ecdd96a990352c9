"""A side of a pair: leaves under abstract paths, the words that name them, and the module that they become."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.refactors.forms import Form, form_of


class ClashError(Exception):
    """Two leaves would stand in the same place: such a network cannot be written."""


class Step(NamedTuple):
    """One level of a path: a role, which a word will name, and its place if the role is a list.

    A role that starts with ``=`` is a name already.
    """

    role: str
    index: int | None = None


Path = tuple[Step, ...]


def parse_path(text: str) -> Path:
    """Read ``blocks#0/attn/q``."""
    return tuple(
        Step(role, int(number) if number else None) for role, _, number in (p.partition("#") for p in text.split("/"))
    )


@dataclass(frozen=True)
class Leaf:
    """One module (or bare parameter) that holds tensors.

    Attributes:
        path: Where it stands.
        kind: What it computes: ``linear``, ``norm``, ``conv2d``...
        pieces: Its identities; several where it is fused.
        sizes: The sizes of each piece.
        bias: Whether it has one.
        layout: How it stores what it holds; ``""`` is PyTorch's own way.
        when: Its place in the execution.
    """

    path: Path
    kind: str
    pieces: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    bias: bool = True
    layout: str = ""
    when: int = 0

    @property
    def role(self) -> str:
        return self.path[-1].role

    @property
    def parent(self) -> Path:
        return self.path[:-1]

    @property
    def plain(self) -> bool:
        """Whether nothing was done to it yet."""
        return not self.layout and len(self.pieces) == 1

    def moved(self, path: Path) -> Leaf:
        return replace(self, path=path)


@dataclass(frozen=True)
class Numbering:
    """How a list's members are written: ``blocks.0``, ``block_01``, ``layer3``, ``unit_c``; from where, up or down."""

    joint: str = "."
    first: int = 0
    down: bool = False
    stride: int = 1
    digits: int = 1
    letters: bool = False

    def written(self, place: int) -> str:
        number = self.first + self.stride * place
        return chr(ord("a") + number) if self.letters and number < 26 else f"{number:0{self.digits}}"


@dataclass
class Side:
    """One of the two networks, while it is being refactored."""

    leaves: list[Leaf]
    words: dict[str, str]
    numbering: dict[str, Numbering] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)  # what only a file holds
    shadow: str = ""  # where a file holds averages, with underscores in their names

    def names(self) -> list[str]:
        """The name of each leaf."""
        last: dict[tuple[Path, str], int] = {}
        for leaf in self.leaves:
            for depth, step in enumerate(leaf.path):
                if step.index is not None:
                    key = (leaf.path[:depth], step.role)
                    last[key] = max(last.get(key, 0), step.index)
        return [self._name(leaf.path, last) for leaf in self.leaves]

    def _name(self, path: Path, last: dict[tuple[Path, str], int]) -> str:
        parts = []
        for depth, step in enumerate(path):
            word = step.role[1:] if step.role.startswith("=") else self.words.get(step.role, step.role)
            if step.index is None:
                parts.append(word)
                continue
            style = self.numbering.get(step.role, Numbering())
            place = last[path[:depth], step.role] - step.index if style.down else step.index
            number = style.written(place)
            parts.append(f"{word}{style.joint}{number}" if word else number)
        return ".".join(part for part in parts if part)

    def used(self) -> set[str]:
        """The roles that stand in some path."""
        return {step.role for leaf in self.leaves for step in leaf.path}


@dataclass(frozen=True)
class Placed:
    """A leaf in a module."""

    name: str
    leaf: Leaf
    form: Form

    @property
    def family(self) -> tuple[str, str, tuple[int, ...]]:
        """Where it belongs by meaning: what stands beside it and could be taken for it."""
        return re.sub(r"\d+", "#", self.leaf.pieces[0].rpartition("/")[0]), self.leaf.kind, self.leaf.sizes[0]

    @property
    def meaning(self) -> str:
        """What it is, whatever its number."""
        return re.sub(r"\d+", "#", self.leaf.pieces[0].rpartition("/")[2])

    @property
    def word(self) -> str:
        """The last word of its name; ``""`` for a number."""
        last = self.name.rpartition(".")[2]
        return "" if last.isdigit() else last


class Net(nn.Module):
    """A side as a module. Its forward runs every leaf once, in the order of execution."""

    def __init__(self, side: Side) -> None:
        super().__init__()
        self.placed: list[Placed] = []
        names = side.names()
        _check(names)
        for name, leaf in zip(names, side.leaves):
            form = form_of(leaf)
            self._plant(name, form)
            self.placed.append(Placed(name, leaf, form))
        self._tie()
        self._calls: list[Callable[[], Any]] = [
            p.form.run for p in sorted(self.placed, key=lambda p: p.leaf.when) if p.form.run is not None
        ]

    def _plant(self, name: str, form: Form) -> None:
        *above, last = name.split(".")
        node: nn.Module = self
        for part in above:
            if part not in node._modules:
                if hasattr(node, part):
                    raise ClashError(name)
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        if form.module is not None:
            if hasattr(node, last):
                raise ClashError(name)
            node.add_module(last, form.module)
        for suffix, tensor in form.bare.items():
            if hasattr(node, last + suffix):
                raise ClashError(name)
            if isinstance(tensor, nn.Parameter):
                node.register_parameter(last + suffix, tensor)
            else:
                node.register_buffer(last + suffix, tensor)

    def _tie(self) -> None:
        """Maps that share the parameter of a table of the same identity, and modules that share all that they hold."""
        tables = {p.leaf.pieces: p.form.module for p in self.placed if p.leaf.kind == "embedding"}
        for placed in self.placed:
            table, module = tables.get(placed.leaf.pieces), placed.form.module
            if placed.leaf.layout == "tied" and isinstance(table, nn.Embedding) and module is not None:
                module.weight = table.weight
        whole = {(p.leaf.pieces, p.leaf.kind, p.leaf.bias): p.form.module for p in self.placed if not p.leaf.layout}
        for placed in self.placed:
            twin = whole.get((placed.leaf.pieces, placed.leaf.kind, placed.leaf.bias))
            if placed.leaf.layout == "shared" and twin is not None and placed.form.module is not None:
                placed.form.module._parameters.update(twin._parameters)

    def forward(self, x: Tensor) -> Tensor:
        for call in self._calls:
            call()
        return x


_IDENTIFIER = re.compile(r"\w+")


def _check(names: list[str]) -> None:
    """No two leaves in one place, none inside another."""
    places = set(names)
    if len(places) < len(names) or not all(_IDENTIFIER.fullmatch(part) for name in names for part in name.split(".")):
        raise ClashError(names)
    for name in names:
        parts = name.split(".")
        if any(".".join(parts[:n]) in places for n in range(1, len(parts))):
            raise ClashError(name)


def names_lie(old: Net, new: Net) -> bool:
    """Whether names say one thing and mean another, so that nobody could see it: then it is no test.

    Either a word stands for one thing here and for its sibling there, or two modules have the same path in lists that
    are numbered alike, and yet they are not the same.
    """
    meant: dict[tuple[object, str], set[str]] = {}
    for placed in old.placed:
        meant.setdefault((placed.family, placed.word), set()).add(placed.meaning)
    for placed in new.placed:
        known = meant.get((placed.family, placed.word)) if placed.word else None
        if known and placed.meaning not in known and len(placed.leaf.pieces) == 1:
            return True
    theirs, ours = _by_pattern(old), _by_pattern(new)
    for pattern in theirs.keys() & ours.keys():
        one, other = theirs[pattern], ours[pattern]
        if one.keys() == other.keys() and any(_differ(one[numbers], other[numbers]) for numbers in one):
            return True
    return False


def _by_pattern(net: Net) -> dict[str, dict[tuple[str, ...], Leaf]]:
    """Leaves by their path without numbers and without the wrappers around all of them, then by the numbers."""
    paths = [placed.name.split(".") for placed in net.placed]
    wrapped = 0
    while all(len(path) > wrapped + 1 for path in paths) and len({path[wrapped] for path in paths}) == 1:
        wrapped += 1
    found: dict[str, dict[tuple[str, ...], Leaf]] = {}
    for placed, path in zip(net.placed, paths):
        name = ".".join(path[wrapped:])
        found.setdefault(re.sub(r"[._]?\d+", "#", name), {})[tuple(re.findall(r"\d+", name))] = placed.leaf
    return found


def _differ(one: Leaf, other: Leaf) -> bool:
    return one.kind == other.kind and one.sizes == other.sizes and not set(one.pieces) & set(other.pieces)


def true_tensors(net: Net, known: frozenset[tuple[str, str]] | None = None) -> dict[str, Tensor | None]:
    """What every tensor of a side holds, by name; ``None`` where a part of it is not among the known ones."""
    held: dict[str, Tensor | None] = {}
    for placed in net.placed:
        for slot in placed.form.slots:
            name = placed.name + slot.suffix
            there = known is None or all((piece, tensor) in known for piece, tensor, _ in slot.of)
            held[name] = slot.value() if there else None
    return {name: held[name] for name in net.state_dict() if name in held}


def pieces_of(net: Net) -> frozenset[tuple[str, str]]:
    """Everything that a side knows: tensors of pieces."""
    return frozenset((piece, of) for placed in net.placed for slot in placed.form.slots for piece, of, _ in slot.of)


def randomise(net: Net) -> dict[str, Tensor]:
    """Give every tensor a value that nothing else has; returns a copy."""
    from benchmarks.refactors.forms import drawn

    with torch.no_grad():
        for name, tensor in net.state_dict(keep_vars=True).items():
            tensor.copy_(drawn("fresh " + name, tuple(tensor.shape), tensor.dtype))
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
