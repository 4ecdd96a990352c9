"""Import paths that users have in their notes keep working."""

from __future__ import annotations

import importlib

import pytest


@pytest.mark.parametrize(
    ("older", "newer", "name"),
    [
        ("lit_wsl.models.weight_renamer", "lit_wsl.renamer", "WeightRenamer"),
        ("lit_wsl.models.checkpoint", "lit_wsl.checkpoint", "load_checkpoint_as_dict"),
        ("lit_wsl.models.weight_mapper", "lit_wsl.mapper", "WeightMapper"),
        ("lit_wsl.mapper.weight_mapper", "lit_wsl.mapper", "WeightMapper"),
    ],
)
def test_older_paths_give_the_same_object(older: str, newer: str, name: str) -> None:
    assert getattr(importlib.import_module(older), name) is getattr(importlib.import_module(newer), name)
