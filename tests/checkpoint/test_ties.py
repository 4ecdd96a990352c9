"""A file tells which of its tensors were tied, and a transfer from it is the same as one from memory."""

from __future__ import annotations

import builtins
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lit_wsl import WeightRenamer, transfer_weights
from lit_wsl.checkpoint import open_checkpoint
from lit_wsl.convert.checkpoint import convert_checkpoint
from lit_wsl.convert.weights import Translation
from lit_wsl.mapper import build_plan
from lit_wsl.plan.entries import SideSummary
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure import describe


class Old(nn.Module):
    """A language model in little; the embedding comes first."""

    def __init__(self, tied: bool = True):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        return self.lm_head(self.norm(self.body(self.embed(tokens))))


class New(nn.Module):
    """The same after a refactoring; the head comes first."""

    def __init__(self, tied: bool = True):
        super().__init__()
        self.output = nn.Linear(16, 50, bias=False)
        self.wte = nn.Embedding(50, 16)
        self.mlp = nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)})
        self.ln_f = nn.LayerNorm(16)
        if tied:
            self.output.weight = self.wte.weight

    def forward(self, tokens):
        return self.output(self.ln_f(self.mlp["down"](torch.relu(self.mlp["up"](self.wte(tokens))))))


TOKENS = torch.arange(40).view(4, 10)


def write(model, kind, folder):
    """Save a model in one of the ways that keep what shares memory."""
    path = folder / f"{kind}.ckpt"
    content = {"state_dict": model.state_dict(), "epoch": 1}
    if kind == "foreign":  # read by our own unpickler
        content["hyper_parameters"] = SimpleNamespace(width=16)
    if kind == "sharded":
        (folder / kind).mkdir()
        torch.save(dict(model.state_dict()), folder / kind / "pytorch_model-00001-of-00001.bin")
        names = ", ".join(f'"{n}": "pytorch_model-00001-of-00001.bin"' for n in model.state_dict())
        (folder / kind / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {{{names}}}}}')
        return folder / kind
    torch.save(model if kind == "module" else content, path, _use_new_zipfile_serialization=kind != "legacy")
    return path


KINDS = ["zip", "legacy", "foreign", "module", "sharded"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_knows_the_ties_of_its_model(kind, tmp_path):
    checkpoint = open_checkpoint(write(Old(), kind, tmp_path))
    found = describe(checkpoint)
    assert found.tied == describe(Old()).tied == {"lm_head.weight": "embed.weight"}
    assert "lm_head.weight" not in [info.name for info in found.parameters]
    sides = Translation.of(checkpoint, _no_plan(checkpoint))
    assert list(sides.old_parameters) == [n for n, _ in Old().named_parameters()]


def _no_plan(checkpoint):
    side = SideSummary.of(describe(checkpoint))
    return TransferPlan((), side, side)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_values_in_memory_of_their_own_are_no_tie(kind, tmp_path):
    model = Old(tied=False)
    model.lm_head.load_state_dict(model.embed.state_dict())
    assert not describe(open_checkpoint(write(model, kind, tmp_path))).tied


def test_parts_of_one_storage_are_no_tie(tmp_path):
    whole = torch.arange(12.0)
    parts = {"a": whole[:6], "b": whole[6:], "c": whole[:6].view(2, 3), "d": whole[::2], "e": whole[:6]}
    torch.save(parts, tmp_path / "parts.pt")
    assert describe(open_checkpoint(tmp_path / "parts.pt")).tied == {"e": "a"} == describe(parts).tied
    assert not describe({"floats": whole, "bits": whole.view(torch.int32)}).tied


def test_ties_of_a_model_without_memory_are_known():
    with torch.device("meta"):
        model = Old()
    assert describe(dict(model.state_dict())).tied == {"lm_head.weight": "embed.weight"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("new", [Old, New], ids=["same names", "renamed"])
def test_the_transfer_is_that_from_memory_and_nothing_is_missing(kind, tied, new, tmp_path):
    old, model = Old(), new(tied)
    file = write(old, kind, tmp_path)
    report = transfer_weights(model, file)
    assert not report.missing
    assert not report.unused
    assert not report.ambiguous
    assert torch.equal(model(TOKENS), old(TOKENS))
    in_memory = build_plan(describe(old.state_dict()), describe(model))
    assert report.plan.entries == in_memory.entries


def test_a_tie_survives_two_renamings_and_a_conversion(tmp_path):
    old, first, second = Old(), New(), Old()
    file = write(old, "zip", tmp_path)
    renamer = WeightRenamer(file)
    renamer.rename_keys({"embed.weight": "tokens.table", "lm_head.weight": "to_logits.weight"})
    renamer.save(tmp_path / "renamed.ckpt")
    assert describe(open_checkpoint(tmp_path / "renamed.ckpt")).tied == {"to_logits.weight": "tokens.table"}
    report = transfer_weights(first, tmp_path / "renamed.ckpt")
    assert not report.missing
    done = convert_checkpoint(tmp_path / "renamed.ckpt", tmp_path / "new.ckpt", report.plan, target=New())
    assert not [note for note in done.notes if "not used" in note]
    assert describe(open_checkpoint(tmp_path / "new.ckpt")).tied == describe(New()).tied
    assert not transfer_weights(second, tmp_path / "new.ckpt").missing
    assert torch.equal(first(TOKENS), old(TOKENS))
    assert torch.equal(second(TOKENS), old(TOKENS))


def test_weights_of_different_values_are_not_joined_into_one(tmp_path):
    """The file says that they are two; the model has room for one."""
    report = transfer_weights(New(), write(Old(tied=False), "zip", tmp_path), min_coverage=0.1)
    assert report.missing == ("output.weight",)
    assert set(report.unused) == {"embed.weight", "lm_head.weight"}


def test_asking_for_ties_reads_no_data(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file({n: t.clone() for n, t in Old().state_dict().items()}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    monkeypatch.setattr(type(checkpoint), "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(builtins, "open", lambda *_, **__: pytest.fail("a file was opened"))
    described = describe(checkpoint)
    monkeypatch.undo()
    assert not described.tied
    assert len(described.parameters) == len(Old().state_dict())
