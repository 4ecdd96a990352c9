"""What a hostile file would call is not written again: no file that is written here runs code when it is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile_corpus import CANARY, files

from lit_wsl import WeightRenamer
from lit_wsl.checkpoint import open_checkpoint
from lit_wsl.checkpoint.records import ForeignName, ForeignObject, foreign_calls, is_harmless
from lit_wsl.cli import main
from lit_wsl.convert.checkpoint import convert_checkpoint
from lit_wsl.errors import CheckpointError, LitWslError
from lit_wsl.plan.entries import PlanEntry, SideSummary
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure import describe

LOAD = """
import sys, torch
for file in sys.argv[1:]:
    try:
        torch.load(file, weights_only=False)
    except BaseException as error:
        print(type(error).__name__)
"""


class Trap:
    def __reduce__(self):
        return eval, (f"open({CANARY!r}, 'w')",)


def plan_for(path):
    side = SideSummary.of(describe(open_checkpoint(path)))
    return TransferPlan(tuple(PlanEntry((n,), (f"net.{n}",)) for n in open_checkpoint(path)), side, side)


def trapped(folder: Path) -> Path:
    content = {"state_dict": {"w": torch.ones(2)}, "epoch": 3, "hyper_parameters": {"width": 2, "config": Trap()}}
    torch.save(content, folder / "old.ckpt")
    return folder / "old.ckpt"


def test_no_payload_of_the_corpus_runs_from_a_file_that_was_written(tmp_path):
    """Each hostile file that opens is renamed and converted; what comes of it is loaded with weights_only=False."""
    written = []
    for name, data in sorted(files().items()):
        if not name.startswith(("payload-", "tensor-", "stream-")):
            continue
        old = tmp_path / name
        old.write_bytes(data)
        for number, write in enumerate(
            (
                lambda old, new: WeightRenamer(old).save(new),
                lambda old, new: convert_checkpoint(old, new, plan_for(old)),
                lambda old, new: convert_checkpoint(old, new, plan_for(old), weights_only=True),
            )
        ):
            new = tmp_path / f"{number}-{name}"
            try:
                write(old, new)
            except LitWslError:
                assert not new.exists()
                continue
            written.append(new)
    assert len(written) >= 60  # the weights at least are taken out of most of them
    command = [sys.executable, "-c", LOAD, *map(str, written)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / CANARY).exists()
    torch.save({"w": torch.ones(1), "evil": Trap()}, tmp_path / "proof.ckpt")  # the canary would have been seen
    subprocess.run([*command[:3], "proof.ckpt"], cwd=tmp_path, capture_output=True, timeout=800, check=False)
    assert (tmp_path / CANARY).exists()


def test_the_error_names_the_call_its_place_and_both_remedies(tmp_path):
    old = trapped(tmp_path)
    words = r"calls \S*eval in 'hyper_parameters/config'.*keep_foreign=True.*safetensors"
    with pytest.raises(CheckpointError, match=words):
        convert_checkpoint(old, tmp_path / "new.ckpt", plan_for(old))
    with pytest.raises(CheckpointError, match="keep_foreign=True"):
        WeightRenamer(old).save(tmp_path / "new.ckpt")
    assert not (tmp_path / "new.ckpt").exists()
    convert_checkpoint(old, tmp_path / "new.safetensors", plan_for(old))
    assert torch.equal(open_checkpoint(tmp_path / "new.safetensors")["net.w"], torch.ones(2))


def test_the_entry_that_the_error_names_can_be_dropped_and_the_rest_stays(tmp_path):
    old = trapped(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        convert_checkpoint(old, tmp_path / "new.ckpt", plan_for(old))
    drop = str(refused.value).partition("drop=['")[2].partition("'")[0]
    convert_checkpoint(old, tmp_path / "new.ckpt", plan_for(old), drop=[drop])
    assert torch.load(tmp_path / "new.ckpt", weights_only=True)["hyper_parameters"] == {"width": 2}


def test_weights_only_leaves_the_call_out_and_says_so(tmp_path):
    old = trapped(tmp_path)
    done = convert_checkpoint(old, tmp_path / "new.ckpt", plan_for(old), weights_only=True)
    assert "left out: 'hyper_parameters'" in done.notes
    assert torch.load(tmp_path / "new.ckpt", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("command", ["convert", "rename"])
def test_whoever_trusts_the_file_keeps_all_of_it(command, tmp_path, monkeypatch, capsys):
    old, new = trapped(tmp_path), tmp_path / "new.ckpt"
    plan_for(old).save(tmp_path / "plan.json")
    line = {
        "convert": ["convert", str(old), "--plan", str(tmp_path / "plan.json"), "-o", str(new)],
        "rename": ["rename", str(old), "--add-prefix", "net", "-o", str(new)],
    }[command]
    assert main(line) == 2
    assert "--keep-foreign" in capsys.readouterr().err
    assert main([*line, "--keep-foreign"]) == 0
    monkeypatch.chdir(tmp_path)
    assert not Path(CANARY).exists()
    found = open_checkpoint(new)
    assert torch.equal(found["net.w"], torch.ones(2))
    assert found.stubbed == open_checkpoint(old).stubbed != ()


def record(module, name, *args, how="reduce"):
    return ForeignObject(ForeignName(module, name), args, how=how)


NAME = ForeignName("subprocess", "Popen")


@pytest.mark.parametrize(
    "call",
    [
        record("posix", "system", "true"),
        record("subprocess", "Popen", "true"),
        record("my.code", "Color", 1),
        record("builtins", "getattr", NAME, "x"),
        record("copyreg", "_reconstructor", NAME, NAME, "true"),  # would call the base's __init__
        record("_codecs", "encode", "text", "zip"),
        record("operator", "getitem", record("my.code", "Evil", how="newobj"), 0),
        record("torch._utils", "_rebuild_from_type_v2", NAME, NAME, (), None),
        ForeignObject(record("functools", "partial", NAME, "true"), ()),  # the result is called
    ],
    ids=lambda call: call.type_name,
)
def test_calls_are_no_data(call):
    assert not is_harmless(call)
    holder = record("my.code", "Config", how="newobj")
    holder.orders.append(("build", {"deep": [({"er": call},)]}))
    assert foreign_calls({"a": [holder, holder]}) == [call.type_name]


def test_a_tree_that_holds_itself_is_looked_through():
    holder = record("my.code", "Config", how="newobj")
    holder.orders.append(("build", {"me": holder, "evil": record("posix", "system", "true")}))
    assert foreign_calls(holder) == ["posix.system"]
