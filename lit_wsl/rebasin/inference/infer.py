"""Infer the permutation spec of any model from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import nn

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.inference import rules_compute, rules_index, rules_shape  # noqa: F401  (registers the rules)
from lit_wsl.rebasin.inference.groups import build_spec
from lit_wsl.rebasin.inference.propagate import propagate
from lit_wsl.rebasin.inference.run import Joint, Run
from lit_wsl.rebasin.inference.trace import Trace, trace_forward, traceable
from lit_wsl.rebasin.spec.spec import PermutationSpec

MAX_PASSES = 6
Place: TypeAlias = tuple[int, int]


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
    with traceable(model):
        trace = trace_forward(model, example_args, example_kwargs, outputs)
    spec = spec_from_trace(trace)
    spec = replace(spec, parameters=tuple(dict(model.named_parameters())))
    if verify and spec.groups:
        from lit_wsl.rebasin.inference.verify import verify_permutation_spec

        spec = verify_permutation_spec(spec, model, example_args, example_kwargs, outputs=outputs).spec
    return spec


def spec_from_trace(trace: Trace) -> PermutationSpec:
    """Apply the rules to a trace until no rule asks for a finer labelling.

    Finer labels that rules wish for, but can do without, are kept if more is moved with them.
    """
    plain, wishes = _spec(trace, wishes=False)
    if not wishes:
        return plain
    try:
        finer, _ = _spec(trace, wishes=True)
    except RebasinError:  # what is found cannot be written as a spec
        return plain
    return finer if _moved(finer) > _moved(plain) else plain


def _spec(trace: Trace, wishes: bool) -> tuple[PermutationSpec, bool]:
    """The spec, and whether rules wished for finer labels."""
    joints: dict[Place, Joint] = {}
    for _ in range(MAX_PASSES):
        run = Run(trace, joints=joints)
        propagate(run)
        asked = [*run.requests, *(run.wishes if wishes else ())]
        finer = refined(joints, [ask for ask in asked if ask[0] not in run.ordered])
        if finer == joints:
            # Nothing to be followed more closely: where an axis or what it is bound to stays, units may be loose.
            still = {place for place, made in run.axes.items() if not run.algebra.units.find(made).any()}
            finer = {
                (number, axis): replace(
                    joint, bound=joint.bound and not still.intersection([(number, axis), (number, joint.outer[-1])])
                )
                for (number, axis), joint in joints.items()
            }
        if finer == joints:
            break
        joints = finer
    return build_spec(run), any(place not in run.ordered for place, _ in run.wishes)


def _moved(spec: PermutationSpec) -> tuple[float, int]:
    """How much a spec moves: axes, and with how many groups."""
    shares = (float(axis.touched.double().mean()) for by_axis in spec.axes.values() for axis in by_axis.values())
    return round(sum(shares), 6), len(spec.groups)


def refined(joints: Mapping[Place, Joint], asked: Sequence[tuple[Place, Joint]]) -> dict[Place, Joint]:
    """The joints with those that are asked for: each axis below the axes that those around it are below.

    >>> refined({(0, 1): Joint((0,))}, [((0, 2), Joint((1,)))])
    {(0, 1): Joint(outer=(0,), blocks=None, bound=True), (0, 2): Joint(outer=(0, 1), blocks=None, bound=True)}
    """
    result = dict(joints)
    for place, joint in asked:
        known = result.get(place, Joint(()))
        if place not in result and joint.blocks is not None:
            result[place] = joint
        elif known.blocks is None and joint.blocks is None:
            result[place] = replace(known, outer=tuple(dict.fromkeys((*known.outer, *joint.outer))))
    for _ in range(len(result)):
        for (number, axis), joint in result.items():
            if joint.blocks is not None:
                continue
            above = {outer: result.get((number, outer), Joint(())) for outer in joint.outer}
            usable = [o for o, j in above.items() if j.blocks is None and axis not in j.outer]
            every = {*usable, *(a for outer in usable for a in above[outer].outer)} - {axis}
            ordered = tuple(sorted(every, key=lambda a: (len(_outer(result, number, a)), a)))
            result[number, axis] = replace(joint, outer=ordered)
    return {place: joint for place, joint in result.items() if joint.outer}


def _outer(joints: Mapping[Place, Joint], number: int, axis: int) -> tuple[int, ...]:
    return joints.get((number, axis), Joint(())).outer
