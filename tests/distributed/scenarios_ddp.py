"""What two processes do under DDP; run by ``launch.run_ranks``, judged by ``test_ddp.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import runs_dist
import torch
import torch.distributed as dist
from checks_dist import attempt, differing, digest, failing_copy, little_memory_to_undo, save, save_old, whole
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from models_dist import New
from runs_dist import Watch, data, transfer
from torch import Tensor, nn


class Lit(runs_dist.Lit):
    """The new network, built when ``built`` says."""

    def __init__(self, built: str = "init") -> None:
        super().__init__()
        self.built = built
        if built == "init":
            self.net = New()

    def setup(self, stage: str) -> None:
        if self.built == "setup":
            self.net = New()

    def configure_model(self) -> None:
        if self.built == "configure_model" and not hasattr(self, "net"):
            self.net = New()


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    strategy = DDPStrategy(process_group_backend="gloo") if options.get("devices", 2) == 2 else "auto"
    return runs_dist.quiet_trainer(folder, *callbacks, strategy=strategy, **options)


def parameters(net: nn.Module) -> dict[str, Tensor]:
    """Running statistics are each rank's own until the next forward."""
    names = dict(net.named_parameters())
    return {name: tensor for name, tensor in whole(net).items() if name in names}


def _fit(folder: Path, built: str) -> dict[str, Any]:
    import lit_wsl.transfer.api as api

    planned: list[str] = []
    check = api.check_floor
    api.check_floor = lambda *a, **k: planned.append("here") or check(*a, **k)  # called once where the plan is made
    path, expected = save_old(folder)
    torch.manual_seed(100 + dist.get_rank())  # other initial weights on each rank
    model, watch, callback = Lit(built), Watch(), transfer(path)
    try:
        trainer(folder, callback, watch).fit(model, data())
    finally:
        api.check_floor = check
    after = parameters(model.net)
    return {
        "wrong": differing(watch.state, expected),
        "before": digest(watch.state),
        "start": digest({name: watch.state[name] for name in after}),
        "after": digest(after),
        "planned": len(planned),
        "loaded": len(callback.report.loaded),
        "reports": runs_dist.reports(folder),
    }


def built_in_init(folder: Path) -> dict[str, Any]:
    return _fit(folder, "init")


def built_in_setup(folder: Path) -> dict[str, Any]:
    return _fit(folder, "setup")


def built_in_configure_model(folder: Path) -> dict[str, Any]:
    return _fit(folder, "configure_model")


def one_trainer_each(folder: Path) -> dict[str, Any]:
    """Two processes of one group, each with a trainer of its own; only one of them transfers."""
    path, expected = save_old(folder)
    watch = Watch()
    if dist.get_rank() == 1:
        trainer(folder, transfer(path), watch, devices=1).fit(Lit(), data())
    return {"equal": dist.get_rank() == 0 or not differing(watch.state, expected)}


def validate_alone(folder: Path) -> dict[str, Any]:
    path, expected = save_old(folder)
    watch = Watch()
    trainer(folder, transfer(path), watch).validate(Lit(), data(), verbose=False)
    return {"wrong": differing(watch.state, expected), "before": digest(watch.state)}


class OldLit(runs_dist.Lit):
    """Flat and under other names, all renamed in :class:`Refactored`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Linear(6, 10), nn.BatchNorm1d(10)
        self.conv2, self.fc = nn.Linear(10, 7), nn.Linear(7, 3)


class Refactored(runs_dist.Lit):
    """What the old one became; ``lazy``: its first layer gets its shape from the first batch."""

    def __init__(self, lazy: bool = False) -> None:
        super().__init__()
        first = nn.LazyLinear(10) if lazy else nn.Linear(6, 10)
        backbone = nn.Sequential(first, nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 7))
        self.net = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(7, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["head"](self.net["backbone"](x))


def _matched(folder: Path, lazy: bool) -> dict[str, Any]:
    torch.manual_seed(2)
    old = OldLit()
    path = save(folder / "old.ckpt", {"state_dict": old.state_dict()})
    names = {"conv1": "backbone.0", "bn1": "backbone.1", "conv2": "backbone.3", "fc": "head"}
    expected = {
        f"{names[name.split('.')[0]]}.{name.split('.')[1]}": tensor for name, tensor in old.state_dict().items()
    }
    torch.manual_seed(100 + dist.get_rank())
    watch, callback = Watch(), transfer(path, plan=None)
    trainer(folder, callback, watch).fit(Refactored(lazy), data())
    return {
        "wrong": differing(watch.state, expected),
        "before": digest(watch.state),
        "missing": list(callback.report.missing),
    }


def matched_without_a_plan(folder: Path) -> dict[str, Any]:
    return _matched(folder, lazy=False)


def lazy_modules(folder: Path) -> dict[str, Any]:
    return _matched(folder, lazy=True)


class Gated(runs_dist.Lit):
    """A gate and a value, apart or in one without a name that tells their order; the target is the first input."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        layers = {"q": nn.Linear(6, 16)} if fused else {"gate": nn.Linear(6, 8), "value": nn.Linear(6, 8)}
        self.net = nn.ModuleDict({**layers, "out": nn.Linear(8, 1)})

    def forward(self, x: Tensor) -> Tensor:
        both = self.net["q"](x).chunk(2, -1) if "q" in self.net else (self.net["value"](x), self.net["gate"](x))
        return self.net["out"](both[0].relu() * both[1].sigmoid())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0])[:, 0] - batch[0][:, 0]).square().mean()


