"""The outcome of :meth:`lit_wsl.WeightMapper.suggest_mapping`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from lit_wsl.plan.coverage import Coverage
from lit_wsl.plan.plan import TransferPlan


class MappingResult(Mapping[str, str]):
    """Source name -> target name, as a read-only mapping, and the plan that it stands for.

    The mapping holds the steps that take *one* tensor to *one* tensor under a new name: exact copies, casts,
    transposes, permutes and reshapes. A step with several sources or targets (``q, k, v -> qkv``) cannot be said as
    a name for a name; those are in :attr:`plan`, and :attr:`composite` lists their names. So renaming a
    checkpoint's keys with this mapping never invents a name for half a tensor.

    Attributes:
        plan: Everything that would be loaded, as data.
        coverage: The share of both sides that the plan moves.

    >>> import torch
    >>> from lit_wsl import WeightMapper
    >>> result = WeightMapper(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)).suggest_mapping()
    >>> dict(result)
    {'weight': 'weight', 'bias': 'bias'}
    >>> result.coverage.target.share
    1.0
    """

    def __init__(self, plan: TransferPlan, coverage: Coverage) -> None:
        self.plan = plan
        self.coverage = coverage

    @cached_property
    def _scored(self) -> dict[str, tuple[str, float]]:
        return {
            entry.sources[0]: (entry.targets[0], entry.score)
            for entry in self.plan.entries
            if len(entry.sources) == len(entry.targets) == 1
        }

    def __getitem__(self, source: str) -> str:
        return self._scored[source][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scored)

    def __len__(self) -> int:
        return len(self._scored)

    @property
    def composite(self) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
        """Sources and targets of the steps with several names on a side, in the plan's order."""
        return tuple(
            (entry.sources, entry.targets)
            for entry in self.plan.entries
            if not len(entry.sources) == len(entry.targets) == 1
        )

    def get_mapping_with_scores(self) -> dict[str, tuple[str, float]]:
        """Source name -> (target name, score from 0 to 1)."""
        return dict(self._scored)

    def get_unmatched(self) -> dict[str, list[str]]:
        """Names without a partner: ``{"source": [...], "target": [...]}``; ambiguous targets are among them."""
        target = dict.fromkeys(left.name for left in self.plan.unmatched_target)
        target.update(dict.fromkeys(name for case in self.plan.ambiguous for name in case.targets))
        return {"source": [left.name for left in self.plan.unmatched_source], "target": list(target)}

    def __repr__(self) -> str:
        share = 100 * self.coverage.target.share
        return f"MappingResult({len(self.plan)} mappings, {share:.1f} % of the target's parameter elements)"
