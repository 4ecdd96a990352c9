"""Finding the weights inside a checkpoint by structure: which nest is the state dict, which is an EMA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lit_wsl.checkpoint.allowlist import RefusedError
from lit_wsl.checkpoint.document import Leaf, numpy_array, with_ties
from lit_wsl.checkpoint.records import ForeignName, ForeignObject, as_mapping
from lit_wsl.errors import CheckpointError
from lit_wsl.structure.families import find_average, speaks_of_average

MAX_NAMES = 4_000_000
MAX_MODULE_DEPTH = 300

_NUMPY = frozenset(("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1", "c8", "c16"))  # that torch has, too


def is_module(value: Any) -> bool:
    """Whether a value is the record of an ``nn.Module`` (recognised by its structure) or of a script module."""
    if not isinstance(value, ForeignObject):
        return False
    if isinstance(value.func, ForeignName) and value.func.module.startswith("__torch__"):
        return True
    state = value.state
    return all(isinstance(state.get(key), dict) for key in ("_parameters", "_buffers", "_modules"))


def module_state_dict(root: ForeignObject) -> dict[str, Tensor]:
    """List the tensors of ``module.state_dict()``, in its order, tied ones under each of their names."""
    result: dict[str, Tensor] = {}
    stack: list[tuple[str, ForeignObject, int]] = [("", root, 0)]
    visits = 0
    while stack:
        prefix, module, depth = stack.pop()
        visits += 1
        if depth > MAX_MODULE_DEPTH or visits > MAX_NAMES or len(result) > MAX_NAMES:
            raise RefusedError("modules that contain themselves, or are nested to an excessive size")
        own, children = _contents(module)
        result.update((prefix + name, tensor) for name, tensor in own.items())
        stack.extend((f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children.items()))
    return result


def _contents(module: ForeignObject) -> tuple[dict[str, Tensor], dict[str, ForeignObject]]:
    state = module.state
    if not isinstance(state.get("_modules"), dict):  # a script module: its attributes are its state
        own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        return own, {name: value for name, value in state.items() if is_module(value)}
    transient = state.get("_non_persistent_buffers_set")
    transient = transient if isinstance(transient, (set, frozenset, list, tuple)) else ()
    own = {str(name): value for name, value in state["_parameters"].items() if isinstance(value, Tensor)}
    own |= {
        str(name): value
        for name, value in (state.get("_buffers") or {}).items()
        if isinstance(value, Tensor) and name not in transient
    }
    return own, {str(name): child for name, child in state["_modules"].items() if isinstance(child, ForeignObject)}


def numpy_tensor(value: Any) -> Tensor | None:
    """Give the tensor of a pickled NumPy array (not an object array), or None if the record is something else."""
    array = numpy_array(value)
    if array is None or f"{array.dtype.kind}{array.dtype.itemsize}" not in _NUMPY:
        return None
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def attributes(value: Any) -> dict[Any, Any]:
    """What can be looked into: the items of a mapping, the attributes of a record."""
    mapping = as_mapping(value)
    if mapping is not None:
        return dict(mapping)
    return value.state if isinstance(value, ForeignObject) else {}


MAX_NEST = 6


@dataclass(frozen=True)
class Nest:
    """A place in the tree that holds named tensors."""

    path: tuple[str, ...]  # the keys that lead there
    tensors: dict[str, Leaf]  # names and tensors
    extra: dict[Any, Any] = field(default_factory=dict)  # its entries that are no tensors, such as ``_extra_state``
    module: bool = False  # whether it is a whole pickled module

    @property
    def numel(self) -> int:
        """Number of elements of all its tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def averaged(self) -> bool:
        """Whether a word on its path says that it is a running average of the weights."""
        return any(speaks_of_average(part) for part in self.path)

    @property
    def label(self) -> str:
        """Its path as text."""
        return ".".join(self.path) or "state_dict"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, without a leading ``module.`` that all names share."""
        names = list(self.tensors)
        common = "module." if all(name.startswith("module.") or "." not in name for name in names) else ""
        return {name.removeprefix(common): tuple(tensor.shape) for name, tensor in self.tensors.items()}


def find_nests(tree: Any) -> list[Nest]:
    """List every place of the tree that holds named tensors, in the file's order; optimizer states are left out."""
    found: list[Nest] = []
    seen: set[int] = set()
    stack: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while stack:
        path, value = stack.pop()
        if id(value) in seen or len(path) > MAX_NEST:
            continue
        seen.add(id(value))
        if is_module(value):
            tensors = module_state_dict(value)
            if tensors:
                found.append(Nest(path, dict(tensors), module=True))
                continue
        entries = attributes(value)
        if {"param_groups", "state"} <= set(entries) or any(str(key).startswith("param_groups.") for key in entries):
            continue  # an optimizer's state dict, nested or flattened into dotted names
        nest = _nest(path, entries)
        if nest.tensors:
            found.append(nest)
        inner = [(path + (key,), child) for key, child in entries.items() if isinstance(key, str)]
        stack.extend(reversed([item for item in inner if isinstance(item[1], (Mapping, ForeignObject))]))
    return found


