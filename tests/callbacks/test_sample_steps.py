"""Batches that only a step can unpack give an execution order too: that step is run, once, quietly."""

from __future__ import annotations

import logging
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lit_wsl import WeightTransferCallback


class Pairs(Dataset):
    """Two views and how far they are shifted, nested as no signature tells."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index)
        return {"views": {"left": torch.randn(4, generator=g), "right": torch.randn(4, generator=g)}, "shift": index}


class Siamese(L.LightningModule):
    """Its layers run against their order of registration."""

    def __init__(self):
        super().__init__()
        self.out, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)
        self.steps, self.losses, self.seen = 0, [], nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, left, right):
        return self.out(self.inner(left + right))

    def training_step(self, batch, batch_idx):
        self.steps += 1
        type(self).runs.append((self.training, batch_idx))
        loss = self(batch["views"]["left"], batch["views"]["right"]).square().mean()
        warnings.warn("a loss of this kind", stacklevel=2)
        self.log("loss", loss)
        self.logger.log_metrics({"loss": 1})
        self.losses.append(loss)
        self.seen.data.add_(1)
        return loss

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Logging(L.pytorch.loggers.Logger):
    name, version = "x", "0"
    lines = ()

    def log_metrics(self, metrics, step=None):
        self.lines += (metrics,)

    def log_hyperparams(self, params):
        """Nothing to do."""


@pytest.fixture
def transfer(tmp_path, trainer_kwargs):
    def run(model, stage="fit", **options):
        type(model).runs = []
        torch.save({n: torch.full_like(t, 2) for n, t in model.state_dict().items()}, tmp_path / "old.pt")
        callback, logger = WeightTransferCallback(tmp_path / "old.pt", proof="off", verbose=False, **options), Logging()
        trainer_kwargs.update(max_epochs=0, limit_val_batches=0, logger=logger)
        trainer = L.Trainer(**trainer_kwargs, callbacks=[callback])
        getattr(trainer, stage)(model, DataLoader(Pairs(), batch_size=2))
        return callback.report, logger

    return run


def orders(report):
    return {i.name: i.execution_order for i in report.target.parameters if i.execution_order is not None}


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_the_step_is_run_once_quietly_and_leaves_no_trace(stage, transfer, recwarn):
    model = Siamese()
    report, logger = transfer(model, stage)
    assert orders(report)["inner.weight"] < orders(report)["out.weight"]
    assert report.notes == ()
    assert model.runs == [(False, 0)]
    assert (model.steps, model.losses, model.training) == (0, [], stage == "fit" or model.training)
    assert model.seen.item() == 2  # from the checkpoint
    assert not [line for line in logger.lines if "loss" in line]
    assert not [w for w in recwarn if "of this kind" in str(w.message)]


def test_a_step_that_goes_on_to_train_tells_the_order_of_what_it_has_run(transfer):
    class Manual(Siamese):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            type(self).runs.append(batch_idx)
            loss = self(batch["views"]["left"], batch["views"]["right"]).square().mean()
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    model = Manual()
    report, _ = transfer(model)
    assert orders(report)["inner.weight"] < orders(report)["out.weight"]
    assert model.runs == [0]


def test_a_forward_that_takes_the_batch_is_asked_instead(transfer):
    class Plain(Siamese):
        def forward(self, views, **_):
            return super().forward(views["left"], views["right"])

    model = Plain()
    report, _ = transfer(model)
    assert orders(report)["inner.weight"] < orders(report)["out.weight"]
    assert model.runs == []


def test_a_step_that_fails_before_it_ran_anything_costs_a_note(transfer, caplog):
    class Failing(Siamese):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("not yet")

    with caplog.at_level(logging.WARNING):
        report, _ = transfer(Failing())
    assert orders(report) == {}
    assert "no execution order" in report.notes[0]
    assert report.coverage.target.share == 1.0


def test_lazy_modules_get_their_shapes_by_a_step_of_a_copy_run_once(tmp_path, trainer_kwargs):
    class Lazy(Siamese):
        def __init__(self):
            super().__init__()
            self.inner = nn.LazyLinear(4)

        def training_step(self, batch, batch_idx):
            assert self.trainer.max_epochs == 0
            return super().training_step(batch, batch_idx)

    old = Siamese()
    torch.save(old.state_dict(), tmp_path / "whole.pt")
    model, Lazy.runs = Lazy(), []
    parameters = dict(model.named_parameters())
    callback = WeightTransferCallback(tmp_path / "whole.pt", proof="off", verbose=False)
    trainer_kwargs.update(max_epochs=0, limit_val_batches=0)
    L.Trainer(**trainer_kwargs, callbacks=[callback]).fit(model, DataLoader(Pairs(), batch_size=2))
    assert model.runs == [(False, 0)]
    assert orders(callback.report)["inner.weight"] < orders(callback.report)["out.weight"]
    assert type(model.inner) is nn.Linear
    assert torch.equal(model.inner.weight, old.inner.weight)
    assert (model.steps, model.losses) == (0, [])
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("lazy", [False, True])
def test_steps_that_ask_for_optimizers_before_anything_ran_tell_the_order(lazy, transfer, tmp_path, trainer_kwargs):
    class Adversarial(Siamese):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.inner = nn.LazyLinear(4) if lazy else self.inner

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for scheduler in self.lr_schedulers():
                scheduler.step()
            type(self).runs.append(batch_idx)
            with first.toggle_model():
                loss = self(batch["views"]["left"], batch["views"]["right"]).square().mean()
                first.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(first, 1.0)
                first.step()
            self.toggle_optimizer(second)
            second.optimizer.step()

    torch.save(Siamese().state_dict(), tmp_path / "whole.pt")
    model, Adversarial.runs = Adversarial(), []
    callback = WeightTransferCallback(tmp_path / "whole.pt", verbose=False)
    trainer_kwargs.update(max_epochs=0, limit_val_batches=0)
    L.Trainer(**trainer_kwargs, callbacks=[callback]).fit(model, DataLoader(Pairs(), batch_size=2))
    assert orders(callback.report)["inner.weight"] < orders(callback.report)["out.weight"]
    assert model.runs == [0]
    assert "optimizers" not in vars(model)
