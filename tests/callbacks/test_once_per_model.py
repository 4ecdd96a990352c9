"""What a model remembers of its transfers: by the tensors it holds, wherever it goes, whatever became of its layers."""

from __future__ import annotations

import copy
import io
import logging
import subprocess
import sys
import textwrap

import lightning as L
import pytest
import torch
from lives import InInit, New, Probe, World, network, same, weights
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lit_wsl import WeightTransferCallback, transfer_weights
from lit_wsl.transfer.memory import glance, recall, remember


@pytest.fixture
def world(tmp_path, trainer_kwargs):
    def trainer(folder, *callbacks):
        return L.Trainer(**trainer_kwargs, callbacks=list(callbacks))

    return World(tmp_path, "__init__", trainer)


def part(state, name):
    return {n: t for n, t in state.items() if n.startswith(name)}


def but(state, name):
    return {n: t for n, t in state.items() if not n.startswith(name)}


def head_anew(model):
    model.net["head"] = nn.Linear(7, 3)


def weight_anew(model):
    model.net["head"].weight = nn.Parameter(torch.randn(3, 7))


@pytest.mark.parametrize("rebuild", [head_anew, weight_anew])
@pytest.mark.parametrize("first", ["validate", "fit"])
def test_what_was_built_anew_is_filled_again_and_nothing_that_was_trained(world, rebuild, first):
    model, transfer = world.model(), world.transfer()
    world.run(first, model, transfer)
    before = weights(model)
    rebuild(model)
    again = world.transfer()
    _, start = world.run("fit", model, again)
    name = "net.head.weight" if rebuild is weight_anew else "net.head"
    assert same(part(start, name), part(world.old, name))
    assert same(but(start, name), but(before, name))
    assert any("new in it since" in note for note in again.report.notes)
    assert set(again.report.loaded) == set(part(world.old, name))
    world.check_kept("test", model, again)
    assert world.wrong == []


def test_a_setup_that_builds_everything_anew_each_time_gets_the_old_weights_each_time(world):
    class Unguarded(New):
        def setup(self, stage):
            self.net = network()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return super().forward(x) * self.scale

    world.old["scale"] = torch.tensor([2.0, 3.0, 4.0])
    saved = torch.load(world.path)
    saved["state_dict"]["scale"] = world.old["scale"]
    torch.save(saved, world.path)
    model, transfer = Unguarded(), world.transfer()
    for what in ("validate", "fit", "test", "fit"):
        _, start = world.run(what, model, transfer)
        assert same(start, {name: world.old[name] for name in start}), what
        assert set(start) == set(world.old)