def decided_on_data(folder: Path) -> dict[str, Any]:
    """Rank zero lets the loss decide which part of a whole is the gate, on its own share of the data."""
    rows = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    old = Gated(fused=False)
    optimizer = torch.optim.Adam(old.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        old.training_step([rows], 0).backward()
        optimizer.step()
    path = save(folder / "gated.ckpt", {"state_dict": old.state_dict()})
    state = {name: tensor.detach() for name, tensor in old.net.state_dict().items()}
    expected = {f"q.{s}": torch.cat([state[f"value.{s}"], state[f"gate.{s}"]]) for s in ("weight", "bias")}
    torch.manual_seed(100 + dist.get_rank())
    watch, callback = Watch(), transfer(path, plan=None)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), 32)
    trainer(folder, callback, watch).fit(Gated(fused=True), loader)
    return {
        "wrong": differing({name: watch.state[name] for name in expected}, expected),
        "before": digest(watch.state),
        "proof": [callback.report.plan.proof, callback.report.plan.proof_by],
    }


def restored(folder: Path) -> dict[str, Any]:
    """A restored checkpoint wins over the transfer, on every rank."""
    path, _ = save_old(folder)
    model = Lit()
    first = trainer(folder, transfer(path))
    first.fit(model, data())
    first.save_checkpoint(folder / "run.ckpt")
    trained = parameters(model.net)
    watch, callback = Watch(), transfer(path)
    trainer(folder, callback, watch, max_epochs=2).fit(Lit(), data(), ckpt_path=folder / "run.ckpt")
    return {
        "wrong": differing(watch.state, trained),
        "applied": callback.report.applied,
        "notes": list(callback.report.notes),
    }


def _failing(folder: Path, checkpoint: Path) -> dict[str, Any]:
    torch.manual_seed(5)
    model = Lit()
    return attempt(model.net, lambda: trainer(folder, transfer(checkpoint)).fit(model, data()))


def missing_on_rank_one(folder: Path) -> dict[str, Any]:
    path, _ = save_old(folder)
    return _failing(folder, path if dist.get_rank() == 0 else folder / "elsewhere.ckpt")


def truncated_on_rank_one(folder: Path) -> dict[str, Any]:
    path, _ = save_old(folder)
    if dist.get_rank() == 1:
        half = folder / "half.ckpt"
        half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        path = half
    return _failing(folder, path)


def another_model_on_rank_one(folder: Path) -> dict[str, Any]:
    path, _ = save_old(folder)
    if dist.get_rank() == 1:
        path = folder / "other.ckpt"
        torch.save({"state_dict": nn.Linear(3, 4).state_dict()}, path)
    return _failing(folder, path)


def copy_fails_on_rank_one(folder: Path) -> dict[str, Any]:
    path, _ = save_old(folder)
    with failing_copy(5):
        return _failing(folder, path)


def last_copy_fails_on_rank_one(folder: Path) -> dict[str, Any]:
    path, expected = save_old(folder)
    with failing_copy(len(expected)), little_memory_to_undo():
        return _failing(folder, path)


def fails_everywhere(folder: Path) -> dict[str, Any]:
    return _failing(folder, folder / "nowhere.ckpt")
