"""DeepSpeed ZeRO folders: what can be read without DeepSpeed's own reader, and a clear error for the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lit_wsl.checkpoint.document import Document
from lit_wsl.checkpoint.inert import as_mapping
from lit_wsl.checkpoint.weights import find_nests
from lit_wsl.errors import CheckpointError


def read_deepspeed(path: Path, read_file: Callable[[Path], Document]) -> Document:
    """Read the module weights of a ZeRO folder of stage 0, 1 or 2, where one file holds them whole.

    Stage 3 cuts every parameter over the ranks, and model parallelism cuts the model: these are refused.

    Raises:
        CheckpointError: naming the script that DeepSpeed puts beside the checkpoint, and how to use it.
    """
    states = sorted(path.glob("**/*model_states.pt"))
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()[:200]
        states = [file for file in states if file.parent.name == tag] or states
    whole = [file for file in states if file.name == "mp_rank_00_model_states.pt"]
    if len(whole) != 1 or len({file.name for file in states if file.name.startswith("mp_rank")}) != 1:
        raise CheckpointError(_remedy(path, "its weights are cut over several files"))
    document = read_file(whole[0])
    tree = as_mapping(document.tree) or {}
    if "module" not in tree or not find_nests({"module": tree["module"]}):
        raise CheckpointError(_remedy(path, "its weights are in the optimizer's parts"))
    if any(tensor.numel() == 0 for nest in find_nests({"module": tree["module"]}) for tensor in nest.tensors.values()):
        raise CheckpointError(_remedy(path, "ZeRO stage 3 cuts every weight over the ranks"))
    note = f"DeepSpeed: the weights of {whole[0].name}, in the precision of training (not the optimizer's fp32 copies)"
    return Document("deepspeed", document.tree, document.stubbed, (*document.notes, note), lossy=document.lossy)


def _remedy(path: Path, why: str) -> str:
    script = path / "zero_to_fp32.py"
    how = (
        f"DeepSpeed put a script beside it for this: `python {script} {path} consolidated/` (needs deepspeed; it runs "
        "code from the folder and unpickles, so use it on folders you trust only)"
        if script.is_file()
        else "Consolidate it with DeepSpeed's zero_to_fp32.py where it was written"
    )
    return f"{path} is a DeepSpeed ZeRO checkpoint that cannot be read whole: {why}. {how}, then give the result."
