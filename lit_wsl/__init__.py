"""Weight transfer across refactored models, and Git Re-Basin for task vectors, as PyTorch Lightning callbacks."""

from lit_wsl.errors import LitWslError

__version__ = "0.1.0"

__all__ = ["LitWslError", "__version__"]
