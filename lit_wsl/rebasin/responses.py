"""What models answer to data: outputs, responses of their modules, and batch norm statistics estimated anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.inference.trace import output_tensors
from lit_wsl.rebasin.spec.spec import PermutationSpec
from lit_wsl.structure.description import require_batches

Forward = Callable[[nn.Module, Any], Any]


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether the model has batch norms with running statistics."""
    return bool(_norms(model))


def call_on_inputs(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch: the first of a pair of inputs and targets, the keywords of a dict, else as it is."""
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch)


@torch.no_grad()
def reestimate_batchnorm(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward = call_on_inputs, max_batches: int | None = None
) -> int:
    """Estimate the running statistics of all batch norms anew, in place.

    The mean of two networks has activations of smaller variance than either, and the mean of their statistics does
    not describe it; this restores most of what is lost (REPAIR, Jordan et al. 2023). The statistics are those of all
    batches together, every sample counted once, also where batches differ in size or in their means. Only batch norms
    run in training mode: dropout stays off, and the mode of every module is put back. A batch norm that no batch
    reaches keeps its statistics.

    Args:
        model: the merged model.
        batches: a dataloader or list of batches.
        forward: how to call the model on a batch.
        max_batches: stop after so many.

    Returns:
        The number of batches used; 0 if the model has no batch norms with running statistics.

    Raises:
        RebasinError: there was no batch.
    """
    require_batches(batches)
    norms = _norms(model)
    if not norms:
        return 0
    with _only_norms_in_training(model, norms):
        moments = [Moments() for _ in norms]
        hooks = [norm.register_forward_pre_hook(partial(_add, each)) for norm, each in zip(norms, moments)]
        count = 0
        try:
            for batch in islice(batches, max_batches):
                forward(model, batch)
                count += 1
        finally:
            for hook in hooks:
                hook.remove()
        if count == 0:
            raise RebasinError("no batch to estimate batch norm statistics from")
    for norm, each in zip(norms, moments):
        _store(each, norm)
    return count


def _add(moments: Moments, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    moments.add(args[0].movedim(1, 0))


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def _only_norms_in_training(model: nn.Module, norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Batch norms normalise by the batch, all else evaluates; modes and statistics are put back at the end."""
    modes = [(m, m.training) for m in model.modules()]
    saved = [{k: v.clone() for k, v in m.named_buffers(recurse=False)} for m in norms]
    try:
        model.eval()
        for norm in norms:
            norm.train()
        yield
    finally:
        for norm, buffers in zip(norms, saved):
            for key, value in buffers.items():
                getattr(norm, key).copy_(value)
        for module, training in modes:
            module.training = training


class Moments:
    """Mean and variance of channels over pieces of data, in float64 (Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        self.count, self.pieces = 0, 0
        self.mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0  # sum of squared distances from the mean

    def add(self, values: Tensor) -> None:
        """Add a piece ``(channels, ...)``, all axes behind the first being samples."""
        columns = values.detach().reshape(len(values), -1).double()
        variance, mean = torch.var_mean(columns, dim=1, correction=0)
        here, total = columns.shape[1], self.count + columns.shape[1]
        apart = mean - self.mean
        self.mean = self.mean + apart * (here / total)
        self._squares = self._squares + variance * here + apart.square() * (self.count * here / total)
        self.count, self.pieces = total, self.pieces + 1

    def variance(self, correction: int = 0) -> Tensor:
        """Variance of each channel; with a correction of one unbiased, as batch norms keep it."""
        return torch.as_tensor(self._squares) / max(self.count - correction, 1)


def _store(moments: Moments, norm: _BatchNorm) -> None:
    """Write statistics into a batch norm, if any data reached it."""
    if moments.pieces == 0 or norm.running_mean is None or norm.running_var is None:
        return
    norm.running_mean.copy_(torch.as_tensor(moments.mean))
    norm.running_var.copy_(moments.variance(correction=1))
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(moments.pieces)


Listener = Callable[[nn.Module, Any, Any], None]


class Responses:
    """What a copy of a model answers to batches, inside and at its end, under any state dict.

    Without ``max_batches`` the batches are not kept, but iterated anew each time.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Forward = call_on_inputs,
        max_batches: int | None = None,
    ) -> None:
        require_batches(batches)
        self.model = copy.deepcopy(model).eval()
        self.batches = batches if max_batches is None else list(islice(batches, max_batches))
        self._given, self.forward = forward, self._forward

    def _forward(self, model: nn.Module, batch: Any) -> Any:
        """Call the model as asked for; what it does not take is said."""
        try:
            return self._given(model, batch)
        except RebasinError:
            raise
        except Exception as error:
            raise RebasinError(
                f"{type(model).__name__} does not take a batch ({type(error).__name__}: {error}); forward= says how to "
                "call it, forward=lambda model, batch: model(batch[0], batch[1])"
            ) from error

    def under(self, state_dict: Mapping[str, Tensor]) -> nn.Module:
        """The copy of the model with these weights, in eval mode."""
        self.model.load_state_dict(dict(state_dict))
        return self.model.eval()

    @torch.no_grad()
    def listen(self, state_dict: Mapping[str, Tensor], listeners: Mapping[str, Listener]) -> list[Tensor]:
        """Run all batches for the listeners of modules; the model's floating outputs as ``(samples, channels)``."""
        kept: list[list[Tensor]] = []
        for output in self.run(state_dict, listeners):
            found = [torch.view_as_real(t) if t.is_complex() else t for t in output_tensors(output)]
            kept = kept or [[] for _ in found]
            for parts, tensor in zip(kept, found):
                parts.append(tensor.double().flatten(0, max(0, tensor.ndim - 2)))
        return [torch.cat(parts) for parts in kept]

    @torch.no_grad()
    def run(self, state_dict: Mapping[str, Tensor], listeners: Mapping[str, Listener]) -> Iterator[Any]:
        """Run all batches as :meth:`listen` does, and give what the model returns to each."""
        model = self.under(state_dict)
        hooks = [model.get_submodule(path).register_forward_hook(listen) for path, listen in listeners.items()]
        empty = True
        try:
            for batch in self.batches:
                empty = False
                yield self.forward(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        if empty:
            raise RebasinError("no batch to run the model on")

    def outputs(self, state_dict: Mapping[str, Tensor]) -> list[Tensor]:
        """Every floating output over all batches, ``(samples, channels)`` in float64."""
        found = self.listen(state_dict, {})
        if not found:
            raise RebasinError("the model returns no floating tensor")
        return found

    def with_statistics(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict with batch norm statistics estimated anew on the batches."""
        state = dict(state_dict)
        if has_batch_statistics(self.model):
            model = self.under(state_dict)
            reestimate_batchnorm(model, self.batches, forward=self.forward)
            buffers = {name for name, _ in model.named_buffers()}
            state.update({n: t.detach().clone() for n, t in model.state_dict().items() if n in buffers})
        return state


def drawn(columns: Tensor, quota: int, seed: int) -> Tensor:
    """So many of the columns at most, the same ones for the same seed and number of columns."""
    columns = columns.detach()
    if columns.shape[1] <= quota:
        return columns.clone()
    draw = torch.randperm(columns.shape[1], generator=torch.Generator().manual_seed(seed))[:quota]
    return columns[:, draw.to(columns.device)]


def output_axis(model: nn.Module, name: str) -> int:
    """Axis of a module's weight (given by its full name) that the module's output channels lie on."""
    module = model.get_submodule(name.rpartition(".")[0])
    return 1 if isinstance(module, _ConvTransposeNd) else 0


def channel_axis(module: nn.Module, output: Tensor) -> int:
    """Axis of a module's output that holds its channels: the second for convolutions and batch norms, else the last."""
    return 1 if isinstance(module, (_ConvNd, _NormBase, nn.GroupNorm)) and output.ndim > 1 else output.ndim - 1


def module_responses(
    spec: PermutationSpec, data: Responses, state_dict: Mapping[str, Tensor], *, max_samples: int = 8192, seed: int = 0
) -> dict[str, Tensor]:
    """Standardised responses ``(channels, samples)`` by the name of the weight whose output axis they share."""
    kept: dict[str, list[Tensor]] = {}

    def listen(name: str, length: int, module: nn.Module, arguments: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        axis = channel_axis(module, output)
        if output.shape[axis] == length:
            parts = kept.setdefault(name, [])
            columns = output.movedim(axis, 0).reshape(length, -1).float()
            parts.append(drawn(columns, max(1, max_samples // 4), seed + len(parts)))

    listeners: dict[str, Listener] = {}
    for path, module in data.model.named_modules():
        name = f"{path}.weight" if path else "weight"
        if name in spec.axes and isinstance(getattr(module, "weight", None), Tensor):
            axis_spec = spec.axes[name].get(output_axis(data.model, name))
            if axis_spec is not None and axis_spec.outer_axis is None is axis_spec.stack_axis:
                listeners[path] = partial(listen, name, axis_spec.length)
    data.listen(state_dict, listeners)
    return {name: _standardise(torch.cat(parts, dim=1), max_samples) for name, parts in kept.items()}


def same_positions(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Refuse responses of two models that are not to the same data."""
    if any(a[name].shape != b[name].shape for name in a):
        raise RebasinError("the two passes over the batches saw different amounts of data: use a list or fixed loader")


def _standardise(responses: Tensor, max_samples: int) -> Tensor:
    """Each row with mean 0 and norm 1 (silent units stay 0), from at most so many columns, evenly spaced."""
    if responses.shape[1] > max_samples:
        pick = torch.linspace(0, responses.shape[1] - 1, max_samples).round().long()
        responses = responses[:, pick.to(responses.device)]
    centred = responses.double() - responses.double().mean(dim=1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    return torch.where(norm > 1e-12, centred / norm.clamp_min(1e-300), 0.0).float()
