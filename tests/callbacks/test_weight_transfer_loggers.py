"""Coverage in the terminal, in loggers and in a file: written by real runs and read back."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tiny import InInit, loader

from lit_wsl import WeightTransferCallback
from lit_wsl.callbacks.remarks import log_report, scalars
from lit_wsl.report.saving import SCHEMA


@pytest.fixture
def partial(tmp_path):
    """A checkpoint that lacks the head, and holds something else."""
    torch.manual_seed(0)
    state = InInit().state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("net.4")}
    state["unknown.weight"] = torch.ones(11, 13)
    torch.save({"state_dict": state}, tmp_path / "partial.ckpt")
    return tmp_path / "partial.ckpt"


def fit(path, trainer_kwargs, **kwargs):
    callback = WeightTransferCallback(path, min_coverage=0.1)
    trainer = L.Trainer(**{**trainer_kwargs, **kwargs}, callbacks=[callback])
    trainer.fit(InInit(), loader())
    return trainer, callback.report


def expected_scalars():
    """Counted by hand: 4*8+8, 8+8 of 4*8+8+8+8+8*3+3 parameter elements are loaded."""
    return {
        "weight_transfer/target_coverage": 56 / 83,
        "weight_transfer/source_coverage": 56 / (56 + 143),
        "weight_transfer/loaded": 7,  # four parameters and three buffers
        "weight_transfer/missing": 2,
        "weight_transfer/unused": 1,
        "weight_transfer/ambiguous": 0,
        "weight_transfer/module_coverage/net.0": 1.0,
        "weight_transfer/module_coverage/net.4": 0.0,
    }


def test_tensorboard_gets_scalars_and_the_table_as_text(partial, trainer_kwargs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, _ = fit(partial, trainer_kwargs, logger=TensorBoardLogger(tmp_path, name="tb"))
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    for name, value in expected_scalars().items():
        assert events.Scalars(name)[0].value == pytest.approx(value), name
    text = events.Tensors("weight_transfer/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| net.4 | 0 of 2 | 2 | 0 | 0 of 27 | 0.0% |" in text
    assert "loss" in events.Tags()["scalars"]


def test_csv_gets_scalars_beside_the_runs_own_metrics(partial, trainer_kwargs, tmp_path):
    trainer, _ = fit(partial, trainer_kwargs, logger=CSVLogger(tmp_path, name="csv"))
    rows = list(csv.DictReader((Path(trainer.log_dir) / "metrics.csv").open()))
    first = next(row for row in rows if row.get("weight_transfer/loaded"))
    for name, value in expected_scalars().items():
        assert float(first[name]) == pytest.approx(value), name
    assert sum(bool(row["loss"]) for row in rows) == 4


def test_the_report_is_written_to_the_log_dir_of_every_kind_of_run(partial, trainer_kwargs, tmp_path):
    for logger in (CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb"), False):
        trainer, report = fit(partial, trainer_kwargs, logger=logger)
        written = json.loads((Path(trainer.log_dir) / "weight_transfer.json").read_text())
        assert written == json.loads(report.to_json())
        jsonschema.validate(written, json.loads(SCHEMA.read_text()))
        assert written["applied"] is True
        assert [item["name"] for item in written["unmatched"]["target"]] == ["net.4.weight", "net.4.bias"]
        assert [item["name"] for item in written["unmatched"]["source"]] == ["unknown.weight"]
        assert written["coverage"]["target"]["elements"] == 56


def test_a_fast_dev_run_works_and_writes_nothing(partial, trainer_kwargs, tmp_path):
    logger = CSVLogger(tmp_path, name="csv")
    _, report = fit(partial, trainer_kwargs, fast_dev_run=True, logger=logger)
    assert report.applied
    assert not list(tmp_path.rglob("weight_transfer.json"))


def test_a_barebones_run_works(partial, trainer_kwargs, tmp_path):
    keep = {k: trainer_kwargs[k] for k in ("accelerator", "devices", "max_epochs", "default_root_dir")}
    callback = WeightTransferCallback(partial, min_coverage=0.1)
    L.Trainer(**keep, barebones=True, callbacks=[callback]).fit(InInit(), loader())
    assert callback.report.applied


def test_sanity_checks_do_not_transfer_again(partial, trainer_kwargs, capsys):
    callback = WeightTransferCallback(partial, min_coverage=0.1)
    trainer = L.Trainer(**trainer_kwargs, num_sanity_val_steps=2, callbacks=[callback])
    trainer.fit(InInit(), loader(), loader())
    assert capsys.readouterr().out.count("-> InInit") == 1


def test_other_ranks_are_silent(partial, trainer_kwargs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(L.Trainer, "is_global_zero", property(lambda self: False))
    _, report = fit(partial, trainer_kwargs)
    assert report.applied
    assert "-> InInit" not in capsys.readouterr().out
    assert not (tmp_path / "weight_transfer.json").exists()


def test_verbose_false_prints_nothing(partial, trainer_kwargs, capsys):
    callback = WeightTransferCallback(partial, min_coverage=0.1, verbose=False)
    L.Trainer(**trainer_kwargs, callbacks=[callback]).fit(InInit(), loader())
    assert "-> InInit" not in capsys.readouterr().out


class Fake(Logger):
    """A logger whose experiment offers the given methods only, like the real one's."""

    def __init__(self, *methods, own=(), run_id=None):
        super().__init__()
        self.calls = []
        self.run_id = run_id
        self.experiment = type("Experiment", (), {m: self._recording(m) for m in methods})()
        for name in own:
            setattr(self, name, lambda *a, _name=name, **k: self.calls.append((_name, a, k)))

    def _recording(self, name):
        return lambda _, *a, **k: self.calls.append((name, a, k))

    def log_metrics(self, metrics, step=None):
        self.calls.append(("log_metrics", (metrics,), {"step": step}))

    def log_hyperparams(self, *args, **kwargs):
        pass

    name = version = "fake"


