"""Going on with training inside a run: ``WeightTransferCallback(..., resume=...)``."""

import pytest
import torch
from conversion_models import (
    CASES,
    NewConvNet,
    NewTransformer,
    OldConvNet,
    OldTransformer,
    conv_plan,
    differing,
    fit,
    images,
    interrupted,
    tokens,
    transformer_plan,
)
from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging, LearningRateFinder
from resumed_runs import Case, adamw, data, step_lr, trainer

from lit_wsl import WeightTransferCallback
from lit_wsl.errors import CheckpointError


@pytest.mark.parametrize("case", CASES)
def test_all_is_as_if_nothing_had_happened(case, tmp_path):
    make_old, make_new, make_plan, data = CASES[case]
    torch.manual_seed(0)
    old = make_old()
    uninterrupted = interrupted(old, data, tmp_path, of=5)
    new = make_new()
    plan = make_plan(old, new)
    callback = WeightTransferCallback(tmp_path / "old.ckpt", plan=plan, resume="all", verbose=False)
    runner = fit(new, data(), tmp_path, 5, callbacks=[callback])
    assert runner.global_step == 20
    assert runner.current_epoch == 5
    assert not differing(new, uninterrupted, plan)
    assert any("training continues" in note for note in callback.report.notes)


def test_optimizer_takes_the_same_steps_but_counts_from_zero(tmp_path):
    torch.manual_seed(0)
    old = OldTransformer()
    uninterrupted = interrupted(old, tokens, tmp_path, of=5)
    new = NewTransformer()
    plan = transformer_plan(old, new)
    callback = WeightTransferCallback(tmp_path / "old.ckpt", plan=plan, resume="optimizer", verbose=False)
    runner = fit(new, tokens(), tmp_path, 3, callbacks=[callback])
    assert runner.global_step == 12
    assert not differing(new, uninterrupted, plan)


def test_weights_alone_start_the_optimizer_afresh(tmp_path):
    old = OldTransformer()
    fit(old, tokens(), tmp_path, 2).save_checkpoint(tmp_path / "old.ckpt")
    new = NewTransformer()
    callback = WeightTransferCallback(tmp_path / "old.ckpt", plan=transformer_plan(old, new), verbose=False)
    runner = fit(new, tokens(), tmp_path, 1, callbacks=[callback])
    assert all(state["step"] == 4 for state in runner.optimizers[0].state.values())


def regrouped(module):
    """The new run's optimizer has its own order of parameters; the old groups are one."""
    optimizer = torch.optim.AdamW([{"params": list(reversed(list(module.parameters())))}], lr=1e-2)
    return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


def named(module):
    optimizer = torch.optim.AdamW(list(module.named_parameters()), lr=1e-2)
    return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


