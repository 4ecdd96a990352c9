"""One list of matching options: the function, the callback, the mapper and the command offer the same."""

import inspect
import re
from dataclasses import fields

import pytest
import torch
from torch import nn

from lit_wsl import WeightMapper, WeightTransferCallback, transfer_weights
from lit_wsl.cli.models import matching_options
from lit_wsl.cli.parser import build_parser
from lit_wsl.errors import MappingError
from lit_wsl.matching.options import MatchingOptions

NAMES = [option.name for option in fields(MatchingOptions)]
OTHERS = {
    "buffers": "strict",
    "strategy": "conservative",
    "threshold": 0.3,
    "weights": {"shape": 0.2, "name": 0.8},
    "incompatible_pairs": [({"stem", "encoder"}, {"head"})],
    "shape_tolerance": 0.25,
    "adapt": ["partial_head"],
    "assume_layouts": True,
    "only": ["a.*", "b.*"],
    "skip": ["c.*"],
    "source_prefix": "student",
}
COMMAND = (
    "--buffers strict --strategy conservative --threshold 0.3 --weights.shape 0.2 --weights.name 0.8",
    "--incompatible-pairs encoder,stem:head --shape-tolerance 0.25 --adapt partial_head --assume-layouts",
    "--only a.*,b.* --skip c.* --source-prefix student",
)
STARTS = {"map": ["map", "x.ckpt"], "convert": ["convert", "x.ckpt", "-o", "y.ckpt"]}


def defaults(face):
    return {name: p.default for name, p in inspect.signature(face).parameters.items()}


def described(text):
    """What a docstring says of each option, without its marks."""
    found = {name: re.search(rf"^ +{name}: (.*?)(?=^ +\w+: |^ *$)", text, re.MULTILINE | re.DOTALL) for name in NAMES}
    return {name: " ".join(match[1].replace("`", "").split()) for name, match in found.items() if match}


@pytest.mark.parametrize("face", [transfer_weights, WeightTransferCallback.__init__])
def test_faces_offer_every_option_with_its_default(face):
    offered = defaults(face)
    assert set(NAMES) <= set(offered)
    assert MatchingOptions.of(offered) == MatchingOptions()


@pytest.mark.parametrize("face", [transfer_weights, WeightTransferCallback])
def test_faces_say_the_same_of_every_option(face):
    assert described(face.__doc__) == described(MatchingOptions.__doc__)


@pytest.mark.parametrize("command", STARTS)
def test_commands_offer_every_option_with_its_default(command):
    parsed = build_parser().parse_args(STARTS[command])[command]
    assert set(NAMES) <= set(vars(parsed))
    assert matching_options(parsed) == MatchingOptions()
    parsed = build_parser().parse_args([*STARTS[command], *" ".join(COMMAND).split()])[command]
    assert matching_options(parsed) == MatchingOptions.of(OTHERS)


def test_the_mapper_takes_every_option():
    """Buffers are left out there by default, as they always were; the rest is as everywhere."""
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    mapper = WeightMapper(old, new)
    mapper.suggest_mapping()
    assert mapper.options == MatchingOptions(buffers="exclude")
    later = {name: OTHERS[name] for name in ("threshold", "strategy", "weights")}
    first = {name: value for name, value in OTHERS.items() if name not in later and name != "buffers"}
    for make in (WeightMapper, lambda s, t, **o: WeightMapper.from_state_dict(s.state_dict(), t, **o)):
        mapper = make(old, new, buffer_matching_mode="strict", **first)
        assert mapper.options == MatchingOptions.of({**first, "buffers": "strict"})
    assert set(later) == set(defaults(WeightMapper.suggest_mapping)) - {"self"}
    assert MatchingOptions.of(defaults(WeightMapper.suggest_mapping)) == MatchingOptions()


def test_a_plan_tells_the_options_it_was_made_with():
    made = MatchingOptions.of(OTHERS)
    assert MatchingOptions.of(made.to_dict()) == made


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape_tolerance": -0.1},
        {"threshold": 1.5},
        {"weights": {"size": 1.0}},
        {"buffers": "most"},
        {"adapt": ["grow"]},
        {"only": 3},
        {"incompatible_pairs": [("a",)]},
    ],
)
def test_wrong_options_are_named(wrong):
    with pytest.raises(MappingError, match=next(iter(wrong))):
        MatchingOptions.of(wrong)


class Masked(nn.Module):
    def __init__(self, size, width=4):
        super().__init__()
        self.attend = nn.Linear(width, width)
        self.attend.register_buffer("mask", torch.zeros(size, size))


def test_shape_tolerance_says_which_buffers_strict_mode_takes_for_near():
    old, new = Masked(10), Masked(8)
    for tolerance, moved in ((0.0, set()), (0.1, set()), (0.2, {"attend.weight", "attend.bias"})):
        mapper = WeightMapper(old, new, buffer_matching_mode="strict", shape_tolerance=tolerance)
        result = mapper.suggest_mapping()
        assert set(result) == moved
        assert "attend.mask" in result.get_unmatched()["target"]  # near or not, it is not copied
    lenient = WeightMapper(old, new, buffer_matching_mode="lenient", shape_tolerance=0.2).suggest_mapping()
    assert set(lenient) == moved
    gone = WeightMapper(old, Masked(10), buffer_matching_mode="strict", shape_tolerance=0.2).suggest_mapping()
    assert set(gone) == {*moved, "attend.mask"}
