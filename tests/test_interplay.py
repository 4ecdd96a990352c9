"""Beside other features of torch and Lightning: compiled, half precision, quantised, tied, parametrized, resumed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl import WeightTransferCallback, transfer_weights


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())


class Old(nn.Module):
    def __init__(self, wrap: Any = lambda layer: layer) -> None:
        super().__init__()
        self.block1, self.block2 = block(4, 9), block(9, 6)
        self.mid = wrap(nn.Linear(6, 7))
        self.fc = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mid(self.block2(self.block1(x))))


class Backbone(nn.Module):
    def __init__(self, wrap: Any = lambda layer: layer) -> None:
        super().__init__()
        self.stages = nn.ModuleList([block(4, 9), block(9, 6)])
        self.neck = wrap(nn.Linear(6, 7))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.neck(x)


class Lit(LightningModule):
    """The refactored network: a backbone and a head, other names."""

    def __init__(self, wrap: Any = lambda layer: layer, compiled: bool = False) -> None:
        super().__init__()
        self.backbone = Backbone(wrap)
        if compiled:
            self.backbone = torch.compile(self.backbone, backend="eager")
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class AtStart(Callback):
    """What the network answers, and what it holds, before the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        training = pl_module.training
        x = PROBE.to(next(pl_module.parameters()).dtype)
        with torch.no_grad():
            self.answer = pl_module.eval()(x)
        pl_module.train(training)
        self.state = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


PROBE = torch.randn(11, 4, generator=torch.Generator().manual_seed(9))


def trained(old: nn.Module) -> nn.Module:
    """Give batch norm statistics of its own."""
    old.train()
    with torch.no_grad():
        for _ in range(3):
            old(torch.randn(32, 4) * 2 + 0.5)
    return old.eval()


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 4, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (32,), generator=generator)), batch_size=8)


def make_trainer(path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=path,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **(defaults | options),
    )


