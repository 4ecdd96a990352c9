"""Files of an alignment job: results written, checkpoints read under the model's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_wsl.checkpoint import atomic_save, atomic_write_text
from lit_wsl.errors import RebasinError
from lit_wsl.rebasin.job_report import RebasinReport, StateDict

REPORT_FILE = "rebasin.json"


def write_results(report: RebasinReport, folder: str | Path, *, weights: bool = True) -> RebasinReport:
    """Write ``rebasin.json``, one aligned checkpoint per model and the merged one.

    An aligned checkpoint has ``state_dict`` (whole weights in the reference's order, ready to merge),
    ``permutations`` (found on whole weights) and, where task vectors were compared, ``task_vector`` and
    ``task_vector_permutations``. They are for comparing only.

    Args:
        report: from :func:`align`.
        folder: where to; it is made if it does not exist.
        weights: False for the JSON only.

    Returns:
        The report with :attr:`RebasinReport.files` filled in.

    Raises:
        CheckpointError: a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    if weights:
        for name, model in report.models.items():
            if model.state_dict is None or model.on_weights is None or model.compared is None:
                continue
            content: dict[str, Any] = {
                "state_dict": _saveable(model.state_dict),
                "permutations": _saveable(model.on_weights),
                "reference": report.reference,
            }
            if model.task_vector is not None:
                content["task_vector"] = _saveable(model.task_vector)
                content["task_vector_permutations"] = _saveable(model.compared)
            files[f"aligned/{name}"] = f"rebasin_aligned_{name}.ckpt"
            atomic_save(content, folder / files[f"aligned/{name}"])
        if report.merged is not None:
            files["merged"] = "rebasin_merged.ckpt"
            merged_of = [report.reference, *report.models]
            atomic_save({"state_dict": _saveable(report.merged), "merged": merged_of}, folder / files["merged"])
    report = replace(report, files={**files, "report": REPORT_FILE})
    atomic_write_text(folder / REPORT_FILE, report.to_json() + "\n")
    return report


def _saveable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def names_of(paths: Sequence[str | Path]) -> list[str]:
    """Short, different names for checkpoints: the file's stem, with as many parent folders as it takes.

    >>> names_of(["runs/a/last.ckpt", "runs/b/last.ckpt", "other.pt"])
    ['a_last', 'b_last', 'other']
    """
    parts = [[*Path(p).parts[:-1], Path(p).stem] for p in paths]
    names = []
    for number, own in enumerate(parts):
        others = [other for i, other in enumerate(parts) if i != number]
        depth = 1
        while depth < len(own) and any(other[-depth:] == own[-depth:] for other in others):
            depth += 1
        names.append("_".join(part.strip("/") for part in own[-depth:]))
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            names[i] = f"{name}_{seen[name]}"
    return names


def fit_names(state: StateDict, wanted: Mapping[str, torch.Size], what: str) -> dict[str, Tensor]:
    """The tensors of a state dict under the model's names: as they are, or less or plus one prefix.

    Args:
        state: a state dict or an opened checkpoint.
        wanted: the model's names and shapes.
        what: for messages: which file it is.

    Returns:
        The tensors that fit in name and shape, in the model's order. Others are left out.

    Raises:
        RebasinError: nothing fits.
    """
    renamings = {"": list(state)}
    ends = sorted({name.split(".", 1)[0] + "." for name in state if "." in name})
    renamings.update({f"less {end}": [n[len(end) :] if n.startswith(end) else "" for n in state] for end in ends})
    starts = sorted({name.split(".", 1)[0] + "." for name in wanted if "." in name})
    renamings.update({f"plus {start}": [start + n for n in state] for start in starts})
    best: dict[str, str] = {}
    for renamed in renamings.values():
        found = {new: old for old, new in zip(state, renamed) if new in wanted}
        if len(found) > len(best):
            best = found
    fitting = {new: state[best[new]] for new in wanted if new in best}
    fitting = {new: tensor for new, tensor in fitting.items() if tensor.shape == wanted[new]}
    if not fitting:
        raise RebasinError(
            f"{what}: none of its {len(state)} tensors has the name and shape of one of the model's. "
            "Bring it to this model first: lit-wsl map and lit-wsl convert do that."
        )
    return fitting
