"""The records of a plan: entries, what was left open or unmatched, and what is remembered of each side."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from lit_wsl.plan.operations import Cast, Operation
from lit_wsl.structure.description import Kind, ModelDescription, Shape

Side = Literal["source", "target"]
Proof = Literal["proven", "refuted", "not tested"]
ProofBy = Literal["function", "data", ""]

# why a tensor that nobody asked for has no partner
OUTSIDE = "stands outside of source_prefix="
LEFT_ALONE = "left alone, as only= and skip= ask"
AVERAGE = "an average of the weights, which stand beside it; checkpoint_weights='ema' takes it"
ITS_PLACE = f"its place is {LEFT_ALONE}"


@dataclass(frozen=True)
class PlanEntry:
    """One step of a plan: these sources become these targets.

    Attributes:
        sources: Names in the checkpoint, in the order in which the operations take them.
        targets: Names in the model, in the order in which the operations give them.
        operations: Applied in order to the list of source tensors; none means an exact copy.
        source_shapes: Shape of each source.
        target_shapes: Shape of each target.
        kind: Whether the targets are parameters or buffers.
        score: What users see, 0 to 1: shape, name and hierarchy, weighted.
        margin: How far the kind of evidence sets the pair apart from its rivals, 0 to 1; for sorting.
        reason: Why these belong together, in words.
        evidence: The kind of evidence that decided, the weakest on the way (:mod:`lit_wsl.matching.decision`).
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    source_shapes: tuple[Shape, ...] = ()
    target_shapes: tuple[Shape, ...] = ()
    kind: Kind = "parameter"
    score: float = 1.0
    margin: float = 1.0
    reason: str = ""
    evidence: str = ""

    def names(self, side: Side) -> tuple[str, ...]:
        """The sources, or the targets."""
        return self.sources if side == "source" else self.targets

    def shapes(self, side: Side) -> tuple[Shape, ...]:
        """The shapes of the sources, or of the targets."""
        return self.source_shapes if side == "source" else self.target_shapes

    @property
    def badge(self) -> str:
        """The operation in one word: ``exact``, ``transpose``, ``reshape``, ``split``, ``concat``, ``stack``..."""
        names = [op.name for op in self.operations if op.name != "cast"]
        return "+".join(names) if names else ("cast" if self.operations else "exact")

    @property
    def lossless(self) -> bool:
        """Whether no operation changes values; a cast to a narrower type rounds them."""
        return self.rounding is None and not self.changes_values

    @property
    def changes_values(self) -> bool:
        """Whether an operation that the user asked for by name changes values."""
        return not all(op.lossless for op in self.operations)

    @property
    def rounding(self) -> Cast | None:
        """The cast that rounds, if there is one."""
        return next((op for op in self.operations if isinstance(op, Cast) and op.rounds), None)


@dataclass(frozen=True)
class Candidate:
    """A source that could have filled an ambiguous target.

    Attributes:
        sources: Names in the checkpoint.
        score: Its score, 0 to 1.
        operations: What would have to be done.
    """

    sources: tuple[str, ...]
    score: float
    operations: tuple[Operation, ...] = ()


@dataclass(frozen=True)
class Ambiguity:
    """Targets that stay unloaded because nothing decides between their candidates.

    Attributes:
        targets: Names in the model that were to be decided together.
        candidates: The possible sources, best first.
        shape: Shape of the (first) target.
        reason: What made them equal, in words.
    """

    targets: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    shape: Shape = ()
    reason: str = ""


CANDIDATE = "candidate of an ambiguous target"  # why a source tensor has no partner


@dataclass(frozen=True)
class Unmatched:
    """A tensor of either side that found no partner.

    Attributes:
        name: Its name.
        shape: Its shape.
        kind: Parameter or buffer.
        reason: Why, in words.
    """

    name: str
    shape: Shape
    kind: Kind
    reason: str


@dataclass(frozen=True)
class SideSummary:
    """What a plan remembers of one side, to recognise it again.

    Attributes:
        label: File or class name.
        parameters: Number of trainable tensors.
        parameter_elements: Number of their elements.
        buffers: Number of buffers.
        buffer_elements: Number of their elements.
        fingerprint: SHA-256 over names and shapes, in order.
    """

    label: str
    parameters: int
    parameter_elements: int
    buffers: int
    buffer_elements: int
    fingerprint: str

    @classmethod
    def of(cls, side: ModelDescription) -> SideSummary:
        """Summarise a description."""
        kinds: dict[Kind, list[int]] = {"parameter": [], "buffer": []}
        for info in side.parameters:
            kinds[info.kind].append(info.numel)
        return cls(
            label=side.label,
            parameters=len(kinds["parameter"]),
            parameter_elements=sum(kinds["parameter"]),
            buffers=len(kinds["buffer"]),
            buffer_elements=sum(kinds["buffer"]),
            fingerprint=fingerprint((info.name, info.shape) for info in side.parameters),
        )


