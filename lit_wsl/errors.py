"""One family of errors, so that ``except LitWslError`` catches everything this package raises on purpose.

Every message names the tensor, its shape, the file and the remedy, as far as they are known where it is raised.
"""

from __future__ import annotations


class LitWslError(Exception):
    """Base of all errors that lit_wsl raises on purpose."""


class CheckpointError(LitWslError):
    """A file cannot be read as a checkpoint, or cannot be written."""


class MappingError(LitWslError):
    """Matching was asked for something impossible: a wrong option, a model without tensors."""


class PlanError(LitWslError):
    """A plan does not fit the checkpoint or the model, or is not a valid plan."""


class CoverageError(LitWslError):
    """Fewer weights found a place than ``min_coverage`` asks for; nothing was changed."""


class TransferError(LitWslError):
    """Applying a plan failed; the model is as it was before, but for what ``not_restored`` names.

    Attributes:
        not_restored: The names of the tensors, and of whatever else was changed, that could not be put back.
    """

    not_restored: tuple[str, ...] = ()


class RebasinError(LitWslError):
    """A permutation spec cannot be inferred, verified or applied."""