def _nest(path: tuple[str, ...], entries: Mapping[Any, Any]) -> Nest:
    tensors: dict[str, Leaf] = {}
    extra: dict[Any, Any] = {}
    for key, value in entries.items():
        name = key.decode("utf-8", "replace") if isinstance(key, bytes) else key
        leaf = value if isinstance(value, Leaf) else numpy_tensor(value)
        if isinstance(name, str) and leaf is not None:
            tensors[name] = leaf
        else:
            extra[key] = value
    return Nest(path, tensors, extra)


MAX_PAIRS = 20_000_000  # bounds the time of counting the ways in which a list fits the model


def inner_average(model: Nest) -> tuple[str, Nest, Nest] | None:
    """Find an average that is a submodule of the model: ``ema.module.layer.weight`` beside ``net.layer.weight``.

    The result is the submodule's prefix, the averaged weights under the model's names, and the model without it.
    """
    found = find_average({name: tuple(tensor.shape) for name, tensor in model.tensors.items()})
    if found is None or not found.pairs:
        return None
    rest = {name: tensor for name, tensor in model.tensors.items() if not name.startswith(found.prefix)}
    average = {name: model.tensors[found.pairs.get(name, name)] for name in rest}
    return found.prefix, Nest(model.path, average, model.extra), Nest(model.path, rest, model.extra)


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
        return ".".join(path), Nest(model.path, with_ties(model.tensors, found), model.extra)
    return None


def _lists(tree: Any) -> Iterator[tuple[tuple[str, ...], Sequence[Tensor]]]:
    """Go over the lists of tensors below keys of which a word speaks of an average; shared containers once."""
    stack: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    seen: set[int] = set()
    while stack:
        path, value = stack.pop()
        if isinstance(value, (list, tuple)):
            tensors = len(value) > 1 and all(isinstance(item, Tensor) for item in value)
            if tensors and any(speaks_of_average(part) for part in path):
                yield path, value
        elif id(value) not in seen and len(path) < MAX_NEST:
            seen.add(id(value))
            entries = as_mapping(value) or {}
            stack.extend(reversed([((*path, key), child) for key, child in entries.items() if isinstance(key, str)]))


def _only_fit(part: Sequence[tuple[int, ...]], whole: Sequence[tuple[int, ...]]) -> list[int] | None:
    """Where ``part`` stands in ``whole``, in order, if there is exactly one way to put it; counts ways up to two."""
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


Weights = Literal["auto", "model", "ema"]


@dataclass(frozen=True)
class Selection:
    """The nest that was chosen, the word for it in reports, and remarks."""

    nest: Nest
    label: str
    notes: tuple[str, ...] = ()


def _rank(nest: Nest) -> tuple[bool, int]:
    """The more likely the model's weights, the larger: names of layers (with dots) first, then the elements."""
    return any("." in name for name in nest.tensors), nest.numel


