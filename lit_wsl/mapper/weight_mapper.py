"""``WeightMapper``: match two models, look at the answer, dig where it is doubtful."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor, nn

from lit_wsl.checkpoint import open_checkpoint
from lit_wsl.errors import ArgumentTypeError, MappingError, ShownInNotebooks, did_you_mean, listed, printable
from lit_wsl.matching.layouts import hidden_layouts
from lit_wsl.matching.options import BufferMode, MatchingOptions, Strategy
from lit_wsl.matching.planner import build_plan
from lit_wsl.plan.coverage import Coverage, excluded_names, measure_coverage
from lit_wsl.plan.entries import Side
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.drawing import as_html
from lit_wsl.report.report import TransferReport
from lit_wsl.report.rows import By, describe_from_plan, percent
from lit_wsl.report.saving import save_html, save_json
from lit_wsl.report.scores import BreakdownView
from lit_wsl.report.terminal import AnalysisView, MappingView, ReportView
from lit_wsl.report.trees import HierarchyView
from lit_wsl.structure.description import (
    ModelDescription,
    ModuleNode,
    ParameterInfo,
    describe,
    refuse_whole_checkpoint,
    require_module,
    require_path,
    require_state_dict,
    what_it_is,
)
from lit_wsl.structure.execution_order import trace_execution_order
from lit_wsl.structure.running import as_call


@dataclass(frozen=True)
class Group:
    """The tensors of one module."""

    module_path: str  # dotted path of the module
    params: Mapping[str, ParameterInfo]  # kind of tensor (``"weight"``, ``"bias"``, ``"running_mean"``) -> the tensor

    @property
    def param_types(self) -> frozenset[str]:
        """The kinds of tensors in it."""
        return frozenset(self.params)


@dataclass(frozen=True, eq=False)
class HierarchyNode:
    """A module in the tree of modules."""

    name: str  # last part of its path; ``""`` for the root
    full_path: str  # dotted path
    depth: int  # number of modules above it
    parent: HierarchyNode | None = field(repr=False)  # the module that holds it
    parameter_group: Group | None = field(default=None, repr=False)  # its own tensors, if it has any
    children: Mapping[str, HierarchyNode] = field(default_factory=dict, repr=False)  # name -> module inside it


def groups_of(side: ModelDescription) -> Mapping[str, Group]:
    """Path of a module -> its tensors, for modules that have any."""
    return MappingProxyType(
        {group.module_path: Group(group.module_path, {i.leaf: i for i in group.members}) for group in side.groups}
    )


def hierarchy_of(side: ModelDescription) -> HierarchyNode:
    """The tree of modules, from its root down."""
    groups = groups_of(side)

    def node(module: ModuleNode, depth: int, parent: HierarchyNode | None) -> HierarchyNode:
        inside: dict[str, HierarchyNode] = {}
        made = HierarchyNode(module.name, module.path, depth, parent, groups.get(module.path), MappingProxyType(inside))
        inside.update({child.name: node(child, depth + 1, made) for child in module.children})
        return made

    return node(side.root, 0, None)


def as_module(source: ModelDescription, module: ModelDescription) -> ModelDescription:
    """The description by the module, once it is clear that the state dict is one of this module."""
    for info in source.parameters:
        if info.name not in module:
            raise MappingError(
                f"source_module is another model than the state dict: it has no tensor {info.name!r} of shape "
                f"{info.shape}. Pass the model that wrote the state dict, or leave source_module out."
            )
        if module[info.name].shape != info.shape:
            raise MappingError(
                f"source_module is another model than the state dict: {info.name!r} is {module[info.name].shape} there "
                f"and {info.shape} in the state dict. Build it with the sizes it was trained with."
            )
    return module


def _whole_number(**options: int | None) -> None:
    for option, value in options.items():
        if value is not None and not isinstance(value, int):
            raise ArgumentTypeError(f"{option} must be a whole number, or None for all; got {value!r}.")


class MappingResult(ShownInNotebooks, Mapping[str, str]):
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

    def get_mapping_dict(self) -> dict[str, str]:
        """The mapping as a plain dict, which is yours to change."""
        return dict(self)

    copy = get_mapping_dict

    def __or__(self, other: Mapping[str, str]) -> dict[str, str]:
        return {**self, **other} if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[str, str]) -> dict[str, str]:
        return {**other, **self} if isinstance(other, Mapping) else NotImplemented

    def get_unmatched(self) -> dict[str, list[str]]:
        """Names without a partner: ``{"source": [...], "target": [...]}``.

        Ambiguous targets are among them; excluded buffers, which nobody asked for, are not.
        """
        found: dict[str, list[str]] = {}
        for side in get_args(Side):
            aside = excluded_names(self.plan, side, describe_from_plan(self.plan, side))
            found[side] = [left.name for left in self.plan.unmatched(side) if left.name not in aside]
        ambiguous = (name for case in self.plan.ambiguous for name in case.targets)
        return {**found, "target": list(dict.fromkeys([*found["target"], *ambiguous]))}

    def __repr__(self) -> str:
        sides = f"{self.plan.source.label} -> {self.plan.target.label}"
        steps = f"{len(self)} one-to-one, {len(self.composite)} composite"
        return printable(f"<MappingResult {sides}: {percent(self.coverage.target.share)} of the model, {steps}>")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._view()

    def _repr_html_(self) -> str:
        return as_html(self._view())

    def _view(self) -> ReportView:
        source, target = describe_from_plan(self.plan, "source"), describe_from_plan(self.plan, "target")
        report = TransferReport.of(self.plan, self.coverage, source, target, notes=self.plan.notes)
        return _brief(replace(report, applied=False))


def _brief(report: TransferReport) -> ReportView:
    """A mapping on one screen."""
    return ReportView(report, "Mapping", modules=False, mapping=MappingView(report.plan, max_rows=10))


Pairs = Sequence[tuple[Any, Any]]


class WeightMapper(ShownInNotebooks):
    """Match the tensors of a source model to those of a target model.

    The mapper works on names, shapes and structure only. It reads no tensor data, changes neither model, and gives
    the same answer every time. To load weights, use :func:`lit_wsl.transfer_weights` or the callback; the mapper is
    for looking first.

    Args:
        source_module: The old model. Without its code, use :meth:`from_state_dict` or :meth:`from_checkpoint`.
        target_module: The new model, on any device, the meta device included.
        shape_tolerance: Relative difference up to which the sizes of *buffers* count as near (0.1 is 10 %). Trainable
            parameters never match across different shapes, whatever it is.
        dummy_input: One sample call, for the execution order: a tensor (the only argument), a tuple (positional
            arguments) or a dict (keyword arguments). It is run through the target, and through ``source_module``
            where that is given.
        incompatible_pairs: Pairs of sets of name chunks that must not match across, both ways. Names are cut at dots,
            underscores, digits and capitals: ``[({"encoder"}, {"decoder"})]``.
        buffer_matching_mode: ``"exclude"`` ignores buffers, ``"lenient"`` takes them along where they fit,
            ``"strict"`` refuses a module whose buffers don't all match.

    Attributes:
        source: The source's side.
        target: The target's side.
        options: How the mapping was made; up to date once ``result`` has been asked for.

    Raises:
        MappingError: If a side is missing or empty, or an option has a value that is not allowed.

    Example:
        >>> old = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> new = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> WeightMapper(old, new).suggest_mapping()["2.weight"]
        '2.weight'
    """

    def __init__(
        self,
        source_module: nn.Module | None = None,
        target_module: nn.Module | None = None,
        shape_tolerance: float = 0.0,
        dummy_input: Any = None,
        incompatible_pairs: Pairs | None = None,
        buffer_matching_mode: BufferMode = "exclude",
        **options: Any,
    ) -> None:
        if source_module is None or target_module is None:
            side = "source_module" if source_module is None else "target_module"
            raise MappingError(
                f"WeightMapper needs both models, and {side} is missing. If the source is a file or a state dict, use "
                "WeightMapper.from_checkpoint(path, target_module) or WeightMapper.from_state_dict(sd, target_module)."
            )
        require_module(source_module, "source_module")
        self._notes: list[str] = []
        source = describe(source_module, execution_order=self._order(source_module, dummy_input, "source"))
        known = {"buffers": buffer_matching_mode, "incompatible_pairs": incompatible_pairs, **options}
        self._set_up(source, target_module, dummy_input, {"shape_tolerance": shape_tolerance, **known})

    @classmethod
    def from_state_dict(
        cls,
        source_state_dict: Mapping[str, Tensor],
        target_module: nn.Module,
        shape_tolerance: float = 0.0,
        dummy_input: Any = None,
        incompatible_pairs: Pairs | None = None,
        buffer_matching_mode: BufferMode = "exclude",
        *,
        source_module: nn.Module | None = None,
        label: str | None = None,
        **options: Any,
    ) -> WeightMapper:
        """Match a bare state dict to a model; options as in the constructor.

        Args:
            source_state_dict: Name -> tensor. Only names, shapes and types are looked at.
            target_module: The new model.
            shape_tolerance: See the constructor.
            dummy_input: See the constructor.
            incompatible_pairs: See the constructor.
            buffer_matching_mode: See the constructor.
            source_module: The old model, if its code is still there: it tells parameters from buffers, and with
                ``dummy_input`` the execution order.
            label: What to call the source in tables.
            **options: More of :func:`lit_wsl.transfer_weights`: ``only``, ``skip``, ``source_prefix``, ``adapt``.

        Raises:
            MappingError: If the state dict holds no tensors, or ``source_module`` is another model.
        """
        require_state_dict(
            source_state_dict,
            "source_state_dict",
            module="Use WeightMapper(source_module, target_module) for two models",
            path="Use WeightMapper.from_checkpoint(path, target_module) for a file",
        )
        if isinstance(source_state_dict, dict):  # and no file that is read when it is asked
            refuse_whole_checkpoint(source_state_dict, "source_state_dict")
        mapper = cls.__new__(cls)
        mapper._notes = []
        source = describe(source_state_dict, label=label)
        if source_module is not None:
            require_module(source_module, "source_module")
            order = mapper._order(source_module, dummy_input, "source")
            source = as_module(source, describe(source_module, execution_order=order, label=label))
        known = {"buffers": buffer_matching_mode, "incompatible_pairs": incompatible_pairs, **options}
        mapper._set_up(source, target_module, dummy_input, {"shape_tolerance": shape_tolerance, **known})
        return mapper

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint_path: str | os.PathLike[str],
        target_module: nn.Module,
        shape_tolerance: float = 0.0,
        dummy_input: Any = None,
        incompatible_pairs: Pairs | None = None,
        buffer_matching_mode: BufferMode = "exclude",
        *,
        source_module: nn.Module | None = None,
        **options: Any,
    ) -> WeightMapper:
        """Match a checkpoint of any readable format to a model; options as in :meth:`from_state_dict`.

        Nothing in the file is run.

        Raises:
            CheckpointError: If the file is missing or unreadable, or holds no tensors.
            MappingError: As :meth:`from_state_dict`.
        """
        require_path(checkpoint_path, "checkpoint_path")
        checkpoint = open_checkpoint(checkpoint_path)
        mapper = cls.from_state_dict(
            checkpoint,
            target_module,
            shape_tolerance,
            dummy_input,
            incompatible_pairs,
            buffer_matching_mode,
            source_module=source_module,
            label=Path(checkpoint_path).name,
            **options,
        )
        mapper._notes.extend(checkpoint.notes)
        return mapper

    def _set_up(
        self, source: ModelDescription, target_module: nn.Module, dummy_input: Any, options: dict[str, Any]
    ) -> None:
        require_module(target_module, "target_module")
        self.source = source
        self.target = describe(target_module, execution_order=self._order(target_module, dummy_input, "target"))
        known = [option.name for option in fields(MatchingOptions)]
        for name in options:
            if name not in known:
                raise ArgumentTypeError(f"{name} is no option of the matching.{did_you_mean(name, known)}")
        self.options = MatchingOptions(**options)  # a wrong option is told now, not at the first match
        self._result: MappingResult | None = None

    def _order(self, module: nn.Module, dummy_input: Any, side: str) -> dict[str, int] | None:
        """Execution order of one sample call; without one where the call fails, saying so."""
        if dummy_input is None:
            return None
        try:
            return trace_execution_order(module, *as_call(dummy_input))
        except Exception as error:  # the model's own code: anything may come
            why = f"dummy_input could not be run through the {side} ({type(error).__name__}: {error})"
            self._notes.append(f"{why}; matching continues without execution order.")
            warnings.warn(self._notes[-1], stacklevel=4)
            return None

    def suggest_mapping(
        self, threshold: float = 0.6, strategy: Strategy = "best_match", weights: Mapping[str, float] | None = None
    ) -> MappingResult:
        """Match group by group, one to one.

        Args:
            threshold: Minimum score of a match, 0 to 1.
            strategy: ``"best_match"``, ``"conservative"`` (a score of at least 0.75) or ``"shape_only"`` (names are
                ignored).
            weights: Weights of ``"shape"``, ``"name"`` and ``"hierarchy"``, scaled to a sum of 1; default 0.5, 0.3
                and 0.2. Missing ones count as 0.

        Returns:
            The mapping, which is also what the other methods then show.

        Raises:
            MappingError: If an option has a value that is not allowed.
        """
        given = {"threshold": threshold, "strategy": strategy, "weights": weights}
        self.options = replace(self.options, **given)  # type: ignore[arg-type]
        plan = build_plan(self.source, self.target, self.options, assume_layouts=True)
        assumed = hidden_layouts(plan, self.source, self.target)
        if assumed:
            first = next(iter(assumed))
            note = f"{len(assumed)} steps take for granted what names and shapes don't show, first {first}: "
            plan = replace(plan, notes=(*plan.notes, note + assumed[first]))
        self._result = MappingResult(plan, measure_coverage(plan, self.source, self.target))
        return self._result

    @property
    def result(self) -> MappingResult:
        """The last mapping; :meth:`suggest_mapping` with its defaults, if there is none yet."""
        return self._result if self._result is not None else self.suggest_mapping()

    def get_mapping_dict(self) -> dict[str, str]:
        """Source name -> target name, for steps of one tensor to one tensor (see :class:`MappingResult`)."""
        return dict(self.result)

    def get_mapping_with_scores(self) -> list[tuple[str, str, float]]:
        """``(source name, target name, score)``, the best first."""
        found = [(s, t, score) for s, (t, score) in self.result.get_mapping_with_scores().items()]
        return sorted(found, key=lambda row: -row[2])

    def get_unmatched(self) -> dict[str, list[str]]:
        """Names without a partner: ``{"source": [...], "target": [...]}``."""
        return self.result.get_unmatched()

    def visualize_mapping(
        self,
        result: MappingResult | None = None,
        show_unmatched: bool = True,
        max_matches: int | None = 30,
        max_unmatched: int | None = 15,
        *,
        by: By = "group",
        folded: bool = True,
        console: Console | None = None,
    ) -> None:
        """Print coverage, the mapping, what is ambiguous and what is left over.

        Args:
            result: The mapping to show; the last one by default.
            show_unmatched: Also show what found no partner.
            max_matches: At most so many lines of mappings; the lowest scores always stay. ``None`` for all.
            max_unmatched: At most so many lines of leftovers per side; ``None`` for all.
            by: One line per pair of modules (``"group"``) or per step (``"tensor"``).
            folded: Fold lines that differ only by indices into ``blocks.{0..11}``.
            console: Where to print.

        Raises:
            MappingError: If an option has a value that is not allowed.
        """
        if by not in get_args(By):
            raise MappingError(f"by must be one of {', '.join(map(repr, get_args(By)))}; got {by!r}.")
        _whole_number(max_matches=max_matches, max_unmatched=max_unmatched)
        report = self._report(result)
        table = MappingView(report.plan, by=by, folded=folded, max_rows=max_matches)
        view = ReportView(
            report, "Mapping", modules=False, mapping=table, limit=max_unmatched, show_gaps=show_unmatched
        )
        (console or Console()).print(view)

    def visualize_hierarchies(
        self, max_depth: int = 5, show_matches: bool = False, *, folded: bool = True, console: Console | None = None
    ) -> None:
        """Print both module trees side by side.

        Args:
            max_depth: Number of levels to show.
            show_matches: Mark what is matched, and name the partner beside each module of the source.
            folded: Fold repeated modules into one line, ``{0..11} x12``.
            console: Where to print.
        """
        _whole_number(max_depth=max_depth)
        plan = self.result.plan if show_matches else None
        view = HierarchyView(self.source, self.target, plan, max_depth=max_depth, folded=folded)
        (console or Console()).print(view)

    def visualize_score_breakdown(self, name: str, *, console: Console | None = None) -> None:
        """Print how the score of a tensor's match comes about, and who the runner-up was.

        Args:
            name: Name of a source or target tensor.
            console: Where to print.

        Raises:
            MappingError: If neither model has a tensor of this name; the message names the nearest ones.
        """
        if name not in self.source and name not in self.target:
            known = dict.fromkeys(info.name for side in (self.source, self.target) for info in side.parameters)
            inside = [tensor for tensor in known if tensor.startswith(f"{name}.")]
            hint = f" It is a module; its tensors are {listed(inside)}." if inside else did_you_mean(str(name), known)
            raise MappingError(f"neither model has a tensor named {name!r}.{hint}")
        view = BreakdownView(name, self.result.plan, self.source, self.target, self.options)
        (console or Console()).print(view)

    def print_analysis(self, top_n: int = 10, show_unmatched: bool = True, *, console: Console | None = None) -> None:
        """Print coverage by module, the matches to look at first, and what is left over by reason.

        Args:
            top_n: Number of lines in each list.
            show_unmatched: Also show what found no partner.
            console: Where to print.
        """
        _whole_number(top_n=top_n)
        view = AnalysisView(self._report(), top_n=top_n, show_unmatched=show_unmatched)
        (console or Console()).print(view)

    def export_mapping_report(self, output_path: str | os.PathLike[str]) -> Path:
        """Write the mapping as JSON: models, counts, coverage, every step with scores, shapes and operation, leftovers.

        Args:
            output_path: The file to write, atomically. The schema is ``lit_wsl/report/assets/schema.json``.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        return save_json(self.result, output_path, **self._context())

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the interactive report: one file that needs no network.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        return save_html(self.result, path, **self._context())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _brief(self._report())

    def _repr_html_(self) -> str:
        return as_html(self)

    def _report(self, result: MappingResult | None = None) -> TransferReport:
        """A mapping as the report of a transfer that was not done."""
        shown = result if result is not None else self.result  # making it adds notes
        if not isinstance(shown, MappingResult):
            raise ArgumentTypeError(f"result must be what suggest_mapping returned, but it is {what_it_is(shown)}.")
        notes = tuple(dict.fromkeys((*shown.plan.notes, *self._notes)))
        report = TransferReport.of(shown.plan, shown.coverage, self.source, self.target, notes=notes)
        return replace(report, applied=False)

    def _context(self) -> dict[str, Any]:
        """What a saved report shows besides the result, once that is there: making it adds notes."""
        return {"source": self.source, "target": self.target, "notes": self._notes, "options": self.options}

    def __repr__(self) -> str:
        state = "not matched yet" if self._result is None else f"{len(self._result.plan)} steps"
        return printable(f"<WeightMapper {self.source.label} -> {self.target.label}: {state}>")

    @property
    def source_params(self) -> Mapping[str, ParameterInfo]:
        """Name -> tensor of the source, read-only; without buffers where these are excluded."""
        return MappingProxyType(self._asked(self.source).by_name)

    @property
    def target_params(self) -> Mapping[str, ParameterInfo]:
        """The same of the target."""
        return MappingProxyType(self._asked(self.target).by_name)

    @property
    def source_groups(self) -> Mapping[str, Group]:
        """Path of a module of the source -> its tensors, read-only."""
        return groups_of(self._asked(self.source))

    @property
    def target_groups(self) -> Mapping[str, Group]:
        """The same of the target."""
        return groups_of(self._asked(self.target))

    @property
    def target_groups_by_types(self) -> Mapping[frozenset[str], list[str]]:
        """Kinds of tensors (``{"weight", "bias"}``) -> paths of the target's modules with exactly these."""
        found: dict[frozenset[str], list[str]] = {}
        for path, group in self.target_groups.items():
            found.setdefault(group.param_types, []).append(path)
        return MappingProxyType(found)

    @property
    def source_hierarchy(self) -> HierarchyNode:
        """Root of the source's tree of modules."""
        return hierarchy_of(self._asked(self.source))

    @property
    def target_hierarchy(self) -> HierarchyNode:
        """Root of the target's tree of modules."""
        return hierarchy_of(self._asked(self.target))

    def _asked(self, side: ModelDescription) -> ModelDescription:
        """A side without its buffers where these are excluded."""
        parameters = (info for info in side.parameters if info.kind == "parameter")
        return side.part(parameters) if self.options.excludes_buffers else side