def fingerprint(tensors: Iterable[tuple[str, Shape]]) -> str:
    """What tells a side from others: a digest over all names and shapes, in order."""
    return hashlib.sha256("".join([f"{name}\0{shape}\0" for name, shape in tensors]).encode()).hexdigest()


@dataclass(frozen=True)
class Decided:
    """A question that trials were made for.

    Attributes:
        question: What was open.
        answer: The best answer.
        loss: The model's loss with it.
        rival: The best other option.
        rival_loss: The model's loss with that one, on the same samples.
        risk: Bound of the risk that the option taken is no better than its rivals, corrected for the number of trials.
        taken: Whether the option was taken; otherwise the decision stays open.
    """

    question: str
    answer: str
    loss: float
    rival: str = ""
    rival_loss: float = float("nan")
    risk: float = 1.0
    taken: bool = False


@dataclass(frozen=True)
class Measured:
    """What a proof on data measured.

    Attributes:
        fresh: The loss before the transfer.
        transferred: The loss of the model as it is filled.
        passes: Forward passes of a whole batch that the trials took.
        seconds: How long they took.
        spread: Standard deviation of the fresh model's loss between samples.
        decisions: The questions, the most decisive first.
    """

    fresh: float
    transferred: float
    passes: float = 0.0
    seconds: float = 0.0
    spread: float = 0.0
    decisions: tuple[Decided, ...] = ()

    @property
    def rises(self) -> bool:
        """Whether the loss is higher than before the transfer, by more than one random start differs from another."""
        return not self.transferred <= self.fresh + self.spread


def measured_dict(measured: Measured) -> dict[str, Any]:
    """What a proof measured, as plain data; losses that are no numbers are ``None``."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    data = {key: plain(value) for key, value in asdict(measured).items()}
    decisions = [{key: plain(value) for key, value in asdict(d).items()} for d in measured.decisions]
    return {**data, "decisions": decisions}


@dataclass(frozen=True)
class PlanData:
    """What a plan holds; :class:`~lit_wsl.plan.plan.TransferPlan` adds what can be done with it.

    Attributes:
        entries: The steps, in the target's registration order.
        source: The checkpoint's side.
        target: The model's side.
        ambiguous: Targets left alone because nothing decides between their candidates.
        unmatched_source: Tensors of the checkpoint that are unused, with the reason.
        unmatched_target: Tensors of the model that get nothing, with the reason.
        options: The options of the matching, as plain data.
        proof: Whether the mapping was proven (``lit_wsl.matching.proof``, ``lit_wsl.matching.judge``).
        proof_by: How: by what both models compute, or by the loss on data.
        measured: What a proof on data measured.
        notes: Remarks for the report, one line each.
    """

    entries: tuple[PlanEntry, ...]
    source: SideSummary
    target: SideSummary
    ambiguous: tuple[Ambiguity, ...] = ()
    unmatched_source: tuple[Unmatched, ...] = ()
    unmatched_target: tuple[Unmatched, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    proof: Proof = "not tested"
    notes: tuple[str, ...] = ()
    proof_by: ProofBy = ""
    measured: Measured | None = None

    def __iter__(self) -> Iterator[PlanEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def excludes_buffers(self) -> bool:
        """Whether nobody asked for buffers."""
        return self.options.get("buffers") == "exclude"

    def unmatched(self, side: Side) -> tuple[Unmatched, ...]:
        """What has no partner on a side."""
        return self.unmatched_source if side == "source" else self.unmatched_target

    @cached_property
    def by_target(self) -> dict[str, PlanEntry]:
        """The entry that fills each target."""
        return {target: entry for entry in self.entries for target in entry.targets}

    @cached_property
    def by_source(self) -> dict[str, tuple[PlanEntry, ...]]:
        """The entries that use each source."""
        found: dict[str, tuple[PlanEntry, ...]] = {}
        for entry in self.entries:
            for source in entry.sources:
                found[source] = (*found.get(source, ()), entry)
        return found
