"""What else in a checkpoint speaks of the model's tensors: copies of the state dict, and lists of parameter names.

Callbacks and users keep averages (``StochasticWeightAveraging``, an EMA), the groups that they made
(``BaseFinetuning``), names of frozen layers. They are recognised by content, not by owner: names of the
file's tensors, with tensors of the same shapes beside them or without, or tensors whose shapes are those of all
parameters in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint.document import Leaf, materialize, tensors_of, with_entries
from lit_wsl.checkpoint.records import ForeignObject, as_mapping, children_of, walk
from lit_wsl.convert.weights import Translation, convert_tensors
from lit_wsl.errors import CheckpointError, PlanError, listed
from lit_wsl.plan.entries import PlanEntry
from lit_wsl.plan.operations import Cast
from lit_wsl.structure.description import dtype_text
from lit_wsl.structure.families import prefixes

Path = tuple[Hashable, ...]
"""Keys from the top of a checkpoint."""

_DEEPEST = 60  # containers inside containers; no honest file has more


def spell(path: Path) -> str:
    """How a place in a checkpoint is called in messages and in ``drop``."""
    return "/".join(map(str, path))


@dataclass(frozen=True)
class Problem:
    """What could not be converted."""

    path: Path  # where it is
    text: str  # why
    grave: bool  # whether the new model would continue with something wrong; else it is worth a note

    def __str__(self) -> str:
        return f"{spell(self.path)!r} {self.text}"

    @property
    def remedy(self) -> str:
        """How to leave the entry out."""
        top = spell(self.path[:2] if self.path[0] == "callbacks" else self.path[:1])
        return f"Leave it out with drop=[{top!r}] (--drop {top!r})."


@dataclass
class CopyConverter:
    """Goes through the entries of a checkpoint and gives those that speak of the old model under the new names."""

    sides: Translation  # the plan with both of its sides
    sharded: bool = False  # whether the run holds the model in parts, into which no copy is restored
    notes: list[str] = field(default_factory=list)  # remarks
    problems: list[Problem] = field(default_factory=list)  # what could not be converted, in order
    # where parameter groups are written down by name: the place, and the old and new names of each group
    groups: list[tuple[Path, list[list[str]], list[list[str]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        checkpoint, self.plan, self.target = self.sides.checkpoint, self.sides.plan, self.sides.target
        self._place = {name: at for at, name in enumerate(checkpoint)}
        self._shapes = {name: tuple(checkpoint.meta(name).shape) for name in checkpoint}
        self._new: dict[str, str | None] = {}  # None: split, or joined with others
        for entry in self.plan.entries:
            alone = len(entry.sources) == len(entry.targets) == 1
            for source in entry.sources:
                self._new[source] = entry.targets[0] if alone and source not in self._new else None
        self._new.update((name, self._new[first]) for name, first in self.sides.old.tied.items() if first in self._new)
        self._seen: dict[int, Any] = {}

    def convert(self, path: Path, value: Any) -> Any:
        """Give an entry for the new model; the very same object where nothing in it speaks of the old one."""
        mapping = as_mapping(value)
        container = mapping is not None or isinstance(value, (list, tuple, set, frozenset))
        if isinstance(value, str):
            return self._convert_name(path, value)
        if not container:
            self._look_into(path, value)
            return value
        if id(value) in self._seen or len(path) > _DEEPEST:
            return self._seen.get(id(value), value)
        self._seen[id(value)] = value
        made = self._convert_mapping(path, value, mapping) if mapping is not None else self._convert_items(path, value)
        self._seen[id(value)] = made
        return made

    @cached_property
    def _modules(self) -> set[str]:
        return {name[:at] for name in self._place for at, letter in enumerate(name) if letter == "."}

    # -- names -------------------------------------------------------------------------------------------------------

    def _prefix(self, names: Sequence[str]) -> str | None:
        """What stands before the names of the file's tensors, if all of these are such names."""
        if not names:
            return None
        first = names[0]
        for start in [0, *(i + 1 for i, letter in enumerate(first) if letter == ".")]:
            prefix = first[:start]
            if all(n.startswith(prefix) and n[len(prefix) :] in self._place for n in names):
                return prefix if any("." in n[len(prefix) :] for n in names) else None
        return None

    def _renamed(self, path: Path, names: Sequence[str], prefix: str) -> list[tuple[str, str]]:
        """Old and new names; what splits is a problem, what the new model does not have is left out."""
        made, gone = [], []
        for name in names:
            old = name[len(prefix) :]
            if old not in self._new:
                gone.append(old)
                continue
            new = self._new[old]
            if new is None:
                entry = next(e for e in self.plan.entries if old in e.sources)
                text = (
                    f"lists parameters by name, and {old!r} is no single parameter of the new model "
                    f"({', '.join(entry.sources[:3])} -> {', '.join(entry.targets[:3])})."
                )
                self.problems.append(Problem(path, text, grave=True))
                return [(n, n) for n in names]
            made.append((name, prefix + new))
        if gone:
            self.notes.append(f"{spell(path)!r} names tensors that the new model lacks: {listed(gone)}; left out")
        return made

    def _convert_name(self, path: Path, value: str) -> str:
        if "." not in value or len(value) > 1000:
            return value
        prefix = self._prefix([value])
        if prefix is None:
            return value
        made = self._renamed(path, [value], prefix)
        return made[0][1] if made else value

    def _in_new_order(self, pairs: Sequence[tuple[str, str]], prefix: str) -> list[str]:
        """New names; in the order in which the new model registers them where the old ones stood in the old one's."""
        places = [self._place[old[len(prefix) :]] for old, _ in pairs]
        names = [new for _, new in pairs]
        if places != sorted(places):
            return names
        try:
            place = {name: at for at, name in enumerate(self.sides.order.names)}
        except CheckpointError:
            return names
        known = all(name[len(prefix) :] in place for name in names)
        return sorted(names, key=lambda name: place[name[len(prefix) :]]) if known else names

    def _relative(self, names: Sequence[str]) -> str | None:
        """The module inside which all of some names are tensors, unless they are so still.

        What changed names are relative to in the new model nobody knows.
        """
        module = next(prefixes(names, self._place), None) if "." in names[0] else None
        if module is None:
            return None
        new = [self._new.get(module + other) or "" for other in names]
        start = new[0][: -len(names[0])]
        return None if all(n == start + other for n, other in zip(new, names)) else module.rstrip(".")

    def _convert_items(self, path: Path, value: Any) -> Any:
        items = list(value)
        strings = [item for item in items if isinstance(item, str)]
        if strings and len(strings) == len(items):
            prefix = self._prefix(strings)
            if prefix is not None:
                return type(value)(self._in_new_order(self._renamed(path, strings, prefix), prefix))
            known = [item for item in strings if "." in item and item in self._place]
            module = self._relative(strings)
            if known:
                self.notes.append(f"{spell(path)!r} names tensors of the old model among others and was left as it is")
            elif module is not None:
                self.notes.append(
                    f"{spell(path)!r} names tensors of the old model as seen from {module!r} and was left as it is"
                )
            elif all(item in self._modules for item in strings) and any("." in item for item in strings):
                self.notes.append(f"{spell(path)!r} names modules of the old model and was left as it is")
            return value
        if len(items) > 1 and all(isinstance(item, Leaf) for item in items):
            return self._convert_listed(path, value, items)
        made = [self.convert((*path, at), item) for at, item in enumerate(items)]
        self._remember_groups(path, items, made)
        if all(a is b for a, b in zip(items, made)):
            return value
        return tuple(made) if isinstance(value, tuple) else made if isinstance(value, list) else type(value)(made)

    def _remember_groups(self, path: Path, items: Sequence[Any], made: Sequence[Any]) -> None:
        def listed(groups: Sequence[Any]) -> list[list[str]] | None:
            found = [g.get("params") if isinstance(g, Mapping) else None for g in groups]
            ok = found and all(isinstance(p, list) and p and all(isinstance(n, str) for n in p) for p in found)
            return [list(p or ()) for p in found] if ok else None

        old, new = listed(items), listed(made)
        if old is not None and new is not None and all(name in self._place for names in old for name in names):
            self.groups.append((path, old, new))

    # -- copies ------------------------------------------------------------------------------------------------------

    def _convert_mapping(self, path: Path, value: Any, mapping: Mapping[Any, Any]) -> Any:
        copies = self._copies(mapping)
        if copies:
            return self._convert_copies(path, value, mapping, copies)
        keys = [key for key in mapping if isinstance(key, str)]
        if keys and len(keys) == len(mapping):
            prefix = self._prefix(keys)
            if prefix is not None:
                pairs = self._renamed(path, keys, prefix)
                changed = [old for old, _ in pairs if self._is_changed(old[len(prefix) :])]
                turned = next((old for old in changed if _holds_tensor(mapping[old])), None)
                if turned is not None:
                    text = f"keeps tensors for {turned!r}, whose weights are laid out in another way in the new model."
                    self.problems.append(Problem(path, text, grave=True))
                    return value
                return with_entries(value, {new: mapping[old] for old, new in pairs})
        part = self._part_of(mapping)
        if part is not None:
            return self._convert_part(path, value, mapping, part)
        made = {key: self.convert((*path, key), item) for key, item in mapping.items()}
        return value if all(made[key] is mapping[key] for key in made) else with_entries(value, made)

    def _is_changed(self, name: str) -> bool:
        entry = next((e for e in self.plan.entries if name in e.sources), None)
        return entry is not None and any(not isinstance(op, Cast) for op in entry.operations)

    def _fits(self, name: str, value: Any) -> bool:
        return isinstance(value, Leaf) and self._shapes.get(name) == tuple(value.shape)

    def _copies(self, mapping: Mapping[Any, Any]) -> dict[str, list[str]]:
        """Prefix -> the names under it that are the file's, with tensors of the same shapes; empty if it is no copy."""
        found: dict[str, list[str]] = {}
        tensors = tensors_of(mapping)
        for key, value in tensors.items():
            for start in [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]:
                if self._fits(key[start:], value):
                    found.setdefault(key[:start], []).append(key[start:])
                    break
        whole = len(self._place)
        found = {p: names for p, names in found.items() if any("." in n for n in names) or len(names) == whole}
        return found if sum(map(len, found.values())) * 2 > len(tensors) else {}

    def _convert_copies(
        self, path: Path, value: Any, mapping: Mapping[Any, Any], copies: Mapping[str, list[str]]
    ) -> Any:
        made: dict[Any, Any] = {}
        taken = {prefix + name for prefix, names in copies.items() for name in names}
        for prefix, names in copies.items():
            tensors = {name: mapping[prefix + name] for name in names}
            converted = self._converted(path, tensors)
            if converted is None:
                return value
            made.update((prefix + name, tensor) for name, tensor in converted.items())
        made.update((key, item) for key, item in mapping.items() if key not in taken)
        self.notes.append(f"{spell(path)!r}, a copy of the weights, was converted likewise")
        return with_entries(value, made)

    def _converted(self, path: Path, tensors: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The tensors of a copy for the new model; what has no source comes from the model, where the copy is whole."""
        if self.sharded:
            text = "is a copy of the weights, which cannot be restored into a sharded run (resume='optimizer' can)."
            self.problems.append(Problem(path, text, grave=True))
            return None
        inside, torn = [], []
        for entry in self.plan.entries:
            have = [source for source in entry.sources if source in tensors]
            if len(have) == len(entry.sources):
                inside.append(_without_foreign_casts(entry, [tensors[source] for source in entry.sources]))
            elif have:
                torn.append((entry, have))
        if torn:
            entry, have = torn[0]
            lacking = next(source for source in entry.sources if source not in tensors)
            text = (
                f"is a copy of weights with {have[0]!r} and without {lacking!r}; {entry.targets[0]!r} is made of both."
            )
            self.problems.append(Problem(path, text, grave=True))
            return None
        used = {source: materialize(tensors[source]) for entry in inside for source in entry.sources}
        try:
            made = convert_tensors(used, replace(self.plan, entries=tuple(inside)), self.target)
        except PlanError as error:
            self.problems.append(Problem(path, f"is a copy of the weights: {error}", grave=True))
            return None
        whole = len(tensors) == len(self._place)
        parameters = set(self.sides.old_parameters)
        ordered, fresh, missing = self.sides.whole_state(made)
        if not whole:  # a copy of some of the weights has no others
            kept: set[str] = set()
            if self.target is not None and parameters <= set(tensors):  # all parameters: those without a source, too
                kept = {name for name, _ in self.target.named_parameters(remove_duplicate=False)}
            ordered = {name: tensor for name, tensor in ordered.items() if name in kept or name not in fresh}
            fresh, missing = [name for name in fresh if name in kept], [name for name in missing if name in kept]
        if fresh:
            self.notes.append(
                f"{spell(path)!r}: {len(fresh)} tensors without a source have the model's values: {listed(fresh)}"
            )
        if missing:
            self.notes.append(
                f"{spell(path)!r} has no value for {len(missing)} tensors of the new model: {listed(missing)}"
            )
        return ordered

    def _convert_listed(self, path: Path, value: Any, items: Sequence[Any]) -> Any:
        """Tensors in the order of the parameters, as libraries of averages keep them."""
        shapes = [tuple(item.shape) for item in items]
        parameters = self.sides.old_parameters
        kept = {name: shape for name, shape in parameters.items() if name in self._new}
        lists = (list(self._shapes), list(parameters), list(kept))
        names = next((names for names in lists if [self._shapes[name] for name in names] == shapes), None)
        if names is None:
            return value
        converted = self._converted(path, dict(zip(names, items)))
        if converted is None:
            return value
        try:
            order = list(converted) if names is lists[0] and self.target is not None else list(self.sides.order.names)
        except CheckpointError as error:
            self.problems.append(Problem(path, f"lists a tensor for each parameter, and {error}", grave=True))
            return value
        lacking = [name for name in order if name not in converted]
        if lacking:
            text = f"lists a tensor for each parameter, and has none for {listed(lacking)}."
            self.problems.append(Problem(path, text, grave=True))
            return value
        self.notes.append(f"{spell(path)!r}, a list of tensors in the order of the parameters, was converted likewise")
        made = [converted[name] for name in order]
        return tuple(made) if isinstance(value, tuple) else made

    # -- parts -------------------------------------------------------------------------------------------------------

    def _part_of(self, mapping: Mapping[Any, Any]) -> str | None:
        """The submodule that a mapping is the state dict of, if its tensors are all of one submodule's."""
        tensors = tensors_of(mapping)
        if len(tensors) < 2:
            return None
        for module in filter(None, prefixes(list(tensors), self._place)):
            under = [name for name in self._place if name.startswith(module)]
            if len(under) == len(tensors) and all(self._fits(module + k, v) for k, v in tensors.items()):
                return module
        return None

    def _convert_part(self, path: Path, value: Any, mapping: Mapping[Any, Any], module: str) -> Any:
        held = {module + k: v for k, v in tensors_of(mapping).items()}
        news = {name: self._new.get(name) for name in held}
        fixed = [new for new in news.values() if new is not None]
        prefix = _common_module(fixed)
        if len(fixed) == len(news) and all(new == prefix + name[len(module) :] for name, new in news.items()):
            return value  # the submodule is as it was
        note = f"{spell(path)!r} holds weights of {module.rstrip('.')!r} under names of its own and was left as it is"
        ours = list(self.target.state_dict(keep_vars=True)) if self.target is not None else []
        under = [n for n in ours if n.startswith(prefix)]
        beside = [n for n in ours if n.startswith(_above(prefix))]
        alone = sum(n.startswith(_above(module)) for n in self._place) == len(held)
        if not fixed or not prefix or set(under) != set(fixed) or len(beside) == len(under) or alone:
            self.notes.append(note)  # which part of the new model takes it is not certain
            return value
        converted = self._converted(path, held)
        if converted is None:
            return value
        self.notes.append(f"{spell(path)!r}, a copy of {module.rstrip('.')!r}, was converted likewise")
        rest = {k: v for k, v in mapping.items() if not (isinstance(k, str) and module + k in held)}
        return with_entries(value, {**{n[len(prefix) :]: t for n, t in converted.items()}, **rest})

    def _look_into(self, path: Path, value: Any) -> None:
        """Say so where an object that cannot be changed, or a flat vector, speaks of the old model's parameters."""
        if isinstance(value, ForeignObject):
            words = (word for word in walk(value) if isinstance(word, str))
            named = next((word for word in words if "." in word and word in self._place), None)
            if named is not None:
                self.notes.append(
                    f"{spell(path)!r}, an object of {value.type_name}, names {named!r} of the old model and was left "
                    "as it is"
                )
        elif isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point():
            parameters = self.sides.old_parameters
            total = sum(torch.Size(shape).numel() for shape in parameters.values())
            if len(parameters) > 1 and value.numel() == total:
                self.notes.append(
                    f"{spell(path)!r} has as many elements as the old model's parameters ({total}), may be all of them "
                    "in one vector, and was left as it is"
                )


def _above(module: str) -> str:
    """The path, ending in a dot, of the module around one; ``""`` for the root."""
    return module[: module.rstrip(".").rfind(".") + 1]


def _common_module(names: Sequence[str]) -> str:
    """The path, ending in a dot, of the innermost module that holds all of some tensors; ``""`` for the root."""
    # of sorted paths the first and the last differ most
    paths = sorted(name.split(".")[:-1] for name in names)
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(paths[0], paths[-1])) if paths else ()
    return "".join(part + "." for part, _ in alike)