def test_wandb_mlflow_and_comet_get_their_own_kind_of_table(partial, trainer_kwargs):
    wandb = Fake("log", own=["log_table", "log_text"])
    mlflow = Fake("log_text", run_id="42")
    comet = Fake("log_html", "log_text")
    plain = Fake()
    _, report = fit(partial, trainer_kwargs, logger=[wandb, mlflow, comet, plain])
    for logger in (wandb, mlflow, comet, plain):
        assert logger.calls[0] == ("log_metrics", (scalars(report),), {"step": 0})
    name, _, kwargs = wandb.calls[1]
    assert (name, kwargs["key"]) == ("log_table", "weight_transfer/coverage")
    assert ["net.4", "0 of 2", "2", "0", "0 of 27", "0.0%"] in kwargs["data"]
    assert len(kwargs["columns"]) == 6
    name, args, _ = mlflow.calls[1]
    assert (name, args[0], args[2]) == ("log_text", "42", "weight_transfer.txt")
    assert args[1] == str(report)
    name, args, _ = comet.calls[1]
    assert name == "log_html"
    assert "net.4" in args[0]
    assert "<html" in args[0]
    assert [call[0] for call in plain.calls[:2]].count("log_metrics") >= 1


def test_a_logger_that_fails_does_not_stop_the_run(partial, trainer_kwargs, caplog):
    class Broken(Fake):
        def log_metrics(self, metrics, step=None):
            if any(name.startswith("weight_transfer") for name in metrics):
                raise ConnectionError("the server is gone")

    _, report = fit(partial, trainer_kwargs)
    log_report([Broken()], report)
    assert "the server is gone" in caplog.text


def test_nothing_heavy_is_imported_before_it_is_used(partial, trainer_kwargs):
    code = "import sys, lit_wsl; print([m for m in ('torch', 'lightning', 'rich', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.stdout.strip() == "[]", done.stderr
    _, report = fit(partial, trainer_kwargs)
    log_report([Fake("log", own=["log_table"]), Fake("log_text", run_id="1"), Fake("log_html")], report)
    assert not {"wandb", "mlflow", "comet_ml", "neptune"} & set(sys.modules)


def test_the_terminal_gets_a_table_and_a_pipe_gets_plain_text(partial, trainer_kwargs, capsys):
    from rich.console import Console

    _, report = fit(partial, trainer_kwargs)
    out = capsys.readouterr().out
    assert "\x1b[" not in out
    assert str(report) in out
    lines = [line.split() for line in out.splitlines()]
    assert ["net.4", "0", "of", "2", "2", "0", "0", "of", "27", "0.0%"] in lines
    assert "missing (2): net.4.weight 3x8, net.4.bias 3" in out
    assert "unused in the source (1): unknown.weight 11x13" in out
    console = Console(force_terminal=True, width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report)
    text = console.export_text(styles=True)
    assert "\x1b[31m" in text  # nothing of net.4 was loaded: red
    assert "net.4" in text
