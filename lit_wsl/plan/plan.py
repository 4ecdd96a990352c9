"""A plan: what will be loaded, as data, before anything is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import torch

from lit_wsl.errors import PlanError, Summarised, printable
from lit_wsl.plan.coverage import Conversion
from lit_wsl.plan.entries import Ambiguity as Ambiguity
from lit_wsl.plan.entries import Candidate as Candidate
from lit_wsl.plan.entries import PlanData, PlanEntry
from lit_wsl.plan.entries import SideSummary as SideSummary
from lit_wsl.plan.entries import Unmatched as Unmatched
from lit_wsl.plan.file import load_plan, plan_from_text, save_plan
from lit_wsl.plan.operations import run_shapes
from lit_wsl.structure.description import ModelDescription, ParameterInfo
from lit_wsl.structure.families import fold

if TYPE_CHECKING:
    from typing_extensions import Self


CONVERTER = "lit_wsl.convert.checkpoint:convert_checkpoint"  # the one arrow up: a name, looked up when it is called
SHOWN = 12  # families of entries in a plan's summary


@dataclass(frozen=True, repr=False)
class TransferPlan(Summarised, PlanData):
    """An ordered list of operations that takes a checkpoint into a model.

    Attributes: see :class:`~lit_wsl.plan.entries.PlanData`.
    """

    def __repr__(self) -> str:
        sides = f"{self.source.label} -> {self.target.label}"
        return printable(
            f"<TransferPlan {sides}: {len(self.entries)} entries, {len(self.ambiguous)} ambiguous, "
            f"{len(self.unmatched_source)} sources and {len(self.unmatched_target)} targets unmatched, {self.proof}>"
        )

    def summary(self) -> str:
        """What it would load, folded, as text; shortened, since :meth:`save` has it all."""
        names = [(*entry.sources, *entry.targets) for entry in self.entries]
        families = fold(names, [(len(entry.sources), entry.badge) for entry in self.entries])
        lines = [repr(self)[1:-1]]
        for family in families[:SHOWN]:
            first = self.entries[family.members[0]]
            cut = len(first.sources)
            badge = "" if first.badge == "exact" else f"  ({first.badge})"
            lines.append(f"  {' + '.join(family.patterns[:cut])} -> {', '.join(family.patterns[cut:])}{badge}")
        if len(families) > SHOWN:
            lines.append(f"  ... and {len(families) - SHOWN} more lines")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON (or YAML, by suffix), folded by families; atomically.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        save_plan(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan from JSON or YAML.

        Raises:
            PlanError: If the file is not a valid plan; the message names the entry.
        """
        return cls(**load_plan(path))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read a plan from the text of its file.

        Raises:
            PlanError: If it is not a valid plan.
        """
        return cls(**plan_from_text(text))

    def reverse(self) -> TransferPlan:
        """The plan that takes the model's tensors back to the checkpoint's.

        Raises:
            PlanError: If an entry changes values and so has no inverse.
        """
        return reverse_plan(self)

    def convert_checkpoint(self, source: str | Path, destination: str | Path, **options: Any) -> Conversion:
        """Write a checkpoint for the new model that training resumes from.

        Args:
            source: The old checkpoint.
            destination: The file to write; ``.safetensors`` holds the weights only.
            **options: As for :func:`lit_wsl.convert.checkpoint.convert_checkpoint`; above all ``target``, the model.

        Returns:
            What was done.

        Raises:
            CheckpointError: If a file cannot be read or written, or an optimizer's state cannot be carried.
            PlanError: If the plan does not fit.
        """
        done: Conversion = resolve_name(CONVERTER)(source, destination, self, **options)
        return done


_REMEDY = (
    "Nothing was changed. Edit or remove that entry, or make a new plan for these two: leave out `plan` to match again."
)


def check_plan(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> None:
    """Refuse a plan that does not fit both sides, naming the entry, the shapes and what to do."""
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


def reverse_entry(entry: PlanEntry) -> PlanEntry:
    """The entry that undoes an entry."""
    lost = [op.name for op in entry.operations if not op.lossless]
    if lost:
        raise PlanError(
            f"the entry for {entry.targets[0]!r} cannot be reversed, since {lost[0]} changes values; "
            "remove the entry, or match the other way round."
        )
    try:
        operations = tuple(operation.reverse() for operation in reversed(entry.operations))
    except PlanError as error:
        raise PlanError(f"the entry for {entry.targets[0]!r} cannot be reversed: {error}") from error
    return replace(
        entry,
        sources=entry.targets,
        targets=entry.sources,
        operations=operations,
        source_shapes=entry.target_shapes,
        target_shapes=entry.source_shapes,
    )


def reverse_plan(plan: TransferPlan) -> TransferPlan:
    """Reverse every entry of a plan, in the same order.

    What was ambiguous is not decided by turning around: its targets become unused sources.
    """
    for source, users in plan.by_source.items():
        if len(users) > 1:
            raise PlanError(
                f"{source!r} is used by {len(users)} entries (for {users[0].targets[0]!r} and "
                f"{users[1].targets[0]!r}), so the way back would fill it twice; join them with fan_out, or remove one."
            )
    return replace(
        plan,
        entries=tuple(map(reverse_entry, plan.entries)),
        source=plan.target,
        target=plan.source,
        ambiguous=(),
        unmatched_source=plan.unmatched_target,
        unmatched_target=plan.unmatched_source,
        notes=(*plan.notes, *(f"left out as ambiguous: {', '.join(a.targets)}" for a in plan.ambiguous)),
    )
