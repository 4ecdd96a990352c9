"""Weight transfer across refactored models, and Git Re-Basin for task vectors, as PyTorch Lightning callbacks.

The public names are looked up when they are first used, so that ``import lit_wsl`` and the command start fast.
"""

from __future__ import annotations

import sys
from importlib import import_module

from lit_wsl import former_paths
from lit_wsl.errors import LitWslError

TYPE_CHECKING = False  # importing typing takes longer than the package does
if TYPE_CHECKING:
    from typing import Any

    from lit_wsl.callbacks.rebasin import RebasinCallback as RebasinCallback
    from lit_wsl.callbacks.weight_transfer import WeightTransferCallback as WeightTransferCallback
    from lit_wsl.checkpoint import load_checkpoint_as_dict as load_checkpoint_as_dict
    from lit_wsl.mapper import MappingResult as MappingResult
    from lit_wsl.mapper import WeightMapper as WeightMapper
    from lit_wsl.plan.plan import TransferPlan as TransferPlan
    from lit_wsl.renamer import WeightRenamer as WeightRenamer
    from lit_wsl.report.report import TransferReport as TransferReport
    from lit_wsl.transfer.api import transfer_weights as transfer_weights

former_paths.install()
if "lightning.pytorch" in sys.modules:  # else the callback does it
    from lit_wsl.callbacks.state_dicts import extend_state_dicts

    extend_state_dicts()

_HOMES = {
    "MappingResult": "lit_wsl.mapper",
    "RebasinCallback": "lit_wsl.callbacks.rebasin",
    "TransferPlan": "lit_wsl.plan.plan",
    "TransferReport": "lit_wsl.report.report",
    "WeightMapper": "lit_wsl.mapper",
    "WeightRenamer": "lit_wsl.renamer",
    "WeightTransferCallback": "lit_wsl.callbacks.weight_transfer",
    "load_checkpoint_as_dict": "lit_wsl.checkpoint",
    "transfer_weights": "lit_wsl.transfer.api",
}

__all__ = ["LitWslError", "__version__", *_HOMES]
__version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from lit_wsl.files import package_version

        value: Any = package_version()
    elif name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
