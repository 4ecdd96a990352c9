"""The language of rows: a renamed network as lines of text, and the modules that they stand for.

A row is ``old path | new path | layer`` (``layer => other layer`` where the new one differs):

    enc.layers.{0-2}.fc1 | blocks.{0-2}.mlp.up | L 8 16

``{0-2}``, ``{2-0}``, ``{a,b}``         expanded; the n-th braces of both sides walk together, all others are products
``-``                                   nothing belongs there (old side), or was dropped (new side)
``a.q+a.k+a.v``, ``a.(q+k+v)``          joined along the first axis; ``a.qkv[1/3]`` is the second of three parts
``a/b``, ``(a/b).c``                    either of both is right: copies
``a^T``                                 transposed, if it is a matrix
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

BRACES = re.compile(r"\{([^}]*)\}")
PART = re.compile(r"(.*)\[(\d+)/(\d+)\]")


class Bare(nn.Module):
    """Stands for one parameter or buffer of the module above it, called as this is."""

    def __init__(self, *shape: int, buffer: bool = False):
        super().__init__()
        self.tensor = torch.zeros(shape)
        self.buffer = buffer


class Scale(nn.Module):
    """A norm with nothing but a weight."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))


def _convolution(kind: Any, wide: int, out: int, size: int = 1, groups: int = 1, bias: bool = True) -> nn.Module:
    return kind(wide, out, size, groups=groups, bias=bias)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "L": nn.Linear,
    "l": partial(nn.Linear, bias=False),
    "C": partial(_convolution, nn.Conv2d),
    "c": partial(_convolution, nn.Conv2d, bias=False),
    "K": partial(_convolution, nn.Conv1d),
    "k": partial(_convolution, nn.Conv1d, bias=False),
    "V": partial(_convolution, nn.Conv3d),
    "U": nn.ConvTranspose2d,
    "W": nn.ConvTranspose1d,
    "X": nn.ConvTranspose3d,
    "N": nn.LayerNorm,
    "B": nn.BatchNorm2d,
    "b": nn.BatchNorm1d,
    "G": partial(nn.GroupNorm, 1),
    "I": partial(nn.InstanceNorm2d, affine=True),
    "R": Scale,
    "E": nn.Embedding,
    "S": nn.LSTM,
    "Z": nn.GRU,
    "Q": nn.GRUCell,
    "A": partial(nn.MultiheadAttention, num_heads=1),
    "J": nn.Bilinear,
    "O": nn.PReLU,
    "P": Bare,
    "D": partial(Bare, buffer=True),
}
"""A layer is a letter and its sizes; small letters have no bias, ``P`` is a parameter and ``D`` a buffer by itself."""


@dataclass(frozen=True)
class Row:
    """One layer of a case, its braces expanded."""

    old: str
    new: str
    before: str  # the layer of the old module
    after: str  # and of the new one

    def choices(self) -> list[str]:
        """What belongs there on the old side; any of several is right."""
        return [] if self.old == "-" else re.split(r"/(?!\d+\])", self.old)

    def sources(self) -> list[str]:
        """The paths that the old side names, without signs."""
        paths = [path for choice in self.choices() for path in choice.split("+")]
        return [PART.sub(r"\1", path).removesuffix("^T") for path in paths]


def rows_of(text: str) -> Iterator[Row]:
    for line in text.strip().splitlines():
        if line.strip():
            left, right, layer = (cell.strip() for cell in line.split("|"))
            before, _, after = (cell.strip() for cell in layer.partition("=>"))
            for old, new in expand(left, right):
                yield Row(old, new, before, after or before)


def expand(*texts: str) -> Iterator[tuple[str, ...]]:
    """All expansions of texts whose n-th braces walk together."""
    found = [[_choices(inside) for inside in BRACES.findall(text)] for text in texts]
    sizes = [len(next(c for c in column if c)) for column in itertools.zip_longest(*found)]
    for choices, text in zip(found, texts):
        if [len(c) for c in choices] != sizes[: len(choices)]:
            raise ValueError(f"braces of unequal lengths in {text!r}, one of {texts}")
    for at in itertools.product(*map(range, sizes)):
        yield tuple(spread(_chosen(text, choices, at)) for text, choices in zip(texts, found))


def _chosen(text: str, choices: list[list[str]], at: tuple[int, ...]) -> str:
    """The text with one choice for each of its braces."""
    for own, i in zip(choices, at):
        text = BRACES.sub(own[i], text, count=1)
    return text


def _choices(text: str) -> list[str]:
    span = re.fullmatch(r"(\d+)-(\d+)", text)
    if not span:
        return text.split(",")
    first, last = map(int, span.groups())
    step = 1 if first <= last else -1
    return [str(i) for i in range(first, last + step, step)]


def spread(text: str) -> str:
    """``a.(s+t).w`` is ``a.s.w+a.t.w``."""
    found = re.fullmatch(r"(.*)\(([^)]*)\)(.*)", text)
    if not found:
        return text
    sign = "/" if "/" in found[2] else "+"
    return sign.join(found[1] + part + found[3] for part in found[2].split(sign))


def layer(text: str) -> nn.Module:
    kind, *sizes = text.split()
    return LAYERS[kind](*map(int, sizes))


def build(paths: Iterable[tuple[str, str]], order: str) -> nn.Module:
    """A module of (path, layer) pairs; what ``order`` names is registered first: prefixes, ``*parts`` of paths."""
    first = [prefix for text in order.split() for (prefix,) in expand(text)]
    tree: dict[str, Any] = {}
    for path, text in sorted(paths, key=lambda pair: _rank(pair[0], first)):
        *parents, last = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        if node.setdefault(last, text) != text:
            raise ValueError(f"{path} is {node[last]!r} and {text!r}")
    return _module(tree)


def _rank(path: str, first: list[str]) -> int:
    return next((i for i, prefix in enumerate(first) if _named(prefix, path)), len(first))


def _named(prefix: str, path: str) -> bool:
    return prefix[1:] in f".{path}" if prefix.startswith("*") else f"{path}.".startswith(f"{prefix}.")


def _module(tree: dict[str, Any]) -> nn.Module:
    """A list where all children are numbers in order, a plain module elsewhere."""
    children = {key: _module(value) if isinstance(value, dict) else layer(value) for key, value in tree.items()}
    bare = [child for child in children.values() if isinstance(child, Bare)]
    numbered = list(children) == [str(i) for i in range(len(children))]
    if numbered and len(bare) == len(children) and not any(child.buffer for child in bare):
        return nn.ParameterList(child.tensor for child in bare)
    module = nn.ModuleList() if numbered and not bare else nn.Module()
    for key, child in children.items():
        if not isinstance(child, Bare):
            module.add_module(key, child)
        elif child.buffer:
            module.register_buffer(key, child.tensor)
        else:
            module.register_parameter(key, nn.Parameter(child.tensor))
    return module
