"""Finding the weights inside a checkpoint by structure: which nest is the state dict, which is an EMA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from lit_wsl.checkpoint.document import LazyTensor
from lit_wsl.checkpoint.inert import ForeignObject, as_mapping
from lit_wsl.checkpoint.modules import attributes, is_module, module_state_dict, numpy_tensor
from lit_wsl.errors import CheckpointError

Weights = Literal["auto", "model", "ema"]
Leaf = Tensor | LazyTensor

MAX_NEST = 6
_AVERAGE_WORDS = {"ema", "average", "averaged", "averaging", "avg", "swa", "shadow", "polyak"}


@dataclass(frozen=True)
class Nest:
    """A place in the tree that holds named tensors.

    Attributes:
        path: the keys that lead there.
        tensors: names and tensors.
        extra: its entries that are no tensors, such as ``_extra_state``.
        module: whether it is a whole pickled module.
    """

    path: tuple[str, ...]
    tensors: dict[str, Leaf]
    extra: dict[Any, Any] = field(default_factory=dict)
    module: bool = False

    @property
    def numel(self) -> int:
        """Number of elements of all its tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def averaged(self) -> bool:
        """Whether a word on its path says that it is a running average of the weights."""
        return any(_words(part) & _AVERAGE_WORDS for part in self.path)

    @property
    def label(self) -> str:
        """Its path as text."""
        return ".".join(self.path) or "state_dict"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, without a leading ``module.`` that all names share."""
        names = list(self.tensors)
        common = "module." if all(name.startswith("module.") or "." not in name for name in names) else ""
        return {name.removeprefix(common): tuple(tensor.shape) for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Selection:
    """The nest that was chosen, the word for it in reports, and remarks."""

    nest: Nest
    label: str
    notes: tuple[str, ...] = ()


def _words(text: str) -> set[str]:
    """Cut a key into lower-case words: ``state_dict_ema``, ``EMACallback``, ``modelEma``."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)
    return {part.lower() for part in parts}


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
        if _is_optimizer(entries):
            continue
        nest = _nest(path, entries)
        if nest.tensors:
            found.append(nest)
        inner = [(path + (key,), child) for key, child in entries.items() if isinstance(key, str)]
        stack.extend(reversed([item for item in inner if _is_container(item[1])]))
    return found


def _is_container(value: Any) -> bool:
    return as_mapping(value) is not None or isinstance(value, ForeignObject)


def _is_optimizer(entries: Mapping[Any, Any]) -> bool:
    """Tell an optimizer's state dict by its two parts, nested or flattened into dotted names."""
    if "param_groups" in entries and "state" in entries:
        return True
    return any(isinstance(key, str) and key.startswith("param_groups.") for key in entries)


def _nest(path: tuple[str, ...], entries: Mapping[Any, Any]) -> Nest:
    tensors: dict[str, Leaf] = {}
    extra: dict[Any, Any] = {}
    for key, value in entries.items():
        name = key.decode("utf-8", "replace") if isinstance(key, bytes) else key
        leaf = value if isinstance(value, (Tensor, LazyTensor)) else numpy_tensor(value)
        if isinstance(name, str) and leaf is not None:
            tensors[name] = leaf
        else:
            extra[key] = value
    return Nest(path, tensors, extra)


def _rank(nest: Nest) -> tuple[bool, int]:
    """The more likely the model's weights, the larger: names of layers (with dots) first, then the elements."""
    return any("." in name for name in nest.tensors), nest.numel


