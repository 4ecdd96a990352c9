"""Reading checkpoints of every format without running code, and writing them atomically."""

from lit_wsl.checkpoint.edit import replace_at
from lit_wsl.checkpoint.inert import ForeignName, ForeignObject
from lit_wsl.checkpoint.reader import Checkpoint, load_checkpoint_as_dict, open_checkpoint
from lit_wsl.checkpoint.writing import atomic, atomic_save, atomic_write_bytes, atomic_write_text, save_safetensors

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
