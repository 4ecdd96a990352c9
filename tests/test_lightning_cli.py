"""The callback from a YAML file: LightningCLI builds it, prints it, and names what is wrong with it."""

from __future__ import annotations

import contextlib
import io
import sys

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from tiny import Data, InConfigureModel, InInit

OPTIONS = {
    "buffers": "exclude",
    "strategy": "conservative",
    "threshold": 0.7,
    "weights": {"shape": 0.6, "name": 0.2, "hierarchy": 0.2},
    "incompatible_pairs": [[["backbone"], ["head"]]],
    "plan": None,
    "min_coverage": 0.25,
    "source_module": None,
    "shape_tolerance": 0.1,
    "adapt": ["partial_head"],
    "assume_layouts": True,
    "only": ["net.*"],
    "skip": ["net.4.*"],
    "source_prefix": None,
    "checkpoint_weights": "model",
    "resume": "weights",
    "optimizer_settings": "run",
    "schedule": "run",
    "parameter_names": None,
    "on_lost": "initialize",
    "drop": ["callbacks/EMA"],
    "again": True,
    "proof": "off",
    "proof_batches": 4,
    "proof_seconds": 30.0,
    "verbose": False,
}


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.fixture
def config(tmp_path):
    """Write a config with one callback; gives its path."""
    torch.manual_seed(1)
    old = InInit()
    torch.save({"state_dict": old.state_dict(), "pytorch-lightning_version": "2.0.0"}, tmp_path / "old.ckpt")

    def write(**init_args):
        trainer = {
            "accelerator": "cpu",
            "max_epochs": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                {
                    "class_path": "lit_wsl.WeightTransferCallback",
                    "init_args": {"checkpoint": str(tmp_path / "old.ckpt"), **init_args},
                }
            ],
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"seed_everything": 3, "trainer": trainer}))
        return path

    write.old = old
    return write


