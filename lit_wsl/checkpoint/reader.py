"""Opening a checkpoint of any format: :func:`open_checkpoint` and :class:`Checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_wsl.errors import CheckpointError

Weights = Literal["auto", "model", "ema"]


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of one checkpoint, read one by one on request.

    Attributes:
        path: the file or folder.
        format: what it is: ``"lightning"``, ``"torch"``, ``"safetensors"``, ...
        content: everything else in the file (epoch, hyper_parameters, optimizer_states, ...).
        stubbed: names of foreign classes that became inert records.
        weights: which weights were taken, such as ``"state_dict"`` or ``"ema:model_ema"``.
        prefix: the keys that lead to the state dict inside the file, ``()`` where the file is the state dict.
        notes: remarks for the report.
        metadata: the ``__metadata__`` of a safetensors file.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        tensors: Mapping[str, Tensor],
        *,
        content: Mapping[str, Any] | None = None,
        stubbed: tuple[str, ...] = (),
        weights: str = "state_dict",
        prefix: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.format = format
        self.content: Mapping[str, Any] = content if content is not None else {}
        self.stubbed = stubbed
        self.weights = weights
        self.prefix = prefix
        self.notes = notes
        self.metadata = metadata
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def meta(self, name: str) -> Tensor:
        """Give a tensor of the same shape and dtype on the meta device; no data is read."""
        tensor = self._tensors[name]
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def meta_items(self) -> Iterator[tuple[str, Tensor]]:
        """Go over names and meta tensors in the file's order."""
        for name in self:
            yield name, self.meta(name)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, format={self.format!r}, {len(self)} tensors, weights={self.weights!r})"


def open_checkpoint(path: str | os.PathLike[str], *, weights: Weights = "auto") -> Checkpoint:
    """Open a checkpoint of any format, without running any code that may be in it."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder.")
    with open(path, "rb") as file:
        head = file.read(16)
    if len(head) > 8 and head[8:9] == b"{" and head[:2] != b"PK":
        from safetensors.torch import load_file

        return Checkpoint(path, "safetensors", load_file(path), metadata={})
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=head[:2] == b"PK")
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    prefix: tuple[str, ...] = ()
    sd = tree
    for key in ("state_dict", "model", "model_state_dict", "module"):
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            sd, prefix = tree[key], (key,)
            break
    tensors = {k: v for k, v in sd.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors.")
    content = {k: v for k, v in tree.items() if prefix and k != prefix[0]}
    form = "lightning" if "pytorch-lightning_version" in tree else "torch"
    return Checkpoint(path, form, tensors, content=content, prefix=prefix, weights=".".join(prefix) or "state_dict")


def load_checkpoint_as_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the whole content of a checkpoint as one dict, tensors included, without running any code in it."""
    checkpoint = open_checkpoint(path)
    if not checkpoint.prefix:
        return dict(checkpoint)
    return {**checkpoint.content, checkpoint.prefix[0]: dict(checkpoint)}
