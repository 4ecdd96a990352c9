"""Where the sample batch comes from, and how it goes through forward."""

from __future__ import annotations

import os

import lightning as L
import pytest
import torch
from tiny import Base, Data, InInit, dataset, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl import WeightTransferCallback


class Listening(Base):
    """Remembers the inputs of its forward calls outside training; its layers run against their registration order."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        type(self).heard.append(x)
        return self.last(self.first(x))


@pytest.fixture(autouse=True)
def _forget():
    Listening.heard = []


@pytest.fixture
def transfer(tmp_path, trainer_kwargs):
    """Set a model up with a transfer that maps everything, and give the report."""

    def run(model, *args, stage="fit", **kwargs):
        torch.save({n: torch.ones_like(t) for n, t in model.state_dict().items()}, tmp_path / "all.pt")
        callback = WeightTransferCallback(tmp_path / "all.pt", proof="off", verbose=False)
        trainer_kwargs.update(max_epochs=0, limit_val_batches=0, limit_test_batches=0, limit_predict_batches=0)
        getattr(L.Trainer(**trainer_kwargs, callbacks=[callback]), stage)(model, *args, **kwargs)
        return callback.report

    return run


def test_the_datamodule_comes_first(transfer):
    class Both(Listening):
        example_input_array = torch.zeros(7, 4)

        def train_dataloader(self):
            raise AssertionError("not asked")

    report = transfer(Both(), datamodule=Data())
    assert report.notes == ()
    assert [tuple(x.shape) for x in Listening.heard[-1:]] == [(2, 4)]


def test_a_datamodule_made_of_data_sets(transfer):
    data = L.LightningDataModule.from_datasets(dataset(), batch_size=4)
    assert transfer(Listening(), datamodule=data).notes == ()
    assert torch.equal(Listening.heard[-1], dataset().tensors[0][:2])


def test_then_the_models_own_loaders(transfer):
    class Own(Listening):
        example_input_array = torch.zeros(7, 4)

        def train_dataloader(self):
            return loader()

    assert transfer(Own()).notes == ()
    assert torch.equal(Listening.heard[-1], dataset().tensors[0][:2])


def test_a_val_loader_serves_where_the_train_loader_fails(transfer):
    class Own(Listening):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(0, 4)), 2)

        def val_dataloader(self):
            return loader()

    assert transfer(Own()).notes == ()
    assert torch.equal(Listening.heard[-1], dataset().tensors[0][:2])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_loaders_given_to_the_run(stage, transfer):
    assert transfer(Listening(), loader(), stage=stage).notes == ()
    assert torch.equal(Listening.heard[-1], dataset().tensors[0][:2])


class OfThisProcess:
    """A stream that no copy of the process can read, so that no sample can be taken of it."""

    def __init__(self):
        self.process = os.getpid()

    def __iter__(self):
        if os.getpid() != self.process:
            raise ConnectionError("the queue belongs to another process")
        yield torch.ones(2, 4)


def test_an_iterator_is_read_in_a_copy_of_the_process(transfer):
    assert transfer(Listening(), iter([torch.ones(2, 4), torch.zeros(2, 4)])).notes == ()
    assert [tuple(x.shape) for x in Listening.heard] == [(2, 4)]


def test_then_the_example_input_array(transfer):
    class Own(Listening):
        example_input_array = torch.zeros(7, 4)

    assert transfer(Own(), OfThisProcess()).notes == ()
    assert [tuple(x.shape) for x in Listening.heard] == [(7, 4)]


def test_else_one_line_says_why(transfer):
    report = transfer(Listening(), OfThisProcess())
    assert len(report.notes) == 1
    assert "no execution order" in report.notes[0]
    assert report.coverage.target.share == 1.0


FORMS = {
    "tensor": lambda x, y: x,
    "pair": lambda x, y: (x, y),
    "nested": lambda x, y: ((x, x), y),
    "dict by name": lambda x, y: {"x": x, "label": y},
    "dict by place": lambda x, y: {"image": x, "label": y},
    "dict of labels first": lambda x, y: {"label": {"a": y}, "image": x},
    "pair of dicts": lambda x, y: ({"x": x}, y),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_batch_finds_its_way(form, transfer):
    x, y = dataset().tensors
    data = [FORMS[form](x[i], y[i]) for i in range(4)]
    assert transfer(Listening(), DataLoader(data, 2)).notes == ()
    assert torch.equal(Listening.heard[-1], x[:2])


def test_several_inputs_are_unpacked(transfer):
    class Two(Listening):
        def forward(self, a, b):
            return super().forward(a + b)

    x = dataset().tensors[0]
    assert transfer(Two(), DataLoader(TensorDataset(x, x), 2)).notes == ()
    assert torch.equal(Listening.heard[-1], 2 * x[:2])


def test_dicts_and_lists_of_loaders(transfer):
    class Named(Listening):
        def forward(self, batch):
            return super().forward(batch["a"][0] + batch["b"][0])

    assert transfer(Named(), {"a": loader(), "b": loader()}).notes == ()
    assert torch.equal(Listening.heard[-1], 2 * dataset().tensors[0][:2])


def test_transfer_hooks_prepare_the_batch(transfer):
    class Hooked(Listening):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 0 + 5, batch[1]

    transfer(Hooked(), loader())
    assert torch.equal(Listening.heard[-1], torch.full((2, 4), 5.0))


def test_a_model_without_forward_is_traced_through_its_only_child(transfer):
    class NoForward(Base):
        forward = L.LightningModule.forward

        def __init__(self):
            super().__init__()
            self.inner = Listening()

    assert transfer(NoForward(), loader()).notes == ()
    assert torch.equal(Listening.heard[-1], dataset().tensors[0][:2])


def test_a_list_of_batches_is_a_loader_too(transfer):
    batches = list(loader())
    assert transfer(InInit(), batches).notes == ()


def test_a_model_of_half_precision_gets_a_sample_in_its_type(transfer):
    class Half(Listening):
        def __init__(self):
            super().__init__()
            self.to(torch.bfloat16)

    assert transfer(Half(), loader()).notes == ()
    assert Listening.heard[-1].dtype == torch.bfloat16


def test_a_log_method_of_the_models_own_is_put_back(transfer):
    model, calls = InInit(), []
    vars(model)["log"] = mine = lambda *a, **k: calls.append(a)
    transfer(model, loader())
    assert vars(model)["log"] is mine
    assert calls == []
