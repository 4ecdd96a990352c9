"""Modules under the paths they had before they moved, so that pickled plans, reports and specs can still be read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

FORMER_PATHS = {
    "lit_wsl.callbacks.resume": "lit_wsl.convert.resume",
    "lit_wsl.callbacks.streams": "lit_wsl.callbacks.sample",
    "lit_wsl.checkpoint.convert": "lit_wsl.convert.checkpoint",
    "lit_wsl.checkpoint.edit": "lit_wsl.checkpoint.document",
    "lit_wsl.checkpoint.inert": "lit_wsl.checkpoint.records",
    "lit_wsl.checkpoint.pickler": "lit_wsl.checkpoint.saving",
    "lit_wsl.checkpoint.safetensors_file": "lit_wsl.checkpoint.one_file",
    "lit_wsl.checkpoint.torch_file": "lit_wsl.checkpoint.one_file",
    "lit_wsl.checkpoint.writing": "lit_wsl.files",
    "lit_wsl.mapper.former_names": "lit_wsl.mapper.weight_mapper",
    "lit_wsl.mapper.options": "lit_wsl.matching.options",
    "lit_wsl.mapper.planner": "lit_wsl.matching.planner",
    "lit_wsl.mapper.proof": "lit_wsl.matching.proof",
    "lit_wsl.mapper.result": "lit_wsl.mapper.weight_mapper",
    "lit_wsl.mapper.scoring": "lit_wsl.matching.scoring",
    "lit_wsl.models.checkpoint": "lit_wsl.checkpoint",
    "lit_wsl.models.weight_mapper": "lit_wsl.mapper.weight_mapper",
    "lit_wsl.models.weight_renamer": "lit_wsl.renamer",
    "lit_wsl.rebasin.apply": "lit_wsl.rebasin.spec.spec",
    "lit_wsl.rebasin.inference.writes": "lit_wsl.rebasin.inference.infer",
    "lit_wsl.rebasin.job_report": "lit_wsl.rebasin.job",
    "lit_wsl.rebasin.matching.best": "lit_wsl.rebasin.matching.activations",
    "lit_wsl.rebasin.matching.large_assignment": "lit_wsl.rebasin.matching.assignment",
    "lit_wsl.rebasin.merging.barrier": "lit_wsl.rebasin.merging.merge",
    "lit_wsl.rebasin.merging.repair": "lit_wsl.rebasin.merging.merge",
    "lit_wsl.rebasin.metrics.comparison": "lit_wsl.rebasin.metrics",
    "lit_wsl.rebasin.metrics.functional": "lit_wsl.rebasin.metrics",
    "lit_wsl.rebasin.metrics.matrices": "lit_wsl.rebasin.metrics",
    "lit_wsl.rebasin.metrics.modules": "lit_wsl.rebasin.metrics",
    "lit_wsl.rebasin.metrics.vectors": "lit_wsl.rebasin.metrics",
    "lit_wsl.rebasin.rebasing": "lit_wsl.rebasin.merging.rebase",
    "lit_wsl.rebasin.rebasing.fitting": "lit_wsl.rebasin.merging.fitting",
    "lit_wsl.rebasin.rebasing.rebase": "lit_wsl.rebasin.merging.rebase",
    "lit_wsl.rebasin.spec.apply": "lit_wsl.rebasin.spec.spec",
    "lit_wsl.rebasin.spec_axis": "lit_wsl.rebasin.spec.axis",
    "lit_wsl.rebasin.task_vectors": "lit_wsl.rebasin.matching.weights",
    "lit_wsl.rebasin.verify": "lit_wsl.rebasin.inference.verify",
    "lit_wsl.report.breakdown": "lit_wsl.report.scores",
    "lit_wsl.report.folding": "lit_wsl.report.trees",
    "lit_wsl.report.gaps": "lit_wsl.report.rows",
    "lit_wsl.report.html": "lit_wsl.report.saving",
    "lit_wsl.report.json_report": "lit_wsl.report.saving",
    "lit_wsl.report.leftovers": "lit_wsl.report.terminal",
    "lit_wsl.report.loggers": "lit_wsl.callbacks.remarks",
    "lit_wsl.report.runners_up": "lit_wsl.report.scores",
    "lit_wsl.report.summary": "lit_wsl.report.terminal",
    "lit_wsl.report.tables": "lit_wsl.report.terminal",
    "lit_wsl.structure.describe": "lit_wsl.structure.description",
    "lit_wsl.structure.info": "lit_wsl.structure.description",
    "lit_wsl.structure.tracing": "lit_wsl.structure.execution_order",
    "lit_wsl.transfer.adapt": "lit_wsl.plan.value_changing",
    "lit_wsl.transfer.coverage": "lit_wsl.plan.coverage",
    "lit_wsl.transfer.floor": "lit_wsl.plan.coverage",
    "lit_wsl.transfer.operation": "lit_wsl.plan.operations",
    "lit_wsl.transfer.operations": "lit_wsl.plan.operations",
    "lit_wsl.transfer.operations_each": "lit_wsl.plan.operations",
    "lit_wsl.transfer.operations_join": "lit_wsl.plan.operations",
    "lit_wsl.transfer.plan": "lit_wsl.plan.plan",
    "lit_wsl.transfer.plan_file": "lit_wsl.plan.file",
    "lit_wsl.transfer.report": "lit_wsl.report.report",
}
FORMER_FOLDERS = {"lit_wsl.models"}  # where nothing else stands today


class _Package(ModuleType):
    """A package in which a function keeps its name from a module that was called so."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and callable(vars(self).get(name))):
            super().__setattr__(name, value)


class _FormerPaths:
    """Finds the module that stands under its new path; asked last, so it never shadows a real one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in FORMER_PATHS and fullname not in FORMER_FOLDERS:
            return None
        return ModuleSpec(fullname, self, is_package=fullname in FORMER_FOLDERS)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        if spec.name in FORMER_FOLDERS:
            return None
        sys.modules[spec.name.rpartition(".")[0]].__class__ = _Package
        module = import_module(FORMER_PATHS[spec.name])
        if any(path.startswith(f"{spec.name}.") for path in FORMER_PATHS):  # a folder once
            vars(module).setdefault("__path__", [])
        return module

    def exec_module(self, module: ModuleType) -> None:
        from importlib.util import find_spec

        # import_module ran it under its own name; the machinery wrote the former name's spec on it
        module.__spec__ = find_spec(module.__name__)


def install() -> None:
    """Let the former paths be imported; does nothing the second time."""
    if not any(isinstance(finder, _FormerPaths) for finder in sys.meta_path):
        sys.meta_path.append(_FormerPaths())
