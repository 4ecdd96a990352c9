"""When the transfer happens, how often, and who wins: real Trainer runs."""

from __future__ import annotations

import copy
import json
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from tiny import BUILDERS, InConfigureModel, InInit, InSetup, loader
from torch import nn

from lit_wsl import LitWslError, WeightTransferCallback
from lit_wsl.errors import CheckpointError, CoverageError, MappingError


@pytest.fixture
def old(tmp_path):
    """The old model and its Lightning checkpoint."""
    torch.manual_seed(1)
    model = InInit()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 1)
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": "2.0.0", "epoch": 3}, path)
    return model, path


class AtOptimizers(Callback):
    """Notes the weights at the moment the optimizers are made."""

    def setup(self, trainer, pl_module, stage):
        original = pl_module.configure_optimizers

        def configure_optimizers():
            self.weights = copy.deepcopy(pl_module.state_dict())
            return original()

        pl_module.configure_optimizers = configure_optimizers


@pytest.mark.parametrize("builder", BUILDERS)
def test_fit_starts_from_the_old_weights_wherever_the_model_is_built(builder, old, trainer_kwargs, same_tensors):
    model, watch = builder(), AtOptimizers()
    callback = WeightTransferCallback(old[1])
    trainer = L.Trainer(**trainer_kwargs, callbacks=[callback, watch])
    trainer.fit(model, loader())
    assert same_tensors(watch.weights, old[0].state_dict())
    assert not same_tensors(model.state_dict(), old[0].state_dict())  # it trained on from there
    assert callback.report.coverage.target.share == 1.0
    assert callback.report.plan.target.parameters == 6
    assert "setup" not in vars(trainer.strategy)


def test_the_plan_is_the_same_wherever_the_model_is_built(old, trainer_kwargs):
    plans = []
    for builder in BUILDERS:
        callback = WeightTransferCallback(old[1])
        L.Trainer(**trainer_kwargs, callbacks=[callback]).fit(builder(), loader())
        plans.append(callback.report.plan)
    for plan in plans:
        assert plan.entries == plans[0].entries
        assert plan.target.fingerprint == plans[0].target.fingerprint


def test_a_plan_is_replayed_without_running_the_model(old, trainer_kwargs, tmp_path, same_tensors):
    callback = WeightTransferCallback(old[1])
    L.Trainer(**trainer_kwargs, callbacks=[callback]).validate(InInit(), loader())
    callback.report.plan.save(tmp_path / "plan.json")

    class Unwilling(InConfigureModel):
        def forward(self, x):
            assert self.trainer.state.stage == "validate", "run before the run"
            return super().forward(x)

        def validation_step(self, batch, batch_idx):
            assert same_tensors(self.state_dict(), old[0].state_dict())

    for plan in (tmp_path / "plan.json", str(tmp_path / "plan.json"), callback.report.plan):
        replay = WeightTransferCallback(old[1], plan=plan)
        L.Trainer(**trainer_kwargs, callbacks=[replay]).validate(Unwilling(), loader())
        assert replay.report.notes == callback.report.notes


def test_with_the_old_code_at_hand_the_function_is_checked(old, trainer_kwargs, same_tensors):
    for builder in (InInit, InConfigureModel):
        model, callback = builder(), WeightTransferCallback(old[1], source_module=InInit())
        L.Trainer(**trainer_kwargs, callbacks=[callback]).validate(model, loader())
        assert callback.report.plan.proof == "proven"
        assert same_tensors(model.state_dict(), old[0].state_dict())


def test_a_model_may_bring_the_callback_itself(old, trainer_kwargs, same_tensors):
    class Bringing(InInit):
        def configure_callbacks(self):
            return [WeightTransferCallback(old[1])]

    model = Bringing()
    L.Trainer(**trainer_kwargs).validate(model, loader())
    assert same_tensors(model.state_dict(), old[0].state_dict())


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_alone_starts_from_the_old_weights(builder, stage, old, trainer_kwargs, same_tensors):
    model = builder()
    trainer = L.Trainer(**trainer_kwargs, callbacks=[WeightTransferCallback(old[1])])
    getattr(trainer, stage)(model, loader())
    assert same_tensors(model.state_dict(), old[0].state_dict())


@pytest.mark.parametrize("builder", [InInit, InConfigureModel])
def test_what_training_made_is_never_overwritten_by_a_later_run(builder, old, trainer_kwargs, same_tensors):
    model = builder()
    callback = WeightTransferCallback(old[1])
    trainer = L.Trainer(**trainer_kwargs, callbacks=[callback])
    trainer.fit(model, loader())
    trained = copy.deepcopy(model.state_dict())
    trainer.test(model, loader())
    trainer.validate(model, loader())
    trainer.predict(model, loader())
    assert same_tensors(model.state_dict(), trained)
    trainer.fit_loop.max_epochs = 1
    report = callback.report
    trainer.fit(model, loader())
    assert callback.report is report


