"""What a model remembers goes with its state dict: to a model that is made of it, in whatever process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning as L
import pytest
import torch
from lives import InConfigureModel, InInit, World, data, same, weights
from torch import nn

from lit_wsl.callbacks.state_dicts import extend_state_dicts
from lit_wsl.transfer import memory

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(params=["__init__", "configure_model"])
def world(tmp_path, trainer_kwargs, request):
    return World(tmp_path, request.param, lambda folder, *c: L.Trainer(**trainer_kwargs, callbacks=list(c)))


@pytest.fixture
def elsewhere(monkeypatch):
    """Forget what only the process that trained knows."""

    def forget():
        monkeypatch.setattr(memory, "_trained", set())
        monkeypatch.setattr(memory, "_fresh", set())

    return forget


def loaded_by_hand(model, path):
    saved = torch.load(path)
    if isinstance(model, InConfigureModel):
        model.configure_model()
    model.load_state_dict(saved.get("state_dict", saved))
    return model


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("made", ["load_from_checkpoint", "load_state_dict"])
def test_a_model_made_of_saved_weights_keeps_them(world, elsewhere, weights_only, made):
    trainer = world.check_fit(world.model(), world.transfer())
    trainer.save_checkpoint(world.folder / "t.ckpt", weights_only=weights_only)
    for what in ("test", "fit"):
        elsewhere()
        path = world.folder / "t.ckpt"
        model = world.kind.load_from_checkpoint(path) if made == "load_from_checkpoint" else None
        model = model or loaded_by_hand(world.kind(), path)
        transfer = world.transfer()
        world.check_kept(what, model, transfer)
        assert "again=True" in transfer.report.notes[0]
    assert world.wrong == []


def test_weights_of_a_run_without_the_callback_are_kept_too(world, elsewhere, trainer_kwargs):
    trainer = L.Trainer(**trainer_kwargs)
    trainer.fit(world.model(), data())
    trainer.save_checkpoint(world.folder / "t.ckpt")
    elsewhere()
    model = world.kind.load_from_checkpoint(world.folder / "t.ckpt")
    world.check_kept("test", model, world.transfer())
    world.check_kept("fit", model, world.transfer())
    assert world.wrong == []
    again = world.kind.load_from_checkpoint(world.folder / "t.ckpt")
    _, start = world.run("test", again, world.transfer(again=True))
    assert same(start, world.old)


def test_layers_that_the_file_does_not_have_are_filled(world, elsewhere):
    trainer = world.check_fit(world.model(), world.transfer())
    state = trainer.strategy.lightning_module_state_dict()
    elsewhere()
    for name in [name for name in state if name.startswith("net.head")]:
        del state[name]
    model = world.model()
    if isinstance(model, InConfigureModel):
        model.configure_model()
    model.load_state_dict(state, strict=False)
    _, start = world.run("test", model, world.transfer())
    head = {name for name in start if name.startswith("net.head")}
    assert same({n: start[n] for n in head}, {n: world.old[n] for n in head})
    assert same({n: t for n, t in start.items() if n not in head}, {n: state[n] for n in start if n not in head})


def built(world):
    model = world.model()
    if isinstance(model, InConfigureModel):
        model.configure_model()
    return model


def plain(module):
    """Weights as a script without this package, or another format, would save them."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_weights_of_unknown_origin_are_kept_by_an_evaluation_and_replaced_by_a_fit(world, elsewhere):
    elsewhere()  # other tests train models of the same seeds in this process
    model, transfer = built(world), world.transfer()
    model.load_state_dict(plain(built(world)))
    for what in ("validate", "test"):
        with pytest.warns(UserWarning, match="held weights that load_state_dict gave before"):
            world.check_kept(what, model, transfer)
    assert "again=True" in transfer.report.notes[0]
    with pytest.warns(UserWarning, match="load_state_dict gave before, now replaced"):
        world.check_fit(model, transfer)
    assert any("load_from_checkpoint" in warning for warning in transfer.report.warnings)
    world.check_kept("test", model, transfer)
    assert world.wrong == []


def test_weights_of_unknown_origin_are_replaced_where_it_is_asked_for(world, elsewhere):
    elsewhere()  # other tests train models of the same seeds in this process
    model = built(world)
    model.load_state_dict(plain(built(world)))
    with pytest.warns(UserWarning, match="now replaced"):
        _, start = world.run("test", model, world.transfer(again=True))
    assert same(start, world.old)


