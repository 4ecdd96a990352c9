"""The lives that Lightning leads with one model, each as a function that says what went wrong; any number of processes.

Used by ``test_lives.py`` in one process and by ``tests/distributed/scenarios_lives.py`` in two.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl import WeightTransferCallback

State = dict[str, Tensor]
NAMES = {"first": "net.stem.0", "norm": "net.stem.1", "second": "net.body", "fc": "net.head"}


class Task(L.LightningModule):
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def test_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Old(Task):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 10), nn.BatchNorm1d(10)
        self.second, self.fc = nn.Linear(10, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.fc(self.second(self.norm(self.first(x)).relu()).tanh())


def network() -> nn.ModuleDict:
    stem = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10))
    return nn.ModuleDict({"stem": stem, "body": nn.Linear(10, 7), "head": nn.Linear(7, 3)})


class New(Task):
    """The refactored network."""

    bringing: str | None = None  # a checkpoint for a callback of the module's own

    def forward(self, x):
        return self.net["head"](self.net["body"](self.net["stem"](x).relu()).tanh())

    def configure_callbacks(self):
        return [WeightTransferCallback(self.bringing, verbose=False)] if self.bringing else []


class InInit(New):
    def __init__(self):
        super().__init__()
        self.net = network()


class InSetup(New):
    def setup(self, stage):
        if not hasattr(self, "net"):
            self.net = network()


class InConfigureModel(New):
    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = network()


BUILT = {"__init__": InInit, "setup": InSetup, "configure_model": InConfigureModel}


class Probe(L.Callback):
    """The weights at the start of every run, after all that comes before the first step."""

    def __init__(self) -> None:
        self.starts: list[State] = []

    def on_fit_start(self, trainer, pl_module):
        self.starts.append(weights(pl_module))

    on_test_start = on_fit_start

    def on_validation_start(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            self.on_fit_start(trainer, pl_module)


def weights(model: nn.Module) -> State:
    """Parameters only: under DDP running statistics are each rank's own."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def data() -> DataLoader:
    g = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(16, 6, generator=g), torch.randint(0, 3, (16,), generator=g)), 4)


class World:
    """What one life needs: an old checkpoint, new models, trainers."""

    def __init__(self, folder: Path, built: str, trainer: Callable[..., L.Trainer]) -> None:
        torch.manual_seed(0)
        old = Old()
        self.folder, self.path, self._trainer = folder, folder / "old.ckpt", trainer
        if not self.path.exists():
            torch.save({"state_dict": old.state_dict(), "pytorch-lightning_version": L.__version__}, self.path)
        self.old = {f"{NAMES[n.partition('.')[0]]}.{n.partition('.')[2]}": v for n, v in weights(old).items()}
        self.kind, self.probe, self.wrong = BUILT[built], Probe(), list[str]()

    def model(self) -> New:
        return self.kind()

    def transfer(self, **options: Any) -> WeightTransferCallback:
        return WeightTransferCallback(self.path, verbose=False, **options)

    def run(self, what: str, model: L.LightningModule, *callbacks: L.Callback, trainer: Any = None, **options: Any):
        """Run a new trainer, or the one given, on a model; give the trainer and the weights that the run began with."""
        trainer = trainer or self._trainer(self.folder, *callbacks, self.probe)
        getattr(trainer, what)(model, data(), **options)
        return trainer, self.probe.starts[-1]

    def check(self, words: str, a: State, b: State, equal: bool = True) -> None:
        if same(a, b) != equal:
            self.wrong.append(words)

    def check_fit(self, model: L.LightningModule, *callbacks: L.Callback, words: str = "") -> L.Trainer:
        """A first fit: it starts from the old weights and goes on from there."""
        trainer, start = self.run("fit", model, *callbacks)
        self.check(f"{words} fit did not start from the old weights", start, self.old)
        self.check(f"{words} fit did not train", weights(model), self.old, equal=False)
        return trainer

    def check_kept(self, what: str, model: L.LightningModule, *callbacks: L.Callback, trainer: Any = None) -> None:
        """A later run: it starts with what training has left."""
        trained = weights(model)
        _, start = self.run(what, model, *callbacks, trainer=trainer)
        self.check(f"{what} did not start from the trained weights", start, trained)
        if what != "fit":
            self.check(f"{what} changed the trained weights", weights(model), trained)


