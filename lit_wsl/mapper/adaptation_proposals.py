"""What an adaptation proposes to do with the tensors that the lossless matching left over.

A proposal is a guess from shapes and places alone (:mod:`lit_wsl.mapper.adaptation_norms`,
:mod:`lit_wsl.mapper.adaptation_sizes`); :mod:`lit_wsl.mapper.adaptations` lets the matching judge it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from lit_wsl.structure.info import ModelDescription, ParameterInfo
from lit_wsl.transfer.operations import Operation
from lit_wsl.transfer.plan import TransferPlan


@dataclass(frozen=True)
class Change:
    """One adaptation of one unit of the source.

    Attributes:
        sources: The real tensors, in the order in which the operation takes them.
        made: The pretended tensors, in the order in which the operation gives them; the first bears the name of the
            real tensor in whose place it stands.
        operations: What takes the ones into the others, in order.
        reason: What is done to the values, in words.
        dropped: Real tensors that nothing needs any more.
        partners: Names of the targets each pretended tensor was meant for; empty if any may be right.
    """

    sources: tuple[str, ...]
    made: tuple[ParameterInfo, ...]
    operations: tuple[Operation, ...]
    reason: str
    dropped: tuple[str, ...] = ()
    partners: tuple[tuple[str, ...], ...] = ()

    @property
    def badge(self) -> str:
        """The operations in one word."""
        return "+".join(op.name for op in self.operations)

    def after(self, earlier: Change) -> Change:
        """Both changes as one, where this one concerns what an earlier one makes: other channels for a folded stem."""
        if len(self.made) > 1:  # a norm is folded into the real weight, before it gets other channels
            operations, first, last = (*self.operations, *earlier.operations), self, self
        else:
            operations, first, last = (*earlier.operations, *self.operations), earlier, self
        return replace(
            self,
            sources=first.sources,
            made=(*last.made, *first.made[len(last.made) :]),
            operations=operations,
            reason=f"{earlier.reason}; {self.reason}",
            dropped=(*earlier.dropped, *self.dropped),
        )


@dataclass(frozen=True)
class Proposals:
    """What an adaptation proposes.

    Attributes:
        changes: The changes.
        reasons: Why tensors that look like a case for it are none: by name in the source, or ``->name`` in the target.
        whole: Whether the changes make sense together only.
        others: Other choices of changes that are as likely.
    """

    changes: tuple[Change, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    others: tuple[tuple[Change, ...], ...] = ()


Propose = Callable[[TransferPlan, ModelDescription, ModelDescription], Proposals]