def test_a_trained_backbone_that_was_saved_alone_is_kept_in_a_new_model(world, elsewhere):
    trained = world.model()
    world.check_fit(trained, world.transfer())
    torch.save(trained.net["stem"].state_dict(), world.folder / "stem.pt")
    for what in ("test", "fit"):
        elsewhere()
        model, transfer = built(world), world.transfer()
        model.net["stem"].load_state_dict(torch.load(world.folder / "stem.pt"))
        _, start = world.run(what, model, transfer)
        for name, value in weights(trained).items():
            assert torch.equal(start[name], value if name.startswith("net.stem") else world.old[name]), (what, name)
        world.check_kept("test", model, transfer)
    assert world.wrong == []


def test_a_backbone_of_unknown_origin_is_kept_by_an_evaluation_and_the_rest_is_filled(world, elsewhere):
    elsewhere()  # other tests train models of the same seeds in this process
    model, transfer = built(world), world.transfer()
    given = plain(built(world).net["stem"])
    model.net["stem"].load_state_dict(given)
    with pytest.warns(UserWarning, match="net.stem held weights that load_state_dict gave before, .* kept"):
        _, start = world.run("validate", model, transfer)
    for name, old in world.old.items():
        assert torch.equal(start[name], given.get(name.removeprefix("net.stem."), old)), name
    with pytest.warns(UserWarning, match="net.stem held weights that load_state_dict gave before, now replaced"):
        _, start = world.run("fit", model, transfer)
    assert same(start, world.old)


def test_what_a_model_loads_while_it_is_built_is_replaced_with_a_warning(world):
    class Pretrained(InInit):
        """As with the published weights of a library."""

        def __init__(self):
            super().__init__()
            self.net["body"].load_state_dict(plain(nn.Linear(10, 7)))

    for what in ("test", "fit"):
        with pytest.warns(UserWarning, match="net.body held weights that load_state_dict gave before, now replaced"):
            _, start = world.run(what, Pretrained(), world.transfer())
        assert same(start, world.old)


def test_a_model_that_is_given_its_first_weights_again_is_filled_again(world):
    """The folds of a cross-validation with one model."""
    model = built(world)
    first = plain(model)
    for _ in range(2):
        model.load_state_dict(first)
        transfer = world.transfer()
        world.check_fit(model, transfer)
        best = plain(model)
        world.run("fit", model, world.transfer())
        model.load_state_dict(best)
        world.check_kept("test", model, transfer)
        world.check_kept("fit", model, transfer)
    assert world.wrong == []


def test_a_fit_in_processes_of_its_own_returns_what_it_remembers(world, elsewhere):
    """They return a state dict through a file, which the main process loads."""
    inner = world.model()
    world.check_fit(inner, world.transfer())
    torch.save(inner.state_dict(), world.folder / ".temp.ckpt")
    elsewhere()
    model = loaded_by_hand(world.kind(), world.folder / ".temp.ckpt")
    world.check_kept("test", model, world.transfer())
    assert world.wrong == []


def test_another_process_keeps_trained_weights(tmp_path, trainer_kwargs):
    world = World(tmp_path, "__init__", lambda folder, *c: L.Trainer(**trainer_kwargs, callbacks=list(c)))
    trainer = world.check_fit(world.model(), world.transfer())
    trainer.save_checkpoint(tmp_path / "t.ckpt")
    code = """
        import sys
        import lightning as L
        from lives import InInit, data, same, weights
        from lit_wsl import WeightTransferCallback
        model = InInit.load_from_checkpoint(sys.argv[1])
        before = weights(model)
        callback = WeightTransferCallback(sys.argv[2], verbose=False)
        L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback]).test(model, data())
        print(same(before, weights(model)), callback.report.applied)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), tmp_path / "t.ckpt", world.path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{HELPERS}:{HELPERS.parents[1]}"},
    )
    assert done.stdout.splitlines()[-1] == "True False", done.stderr


def test_state_dicts_are_what_they_were(tmp_path):
    torch.manual_seed(0)
    model, plain = InInit(), nn.Module()
    plain.net = model.net
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.state_dict()._metadata == {**plain.state_dict()._metadata}
    memory.remember(model, "key", "old.ckpt", filled=True)
    state = model.state_dict(prefix="inner.")
    assert state._metadata["inner"] == {"version": 1, "weight_transfer": {"key": "old.ckpt"}}
    torch.save(state, tmp_path / "state.pt")
    assert list(torch.load(tmp_path / "state.pt", weights_only=True)) == list(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
    assert InInit().load_state_dict(weights(model), strict=False).missing_keys
    before = L.LightningModule.load_state_dict
    extend_state_dicts()
    assert L.LightningModule.load_state_dict is before


def test_metadata_of_others_is_passed_by():
    state = InInit().state_dict()
    for strange in ("text", {"weight_transfer": 3}, {"weight_transfer": {"a": 1}}):
        state._metadata[""] = {"version": 1, **(strange if isinstance(strange, dict) else {})}
        model = InInit()
        model.load_state_dict(state)
        assert memory.recall(model) is None
