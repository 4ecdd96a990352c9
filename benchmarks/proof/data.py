"""The data of the proof benchmark: scikit-learn's digits and the standard library's docstrings."""

from __future__ import annotations

import ast
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

CONTEXT = 48
_MODULES = ("argparse", "ast", "csv", "datetime", "decimal", "difflib", "enum", "fractions", "functools", "heapq")
_MODULES += ("inspect", "ipaddress", "locale", "pathlib", "random", "shutil", "statistics", "string", "subprocess")
_MODULES += ("tarfile", "tempfile", "textwrap", "threading", "tokenize", "typing", "uuid", "zipfile")


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 8x8 pixels between 0 and 1, ``(N, 1, 8, 8)``, and their classes, shuffled."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return x[order], torch.as_tensor(labels, dtype=torch.long)[order]


@cache
def text() -> Tensor:
    """Docstrings of the standard library as numbers of characters, at most 72, ``(N, CONTEXT + 1)``, shuffled."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for name in _MODULES:
        path = library / f"{name}.py"
        if not path.exists():  # a package in this Python
            path = library / name / "__init__.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
    letters = "".join(c if 32 <= ord(c) < 127 else " " for c in "\n".join(found).replace("\n", " ").lower())
    known = sorted(set(letters))
    numbers = torch.tensor([known.index(c) for c in letters])
    rows = len(numbers) // (CONTEXT + 1)
    cut = numbers[: rows * (CONTEXT + 1)].reshape(rows, CONTEXT + 1)
    return cut[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]


@cache
def table() -> tuple[Tensor, Tensor]:
    """569 rows of thirty measurements, ``(N, 30)``, each column scaled, and two classes, shuffled."""
    from sklearn.datasets import load_breast_cancer

    rows, labels = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(rows, dtype=torch.float32)
    return ((x - x.mean(0)) / x.std(0))[order], torch.as_tensor(labels, dtype=torch.long)[order]


def dataset(task: str) -> TensorDataset:
    """The training set of a task."""
    if task == "text":
        return TensorDataset(text())
    return TensorDataset(*(table() if task == "table" else digits()))