def test_another_model_in_the_same_trainer_gets_the_weights_too(old, trainer_kwargs, same_tensors):
    trainer = L.Trainer(**trainer_kwargs, callbacks=[WeightTransferCallback(old[1])])
    for model in (InInit(), InInit()):
        trainer.validate(model, loader())
        assert same_tensors(model.state_dict(), old[0].state_dict())


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("old_file_is_gone", [False, True])
def test_a_resumed_checkpoint_wins_and_the_report_says_so(
    builder, old_file_is_gone, old, trainer_kwargs, tmp_path, same_tensors
):
    trainer_kwargs["enable_checkpointing"] = True
    first = builder()
    saving = ModelCheckpoint(tmp_path / "saved", filename="last")
    L.Trainer(**trainer_kwargs, callbacks=[WeightTransferCallback(old[1]), saving]).fit(first, loader())
    if old_file_is_gone:
        old[1].unlink()
    trainer_kwargs.update(max_epochs=1, enable_checkpointing=False)
    model, callback = builder(), WeightTransferCallback(old[1])
    trainer = L.Trainer(**trainer_kwargs, callbacks=[callback])
    trainer.fit(model, loader(), ckpt_path=saving.best_model_path)
    assert same_tensors(model.state_dict(), first.state_dict())
    assert not callback.report.applied
    assert "last.ckpt" in str(callback.report)
    assert "wins" in str(callback.report)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    (told,) = torch.load(tmp_path / "again.ckpt", weights_only=True)[
        "lit_wsl"
    ]  # what started from what is not forgotten
    assert (told["checkpoint"], told["target_coverage"]) == (f"{tmp_path.name}/old.ckpt", 1.0)
    written = json.loads((tmp_path / "weight_transfer.json").read_text())
    assert written["applied"] is False
    assert "wins" in written["notes"][0]


def test_a_tested_checkpoint_wins_too(old, trainer_kwargs, tmp_path, same_tensors):
    other = InInit()
    torch.save({"state_dict": other.state_dict(), "pytorch-lightning_version": L.__version__}, tmp_path / "other.ckpt")
    model, callback = InSetup(), WeightTransferCallback(old[1])
    trainer = L.Trainer(**trainer_kwargs, callbacks=[callback])
    trainer.test(model, loader(), ckpt_path=str(tmp_path / "other.ckpt"))
    assert same_tensors(model.state_dict(), other.state_dict())
    assert not callback.report.applied


def test_a_restore_that_setup_could_not_foresee_is_reported_when_it_comes(
    old, trainer_kwargs, tmp_path, same_tensors, monkeypatch
):
    monkeypatch.setattr("lit_wsl.callbacks.weight_transfer.resumed_path", lambda trainer: (False, None))
    other = InInit()
    torch.save({"state_dict": other.state_dict(), "pytorch-lightning_version": L.__version__}, tmp_path / "other.ckpt")
    model, callback = InInit(), WeightTransferCallback(old[1])
    L.Trainer(**trainer_kwargs, callbacks=[callback]).test(model, loader(), ckpt_path=str(tmp_path / "other.ckpt"))
    assert same_tensors(model.state_dict(), other.state_dict())
    assert not callback.report.applied
    assert "other.ckpt" in callback.report.notes[-1]


def test_a_search_for_the_learning_rate_is_no_resumed_checkpoint(old, trainer_kwargs, same_tensors):
    """The finder saves and restores the model within the run."""
    from lightning.pytorch.callbacks import LearningRateFinder

    class WithRate(InInit):
        lr = 0.1

    model, callback, watch = WithRate(), WeightTransferCallback(old[1]), AtOptimizers()
    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    L.Trainer(**trainer_kwargs, callbacks=[finder, callback, watch]).fit(model, loader())
    assert callback.report.applied
    assert same_tensors(watch.weights, old[0].state_dict())


def test_weights_trained_in_spawned_processes_are_kept(old, trainer_kwargs, same_tensors):
    """After a spawned fit, the main process has the trained weights and a callback that never heard of a transfer."""

    class Launcher:
        is_interactive_compatible, _already_fit = True, True

        def launch(self, function, *args, trainer=None, **kwargs):
            return function(*args, **kwargs)

    model, callback = InInit(), WeightTransferCallback(old[1])
    trained = copy.deepcopy(model.state_dict())
    trainer = L.Trainer(**trainer_kwargs, callbacks=[callback])
    trainer.strategy._launcher = Launcher()
    trainer.test(model, loader())
    assert same_tensors(model.state_dict(), trained)
    assert not callback.report.applied
    assert "earlier fit" in callback.report.notes[0]


def test_a_report_that_cannot_be_written_does_not_stop_the_run(old, trainer_kwargs, tmp_path):
    (tmp_path / "weight_transfer.json").mkdir()
    callback = WeightTransferCallback(old[1])
    with pytest.warns(UserWarning, match="could not be written"):
        L.Trainer(**trainer_kwargs, callbacks=[callback]).validate(InInit(), loader())
    assert callback.report.applied


