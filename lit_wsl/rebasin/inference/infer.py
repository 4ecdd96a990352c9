"""Infer the permutation spec of any model from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lit_wsl.rebasin.inference import rules_compute, rules_index, rules_shape  # noqa: F401  (registers the rules)
from lit_wsl.rebasin.inference.groups import build_spec
from lit_wsl.rebasin.inference.propagate import propagate
from lit_wsl.rebasin.inference.run import Joint, Run
from lit_wsl.rebasin.inference.trace import Trace, trace_forward, undisturbed
from lit_wsl.rebasin.spec.spec import PermutationSpec

MAX_PASSES = 5


def infer_permutation_spec(
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Callable[[Any], Any] | None = None,
    verify: bool = True,
) -> PermutationSpec:
    """Find every permutation of units that leaves the function of a model as it is.

    One forward pass is recorded at the ATen level. Every position of every parameter axis (and of the statistics of
    norms) is a unit; operations that move data move units, operations that compute tie units together, fix them, or
    tie them into blocks (heads, groups, experts). Units of equal use form a group. An operation without a rule fixes
    all that enters it.

    Args:
        model: Any module; its mode, buffers, gradients and the random state are left as they were.
        example_args: Positional arguments of one call.
        example_kwargs: Keyword arguments of the call.
        outputs: Picks what counts from what the model returns (``lambda output: output.logits``). Whatever counts stays
            as it is; by default every floating tensor in tuples, mappings and dataclasses does, hidden states too.
        verify: Check the result with :func:`verify_permutation_spec` and drop groups that would break the function.

    Returns:
        The spec; ``spec.summary()`` says what was found, what stays and why, ``spec.coverage`` how much of the
        parameters it moves. A model without any such permutation gets a spec without groups.

    Raises:
        RebasinError: The forward pass fails, or the model cannot be verified in float64.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> spec = infer_permutation_spec(net, (torch.ones(1, 3),))
    >>> [(group.name, group.size) for group in spec.groups.values()]
    [('0.weight:0', 8)]
    """
    with undisturbed(model):
        trace = trace_forward(model, example_args, example_kwargs, outputs)
    spec = spec_from_trace(trace)
    spec = replace(spec, parameters=tuple(dict(model.named_parameters())))
    if verify and spec.groups:
        from lit_wsl.rebasin.inference.verify import verify_permutation_spec

        spec = verify_permutation_spec(spec, model, example_args, example_kwargs, outputs=outputs).spec
    return spec


def spec_from_trace(trace: Trace) -> PermutationSpec:
    """Apply the rules to a trace until no rule asks for a finer labelling."""
    joints: dict[tuple[int, int], Joint] = {}
    for _ in range(MAX_PASSES):
        run = Run(trace, joints=dict(joints))
        propagate(run)
        if not run.requests:
            break
        joints.update(run.requests)
    return build_spec(run)