def save(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": state}, path / "old.ckpt")
    return path / "old.ckpt"


def fit(path: Path, model: LightningModule, state: dict[str, Tensor], **options: Any):
    transfer, start = WeightTransferCallback(save(path, state), verbose=False), AtStart()
    make_trainer(path, transfer, start, **options).fit(model, data())
    return transfer.report, start


@pytest.fixture(autouse=True)
def _seeded() -> None:
    seed_everything(3, verbose=False)


def test_a_refactored_model_answers_as_the_old_one(tmp_path):
    old = trained(Old())
    report, start = fit(tmp_path, Lit(), old.state_dict())
    assert report.missing == report.ambiguous == report.unused == ()
    torch.testing.assert_close(start.answer, old(PROBE))


# ---- torch.compile ----------------------------------------


def test_a_compiled_part_is_filled(tmp_path):
    old = trained(Old())
    report, start = fit(tmp_path, Lit(compiled=True), old.state_dict())
    assert report.missing == ()
    assert any("_orig_mod" in name for name in start.state)  # it was compiled
    torch.testing.assert_close(start.answer, old(PROBE))


def test_a_checkpoint_of_a_compiled_model_fills_a_plain_one(tmp_path):
    old = trained(Old())
    state = torch.compile(old, backend="eager").state_dict()
    assert all(name.startswith("_orig_mod.") for name in state)
    report, start = fit(tmp_path, Lit(), state)
    assert report.missing == report.unused == ()
    torch.testing.assert_close(start.answer, old(PROBE))


# ---- precision ----------------------------------------


def test_bf16_true(tmp_path):
    old = trained(Old())
    report, start = fit(tmp_path, Lit(), old.state_dict(), precision="bf16-true")
    assert report.missing == ()
    floating = {name: t for name, t in start.state.items() if t.is_floating_point()}
    assert {t.dtype for t in floating.values()} == {torch.bfloat16}
    rounded = old.bfloat16()
    assert torch.equal(start.answer, rounded(PROBE.bfloat16()))


def test_a_bf16_checkpoint_fills_a_full_precision_model(tmp_path):
    old = trained(Old()).bfloat16()
    report, start = fit(tmp_path, Lit(), old.state_dict())
    assert any("bfloat16" in note for note in report.notes)
    torch.testing.assert_close(start.answer, old.float()(PROBE))


# ---- quantised and integer tensors ----------------------------------------


def test_a_quantised_part_is_left_alone_and_the_rest_is_filled(tmp_path):
    class Quantised(nn.Module):
        """An 8-bit layer as quantisers store it: integer codes as a parameter, and their scale."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-9, 9, (7, 6), dtype=torch.int8), requires_grad=False)
            self.register_buffer("scale", torch.full((7, 1), 0.25))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight * self.scale).T

    old, new = trained(Old()), Lit(wrap=lambda layer: Quantised())
    codes = new.backbone.neck.weight.clone()
    transfer_weights(new, old.state_dict())
    assert torch.equal(new.backbone.neck.weight, codes)
    assert torch.equal(new.backbone.neck.scale, torch.full((7, 1), 0.25))
    assert torch.equal(new.head.weight, old.fc.weight)
    assert torch.equal(new.backbone.stages[1][0].weight, old.block2[0].weight)


def test_codes_never_become_weights(tmp_path):
    old = trained(Old())
    state = {k: (v * 40).to(torch.int8) if k == "mid.weight" else v for k, v in old.state_dict().items()}
    new = Lit()
    before = new.backbone.neck.weight.clone()
    report = transfer_weights(new, state, min_coverage=0.0)
    assert torch.equal(new.backbone.neck.weight, before)
    assert "backbone.neck.weight" not in report.loaded
    assert "mid.weight" in report.unused


# ---- tied weights ----------------------------------------


class Tied(nn.Module):
    def __init__(self, tie: bool = True, names: tuple[str, str] = ("embed", "out")) -> None:
        super().__init__()
        self.names = names
        setattr(self, names[0], nn.Embedding(12, 5))
        self.mix = nn.Linear(5, 5)
        setattr(self, names[1], nn.Linear(5, 12, bias=False))
        if tie:
            getattr(self, names[1]).weight = getattr(self, names[0]).weight

    def forward(self, tokens: Tensor) -> Tensor:
        return getattr(self, self.names[1])(self.mix(getattr(self, self.names[0])(tokens)))


TOKENS = torch.arange(12).view(3, 4)


def test_tied_weights_stay_tied_and_are_right():
    old, new = Tied(), Tied(names=("tokens", "logits"))
    transfer_weights(new, old.state_dict(), example_args=(TOKENS,))
    assert new.logits.weight is new.tokens.weight
    torch.testing.assert_close(new(TOKENS), old(TOKENS))


def test_tied_weights_that_the_checkpoint_stores_twice():
    old, new = Tied(), Tied()
    transfer_weights(new, {name: tensor.clone() for name, tensor in old.state_dict().items()})
    assert new.out.weight is new.embed.weight
    torch.testing.assert_close(new(TOKENS), old(TOKENS))


def test_a_tied_checkpoint_fills_separate_tensors():
    old, new = Tied(), Tied(tie=False, names=("tokens", "logits"))
    transfer_weights(new, old.state_dict(), example_args=(TOKENS,))
    assert new.logits.weight is not new.tokens.weight
    torch.testing.assert_close(new(TOKENS), old(TOKENS))


def test_two_different_tensors_never_silently_become_one():
    old, new = Tied(tie=False), Tied(names=("tokens", "logits"))
    before = new.tokens.weight.detach().clone()
    report = transfer_weights(new, old.state_dict(), example_args=(TOKENS,), min_coverage=0.0)
    lost = {"embed.weight", "out.weight"} & set(report.unused)
    if torch.equal(new.tokens.weight, before):
        assert len(lost) == 2
    else:  # one of the two may fill the tied tensor, but then the other is named
        assert len(lost) == 1


# ---- parametrized modules ----------------------------------------


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layers(wrap, tmp_path):
    old = trained(Old(wrap))
    report, start = fit(tmp_path, Lit(wrap), old.state_dict())
    assert report.missing == ()
    torch.testing.assert_close(start.answer, old(PROBE), atol=1e-4, rtol=1e-4)


def old_weight_norm(layer: nn.Linear) -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(layer)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, old_weight_norm])
def test_a_plain_weight_never_becomes_the_direction_of_weight_norm(wrap):
    """The direction has the plain weight's shape, but with another length of its rows it is another function."""
    old, new = trained(Old()), Lit(wrap)
    before = {name: tensor.clone() for name, tensor in new.backbone.neck.state_dict().items()}
    report = transfer_weights(new, old.state_dict())
    for name, tensor in new.backbone.neck.state_dict().items():
        assert name == "bias" or torch.equal(tensor, before[name])
    assert "mid.weight" in report.unused
    assert any("weight_norm" in note for note in report.notes)
    assert torch.equal(new.head.weight, old.fc.weight)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, old_weight_norm])
