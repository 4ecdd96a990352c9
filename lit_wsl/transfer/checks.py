"""Does a plan fit? Everything that can be known from names, shapes and dtypes, before a tensor is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from lit_wsl.errors import PlanError
from lit_wsl.structure.info import ModelDescription, ParameterInfo
from lit_wsl.transfer.operations import run_shapes
from lit_wsl.transfer.plan import PlanEntry, TransferPlan

_REMEDY = (
    "Nothing was changed. Edit or remove that entry, or make a new plan for these two: leave out `plan` to match again."
)


def check_plan(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> None:
    """Refuse a plan that does not fit both sides, naming the entry, the shapes and what to do.

    Args:
        plan: The plan.
        source: The checkpoint's side.
        target: The model's side.

    Raises:
        PlanError: If an entry names a tensor that is not there, was made for other shapes, changes a tensor's kind of
            number so that values would be lost, or if two entries fill one target.
    """
    problems = [problem for entry in plan.entries for problem in _problems(entry, source, target)]
    filled = Counter(target.tied.get(name, name) for entry in plan.entries for name in entry.targets)
    problems += [f"{name} is filled {n} times" for name, n in sorted(filled.items()) if n > 1]
    if problems:
        more = f" ({len(problems) - 1} more entries do not fit.)" if len(problems) > 1 else ""
        raise PlanError(f"The plan does not fit {source.label} -> {target.label}: {problems[0]}.{more} {_REMEDY}")


def _problems(entry: PlanEntry, source: ModelDescription, target: ModelDescription) -> Iterator[str]:
    """Yield what is wrong with one entry, in words; stops at the first thing that makes the rest meaningless."""
    title = describe_entry(entry)
    if not entry.sources or not entry.targets:
        yield f"entry {title} has no {'source' if not entry.sources else 'target'}"
        return
    for side, names in ((source, entry.sources), (target, entry.targets)):
        for name in names:
            if name not in side:
                yield f"entry {title}: {side.label} has no tensor {name!r}{_nearest(name, side)}"
                return
    given = [source[name].shape for name in entry.sources]
    for name, shape, planned in zip(entry.sources, given, entry.source_shapes):
        if tuple(shape) != tuple(planned):
            yield f"entry {title}: {name} has shape {shape} in {source.label}, but the plan was made for {planned}"
            return
    try:
        results = run_shapes(entry.operations, given)
    except PlanError as error:
        yield f"entry {title}: {str(error).rstrip('.')}"
        return
    if len(results) != len(entry.targets):
        yield f"entry {title}: its operations give {len(results)} tensors for {len(entry.targets)} targets"
        return
    for name, result in zip(entry.targets, results):
        if tuple(result) != target[name].shape:
            yield (
                f"entry {title}: {', '.join(entry.sources)} {'give' if len(entry.sources) > 1 else 'gives'} shape "
                f"{tuple(result)}, but {name} in {target.label} has {target[name].shape}"
            )
            return
    for name in entry.targets:
        for origin in entry.sources:
            if loses_values(source[origin].dtype, target[name].dtype):
                yield (
                    f"entry {title}: {origin} is {source[origin].dtype}, but {name} in {target.label} is "
                    f"{target[name].dtype}, which cannot hold its values"
                )
                return


def loses_values(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast drops a whole part of the numbers: imaginary parts, fractions, everything but true and false.

    Rounding from one floating type to another is not counted; that is what a user who builds a half-precision model
    asks for, and it is noted in the report.

    >>> loses_values(torch.float32, torch.int64), loses_values(torch.float32, torch.bfloat16)
    (True, False)
    """

    def rank(dtype: torch.dtype) -> int:
        return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 0 if dtype == torch.bool else 1

    return rank(source) > rank(target)


def describe_entry(entry: PlanEntry) -> str:
    """One entry in one line: ``[q, k, v] --concat--> [qkv]``.

    >>> describe_entry(PlanEntry(("a.weight",), ("b.weight",)))
    'a.weight -> b.weight'
    """

    def side(names: tuple[str, ...]) -> str:
        shown = ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")
        return shown if len(names) == 1 else f"[{shown}]"

    arrow = "->" if not entry.operations else f"--{'+'.join(op.name for op in entry.operations)}-->"
    return f"{side(entry.sources)} {arrow} {side(entry.targets)}"


def _nearest(name: str, side: ModelDescription) -> str:
    """A hint at the name that was probably meant."""
    from rapidfuzz import process

    found = process.extractOne(name, [info.name for info in side.parameters], score_cutoff=60)
    return f" (did you mean {found[0]!r}?)" if found else ""


def left_alone(info: ParameterInfo) -> bool:
    """Whether a tensor of the target holds packed or quantised weights, whose numbers mean nothing by themselves.

    Gradients need floating point, so a parameter that is not holds codes of a quantiser; copying plain weights over
    them, or one quantiser's codes over another's, gives a wrong model without an error.
    """
    return info.kind == "parameter" and not (info.dtype.is_floating_point or info.dtype.is_complex)
