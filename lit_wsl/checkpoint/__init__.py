"""Reading checkpoints of every format without running code, and writing them atomically."""

from lit_wsl.checkpoint.document import replace_at
from lit_wsl.checkpoint.reader import Checkpoint, load_checkpoint_as_dict, open_checkpoint
from lit_wsl.checkpoint.records import ForeignName, ForeignObject
from lit_wsl.checkpoint.saving import atomic_save, save_safetensors
from lit_wsl.files import atomic, atomic_write_bytes, atomic_write_text

__all__ = [
    "Checkpoint",
    "ForeignName",
    "ForeignObject",
    "atomic",
    "atomic_save",
    "atomic_write_bytes",
    "atomic_write_text",
    "load_checkpoint_as_dict",
    "open_checkpoint",
    "replace_at",
    "save_safetensors",
]
