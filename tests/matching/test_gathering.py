"""Copies in one list on one side and in several on the other make up the same region."""

from __future__ import annotations

from torch import nn

from lit_wsl.matching.gathering import flattened, gathered
from lit_wsl.matching.layers import regions
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.planner import build_plan
from lit_wsl.matching.space import Space
from lit_wsl.structure.description import describe


def block(first="fc1", second="fc2"):
    return nn.ModuleDict({first: nn.Linear(6, 9), second: nn.Linear(9, 6)})


def blocks(count):
    return nn.ModuleList(block("up", "down") for _ in range(count))


def copies(net):
    return regions(describe(net))


def test_lists_of_an_encoder_and_a_decoder_are_one_list_of_as_many():
    old = nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(4))})
    new = nn.ModuleDict({"encoder": blocks(2), "decoder": blocks(2)})
    for theirs, ours in (gathered(copies(old), copies(new)), gathered(copies(new), copies(old))[::-1]):
        assert theirs[1].copies == ("blocks.0.", "blocks.1.", "blocks.2.", "blocks.3.")
        assert ours[1].copies == ("encoder.0.", "encoder.1.", "decoder.0.", "decoder.1.")
        assert len(theirs) == len(ours) == 2
    described = describe(old), describe(new)
    space = Space(*described, build_plan(*described, MatchingOptions()), trust=False)
    (numbering,) = space.numbering.values()
    assert len(space.decisions[numbering].options) == 24


def test_a_single_block_joins_the_list_of_its_like():
    old = nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(3)), "head": nn.Linear(6, 2)})
    new = nn.ModuleDict({"encoder": blocks(2), "decoder": nn.ModuleDict({"last": block("up", "down")})})
    new["head"] = nn.Linear(6, 2)
    _, ours = gathered(copies(old), copies(new))
    assert ours[1].copies == ("encoder.0.", "encoder.1.", "decoder.last.")
    assert [unit.path for unit in ours[0].units] == ["head"]


def test_lists_that_have_their_own_counterparts_stay_apart():
    old = nn.ModuleDict({"encoder": blocks(2), "decoder": blocks(3)})
    new = nn.ModuleDict({"a": blocks(3), "b": blocks(2)})
    assert gathered(copies(old), copies(new)) == (copies(old), copies(new))


def test_copies_of_copies_are_flattened_only_where_all_their_layers_are_nested():
    nested = nn.ModuleList(nn.ModuleDict({"experts": blocks(2), "router": nn.Linear(6, 2)}) for _ in range(2))
    assert flattened(copies(nested)[1]) == copies(nested)[1]


def test_a_named_module_is_no_copy_of_counted_ones():
    experts = nn.ModuleDict({**{str(k): block() for k in range(3)}, "shared": block()})
    outside, *found = copies(nn.ModuleDict({"moe": experts}))
    assert [region.copies for region in found] == [("moe.0.", "moe.1.", "moe.2.")]
    assert [unit.path for unit in outside.units] == ["moe.shared.fc1", "moe.shared.fc2"]
