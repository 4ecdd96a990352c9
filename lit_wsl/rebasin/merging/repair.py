"""REPAIR (Jordan et al. 2023): give the hidden units of a merged network the statistics of those it was merged from.

The mean of two units that respond alike, but not equally, varies less than either, and layer by layer the responses of
a merged network fade. Where batch norms follow, estimating their statistics anew undoes it
(:func:`~lit_wsl.rebasin.reestimate_batchnorm`). Without them, each unit is scaled and shifted so that its mean
and standard deviation over data are the weighted means of the end points'; both fold into the layer's weight and bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.responses import (
    Forward,
    Listener,
    Moments,
    Responses,
    call_on_inputs,
    channel_axis,
    has_batch_statistics,
    output_axis,
    reestimate_batchnorm,
)
from lit_wsl.rebasin.spec.spec import PermutationSpec

Statistics = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def repair(
    model: nn.Module,
    endpoints: Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    batches: Iterable[Any],
    weights: Sequence[float] | None = None,
    *,
    forward: Forward = call_on_inputs,
) -> int:
    """Repair a merged model in place.

    With batch norms their statistics are estimated anew. Without, the linear and convolution layers that write hidden
    units (those that some permutation group moves) are rescaled, one after the other in the order in which they run;
    that takes one pass over the batches for each of them. The output layer is not touched.

    Args:
        model: the merged model, of which ``endpoints`` were aligned and averaged.
        endpoints: the aligned state dicts that were merged.
        spec: permutation spec of the architecture.
        batches: a list or loader; iterated several times.
        weights: how much each end point counts; equally by default.
        forward: how to call the model on a batch.

    Returns:
        The number of layers that were repaired (batch norms or rescaled layers).

    Raises:
        RebasinError: there is no batch, or the weights don't fit.
    """
    if has_batch_statistics(model):
        reestimate_batchnorm(model, batches, forward=forward)
        return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    weights = [1.0 / len(endpoints)] * len(endpoints) if weights is None else list(weights)
    if len(weights) != len(endpoints):
        raise RebasinError(f"{len(endpoints)} end points but {len(weights)} weights")
    layers, data = _hidden_layers(model, spec), Responses(model, batches, forward)
    wanted = [_statistics(data, endpoint, layers) for endpoint in endpoints]
    for name in wanted[0]:  # in the order of execution
        now = _statistics(data, model.state_dict(), [name])[name]
        mean = sum(w * found[name][0] for w, found in zip(weights, wanted))
        std = sum(w * found[name][1] for w, found in zip(weights, wanted))
        _fold(model.get_submodule(name), now, (torch.as_tensor(mean), torch.as_tensor(std)))
    return len(wanted[0])


def _hidden_layers(model: nn.Module, spec: PermutationSpec) -> list[str]:
    """Layers with a weight of two axes or more whose outputs some permutation group moves."""
    names = []
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2 and output_axis(model, name) in spec.axes.get(name, {}):
            names.append(path)
    return names


def _statistics(data: Responses, state_dict: Mapping[str, Tensor], layers: Sequence[str]) -> Statistics:
    """Mean and standard deviation of every output channel of the layers over the batches, by first execution."""
    moments: dict[str, Moments] = {}

    def listen_as(name: str) -> Listener:
        def listen(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            axis = channel_axis(module, output)
            moments.setdefault(name, Moments()).add(output.movedim(axis, 0))

        return listen

    for _ in data.run(state_dict, {name: listen_as(name) for name in layers}):
        pass
    if layers and not moments:
        raise RebasinError("none of the merged model's hidden layers ran, so it cannot be repaired")
    return {name: (torch.as_tensor(found.mean), found.variance().sqrt()) for name, found in moments.items()}


def _fold(module: nn.Module, now: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Scale and shift the outputs of a layer by its weight and bias."""
    weight = module.get_parameter("weight")
    # A unit that is silent in the merged network has nothing to be scaled up.
    scale = torch.where(now[1] > 1e-12, wanted[1] / now[1].clamp_min(1e-12), 1.0)
    axis = output_axis(module, "weight")
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    weight.copy_(weight.double() * scale.reshape(shape))
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.copy_((bias.double() - now[0]) * scale + wanted[0])