def plain_order(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


def test_an_order_of_its_own_is_refused_where_the_old_one_is_only_inferred(tmp_path):
    old = OldTransformer(configure=plain_order)
    fit(old, tokens(), tmp_path, 1).save_checkpoint(tmp_path / "old.ckpt")
    new = NewTransformer(configure=regrouped)
    callback = WeightTransferCallback(
        tmp_path / "old.ckpt", plan=transformer_plan(old, new), resume="all", verbose=False
    )
    with pytest.raises(CheckpointError, match="not in the order of the model"):
        fit(new, tokens(), tmp_path, 2, callbacks=[callback])


def test_the_real_optimizers_say_in_which_order_the_states_go(tmp_path):
    torch.manual_seed(0)
    old = OldTransformer(configure=named)
    uninterrupted = interrupted(old, tokens, tmp_path, of=4)
    new = NewTransformer(configure=regrouped)
    plan = transformer_plan(old, new)
    callback = WeightTransferCallback(tmp_path / "old.ckpt", plan=plan, resume="all", verbose=False)
    fit(new, tokens(), tmp_path, 4, callbacks=[callback])
    assert not differing(new, uninterrupted, plan)


def sgd(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


def no_scheduler(module):
    return torch.optim.AdamW(module.parameters())


@pytest.mark.parametrize(
    ("configure", "message"), [(sgd, "of another kind"), (no_scheduler, "1 learning rate schedulers, the run 0")]
)
def test_another_optimizer_is_refused(configure, message, tmp_path):
    old = OldTransformer(configure=plain_order)
    fit(old, tokens(), tmp_path, 1).save_checkpoint(tmp_path / "old.ckpt")
    new = NewTransformer(configure=configure)
    callback = WeightTransferCallback(
        tmp_path / "old.ckpt", plan=transformer_plan(old, new), resume="all", verbose=False
    )
    with pytest.raises(CheckpointError, match=message):
        fit(new, tokens(), tmp_path, 2, callbacks=[callback])


def test_a_checkpoint_of_weights_only_has_nothing_to_go_on_with(tmp_path):
    old = OldTransformer()
    fit(old, tokens(), tmp_path, 1).save_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    new = NewTransformer()
    callback = WeightTransferCallback(
        tmp_path / "old.ckpt", plan=transformer_plan(old, new), resume="optimizer", verbose=False
    )
    with pytest.raises(CheckpointError, match="save_weights_only"):
        fit(new, tokens(), tmp_path, 1, callbacks=[callback])


def test_a_new_head_starts_fresh_while_the_rest_goes_on(tmp_path):
    old = OldConvNet()
    fit(old, images(), tmp_path, 2).save_checkpoint(tmp_path / "old.ckpt")
    new = NewConvNet()
    plan = conv_plan(old, new)
    plan = type(plan)(tuple(e for e in plan.entries if not e.targets[0].startswith("head")), plan.source, plan.target)
    before = new.head.weight.detach().clone()
    callback = WeightTransferCallback(tmp_path / "old.ckpt", plan=plan, resume="all", verbose=False)

    def configure(module):
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.1, amsgrad=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    new.configure = configure
    runner = fit(new, images(), tmp_path, 3, callbacks=[callback])
    state = runner.optimizers[0].state
    assert state[new.head.weight]["step"] == 4
    assert state[new.net["conv_1"].weight]["step"] == 12
    assert not torch.equal(before, new.head.weight)
    assert any("head.weight" in note for note in callback.report.notes)


def test_a_copy_that_is_restored_too_needs_no_warning_about_its_place(tmp_path):
    case = Case(tmp_path, adamw(schedule=step_lr), callbacks=lambda: (EMAWeightAveraging(decay=0.5),))
    model, _ = case.resumed(adamw(schedule=step_lr), last=True)
    assert not case.differs(model)
    assert not case.transfer.report.warnings
    case.resumed(adamw(schedule=step_lr), last=True, resume="optimizer", epochs=1)
    assert any("listed before" in warning for warning in case.transfer.report.warnings)


@pytest.mark.parametrize("mode", ["all", "optimizer"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "finder",
    [
        lambda: LearningRateFinder(num_training_steps=3, update_attr=False, max_lr=0.02),
        lambda: BatchSizeFinder(max_trials=1, steps_per_trial=1, init_val=4),
    ],
)
def test_a_finder_that_puts_its_own_checkpoint_back_does_not_use_up_the_resume(finder, first, mode, tmp_path):
    case = Case(tmp_path, adamw(schedule=step_lr))
    transfer = WeightTransferCallback(case.path, plan=case.plan, resume=mode, verbose=False)
    callbacks = [transfer, finder()] if first else [finder(), transfer]
    runner = trainer(tmp_path, case.epochs[1] - (0 if mode == "all" else case.epochs[0]), *callbacks)
    model = case.new(adamw(schedule=step_lr))
    model.batch_size = 4
    model.train_dataloader = lambda: torch.utils.data.DataLoader(data().dataset, 4)
    runner.fit(model)
    assert not case.differs(model)
    assert "6 parameters have an optimizer state" in transfer.report.notes[-1]