def select_weights(tree: Any, weights: Weights = "auto") -> Selection:
    """Choose the nest with the model's weights, or with their running average.

    Args:
        tree: the content of a checkpoint.
        weights: ``"auto"`` takes the model's weights as the file's own framework would load them; ``"model"`` never an
            average of them; ``"ema"`` the average.

    Raises:
        CheckpointError: if there are no tensors, or no average where one is asked for.
    """
    if weights not in ("auto", "model", "ema"):
        raise CheckpointError(f"weights={weights!r} is not one of 'auto', 'model', 'ema'.")
    nests = find_nests(tree)
    if not nests:
        entries = [str(key)[:40] for key in as_mapping(tree) or ()][:8]
        inside = f"its entries are {entries}" if entries else f"it is {_described(tree)}"
        raise CheckpointError(f"holds no tensors: {inside}. Give the file that has the model's state dict")
    averaging = _weight_averaging(tree, nests, weights)
    if averaging is not None:
        return averaging
    plain = [nest for nest in nests if not nest.averaged]
    averaged = [nest for nest in nests if nest.averaged]
    model = max(plain, key=_rank, default=None)
    twins = [nest for nest in averaged if model is None or _is_twin(nest, model)]
    inner = _inner_average(model) if model is not None else None
    if weights == "ema":
        return _select_average(nests, twins, inner)
    if model is None:
        best = max(averaged, key=_rank)
        return Selection(best, f"ema:{best.label}", (f"the file holds averaged (EMA) weights only, in {best.label!r}",))
    return _select_model(nests, model, twins, inner, weights)


def _described(tree: Any) -> str:
    return f"an object of {tree.type_name}" if isinstance(tree, ForeignObject) else f"a {type(tree).__name__}"


def _select_model(
    nests: list[Nest], model: Nest, twins: list[Nest], inner: tuple[str, Nest, Nest] | None, weights: Weights
) -> Selection:
    notes = []
    if twins:
        notes.append(f"averaged (EMA) weights are in the file too, in {twins[0].label!r}; weights='ema' takes them")
    if inner is not None:
        prefix, _, rest = inner
        notes.append(f"averaged (EMA) weights are among the weights too, under {prefix!r}; weights='ema' takes them")
        model = rest if weights == "model" else model
    others = [nest for nest in nests if nest is not model and nest not in twins and nest.numel * 20 > model.numel]
    others = [nest for nest in others if nest.path and not nest.averaged and nest.path != model.path]
    notes += [f"{len(nest.tensors)} further tensors are in {nest.label!r}; they were not taken" for nest in others]
    return Selection(model, model.label, tuple(notes))


def _select_average(nests: list[Nest], twins: list[Nest], inner: tuple[str, Nest, Nest] | None) -> Selection:
    if twins:
        best = max(twins, key=_rank)
        return Selection(best, f"ema:{best.label}")
    if inner is not None:
        prefix, average, _ = inner
        return Selection(average, f"ema:{prefix.rstrip('.')}")
    listed = ", ".join(f"{nest.label!r} ({len(nest.tensors)} tensors)" for nest in nests[:8])
    raise CheckpointError(
        f"holds no averaged (EMA) weights that cover the model's; it holds {listed}. Take the model's weights with "
        "weights='model'"
    )


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
        "weights='model' takes the weights of the last training step"
    )
    return Selection(average, "ema:state_dict", (note,))


def _is_twin(nest: Nest, model: Nest) -> bool:
    """Whether most of a nest's tensors are there in the model too, under the same names and in the same shapes."""
    shapes, mine = model.shapes(), nest.shapes()
    return sum(shapes.get(name) == shape for name, shape in mine.items()) * 2 > len(mine)


def _inner_average(model: Nest) -> tuple[str, Nest, Nest] | None:
    """Find an average that is a submodule of the model: ``ema.module.layer.weight`` beside ``net.layer.weight``.

    Some averages (LDM's LitEma) keep their names without dots; both spellings are understood. The result is
    the submodule's prefix, the averaged weights under the model's names, and the model without the submodule.
    """
    heads = sorted({name.partition(".")[0] for name in model.tensors if "." in name})
    for head in heads:
        if not _words(head) & _AVERAGE_WORDS:
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
    prefixes = sorted({""} | {name[: at + 1] for name in rest for at, letter in enumerate(name) if letter == "."})
    for prefix in prefixes[:2000]:
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
