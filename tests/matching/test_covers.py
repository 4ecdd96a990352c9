"""Which layers may take one another's place, and make up one another."""

from __future__ import annotations

import time

from lit_wsl.matching.layers import Unit
from lit_wsl.matching.parts import Part, covers, groups_of


def layer(path: str, *shape: int) -> Unit:
    return Unit(path, (((f"{path}.weight",),),), (shape,))


def test_layers_that_find_no_place_each_are_found_out_in_time():
    old, new = [layer(f"old.{k}", 24) for k in range(9)], [layer(f"new.{k}", 24) for k in range(13)]
    start = time.process_time()
    assert not covers(old, new)[0]
    assert groups_of(old, new)  # tensor by tensor
    assert time.process_time() - start < 20


def test_every_layer_is_used_once():
    old, new = [layer(n, 8, 8) for n in "qkv"], [layer("qkv", 24, 8)]
    assert covers(old, new) == ([(((0, 1, 2), (0,)),)], True)
    assert covers(old, [layer("qk", 16, 8)]) == ([], True)


def test_what_is_too_much_to_list_is_not_taken_for_all_there_is():
    old = [layer(f"old.{k}", 8, 8) for k in range(8)]  # of which any two make up the whole
    new = [layer(f"new.{k}", 8, 8) for k in range(6)] + [layer("new.whole", 16, 8)]
    found, whole = covers(old, new)
    assert found
    assert not whole
    assert Part(0, old, new).grows