def assigned(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def normed(model):
    parametrizations.weight_norm(model.net["head"])


def normed_before(model):
    parametrize.remove_parametrizations(model.net["body"], "weight")


def wrapped(model):
    model.net["head"] = nn.Sequential(model.net["head"])


def moved(model):
    layer = nn.Linear(7, 3)
    layer.weight, layer.bias = model.net["head"].weight, model.net["head"].bias
    model.net["head"] = layer


def fused(model):
    """As a model that folds its batch norm for inference."""
    linear, norm = model.net["stem"]
    model.net["stem"] = nn.Sequential(
        torch.nn.utils.fusion.fuse_linear_bn_eval(linear.eval(), norm.eval()), nn.Identity()
    )


def doubled(model):
    model.double()
    model.float()


def compiled(model):
    model.net["body"] = torch.compile(model.net["body"], backend="eager")


def in_another_module(model):
    other = InInit()
    other.net = model.net
    return other


def pruned(model):
    torch.nn.utils.prune.l1_unstructured(model.net["head"], "weight", amount=2)


@pytest.mark.parametrize(
    "change",
    [
        assigned,
        normed,
        normed_before,
        wrapped,
        moved,
        fused,
        doubled,
        compiled,
        in_another_module,
        pruned,
        copy.deepcopy,
    ],
)
def test_whatever_is_done_to_trained_weights_they_are_kept(world, change):
    model = world.model()
    if change is normed_before:
        parametrizations.weight_norm(model.net["body"])
    world.run("fit", model, world.transfer(min_coverage=0.1))
    model.eval()
    model = change(model) or model
    world.check_kept("test", model, world.transfer(min_coverage=0.1))
    world.check_kept("fit", model, world.transfer(min_coverage=0.1))
    assert world.wrong == []


def another(world, tmp_path):
    """A second checkpoint."""
    torch.manual_seed(9)
    other = InInit()
    torch.save(other.state_dict(), tmp_path / "other.pt")
    return weights(other), tmp_path / "other.pt"


def test_another_checkpoint_may_follow_as_long_as_nothing_was_trained(world, tmp_path):
    other, path = another(world, tmp_path)
    model = world.model()
    world.run("validate", model, world.transfer())
    second = WeightTransferCallback(path, verbose=False)
    _, start = world.run("fit", model, second)
    assert same(start, other)
    third = world.transfer(threshold=0.5)
    world.check_kept("test", model, third)
    assert world.wrong == []
    assert not third.report.applied
    assert "again=True" in third.report.notes[0]


def test_again_fills_once_more_and_each_callback_once_per_model(world, tmp_path):
    other, path = another(world, tmp_path)
    model = world.model()
    world.run("fit", model, world.transfer())
    again = WeightTransferCallback(path, again=True, verbose=False)
    trainer, start = world.run("fit", model, again)
    assert same(start, other)
    world.check_kept("test", model, trainer=trainer)
    world.check_kept("validate", model, again)
    assert world.wrong == []


def test_the_function_is_remembered_too_and_always_does_what_it_is_asked_for(world):
    model = world.model()
    transfer_weights(model, world.path)
    transfer = world.transfer()
    _, start = world.run("fit", model, transfer)
    assert same(start, world.old)
    assert not transfer.report.applied
    assert "before" in transfer.report.notes[0]
    transfer_weights(model, world.path)
    assert same(weights(model), world.old)


def test_one_line_says_that_nothing_was_done(world, caplog):
    model, transfer = world.model(), world.transfer()
    world.run("fit", model, transfer)
    report = transfer.report
    for callback, applied in ((transfer, True), (world.transfer(), False)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
            world.run("test", model, callback)
        lines = [record.getMessage() for record in caplog.records if "Weight transfer" in record.getMessage()]
        assert len(lines) == 1
        assert "nothing was transferred" in lines[0]
        assert str(world.path) not in lines[0]
        assert callback.report.applied is applied
    assert transfer.report is report


def test_a_failed_transfer_is_not_remembered(world, tmp_path):
    torch.save({"x": torch.ones(77, 99)}, tmp_path / "wrong.pt")
    model = world.model()
    with pytest.raises(Exception, match="coverage"):
        world.run("fit", model, WeightTransferCallback(tmp_path / "wrong.pt", verbose=False))
    world.check_fit(model, world.transfer())
    assert world.wrong == []


def test_a_run_that_was_broken_off_keeps_what_it_has_learnt(world):
    class Breaking(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("broken off")

    model = world.model()
    with pytest.raises(RuntimeError, match="broken off"):
        world.run("fit", model, world.transfer(), Breaking())
    assert not same(weights(model), world.old)
    world.check_kept("fit", model, world.transfer())
    assert world.wrong == []


def test_a_module_saved_whole_is_loaded_where_the_package_is_not(world, tmp_path):
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    transfer_weights(model, copy.deepcopy(model).state_dict())
    torch.save(model, tmp_path / "whole.pt")
    code = """
        import sys
        sys.modules["lit_wsl"] = None
        import torch
        print(len(torch.load(sys.argv[1], weights_only=False).state_dict()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "whole.pt")], capture_output=True, text=True
    )
    assert done.stdout == "7\n", done.stderr


def test_marks_keep_no_tensor_alive_and_add_nothing_to_the_state():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    names = list(model.state_dict())
    remember(model, "key", "old.ckpt", filled=True)
    assert list(model.state_dict()) == names
    held = glance(model)
    model[1] = nn.Linear(2, 2)
    assert [n for n, ref in held.items() if ref() is None] == ["1.weight", "1.bias"]
    assert recall(model).fresh == {"1.weight", "1.bias"}
    assert recall(nn.Linear(2, 2)) is None


def test_copies_and_pickles_remember_by_their_own_tensors():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    remember(model, "key", "old.ckpt", filled=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        memory = recall(again)
        assert (memory.fresh, memory.replaced, dict(memory.transfers)) == (frozenset(), (), {"key": "old.ckpt"})
        again[1] = nn.Linear(2, 2)
        assert recall(again).fresh == {"1.weight", "1.bias"}
    assert recall(copy.deepcopy(model)).untouched
    assert recall(model).untouched
    with torch.no_grad():
        model[0].weight.zero_()
    assert not recall(model).untouched
    assert not recall(copy.deepcopy(model)).untouched


def test_probe_sees_what_runs_start_with(world):
    """The judge of these tests, judged: without a callback nothing starts from the old weights."""
    model = world.model()
    before = weights(model)
    _, start = world.run("fit", model)
    assert same(start, before)
    assert isinstance(world.probe, Probe)
    assert not same(start, world.old)


def test_weights_that_were_trained_here_are_known_in_a_new_model_that_is_made_of_them(world):
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Saving(L.Callback):
        """As a checkpoint of an early epoch, which the end of training does not hold any more."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(world.folder / "early.ckpt")

    model = world.model()
    trainer = world.check_fit(model, world.transfer(), Saving())
    assert not any(isinstance(callback, ModelCheckpoint) for callback in trainer.callbacks)
    trainer.save_checkpoint(world.folder / "last.ckpt")
    for name in ("early.ckpt", "last.ckpt"):
        again = world.kind.load_from_checkpoint(world.folder / name)
        again.bringing = str(world.path)
        world.check_kept("test", again)
        world.check_kept("fit", again, world.transfer())
    copied = world.model()
    copied.load_state_dict(model.state_dict())
    world.check_kept("test", copied, world.transfer())
    assert world.wrong == []
    world.check_fit(world.model(), world.transfer())
    assert world.wrong == []


@pytest.mark.parametrize("then", [lambda m: m, lambda m: m.requires_grad_(False), copy.deepcopy])
def test_a_model_that_was_trained_without_the_callback_is_not_overwritten_by_an_evaluation(world, then):
    model = world.model()
    world.run("fit", model)
    model.trainer = None
    model = then(model)
    trained = weights(model)
    transfer = world.transfer()
    world.run("test", model, transfer)
    assert same(weights(model), trained)
    assert not transfer.report.applied
    assert "again=True" in transfer.report.notes[0]
    world.run("test", model, world.transfer(again=True))
    assert same(weights(model), world.old)


def test_a_fit_fills_a_model_that_was_trained_without_the_callback_and_warns(world):
    model, transfer = world.model(), world.transfer()
    world.run("fit", model)
    with pytest.warns(UserWarning, match="trained before in this process"):
        world.check_fit(model, transfer)
    assert world.wrong == []
    fresh = world.transfer()
    world.check_fit(world.model(), fresh)  # what others trained is no matter
    assert not fresh.report.warnings
