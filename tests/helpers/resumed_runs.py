"""One small network before and after a refactor, and a control: the old code, resumed by Lightning itself."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl import WeightTransferCallback, transfer_weights
from lit_wsl.convert.checkpoint import convert_checkpoint

NAMES = {"encoder.0": "trunk.stem", "encoder.2": "trunk.body", "fc": "classifier"}


class Task(pl.LightningModule):
    """Automatic optimization with one optimizer; with several, each takes a step for the same loss."""

    def __init__(self, configure):
        super().__init__()
        self.configure = configure
        self.automatic_optimization = not getattr(configure, "several", False)

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def on_train_epoch_end(self):
        if not self.automatic_optimization:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def configure_optimizers(self):
        return self.configure(self)


class Old(Task):
    def __init__(self, configure):
        super().__init__(configure)
        self.encoder = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh())
        self.fc = nn.Linear(10, 3)

    @property
    def backbone(self):
        return self.encoder

    @property
    def head(self):
        return self.fc

    def forward(self, x):
        return self.fc(self.encoder(x))


class New(Task):
    def __init__(self, configure):
        super().__init__(configure)
        self.classifier = nn.Linear(10, 3)
        self.trunk = nn.ModuleDict({"stem": nn.Linear(8, 12), "body": nn.Linear(12, 10)})

    @property
    def backbone(self):
        return self.trunk

    @property
    def head(self):
        return self.classifier

    def forward(self, x):
        return self.classifier(self.trunk["body"](self.trunk["stem"](x).tanh()).tanh())


def renamed(state):
    """The old model's state dict under the new names."""
    return {f"{NAMES[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value for name, value in state.items()}


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (16,), generator=generator)), 4)


def trainer(folder, epochs, *callbacks):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )


def adamw(groups=lambda m: m.parameters(), schedule=None, **settings):
    """A ``configure_optimizers`` with one AdamW."""

    def configure(module):
        optimizer = torch.optim.AdamW(groups(module), **{"lr": 1e-2, **settings})
        scheduler = schedule(optimizer) if schedule is not None else None
        return [optimizer], [scheduler] if scheduler is not None else []

    return configure


def step_lr(optimizer):
    return lrs.StepLR(optimizer, 1, 0.7)


class Case:
    """An old run, saved after two epochs, and what its code ends with when Lightning resumes it up to the fourth."""

    def __init__(self, folder, configure, callbacks=lambda: (), epochs=(2, 4), old=Old, new=New):
        self.folder, self.callbacks, self.epochs, self.new = folder, callbacks, epochs, new
        torch.manual_seed(0)
        runner = trainer(folder, epochs[0], *callbacks())
        runner.fit(old(configure), data())
        self.path = folder / "old.ckpt"
        runner.save_checkpoint(self.path)
        self.make_control = lambda: old(configure)
        self._end = None
        self.plan = transfer_weights(new(configure), self.path, min_coverage=1.0).plan

    @property
    def end(self):
        if self._end is None:
            control = self.make_control()
            trainer(self.folder, self.epochs[1], *self.callbacks()).fit(
                control, data(), ckpt_path=self.path, weights_only=False
            )
            self._end = renamed(control.state_dict())
        return self._end

    def converted(self, configure, *, tell_optimizers=True, **options):
        """The new model, resumed from the converted file, and the notes."""
        probe = self.new(configure)
        optimizers = probe.configure_optimizers()[0] if tell_optimizers else None
        done = convert_checkpoint(
            self.path, self.folder / "new.ckpt", self.plan, target=probe, optimizers=optimizers, **options
        )
        model = self.new(configure)
        trainer(self.folder, self.epochs[1], *self.callbacks()).fit(
            model, data(), ckpt_path=self.folder / "new.ckpt", weights_only=False
        )
        return model, done.notes

    def resumed(self, configure, *, last=False, model=None, callbacks=None, epochs=None, **options):
        """The new model, resumed inside its run, and the notes."""
        transfer = WeightTransferCallback(self.path, plan=self.plan, verbose=False, **{"resume": "all", **options})
        others = list(self.callbacks() if callbacks is None else callbacks)
        model = model if model is not None else self.new(configure)
        self.transfer = transfer
        self.runner = trainer(
            self.folder, epochs or self.epochs[1], *([*others, transfer] if last else [transfer, *others])
        )
        self.runner.fit(model, data())
        return model, transfer.report.notes

    def differs(self, model, *, exact=True):
        """Names of tensors that are not what the control ends with."""
        close = torch.equal if exact else lambda a, b: torch.allclose(a, b, atol=1e-6)
        state = model.state_dict()
        return [name for name, value in self.end.items() if not close(state[name], value)]
