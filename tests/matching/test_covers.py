"""Which layers may take one another's place, and make up one another."""

from __future__ import annotations

import time

from lit_wsl.matching.layers import Unit
from lit_wsl.matching.parts import covers, groups_of


def layer(path: str, *shape: int) -> Unit:
    return Unit(path, (((f"{path}.weight",),),), (shape,))


def test_layers_that_find_no_place_each_are_found_out_in_time():
    old, new = [layer(f"old.{k}", 24) for k in range(9)], [layer(f"new.{k}", 24) for k in range(13)]
    start = time.process_time()
    assert covers(old, new) == []
    assert groups_of(old, new)  # tensor by tensor
    assert time.process_time() - start < 20


def test_every_layer_is_used_once():
    old, new = [layer(n, 8, 8) for n in "qkv"], [layer("qkv", 24, 8)]
    assert covers(old, new) == [(((0, 1, 2), (0,)),)]
    assert covers(old, [layer("qk", 16, 8)]) == []
