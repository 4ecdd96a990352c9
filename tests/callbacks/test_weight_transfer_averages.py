"""EMA and other callbacks that copy the model: listed after, they are fed; listed before, we warn."""

from __future__ import annotations

import copy
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, EMAWeightAveraging, WeightAveraging
from tiny import Base, InConfigureModel, InInit, SetupForData, loader, network

from lit_wsl import WeightTransferCallback


@pytest.fixture
def old(tmp_path):
    torch.manual_seed(1)
    model = InInit()
    torch.save(model.state_dict(), tmp_path / "old.pt")
    return model, tmp_path / "old.pt"


class AtStart(Callback):
    """Notes an average as training starts."""

    def __init__(self, average):
        self.average = average

    def on_fit_start(self, trainer, pl_module):
        module = getattr(self.average, "_average_model", None) or self.average.copied
        self.state = copy.deepcopy(module.state_dict())


class OwnCopy(Callback):
    """A user's own EMA: a copy made at setup."""

    def setup(self, trainer, pl_module, stage):
        self.copied = copy.deepcopy(pl_module)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging")
@pytest.mark.parametrize("builder", [InInit, SetupForData, InConfigureModel])
@pytest.mark.parametrize("average", [EMAWeightAveraging, WeightAveraging, OwnCopy])
def test_an_average_listed_after_starts_from_the_transferred_weights(builder, average, old, trainer_kwargs):
    if average is OwnCopy and builder is InConfigureModel:
        pytest.skip("copies before the model exists, with or without us")
    averaging = average()
    watch = AtStart(averaging)
    callback = WeightTransferCallback(old[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = L.Trainer(**trainer_kwargs, callbacks=[callback, averaging, watch])
        trainer.fit(builder(), loader())
    prefix = "" if average is OwnCopy else "module."
    for name, value in old[0].state_dict().items():
        assert torch.equal(watch.state[prefix + name], value), name
    assert callback.report.warnings == ()
    assert not [w for w in caught if "listed before" in str(w.message)]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging")
@pytest.mark.parametrize("builder", [InInit, SetupForData, InConfigureModel])
def test_an_average_listed_before_is_warned_about(builder, old, trainer_kwargs):
    averaging = EMAWeightAveraging()
    callback = WeightTransferCallback(old[1])
    with pytest.warns(UserWarning, match="EMAWeightAveraging is listed before"):
        L.Trainer(**trainer_kwargs, callbacks=[averaging, callback]).fit(builder(), loader())
    assert len(callback.report.warnings) == 1


def test_backbone_finetuning_freezes_the_transferred_backbone(old, trainer_kwargs):
    class WithBackbone(Base):
        def __init__(self):
            super().__init__()
            self.backbone = network()[:4]
            self.head = network()[4]

        def forward(self, x):
            return self.head(self.backbone(x))

    state = {n.replace("net.4", "head").replace("net.", "backbone."): t for n, t in old[0].state_dict().items()}
    torch.save(state, old[1])
    for first in (True, False):
        model = WithBackbone()
        callbacks = [WeightTransferCallback(old[1]), BackboneFinetuning(unfreeze_backbone_at_epoch=5)]
        L.Trainer(**trainer_kwargs, callbacks=callbacks if first else callbacks[::-1]).fit(model, loader())
        assert not any(p.requires_grad for n, p in model.backbone.named_parameters() if n.startswith("0"))
        assert torch.equal(model.backbone[0].weight, state["backbone.0.weight"])
        assert not torch.equal(model.head.weight, state["head.weight"])
