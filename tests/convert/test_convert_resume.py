"""A run that goes on after a refactor as if nothing had happened."""

import lightning.pytorch as pl
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
    trainer,
    transformer_plan,
)

from lit_wsl.convert.checkpoint import convert_checkpoint
from lit_wsl.convert.weights import convert_tensors
from lit_wsl.errors import CheckpointError
from lit_wsl.transfer import TransferPlan


def groups_by_rank(module):
    """Weight decay for matrices only: two groups whose orders interleave in the model."""
    decay = [p for p in module.parameters() if p.ndim >= 2]
    rest = [p for p in module.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2
    )
    return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


def sgd(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)]


def named_adam(module):
    return torch.optim.NAdam(list(module.named_parameters()), lr=1e-2)


CONFIGURES = [None, groups_by_rank, sgd, named_adam]


@pytest.mark.parametrize("configure", CONFIGURES, ids=lambda c: c.__name__ if c else "adamw_one_cycle")
@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_bit_for_bit(case, configure, tmp_path):
    make_old, make_new, make_the_plan, data = CASES[case]
    torch.manual_seed(0)
    uninterrupted = interrupted(make_old(configure=configure), data, tmp_path, of=5)

    new = make_new(configure=configure)
    plan = make_the_plan(make_old(), new)
    file = tmp_path / "plan.json"
    plan.save(file)
    TransferPlan.load(file).convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt")
    runner = fit(new, data(), tmp_path, 5, ckpt_path=tmp_path / "new.ckpt")

    assert runner.global_step == 20
    assert not differing(new, uninterrupted, plan)


def test_three_projections_instead_of_one_go_on_to_rounding(tmp_path):
    # The gradient of the input is a sum of three products now, in another order. SGD, since Adam would blow the
    # rounding noise up where a gradient is zero in exact arithmetic: softmax does not see the bias of the keys.
    torch.manual_seed(0)
    old = OldTransformer(configure=sgd)
    uninterrupted = interrupted(old, tokens, tmp_path, of=5)
    new = NewTransformer(fused=False, configure=sgd)
    plan = transformer_plan(old, new)
    plan.convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt")
    fit(new, tokens(), tmp_path, 5, ckpt_path=tmp_path / "new.ckpt")
    expected = convert_tensors(uninterrupted.state_dict(), plan)
    for name, value in new.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_the_reversed_plan_gives_the_old_checkpoint_back(tmp_path):
    old = OldTransformer()
    fit(old, tokens(), tmp_path, 1).save_checkpoint(tmp_path / "old.ckpt")
    plan = transformer_plan(old, NewTransformer())
    plan.convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt")
    with pytest.raises(CheckpointError, match="order in which the new model registers"):
        plan.reverse().convert_checkpoint(tmp_path / "new.ckpt", tmp_path / "back.ckpt")
    plan.reverse().convert_checkpoint(tmp_path / "new.ckpt", tmp_path / "back.ckpt", target=OldTransformer())
    first, back = (torch.load(tmp_path / name, weights_only=True) for name in ("old.ckpt", "back.ckpt"))
    assert first.keys() == back.keys()
    assert set(first["state_dict"]) == set(back["state_dict"])
    assert all(torch.equal(v, back["state_dict"][k]) for k, v in first["state_dict"].items())
    (before,), (after,) = first["optimizer_states"], back["optimizer_states"]
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for index, state in before["state"].items():
        assert state.keys() == after["state"][index].keys()
        assert all(torch.equal(v, after["state"][index][k]) for k, v in state.items())


