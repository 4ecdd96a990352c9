"""What units are in an attention by their names, and that nothing becomes another of these."""

from __future__ import annotations

import pytest
import torch
from small_nets import Tree
from torch import nn

from lit_wsl import transfer_weights
from lit_wsl.matching.formula import PERHAPS, letters_below
from lit_wsl.matching.tree import TreeBuilder
from lit_wsl.structure.description import describe


def tree(layers: dict[str, tuple[int, int]]) -> nn.Module:
    return Tree({path: nn.Linear(*sizes) for path, sizes in layers.items()})


def letters(names: dict[str, tuple[int, int]]) -> dict[str, str]:
    root, _ = TreeBuilder().build(describe(tree(names)).parameters)
    return {name.rpartition(".")[0]: "".join(sorted(found)) for name, found in letters_below(root).items()}


SQUARE, THREE = (8, 8), (8, 24)


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (("wq", "wk", "wv", "wo"), "qkvo"),
        (("q_lin", "k_lin", "v_lin", "out_lin"), "qkvo"),
        (("query", "key", "value", "proj"), "qkvo"),
        (("to_q", "to_k", "to_v", "to_out"), "qkvo"),
    ],
)
def test_the_output_is_called_in_the_manner_of_the_others(names, known):
    inside = {f"attn.{n}": SQUARE for n in names} | {"ff.wi": (8, 9), "ff.wo": (9, 8)}
    assert letters(inside) == {f"attn.{n}": letter for n, letter in zip(names, known)}
    beside = dict.fromkeys(names, SQUARE) | {"gate": SQUARE, "down": SQUARE}
    assert letters(beside) == dict(zip(names, known))


def test_of_several_that_may_be_the_output_none_is_known_to_be():
    names = dict.fromkeys(("query", "key", "value", "proj", "intermediate", "output"), SQUARE)
    assert letters(names) == {"query": "q", "key": "k", "value": "v", "proj": PERHAPS, "output": PERHAPS}


def test_a_value_without_queries_and_a_lonely_key_are_none():
    assert letters({"act_fn": SQUARE, "value": SQUARE, "output": SQUARE, "memory.key": SQUARE}) == {}


def test_what_goes_in_is_three_times_as_high():
    assert letters({"in_proj": THREE, "out_proj": SQUARE, "fc": SQUARE}) == {"in_proj": "kqv", "out_proj": "o"}
    assert letters({"in_proj": SQUARE, "out_proj": SQUARE}) == {}


def _filled(old: dict[str, tuple[int, int]], new: dict[str, tuple[int, int]]) -> dict[str, str]:
    """By the target's modules the sources of their weights."""
    report = transfer_weights(tree(new), tree(old).state_dict(), min_coverage=0.0)
    return {
        t.rpartition(".")[0]: "+".join(s.rpartition(".")[0] for s in e.sources)
        for e in report.plan
        for t in e.targets
        if t.endswith("weight")
    }


def _block(attention: str, names: tuple[str, ...], feed: str, maps: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    inner = {f"h.{k}.{attention}{n}": THREE if "qkv" in n or n == "in_proj" else SQUARE for k in (0, 1) for n in names}
    return inner | {f"h.{k}.{feed}{n}": SQUARE for k in (0, 1) for n in maps}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (("attn.", ("in_proj", "out_lin"), "ff.", ("wi", "wo")), ("mixer.", ("wq", "wk", "wv", "wo"), "", ("a", "b"))),
        (
            ("", ("wq", "wk", "wv", "wo"), "", ("up", "output")),
            ("attn.", ("q", "k", "v", "out_lin"), "ff.", ("wi", "wo")),
        ),
        (("attn.", ("qkv", "out"), "ff.", ("gate", "output")), ("", ("q", "k", "v", "proj"), "ff.", ("value", "o"))),
    ],
)
def test_the_output_of_an_attention_becomes_no_other_layer(old, new):
    found = _filled(_block(*old), _block(*new))
    for k in (0, 1):
        was, now = f"h.{k}.{old[0]}{old[1][-1]}", f"h.{k}.{new[0]}{new[1][-1]}"
        assert found.get(now, was) == was
        assert not [t for t, sources in found.items() if was in sources.split("+") and t != now]


def test_keys_and_an_output_make_up_no_whole_of_queries():
    old = {"h.query": SQUARE, "h.to_kv": (8, 16), "h.out": SQUARE}
    new = {"h.o": SQUARE, "h.to_qkv": THREE}
    found = _filled(old, new)
    assert found.get("h.to_qkv", "h.query+h.to_kv") == "h.query+h.to_kv"
    assert found.get("h.o", "h.out") == "h.out"
    back = _filled(new, {"h.kv": (8, 16), "h.wq": SQUARE, "h.wo": SQUARE})
    assert back.get("h.wo", "h.o") == "h.o"
    assert back.get("h.kv", "h.to_qkv") == "h.to_qkv"


def test_heads_of_two_encoders_are_no_parts_of_a_whole():
    old = {"net.body": (6, 8), "net.fc": (8, 10)}
    new = {f"encoder_{x}.{n}": shape for x in "qk" for n, shape in (("body", (6, 8)), ("head", (8, 5)))}
    assert not {"encoder_q.head", "encoder_k.head"} & set(_filled(old, new))


def test_names_of_an_attention_are_kept_apart_by_values():
    torch.manual_seed(0)
    old = tree(_block("attn.", ("wq", "wk", "wv", "wo"), "ff.", ("gate", "up", "down")))
    new = tree(_block("", ("query", "key", "value", "proj"), "ff.", ("w1", "v1", "w2")))
    transfer_weights(new, old.state_dict(), min_coverage=0.0)
    kept = {"query": "wq", "key": "wk", "value": "wv", "proj": "wo"}
    state = old.state_dict()
    for name, tensor in new.state_dict().items():
        held = next((n for n, t in state.items() if torch.equal(t, tensor)), None)
        own = name.split(".")[2]
        if held is not None and own in kept:
            assert held.split(".")[3] == kept[own]


def test_what_a_whole_holds_stands_nowhere_else():
    """The ``v1`` of a gated feed-forward, beside a fused ``kv``, are no values of the attention."""
    names = {"query": SQUARE, "kv": (8, 16), "proj": SQUARE, "w1": SQUARE, "v1": SQUARE, "w2": SQUARE}
    assert letters(names) == {"query": "q", "kv": "kv", "proj": "o"}


def test_the_value_of_a_gate_beside_a_spelled_value_is_none():
    names = dict.fromkeys(("query", "key", "value", "out", "w1", "v1", "w2"), SQUARE)
    assert letters(names) == {"query": "q", "key": "k", "value": "v", "out": "o"}