def test_a_checkpoint_tells_what_it_started_from_in_primitives_and_without_a_path_of_this_machine(
    old, trainer_kwargs, tmp_path
):
    callback = WeightTransferCallback(old[1])
    trainer = L.Trainer(**trainer_kwargs, callbacks=[callback])
    trainer.fit(InInit(), loader())
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    saved = torch.load(tmp_path / "new.ckpt", weights_only=True)
    (told,) = saved["lit_wsl"]
    assert told["checkpoint"] == f"{tmp_path.name}/old.ckpt"
    assert told["tensors"] == len(callback.report.loaded)
    assert all(type(value) in (str, float, int) for value in told.values())
    assert saved["callbacks"] == {}
    assert str(tmp_path) not in str(told) + callback.state_key


def test_a_run_resumed_without_the_callback_gets_no_warning_of_it(old, trainer_kwargs, tmp_path, recwarn):
    trainer = L.Trainer(**trainer_kwargs, callbacks=[WeightTransferCallback(old[1])])
    trainer.fit(InInit(), loader())
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    recwarn.clear()
    L.Trainer(**{**trainer_kwargs, "max_epochs": 2}).fit(InInit(), loader(), ckpt_path=str(tmp_path / "new.ckpt"))
    assert not [w for w in recwarn if "callbacks" in str(w.message) or "WeightTransfer" in str(w.message)]


def test_two_transfers_in_one_trainer_are_done_in_their_order(old, trainer_kwargs, tmp_path, same_tensors):
    second = InInit()
    torch.save(second.state_dict(), tmp_path / "second.pt")
    for builder in (InInit, InConfigureModel):
        model = builder()
        callbacks = [WeightTransferCallback(old[1]), WeightTransferCallback(tmp_path / "second.pt")]
        trainer = L.Trainer(**trainer_kwargs, callbacks=callbacks)
        trainer.validate(model, loader())
        assert same_tensors(model.state_dict(), second.state_dict())
        assert all(callback.report.applied for callback in callbacks)
        assert "setup" not in vars(trainer.strategy)


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_failure_stops_the_run_and_leaves_model_and_trainer_untouched(builder, trainer_kwargs, tmp_path):
    torch.save({"a.weight": torch.ones(77, 99)}, tmp_path / "other.pt")
    for path, error in ((tmp_path / "other.pt", CoverageError), (tmp_path / "none.ckpt", CheckpointError)):
        torch.manual_seed(0)
        model = builder()
        before = copy.deepcopy(model.state_dict())
        trainer = L.Trainer(**trainer_kwargs, callbacks=[WeightTransferCallback(path)])
        with pytest.raises(error):
            trainer.fit(model, loader())
        assert "setup" not in vars(trainer.strategy)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
        assert not is_overridden("log", model) or "log" not in vars(model)


def test_frozen_parameters_stay_frozen_and_identity_is_kept(old, trainer_kwargs):
    model = InInit()
    model.net[0].requires_grad_(False)
    objects = [id(p) for p in model.parameters()]
    L.Trainer(**trainer_kwargs, callbacks=[WeightTransferCallback(old[1])]).fit(model, loader())
    assert [id(p) for p in model.parameters()] == objects
    assert [p.requires_grad for p in model.net[0].parameters()] == [False, False]
    assert torch.equal(model.net[0].weight, old[0].net[0].weight)


def test_a_lazy_model_is_materialised_by_the_sample(old, trainer_kwargs, same_tensors):
    class Lazy(InInit):
        def __init__(self):
            super().__init__()
            self.net[0] = nn.LazyLinear(8)

    model = Lazy()
    L.Trainer(**trainer_kwargs, callbacks=[WeightTransferCallback(old[1])]).validate(model, loader())
    assert same_tensors(model.state_dict(), old[0].state_dict())


def test_a_lazy_model_without_a_sample_is_named(old, trainer_kwargs):
    class Lazy(InInit):
        def __init__(self):
            super().__init__()
            self.net[0] = nn.LazyLinear(8)

        def train_dataloader(self):
            return iter([])

    with pytest.raises(LitWslError, match=r"net\.0\.weight"):
        L.Trainer(**trainer_kwargs, callbacks=[WeightTransferCallback(old[1])]).fit(Lazy())


@pytest.mark.parametrize(
    "option",
    [
        {"buffers": "some"},
        {"strategy": "bold"},
        {"threshold": 2},
        {"weights": {"colour": 1}},
        {"incompatible_pairs": [1]},
        {"min_coverage": 7},
        {"adapt": ["stretch"]},
        {"resume": "everything"},
        {"checkpoint_weights": "best"},
    ],
)
def test_a_wrong_option_names_itself(option):
    with pytest.raises(MappingError, match=next(iter(option))):
        WeightTransferCallback("old.ckpt", **option)


def test_an_empty_path_is_refused_at_once():
    with pytest.raises(MappingError, match="checkpoint is empty"):
        WeightTransferCallback("")


def test_the_callback_can_be_pickled_and_copied(old, trainer_kwargs):
    callback = WeightTransferCallback(old[1])
    L.Trainer(**trainer_kwargs, callbacks=[callback]).validate(InInit(), loader())
    again = pickle.loads(pickle.dumps(copy.deepcopy(callback)))
    assert again.report.plan == callback.report.plan
    assert again.state_key == callback.state_key