def fit(world: World) -> None:
    world.check_fit(world.model(), world.transfer())


def validate_then_fit(world: World) -> None:
    model, transfer = world.model(), world.transfer()
    trainer, start = world.run("validate", model, transfer)
    world.check("validate did not start from the old weights", start, world.old)
    _, start = world.run("fit", model, trainer=trainer)
    world.check("fit did not start from the old weights", start, world.old)
    world.check_kept("validate", model, trainer=trainer)


def fit_then_test(world: World) -> None:
    model = world.model()
    trainer = world.check_fit(model, world.transfer())
    for what in ("test", "validate", "test"):
        world.check_kept(what, model, trainer=trainer)


def fit_then_fit(world: World) -> None:
    model = world.model()
    trainer = world.check_fit(model, world.transfer())
    trainer.fit_loop.max_epochs += 1
    world.check_kept("fit", model, trainer=trainer)
    world.check_kept("test", model, trainer=trainer)


def two_models(world: World) -> None:
    """Folds of a cross-validation: one callback, each model has a fit of its own and is tested afterwards."""
    transfer, models = world.transfer(), [world.model() for _ in range(2)]
    for model in models:
        world.check_fit(model, transfer)
    for model in models:
        world.check_kept("test", model, transfer)


def two_callbacks(world: World) -> None:
    model = world.model()
    transfers = world.transfer(), world.transfer()
    trainer = world.check_fit(model, *transfers)
    if [t.report.applied for t in transfers] != [True, False]:
        world.wrong.append("the second callback filled the model again")
    world.check_kept("test", model, trainer=trainer)
    world.check_kept("test", model, *reversed(transfers))


def two_trainers(world: World) -> None:
    model = world.model()
    world.check_fit(model, world.transfer())
    world.check_kept("test", model, world.transfer())
    world.check_kept("fit", model, world.transfer())
    world.check_kept("validate", model, world.transfer(), world.transfer(strategy="conservative"))


def configure_callbacks(world: World) -> None:
    model = world.model()
    model.bringing = str(world.path)
    trainer = world.check_fit(model)
    world.check_kept("test", model, trainer=trainer)
    world.check_kept("test", model)
    world.check_kept("fit", model)


def resumed_by_ckpt_path(world: World) -> None:
    first = world.model()
    trainer = world.check_fit(first, world.transfer())
    saved, trained = world.folder / "trained.ckpt", weights(first)
    trainer.save_checkpoint(saved)
    model, transfer = world.model(), world.transfer()
    later = world._trainer(world.folder, transfer, world.probe)
    later.fit_loop.max_epochs += 1
    _, start = world.run("fit", model, trainer=later, ckpt_path=str(saved))
    world.check("the resumed fit did not start from its checkpoint", start, trained)
    world.check_kept("test", model, trainer=later)
    world.check_kept("test", model, world.transfer())
    tested = world.model()
    _, start = world.run("test", tested, world.transfer(), ckpt_path=str(saved))
    world.check("the test of a checkpoint did not start from it", start, trained)
    world.check_kept("test", tested, world.transfer())


def deep_copies_and_pickles(world: World) -> None:
    model = world.model()
    world.check_fit(model, world.transfer())
    model.trainer = None
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        world.check_kept("test", again, world.transfer())
        world.check_kept("fit", again, world.transfer())


LIVES = {
    life.__name__: life
    for life in (
        fit, validate_then_fit, fit_then_test, fit_then_fit, two_models, two_callbacks, two_trainers,
        configure_callbacks, resumed_by_ckpt_path, deep_copies_and_pickles,
    )
}  # fmt: skip


def lead(life: str, built: str, folder: Path, trainer: Callable[..., L.Trainer]) -> list[str]:
    """Lead one life; what went wrong."""
    world = World(folder, built, trainer)
    LIVES[life](world)
    return world.wrong