class Remembers(pl.Callback):
    """A callback with a state."""

    def __init__(self):
        self.seen = 0

    def on_train_batch_end(self, *_):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Data(pl.LightningDataModule):
    """A datamodule with a state."""

    position = 0

    def train_dataloader(self):
        self.position += 1
        return tokens()

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_everything_else_is_untouched(tmp_path):
    old = OldTransformer()
    old.save_hyperparameters({"width": 8, "layers": [1, 2]})
    old.on_save_checkpoint = lambda checkpoint: checkpoint.update(something={"x": torch.arange(3)})
    remembers, data = Remembers(), Data()
    fit(old, data, tmp_path, 2, callbacks=[remembers]).save_checkpoint(tmp_path / "old.ckpt")
    new = NewTransformer()
    transformer_plan(old, new).convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("old.ckpt", "new.ckpt"))
    assert list(before) == list(after)
    assert {"hyper_parameters", "loops", "lr_schedulers", "callbacks", "Data", "something"} <= set(before)
    for key in set(before) - {"state_dict", "optimizer_states", "something"}:
        assert before[key] == after[key], key
    assert torch.equal(after["something"]["x"], torch.arange(3))
    resumed, other = Remembers(), Data()
    fit(new, other, tmp_path, 3, ckpt_path=tmp_path / "new.ckpt", callbacks=[resumed])
    assert resumed.seen == remembers.seen + 4
    assert other.position > 1


def test_two_optimizers_as_in_a_gan(tmp_path):
    class Adversarial:
        automatic_optimization = False

        def training_step(self, batch, _):
            x, y = batch
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(torch.nn.functional.cross_entropy(self(x), y))
                optimizer.step()

        def configure_optimizers(self):
            halves = list(self.parameters())
            body = [p for p in halves if p.ndim == 4]
            return [torch.optim.Adam(body, lr=1e-2), torch.optim.SGD([p for p in halves if p.ndim != 4], 0.1, 0.9)]

    class Old(Adversarial, OldConvNet):
        pass

    class New(Adversarial, NewConvNet):
        def configure_optimizers(self):  # the head is no convolution any more, but stays with the first optimizer
            first = [self.head.weight] + [p for p in self.net.parameters() if p.ndim == 4]
            chosen = {id(p) for p in first}
            rest = [p for p in self.parameters() if id(p) not in chosen]
            return [torch.optim.Adam(first, lr=1e-2), torch.optim.SGD(rest, 0.1, 0.9)]

    torch.manual_seed(0)
    old = Old()
    uninterrupted = interrupted(old, images, tmp_path, of=4)
    new = New()
    plan = conv_plan(old, new)
    done = convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", plan)
    assert (done.optimizers, done.states) == (2, 10)
    fit(new, images(), tmp_path, 4, ckpt_path=tmp_path / "new.ckpt")
    assert not differing(new, uninterrupted, plan)


def test_the_average_of_the_weights_is_converted_too(tmp_path):
    from lightning.pytorch.callbacks import WeightAveraging

    old = OldTransformer()
    averaging = WeightAveraging()
    fit(old, tokens(), tmp_path, 2, callbacks=[averaging]).save_checkpoint(tmp_path / "old.ckpt")
    assert "current_model_state" in torch.load(tmp_path / "old.ckpt", weights_only=True)
    new = NewTransformer()
    plan = transformer_plan(old, new)
    plan.convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("old.ckpt", "new.ckpt"))
    for key in ("state_dict", "current_model_state"):
        expected = convert_tensors(before[key], plan)
        assert set(after[key]) == set(expected)
        assert all(torch.equal(after[key][name], expected[name]) for name in expected)
    runner = fit(new, tokens(), tmp_path, 3, ckpt_path=tmp_path / "new.ckpt", callbacks=[WeightAveraging()])
    assert runner.global_step == 12


def test_files_of_the_old_model_that_callbacks_remember_are_named(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    old = OldTransformer()
    runner = trainer(tmp_path, 1, [ModelCheckpoint(tmp_path, filename="best")], checkpoints=True)
    runner.fit(old, tokens())
    done = convert_checkpoint(tmp_path / "best.ckpt", tmp_path / "new.ckpt", transformer_plan(old, NewTransformer()))
    assert any("best.ckpt, a file of the old model" in note for note in done.notes)
