"""Import this module before torchvision, timm, torchmetrics or lightning.

The torchvision wheel that belongs to our torch is a CUDA build. Beside a CPU-only torch its compiled operators do not
load, and the import of torchvision stops at the registration of fake kernels for operators that do not exist. Defining
the schemas of these operators first is enough: no model of the gauntlet calls them.
"""

from __future__ import annotations

import torch

_LIBRARIES: list[torch.library.Library] = []  # a library's definitions live as long as the object


def install() -> None:
    """Define the schemas of the operators that torchvision registers fake kernels for, where they are absent."""
    for name in ("nms", "qnms"):
        if hasattr(torch.ops.torchvision, name):
            continue
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


install()
