"""Copies of one network in a checkpoint: one of them fills the model, by name or by choice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lit_wsl import transfer_weights


def network() -> nn.Module:
    layers = {f"stage{k}": nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 6)) for k in range(3)}
    return nn.ModuleDict({**layers, "head": nn.Linear(6, 4)})


def renamed() -> nn.Module:
    return nn.ModuleDict(
        {
            **{
                f"level{k}": nn.ModuleDict({"fc1": nn.Linear(6, 7), "ln": nn.LayerNorm(7), "fc2": nn.Linear(7, 6)})
                for k in range(3)
            },
            "classifier": nn.Linear(6, 4),
        }
    )


def checkpoint(*places: str) -> dict[str, Tensor]:
    return {f"{place}{n}": torch.randn_like(t) for place in places for n, t in network().state_dict().items()}


@pytest.mark.parametrize(
    "places", [("online.", "target."), ("student.net.", "teacher.net."), ("policy.", "old_actor.")]
)
@pytest.mark.parametrize("new", [network, renamed])
def test_copies_of_equal_standing_are_a_choice(places, new):
    model = new()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = transfer_weights(model, checkpoint(*places), min_coverage=0.0)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert set(report.ambiguous) == set(before)
    for choice in report.plan.ambiguous:
        for place in places:
            assert any(s.startswith(place) for c in choice.candidates for s in c.sources)
        assert f"source_prefix={places[0].rstrip('.')!r}" in choice.reason


@pytest.mark.parametrize("place", ["online.", "target."])
def test_the_user_chooses(place):
    source, model = checkpoint("online.", "target."), network()
    transfer_weights(model, source, source_prefix=place.rstrip("."))
    assert all(torch.equal(t, source[place + n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("new", [network, renamed])
def test_what_stands_outside_is_taken_before_its_copy(new):
    source, model = checkpoint("", "best_so_far."), new()
    report = transfer_weights(model, source)
    assert len(report.plan.entries) == len(model.state_dict())
    assert not any(s.startswith("best_so_far.") for e in report.plan for s in e.sources)
    assert any("best_so_far" in note for note in report.plan.notes)
    assert {u.name for u in report.plan.unmatched_source} == {n for n in source if n.startswith("best_so_far.")}


def test_a_name_tells_which_copy_it_is():
    source = checkpoint("image_encoder.", "audio_encoder.")
    model = nn.ModuleDict({"audio": network()})
    transfer_weights(model, source)
    assert all(torch.equal(t, source["audio_encoder." + n]) for n, t in model["audio"].state_dict().items())


def test_a_model_that_holds_both_gets_both():
    source = checkpoint("student.", "teacher.")
    model = nn.ModuleDict({"student": network(), "teacher": network()})
    transfer_weights(model, source)
    assert all(torch.equal(t, source[n]) for n, t in model.state_dict().items())


def test_layers_of_a_list_are_no_copies():
    source, model = network(), network()
    del model["stage2"]
    report = transfer_weights(model, source.state_dict(), min_coverage=0.0)
    assert not any("copies" in note for note in report.plan.notes)


def test_a_word_inside_the_model_does_not_choose_a_copy():
    """``initial`` is what ``init_norm`` begins with, and says nothing of ``initial_copy``."""

    def flow(names: tuple[str, str, str]) -> nn.Module:
        norm, enter, leave = names
        steps = [nn.ModuleDict({norm: nn.LayerNorm(6), enter: nn.Linear(6, 7), leave: nn.Linear(7, 6)}) for _ in "abc"]
        return nn.ModuleDict({"flow": nn.ModuleList(steps)})

    old = flow(("init_norm", "enter", "leave")).state_dict()
    source = {place + n: torch.randn_like(t) for place in ("", "initial_copy.") for n, t in old.items()}
    model = flow(("_norm_init", "_enter", "_leave"))
    transfer_weights(model, source)
    pairs = zip(model.state_dict().items(), old)
    assert all(torch.equal(t, source[n]) for (_, t), n in pairs)


@pytest.mark.parametrize("new", [network, renamed])
def test_a_teacher_beside_an_average_is_no_source_either(new):
    source, model = checkpoint("student.", "teacher."), new()
    source |= {f"ema.{n.replace('.', '_')}": torch.randn_like(t) for n, t in list(source.items())}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = transfer_weights(model, source, min_coverage=0.0)
    held = {n: t for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    origins = {e.sources[0].split(".")[0] for e in report.plan}
    assert len(origins) <= 1
    assert held or set(report.ambiguous) == set(before)


@pytest.mark.parametrize("places", [("", "twin."), ("student.", "teacher.")])
def test_a_copy_of_a_model_that_holds_twins_is_a_copy(places):
    def twins(around: str = "") -> dict[str, Tensor]:
        return {f"{around}{n}": t for n, t in checkpoint("net_a.", "net_b.").items()}

    model = nn.ModuleDict({"first_a": network(), "first_b": network()})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    source = twins(places[0]) | twins(places[1])
    transfer_weights(model, source, min_coverage=0.0)
    held = {n: t for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert bool(held) == (places[0] == "")
    for name, tensor in held.items():
        assert torch.equal(tensor, source[name.replace("first", "net")])


def test_an_encoder_and_a_decoder_of_one_make_are_a_choice_for_a_model_that_is_one_of_them():
    def blocks() -> nn.Module:
        parts = {"norm": nn.LayerNorm(8), "qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "up": nn.Linear(8, 16)}
        return nn.ModuleList(nn.ModuleDict(copy.deepcopy(parts)) for _ in range(2))

    old = nn.ModuleDict({"emb": nn.Embedding(9, 8), "encoder": blocks(), "decoder": blocks()})
    new = nn.ModuleDict({"emb": nn.Embedding(9, 8), "layers": blocks()})
    report = transfer_weights(new, old.state_dict(), min_coverage=0.0)
    assert set(report.plan.by_target) == {"emb.weight"}
    assert any("source_prefix" in note for note in report.plan.notes)


def _twice(first: str, second: str) -> nn.Module:
    return nn.ModuleDict({first: network(), second: network()})


@pytest.mark.parametrize(
    "names", [("left", "right"), ("policy", "policy_old"), ("q_target", "q"), ("encoder", "decoder")]
)
def test_one_network_is_a_choice_for_a_model_that_holds_two(names):
    old, new = network(), _twice(*names)
    for order in (list, sorted):
        plan = transfer_weights(new, dict(order(old.state_dict().items())), min_coverage=0.0).plan
        assert not plan.by_target


def test_the_last_and_the_best_are_a_choice():
    plan = transfer_weights(renamed(), _twice("last", "best").state_dict(), min_coverage=0.0).plan
    assert not plan.by_target
    assert any("source_prefix" in note for note in plan.notes)


def test_a_copy_is_not_told_by_a_word_that_begins_another():
    """``pre`` in a name of the model is no ``previous``."""
    model = nn.ModuleDict({"pre_net": network(), "post": nn.Linear(6, 4)})
    source = {
        f"{place}net.{n}": torch.randn_like(t)
        for place in ("current.", "previous.")
        for n, t in network().state_dict().items()
    }
    before = {n: t.clone() for n, t in model.state_dict().items()}
    transfer_weights(model, source, min_coverage=0.0)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_model_that_holds_both_copies_needs_both_whatever_stands_beside_each_weight():
    model = nn.ModuleDict({"coarse": network(), "fine": network()})
    source = {n: torch.randn_like(t) for n, t in model.state_dict().items()}
    beside = {f"{n}_init": torch.randn_like(t) for n, t in source.items()}
    transfer_weights(model, dict(sorted((source | beside).items())), min_coverage=0.0)
    assert all(torch.equal(t, source[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_what_torch_wraps_around_modules_is_no_name(wrapper):
    """Each stage was wrapped alone, the average as a whole: the weights are still taken, not their average."""
    model = network()
    whole = {n: torch.randn_like(t) for n, t in model.state_dict().items()}
    source = {n.replace(".", f".{wrapper}.", 1): t for n, t in whole.items()}
    source |= {f"ema.ema_model.{wrapper}.{n}": torch.randn_like(t) for n, t in whole.items()}
    report = transfer_weights(model, source)
    assert all(torch.equal(t, whole[n]) for n, t in model.state_dict().items())
    assert {s for e in report.plan for s in e.sources} <= set(source)