def test_the_direction_of_weight_norm_never_becomes_a_plain_weight(wrap):
    old, new = trained(Old(wrap)), Lit()
    before = new.backbone.neck.weight.clone()
    report = transfer_weights(new, old.state_dict())
    assert torch.equal(new.backbone.neck.weight, before)
    assert "backbone.neck.weight" in report.missing
    assert torch.equal(new.head.weight, old.fc.weight)


def test_old_weight_norm_becomes_the_new_one():
    old, new = trained(Old(old_weight_norm)), Lit(parametrizations.weight_norm)
    report = transfer_weights(new, old.state_dict())
    assert report.missing == report.unused == ()
    torch.testing.assert_close(new.eval()(PROBE), old(PROBE))


# ---- checkpoints of the run ----------------------------------------


def test_a_run_with_checkpoints_resumes_as_if_it_had_not_stopped(tmp_path):
    """Two epochs at once, and one epoch, a stop, and the second: the same weights in the end."""
    path = save(tmp_path, trained(Old()).state_dict())

    def run(folder: str, epochs: int, resume: Path | None = None) -> tuple[Lit, WeightTransferCallback, Path]:
        seed_everything(5, verbose=False)
        model, transfer = Lit(), WeightTransferCallback(path, verbose=False)
        keep = ModelCheckpoint(tmp_path / folder, save_last=True)
        trainer = make_trainer(tmp_path, transfer, keep, max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(model, data(), ckpt_path=resume)
        return model, transfer, tmp_path / folder / "last.ckpt"

    whole, _, _ = run("whole", 2)
    _, _, last = run("half", 1)
    resumed, transfer, _ = run("rest", 2, last)
    assert not transfer.report.applied
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_best_checkpoint_of_a_run_loads_without_the_package(tmp_path):
    path = save(tmp_path, trained(Old()).state_dict())
    keep = ModelCheckpoint(tmp_path / "kept")
    trainer = make_trainer(tmp_path, WeightTransferCallback(path, verbose=False), keep, enable_checkpointing=True)
    model = Lit()
    trainer.fit(model, data())
    content = torch.load(keep.best_model_path, weights_only=True)
    assert content["state_dict"].keys() == model.state_dict().keys()
    other = Lit.load_from_checkpoint(keep.best_model_path)
    assert torch.equal(other.head.weight, model.head.weight)


def test_a_module_that_fabric_has_set_up_is_filled_and_its_checkpoints_are_read(tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    torch.manual_seed(0)
    old, fabric = Old().eval(), Fabric(accelerator="cpu", devices=1)
    wrapped, _ = fabric.setup(Old(), torch.optim.SGD(old.parameters(), lr=0.1))
    wrapped.load_state_dict(old.state_dict())
    fabric.save(tmp_path / "fabric.ckpt", {"model": wrapped, "step": 3})
    model = Lit()
    inside = fabric.setup(model)
    inside.mark_forward_method("training_step")
    report = transfer_weights(inside, tmp_path / "fabric.ckpt", min_coverage=1.0)
    assert set(report.loaded) >= {name for name, _ in model.named_parameters()}  # the model's names, not the wrapper's
    with torch.no_grad():
        assert torch.allclose(model.eval()(PROBE), old(PROBE), atol=1e-6)
