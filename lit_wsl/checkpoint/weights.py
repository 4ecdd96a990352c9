"""Finding the weights inside a checkpoint by structure: which nest is the state dict, which is an EMA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lit_wsl.checkpoint.averages import inner_average, list_average
from lit_wsl.checkpoint.inert import ForeignObject, as_mapping
from lit_wsl.checkpoint.nests import Nest, find_nests
from lit_wsl.errors import CheckpointError

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
    inner = inner_average(model) if model is not None else None
    listed = list_average(tree, model) if model is not None and not twins else None
    if weights == "ema":
        return _select_average(nests, twins, inner, listed)
    if model is None:
        best = max(averaged, key=_rank)
        return Selection(best, f"ema:{best.label}", (f"the file holds averaged (EMA) weights only, in {best.label!r}",))
    return _select_model(nests, model, twins, inner, listed, weights)


def _described(tree: Any) -> str:
    return f"an object of {tree.type_name}" if isinstance(tree, ForeignObject) else f"a {type(tree).__name__}"


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
    raise CheckpointError(
        f"holds no averaged (EMA) weights that cover the model's; it holds {there}. Take the model's weights with "
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
