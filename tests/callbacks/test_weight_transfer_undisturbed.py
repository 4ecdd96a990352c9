"""A fit with a transfer that maps nothing is bitwise the fit without the callback."""

from __future__ import annotations

import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny import Augmented, Data, InConfigureModel, InInit, InSetup, Measured, loader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lit_wsl import WeightTransferCallback


class Recorder(Callback):
    """Notes all metrics after every batch."""

    def __init__(self):
        self.metrics = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.metrics.append({k: v.item() for k, v in trainer.callback_metrics.items()})

    on_validation_epoch_end = on_train_batch_end


def run(make_model, make_data, path, trainer_kwargs, stage="fit", *, with_callback):
    """One run from one seed; everything it leaves behind."""
    L.seed_everything(7, verbose=False)
    model, data, recorder = make_model(), make_data(), Recorder()
    transfer = [WeightTransferCallback(path, min_coverage=0.0)] if with_callback else []
    trainer_kwargs = {**trainer_kwargs, "max_epochs": 2, "logger": CSVLogger(trainer_kwargs["default_root_dir"])}
    trainer = L.Trainer(**trainer_kwargs, callbacks=[*transfer, recorder])
    getattr(trainer, stage)(model, data)
    if transfer:
        assert len(transfer[0].report.plan) == 0
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    optimizers = [o.state_dict()["state"] for o in trainer.optimizers]
    world = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
    modes = [(m.training, *(p.requires_grad for p in m.parameters(recurse=False))) for m in model.modules()]
    logged = [
        {k: v for k, v in row.items() if not k.startswith("weight_transfer")}
        for row in getattr(trainer.logger.experiment, "metrics", [])
    ]
    counts = (data.loaders_made, data.data.reads) if isinstance(data, Data) else ()
    return weights, optimizers, world, modes, recorder.metrics, logged, model.seen, counts, transfer


def assert_equal_runs(make_model, make_data, trainer_kwargs, tmp_path, stage="fit"):
    torch.save({"other.weight": torch.ones(123, 45)}, tmp_path / "other.pt")
    with_it = run(make_model, make_data, tmp_path / "other.pt", trainer_kwargs, stage, with_callback=True)
    without = run(make_model, make_data, tmp_path / "other.pt", trainer_kwargs, stage, with_callback=False)
    for name, value in without[0].items():
        assert torch.equal(value, with_it[0][name]), name
    for ours, plain in zip(with_it[1], without[1], strict=True):
        for key, state in plain.items():
            assert all(
                torch.equal(v, ours[key][k]) if isinstance(v, torch.Tensor) else v == ours[key][k]
                for k, v in state.items()
            )
    for ours, plain in zip(with_it[2:-1], without[2:-1], strict=True):
        assert ours == plain
    assert len(without[6]) == (8 if stage == "fit" else 0)
    return [note for note in with_it[-1][0].report.notes if "on data" not in note]


@pytest.mark.parametrize("make_model", [Measured, InInit, InSetup, InConfigureModel])
def test_a_fit_with_a_datamodule_is_bitwise_the_same(make_model, trainer_kwargs, tmp_path):
    notes = assert_equal_runs(make_model, Data, trainer_kwargs, tmp_path)
    assert notes == []  # the sample call worked, so the comparison means something


def test_a_fit_with_shuffled_loaders_and_workers_is_bitwise_the_same(trainer_kwargs, tmp_path):
    def data():
        return DataLoader(Augmented(), 4, shuffle=True, num_workers=1)

    notes = assert_equal_runs(Measured, data, trainer_kwargs, tmp_path)
    assert notes == []


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_is_bitwise_the_same(stage, trainer_kwargs, tmp_path):
    assert_equal_runs(InInit, lambda: loader(shuffle=True), trainer_kwargs, tmp_path, stage)


def test_a_stream_gives_a_sample_and_loses_none(trainer_kwargs, tmp_path):
    class Stream(IterableDataset):
        def __init__(self):
            g = torch.Generator().manual_seed(0)
            self.rows = iter([(torch.randn(4, generator=g), torch.tensor(i % 3)) for i in range(32)])

        def __iter__(self):
            for _ in range(16):
                yield next(self.rows)

    notes = assert_equal_runs(InInit, lambda: DataLoader(Stream(), 4), trainer_kwargs, tmp_path)
    assert notes == []


def test_a_fit_whose_sample_fails_is_bitwise_the_same(trainer_kwargs, tmp_path):
    class Failing(Measured):
        def forward(self, x):
            self.net[1].running_mean += 1
            self.net[0].weight.data.mul_(1.01)
            torch.rand(3)
            self.fresh = True
            if not self.trainer.training or (self.trainer.global_step == 0 and not self.training):
                raise RuntimeError("not like this")
            return self.net(x)

    notes = assert_equal_runs(Failing, loader, trainer_kwargs, tmp_path)
    assert len(notes) == 1
    assert "not like this" in notes[0]


def test_a_generator_that_only_comes_once_is_not_touched(trainer_kwargs, tmp_path):
    class OneShot(nn.Module):
        """A re-iterable loader whose iterations all share one position."""

        def __init__(self):
            super().__init__()
            self.batches = iter(list(loader()) * 2)

        def __iter__(self):
            for _ in range(4):
                yield next(self.batches)

    assert_equal_runs(InInit, OneShot, trainer_kwargs, tmp_path)
