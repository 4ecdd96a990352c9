"""WeightRenamer renames tensors and keeps everything else in the file."""

from __future__ import annotations

import argparse
import io
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file

from lit_wsl.checkpoint import open_checkpoint
from lit_wsl.errors import CheckpointError, LitWslError, MappingError
from lit_wsl.renamer import WeightRenamer


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        OrderedDict(enc=torch.nn.Linear(3, 4), norm=torch.nn.BatchNorm1d(4), head=torch.nn.Linear(4, 2))
    )


def content(hparams: Any = None) -> dict[str, Any]:
    net = model()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {"epoch": 3, "state_dict": model().state_dict(), "optimizer_states": [optimizer.state_dict()],
            "hyper_parameters": hparams or {"lr": 0.1}, "pytorch-lightning_version": "2.6.6"}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(content(), tmp_path / "old.ckpt")
    return tmp_path / "old.ckpt"


def test_list_and_search(file: Path) -> None:
    renamer = WeightRenamer(file)
    assert renamer.list_keys() == list(model().state_dict())
    assert renamer.search_keys("enc") == ["enc.weight", "enc.bias"]
    assert renamer.search_keys(r"^(enc|head)\.bias$") == ["enc.bias", "head.bias"]
    assert renamer.search_keys(re.compile("WEIGHT", re.IGNORECASE)) == ["enc.weight", "norm.weight", "head.weight"]
    assert renamer.search_keys("enc.(") == []
    assert renamer.search_keys("nothing") == []


def test_rename_keys_takes_any_mapping(file: Path, tmp_path: Path) -> None:
    class Result(dict):
        pass

    renamer = WeightRenamer(file)
    assert renamer.rename_keys(Result({"enc.weight": "encoder.w", "enc.bias": "encoder.b"})) == 2
    renamer.save(tmp_path / "new.ckpt")
    found = open_checkpoint(tmp_path / "new.ckpt")
    expected = ["encoder.w", "encoder.b", *list(model().state_dict())[2:]]
    assert list(found) == expected
    for (_, old), name in zip(model().state_dict().items(), expected):
        if "norm" not in name:
            assert torch.equal(found[name], old)


def test_names_can_be_swapped(file: Path, tmp_path: Path) -> None:
    renamer = WeightRenamer(file)
    before = {name: renamer.checkpoint[name].clone() for name in renamer.list_keys()}
    renamer.rename_keys({"norm.weight": "norm.bias", "norm.bias": "norm.weight"})
    renamer.save(tmp_path / "new.ckpt")
    after = open_checkpoint(tmp_path / "new.ckpt")
    assert torch.equal(after["norm.weight"], before["norm.bias"])
    assert torch.equal(after["norm.bias"], before["norm.weight"])


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"enc.wight": "x"}, r"'enc\.wight'.*'enc\.weight'"),
        ({"enc.weight": "enc.bias"}, r"'enc\.bias'"),
        ({"enc.weight": "x", "enc.bias": "x"}, r"'x'.*'enc\.weight' and 'enc\.bias'"),
        ({"enc.weight": ""}, r"'enc\.weight'"),
        ({"enc.weight": 3}, r"'enc\.weight'"),
    ],
)
def test_impossible_renames_name_the_key_and_change_nothing(file: Path, mapping: dict, words: str) -> None:
    renamer = WeightRenamer(file)
    with pytest.raises(MappingError, match=words) as caught:
        renamer.rename_keys({"head.weight": "moved", **mapping})
    assert isinstance(caught.value, LitWslError)
    assert renamer.list_keys() == list(model().state_dict())


def test_prefixes(file: Path) -> None:
    renamer = WeightRenamer(file)
    assert renamer.rename_with_prefix("enc", "backbone.0") == 2
    assert renamer.list_keys()[:2] == ["backbone.0.weight", "backbone.0.bias"]
    assert renamer.rename_with_prefix("backbone.", "b.") == 2
    assert renamer.list_keys()[:2] == ["b.0.weight", "b.0.bias"]
    assert renamer.add_prefix("model") == 9
    assert all(name.startswith("model.") for name in renamer.list_keys())
    assert renamer.remove_prefix("model.") == 9
    assert renamer.add_prefix("x", r"^head") == 2
    assert renamer.list_keys()[-2:] == ["x.head.weight", "x.head.bias"]
    with pytest.raises(MappingError, match=r"'he'"):
        renamer.remove_prefix("he")
    with pytest.raises(MappingError, match=r"Two tensors"):
        renamer.rename_with_prefix("norm", "b.0")
    renamer.restore_backup()
    assert renamer.list_keys() == list(model().state_dict())


@settings(max_examples=25, deadline=None)
@given(st.permutations(list(model().state_dict())))
def test_restore_and_inverse_give_the_old_names(tmp_path_factory: pytest.TempPathFactory, shuffled: list[str]) -> None:
    path = tmp_path_factory.mktemp("r") / "a.ckpt"
    torch.save(model().state_dict(), path)
    renamer = WeightRenamer(path)
    names = renamer.list_keys()
    renamer.rename_keys(dict(zip(names, shuffled)))
    assert renamer.list_keys() == shuffled
    renamer.rename_keys(dict(zip(shuffled, names)))
    assert renamer.list_keys() == names