def select_weights(tree: Any, weights: Weights = "auto") -> Selection:
    """Choose the nest with the model's weights, or with their running average.

    ``"auto"`` takes the model's weights as the file's own framework would load them; ``"model"`` never an average of
    them; ``"ema"`` the average.
    """
    if weights not in ("auto", "model", "ema"):
        raise CheckpointError(f"holds no weights called {weights!r}: ask for one of 'auto', 'model', 'ema'")
    nests = find_nests(tree)
    if not nests:
        entries = [str(key)[:40] for key in as_mapping(tree) or ()][:8]
        kind = f"an object of {tree.type_name}" if isinstance(tree, ForeignObject) else f"a {type(tree).__name__}"
        inside = f"its entries are {entries}" if entries else f"it is {kind}"
        raise CheckpointError(f"holds no tensors: {inside}. Give the file that has the model's state dict")
    averaging = _weight_averaging(tree, nests, weights)
    if averaging is not None:
        return averaging
    plain = [nest for nest in nests if not nest.averaged]
    averaged = [nest for nest in nests if nest.averaged]
    model = max(plain, key=_rank, default=None)
    twins = [nest for nest in averaged if model is None or _is_twin(nest, model)]
    inner = inner_average(model) if model is not None else None
    listed = list_average(tree, model) if model is not None and not twins else None
    if weights == "ema":
        return _select_average(nests, twins, inner, listed)
    if model is None:
        best = max(averaged, key=_rank)
        return Selection(best, f"ema:{best.label}", (f"the file holds averaged (EMA) weights only, in {best.label!r}",))
    return _select_model(nests, model, twins, inner, listed, weights)


def _select_model(
    nests: list[Nest],
    model: Nest,
    twins: list[Nest],
    inner: tuple[str, Nest, Nest] | None,
    listed: tuple[str, Nest] | None,
    weights: Weights,
) -> Selection:
    notes = []
    where = twins[0].label if twins else listed[0] if listed else None
    if where is not None:
        notes.append(f"averaged (EMA) weights are in the file too, in {where!r}; weights='ema' takes them")
    if inner is not None:
        prefix, _, rest = inner
        notes.append(f"averaged (EMA) weights are among the weights too, under {prefix!r}; weights='ema' takes them")
        model = rest if weights == "model" else model
    others = [nest for nest in nests if nest is not model and nest not in twins and nest.numel * 20 > model.numel]
    others = [nest for nest in others if nest.path and not nest.averaged and nest.path != model.path]
    notes += [f"{len(nest.tensors)} further tensors are in {nest.label!r}; they were not taken" for nest in others]
    return Selection(model, model.label, tuple(notes))


def _select_average(
    nests: list[Nest], twins: list[Nest], inner: tuple[str, Nest, Nest] | None, listed: tuple[str, Nest] | None
) -> Selection:
    if twins:
        best = max(twins, key=_rank)
        return Selection(best, f"ema:{best.label}")
    if inner is not None:
        prefix, average, _ = inner
        return Selection(average, f"ema:{prefix.rstrip('.')}")
    if listed is not None:
        return Selection(listed[1], f"ema:{listed[0]}")
    there = ", ".join(f"{nest.label!r} ({len(nest.tensors)} tensors)" for nest in nests[:8])
    raise CheckpointError(f"holds no averaged (EMA) weights that cover the model's; it holds {there}. Ask for 'model'")


def _weight_averaging(tree: Any, nests: list[Nest], weights: Weights) -> Selection | None:
    """Lightning's WeightAveraging puts the average into ``state_dict`` and the model into ``current_model_state``."""
    top = as_mapping(tree)
    if top is None or "current_model_state" not in top or "averaging_state" not in top:
        return None
    by_path = {nest.path: nest for nest in nests}
    average, current = by_path.get(("state_dict",)), by_path.get(("current_model_state",))
    if average is None or current is None:
        return None
    if weights == "model":
        return Selection(current, "current_model_state")
    if weights == "ema":
        return Selection(average, "ema:state_dict")
    note = (
        "WeightAveraging wrote this file: its 'state_dict' is the running average, as Lightning loads it; "
        "ask for 'model' to take the weights of the last training step"
    )
    return Selection(average, "ema:state_dict", (note,))


def _is_twin(nest: Nest, model: Nest) -> bool:
    """Whether most of a nest's tensors are there in the model too, under the same names and in the same shapes."""
    shapes, mine = model.shapes(), nest.shapes()
    return sum(shapes.get(name) == shape for name, shape in mine.items()) * 2 > len(mine)