def _without_foreign_casts(entry: PlanEntry, tensors: Sequence[Any]) -> PlanEntry:
    """An average may be kept in another dtype than the weights; it stays in it."""
    dtypes = {dtype_text(tensor.dtype) for tensor in tensors}
    operations = tuple(op for op in entry.operations if not isinstance(op, Cast) or dtypes == {op.source})
    return replace(entry, operations=operations) if len(operations) != len(entry.operations) else entry


def _holds_tensor(value: Any) -> bool:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Leaf) and item.numel() > 1:
            return True
        if isinstance(item, (Mapping, list, tuple)):
            stack.extend(children_of(item))
    return False


def drop_entries(tree: Any, drop: Sequence[str], path: Path = ()) -> tuple[Any, set[str]]:
    """A checkpoint without some entries, and which of the wishes found something.

    >>> drop_entries({"callbacks": {"EMA": 1, "Timer": 2}, "epoch": 3}, ["callbacks/E*"])
    ({'callbacks': {'Timer': 2}, 'epoch': 3}, {'callbacks/E*'})
    """
    mapping = as_mapping(tree)
    if mapping is None or not drop or len(path) > 3:
        return tree, set()
    kept, found = {}, set()
    for key, value in mapping.items():
        here = spell((*path, key))
        hits = {wish for wish in drop if wish == here or fnmatchcase(here, wish)}
        found |= hits
        if not hits:
            kept[key], inner = drop_entries(value, drop, (*path, key))
            found |= inner
    unchanged = len(kept) == len(mapping) and all(kept[key] is mapping[key] for key in kept)
    return (tree if unchanged else with_entries(tree, kept)), found