def run(*args, model=InInit):
    """Run the CLI in this process; gives it, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli = LightningCLI(model, Data, args=[str(a) for a in args], save_config_callback=None)
        except SystemExit:
            cli = None
    return cli, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("model", [InInit, InConfigureModel])
def test_a_yaml_config_runs_fit_from_the_old_weights(model, config):
    cli, _, err = run("fit", "--config", config(), model=model)
    assert cli is not None, err
    assert all(torch.equal(a, b) for a, b in zip(config.old.state_dict().values(), cli.model.state_dict().values()))
    callback = next(c for c in cli.trainer.callbacks if type(c).__name__ == "WeightTransferCallback")
    assert callback.report.coverage.target.share == 1.0


def test_every_option_arrives(config):
    cli, _, err = run("validate", "--config", config(**OPTIONS))
    assert cli is not None, err
    callback = next(c for c in cli.trainer.callbacks if type(c).__name__ == "WeightTransferCallback")
    options = callback.options
    assert (options.buffers, options.strategy, options.threshold) == ("exclude", "conservative", 0.7)
    assert options.weights == {"hierarchy": 0.2, "name": 0.2, "shape": 0.6}
    assert options.incompatible_pairs == ((frozenset({"backbone"}), frozenset({"head"})),)
    assert (options.adapt, options.assume_layouts) == (("partial_head",), True)
    assert (callback.min_coverage, callback.checkpoint_weights, callback.verbose) == (0.25, "model", False)


def test_print_config_round_trips(config, tmp_path):
    _, first, err = run("fit", "--config", config(**OPTIONS), "--print_config")
    assert first, err
    printed = yaml.safe_load(first)
    (callback,) = printed["trainer"]["callbacks"]
    assert callback["class_path"] == "lit_wsl.WeightTransferCallback"
    assert callback["init_args"] == {"checkpoint": str(tmp_path / "old.ckpt"), **OPTIONS}
    (tmp_path / "printed.yaml").write_text(first)
    _, second, err = run("fit", "--config", tmp_path / "printed.yaml", "--print_config")
    assert yaml.safe_load(second) == printed, err
    cli, _, err = run("fit", "--config", tmp_path / "printed.yaml")
    assert cli is not None, err


def test_a_bare_off_in_yaml_is_off(config):
    path = config(proof="off")
    path.write_text(path.read_text().replace("'off'", "off"))
    assert ": off" in path.read_text()
    cli, _, err = run("fit", "--config", path)
    assert cli is not None, err
    assert next(c for c in cli.trainer.callbacks if type(c).__name__ == "WeightTransferCallback").proof == "off"


def test_the_defaults_are_printed_too(config):
    _, printed, err = run("fit", "--config", config(), "--print_config")
    assert printed, err
    (callback,) = yaml.safe_load(printed)["trainer"]["callbacks"]
    defaults = {"buffers": "lenient", "strategy": "best_match", "threshold": 0.6, "min_coverage": 0.5, "plan": None}
    assert {k: callback["init_args"][k] for k in defaults} == defaults


@pytest.mark.parametrize(
    "wrong",
    [
        {"bufers": "exclude"},
        {"buffers": "some"},
        {"strategy": "bold"},
        {"threshold": "high"},
        {"weights": {"colour": "red"}},
        {"resume": "everything"},
    ],
)
def test_a_wrong_option_names_itself(wrong, config):
    cli, _, err = run("fit", "--config", config(**wrong))
    assert cli is None
    assert next(iter(wrong)) in err


def test_the_callback_from_the_command_line(config, tmp_path):
    torch.save(config.old.state_dict(), tmp_path / "second.pt")
    cli, _, err = run(
        "fit",
        "--config",
        config(),
        "--trainer.callbacks+=lit_wsl.WeightTransferCallback",
        f"--trainer.callbacks.checkpoint={tmp_path / 'second.pt'}",
        "--trainer.callbacks.buffers=exclude",
    )
    assert cli is not None, err
    assert [c.options.buffers for c in cli.trainer.callbacks if hasattr(c, "options")] == ["lenient", "exclude"]


def test_the_old_code_may_be_named_in_the_config(config):
    old = {"class_path": "tiny.InInit"}
    cli, _, err = run("validate", "--config", config(source_module=old))
    assert cli is not None, err
    callback = next(c for c in cli.trainer.callbacks if type(c).__name__ == "WeightTransferCallback")
    assert isinstance(callback.source_module, InInit)
    assert callback.report.plan.proof == "proven"


def test_a_plan_may_be_named_in_the_config(config, tmp_path):
    cli, _, err = run("validate", "--config", config())
    assert cli is not None, err
    first = next(c for c in cli.trainer.callbacks if type(c).__name__ == "WeightTransferCallback")
    first.report.plan.save(tmp_path / "plan.json")
    cli, _, err = run("validate", "--config", config(plan=str(tmp_path / "plan.json")))
    assert cli is not None, err
    replay = next(c for c in cli.trainer.callbacks if type(c).__name__ == "WeightTransferCallback")
    assert replay.report.plan.entries == first.report.plan.entries


@pytest.mark.parametrize("name", ["WeightTransferCallback", "RebasinCallback"])
def test_the_class_help_has_no_markup(name, capsys):
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback

    import lit_wsl

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--callback.help=lit_wsl.{name}"])
    text = capsys.readouterr().out
    assert "checkpoint" in text
    for markup in ("`", ":func:", ":class:", ":meth:"):
        assert markup not in text
    assert getattr(lit_wsl, name).__doc__


def test_the_bare_class_name_works_once_the_class_is_imported():
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback

    from lit_wsl import WeightTransferCallback

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    given = {"class_path": "WeightTransferCallback", "init_args": {"checkpoint": "old.ckpt"}}
    made = parser.instantiate_classes(parser.parse_object({"callback": given})).callback
    assert isinstance(made, WeightTransferCallback)
