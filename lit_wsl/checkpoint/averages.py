"""Averages of the weights (EMA) that are no state dict of their own: a submodule of the model, a list in its order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lit_wsl.checkpoint.inert import as_mapping
from lit_wsl.checkpoint.nests import AVERAGE_WORDS, MAX_NEST, Leaf, Nest, words_of

MAX_PAIRS = 20_000_000  # bounds the time of counting the ways in which a list fits the model


def inner_average(model: Nest) -> tuple[str, Nest, Nest] | None:
    """Find an average that is a submodule of the model: ``ema.module.layer.weight`` beside ``net.layer.weight``.

    Some averages (LDM's LitEma) keep their names without dots; both spellings are understood. The result is
    the submodule's prefix, the averaged weights under the model's names, and the model without the submodule.
    """
    heads = sorted({name.partition(".")[0] for name in model.tensors if "." in name})
    for head in heads:
        if not words_of(head) & AVERAGE_WORDS:
            continue
        rest = {name: tensor for name, tensor in model.tensors.items() if not name.startswith(f"{head}.")}
        mine = {name[len(head) + 1 :]: name for name in model.tensors if name.startswith(f"{head}.")}
        if mine and all(name.startswith("module.") or "." not in name for name in mine):
            mine = {name.removeprefix("module."): full for name, full in mine.items()}
        found = _pair_average(model.tensors, mine, rest)
        if found:
            average = {name: model.tensors[found[name]] if name in found else rest[name] for name in rest}
            return f"{head}.", Nest(model.path, average, model.extra), Nest(model.path, rest, model.extra)
    return None


def _pair_average(tensors: Mapping[str, Leaf], mine: Mapping[str, str], rest: Mapping[str, Leaf]) -> dict[str, str]:
    """Pair averaged names with the model's, under the common prefix that pairs the most of them."""
    best: dict[str, str] = {}
    prefixes = {""} | {".".join(name.split(".")[:depth]) + "." for name in rest for depth in (1, 2, 3) if "." in name}
    for prefix in sorted(prefixes, key=lambda text: (text.count("."), text))[: 1 + MAX_PAIRS // (4 * len(rest) + 1)]:
        for spelling in (str, lambda name: name.replace(".", "")):
            pairs = {
                name: mine[spelling(name[len(prefix) :])]
                for name in rest
                if name.startswith(prefix) and spelling(name[len(prefix) :]) in mine
            }
            pairs = {a: b for a, b in pairs.items() if tensors[a].shape == tensors[b].shape}
            if len(pairs) > len(best):
                best = pairs
    return best if len(best) * 2 > len(mine) else {}


def list_average(tree: Any, model: Nest) -> tuple[str, Nest] | None:
    """Find an average that is a bare list of tensors in the order of the model's parameters (``shadow_params``).

    The list has no names. It is taken only if its shapes fit into the model's order in exactly one way; tensors that it
    leaves out (buffers) keep the model's values, and tied ones follow their partner.

    Returns:
        Where the list is, and the averaged weights under the model's names; None if there is none that surely fits.
    """
    names = list(model.tensors)
    for path, values in _lists(tree):
        places = _only_fit([tuple(t.shape) for t in values], [tuple(t.shape) for t in model.tensors.values()])
        if places is None:
            continue
        found: dict[str, Leaf] = {names[place]: value for place, value in zip(places, values)}
        tied = {_address(model.tensors[name]): value for name, value in found.items()}
        average = {name: found.get(name, tied.get(_address(leaf), leaf)) for name, leaf in model.tensors.items()}
        return ".".join(path), Nest(model.path, average, model.extra)
    return None


def _lists(tree: Any) -> Iterator[tuple[tuple[str, ...], Sequence[Tensor]]]:
    """Go over the lists of tensors below keys of which a word speaks of an average; shared containers once."""
    stack: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    seen: set[int] = set()
    while stack:
        path, value = stack.pop()
        if isinstance(value, (list, tuple)):
            tensors = len(value) > 1 and all(isinstance(item, Tensor) for item in value)
            if tensors and any(words_of(part) & AVERAGE_WORDS for part in path):
                yield path, value
        elif id(value) not in seen and len(path) < MAX_NEST:
            seen.add(id(value))
            entries = as_mapping(value) or {}
            stack.extend(reversed([((*path, key), child) for key, child in entries.items() if isinstance(key, str)]))


def _only_fit(part: Sequence[tuple[int, ...]], whole: Sequence[tuple[int, ...]]) -> list[int] | None:
    """The places of ``part`` in ``whole``, in order, if there is exactly one way to put it there.

    Counts embeddings of one sequence into another by dynamic programming, up to two.
    """
    if len(part) == len(whole):
        return list(range(len(part))) if list(part) == list(whole) else None
    if len(part) * len(whole) > MAX_PAIRS or len(part) > len(whole):
        return None
    ways = [1] + [0] * len(part)
    for shape in whole:
        for at in range(len(part) - 1, -1, -1):
            if part[at] == shape:
                ways[at + 1] = min(2, ways[at + 1] + ways[at])
    if ways[-1] != 1:
        return None
    places, begin = [], 0
    for shape in part:
        begin = whole.index(shape, begin)
        places.append(begin)
        begin += 1
    return places


def _address(leaf: Leaf) -> Any:
    return (leaf.data_ptr(), leaf.shape) if isinstance(leaf, Tensor) and leaf.numel() and not leaf.is_meta else None