def test_everything_else_is_kept(file: Path, tmp_path: Path) -> None:
    renamer = WeightRenamer(file)
    renamer.add_prefix("m")
    renamer.save(tmp_path / "new.ckpt")
    old, new = torch.load(file, weights_only=True), torch.load(tmp_path / "new.ckpt", weights_only=True)
    assert list(old) == list(new)
    assert type(new["state_dict"]) is OrderedDict
    assert new["state_dict"]._metadata == old["state_dict"]._metadata
    for key in ("epoch", "hyper_parameters", "pytorch-lightning_version"):
        assert new[key] == old[key]
    states = [content["optimizer_states"][0]["state"] for content in (old, new)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i])


def test_foreign_objects_are_kept(tmp_path: Path) -> None:
    hparams = argparse.Namespace(data=Path("x"), sizes=[1, 2])
    torch.save(content(hparams), tmp_path / "a.ckpt")
    renamer = WeightRenamer(tmp_path / "a.ckpt")
    renamer.rename_with_prefix("enc", "encoder")
    renamer.save(tmp_path / "a.ckpt")
    trusted = torch.load(tmp_path / "a.ckpt", weights_only=False)  # our own file
    assert trusted["hyper_parameters"] == hparams
    assert next(iter(trusted["state_dict"])) == "encoder.weight"


def test_saving_over_the_file_that_is_read(file: Path) -> None:
    renamer = WeightRenamer(file)
    renamer.add_prefix("m")
    renamer.save(file)
    for name, tensor in model().state_dict().items():
        if "norm" not in name:
            assert torch.equal(open_checkpoint(file)[f"m.{name}"], tensor)
    assert torch.equal(renamer.checkpoint["enc.weight"], model().state_dict()["enc.weight"]), "still readable"


def test_tied_weights_stay_tied_and_the_file_small(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    torch.save({"state_dict": {"emb.weight": weight, "out.weight": weight}}, tmp_path / "a.ckpt")
    renamer = WeightRenamer(tmp_path / "a.ckpt")
    renamer.add_prefix("m")
    renamer.save(tmp_path / "b.ckpt")
    found = open_checkpoint(tmp_path / "b.ckpt")
    assert found["m.emb.weight"].data_ptr() == found["m.out.weight"].data_ptr()
    assert abs((tmp_path / "b.ckpt").stat().st_size - (tmp_path / "a.ckpt").stat().st_size) < 1000


def test_entries_that_are_no_tensors_are_kept(tmp_path: Path) -> None:
    torch.save(
        {"model": {"a.w": torch.ones(2), "a._extra_state": {"step": 3}, "b.w": torch.ones(3)}}, tmp_path / "a.pt"
    )
    renamer = WeightRenamer(tmp_path / "a.pt")
    with pytest.raises(MappingError, match="_extra_state"):
        renamer.rename_keys({"a.w": "a._extra_state"})
    renamer.rename_keys({"a.w": "x.w"})
    renamer.save(tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt", weights_only=True)["model"]
    assert list(found) == ["x.w", "a._extra_state", "b.w"]
    assert found["a._extra_state"] == {"step": 3}


def test_safetensors_keep_their_metadata(tmp_path: Path) -> None:
    save_file(
        {"a.w": torch.ones(2), "b.w": torch.zeros(3)},
        tmp_path / "a.safetensors",
        metadata={"format": "pt", "who": "me"},
    )
    renamer = WeightRenamer(tmp_path / "a.safetensors")
    renamer.add_prefix("m")
    renamer.save(tmp_path / "a.safetensors")
    found = open_checkpoint(tmp_path / "a.safetensors")
    assert found.metadata == {"format": "pt", "who": "me"}
    assert set(found) == {"m.a.w", "m.b.w"}
    assert found["m.a.w"].tolist() == [1, 1]


def test_a_pickled_module_can_only_become_safetensors(tmp_path: Path) -> None:
    torch.save(model(), tmp_path / "a.pt")
    renamer = WeightRenamer(tmp_path / "a.pt")
    renamer.add_prefix("m")
    with pytest.raises(CheckpointError, match=r"\.safetensors"):
        renamer.save(tmp_path / "b.pt")
    renamer.save(tmp_path / "b.safetensors")
    assert torch.equal(open_checkpoint(tmp_path / "b.safetensors")["m.enc.weight"], model().state_dict()["enc.weight"])


def test_summary(file: Path) -> None:
    renamer = WeightRenamer(file)
    renamer.rename_with_prefix("enc", "[encoder]")
    console = Console(file=io.StringIO(), width=100)
    renamer.print_summary(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("old.ckpt", "lightning", "[encoder]", "norm", "float32", "2 of 9", "enc.weight"):
        assert words in text
