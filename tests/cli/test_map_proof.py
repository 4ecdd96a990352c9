"""``lit-wsl map --config``: the config's own model and data prove the plan, and a job replays it without trials."""

from __future__ import annotations

import importlib
import sys
import textwrap

import lightning.pytorch as pl
import torch
import yaml

from lit_wsl import WeightTransferCallback
from lit_wsl.cli import main
from lit_wsl.transfer import TransferPlan

CODE = textwrap.dedent('''
    import lightning.pytorch as pl
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset


    class Data(pl.LightningDataModule):
        def __init__(self, count: int = 128):
            super().__init__()
            self.count = count

        def setup(self, stage):
            x = torch.randn(self.count, 5, generator=torch.Generator().manual_seed(0))
            self.rows = TensorDataset(x, torch.sin(2 * x[:, 0]) + x[:, 1])

        def train_dataloader(self):
            return DataLoader(self.rows, 32, shuffle=True)

        def val_dataloader(self):
            return DataLoader(self.rows, 32)


    class Net(pl.LightningModule):
        """A gate and a value, apart or in one without a name that tells their order."""

        steps = 0

        def __init__(self, fused: bool = True):
            super().__init__()
            layers = {"q": nn.Linear(5, 24)} if fused else {"gate": nn.Linear(5, 12), "value": nn.Linear(5, 12)}
            self.net = nn.ModuleDict({**layers, "out": nn.Linear(12, 1)})

        def forward(self, x):
            if "q" in self.net:
                value, gate = self.net["q"](x).chunk(2, -1)
            else:
                value, gate = self.net["value"](x), self.net["gate"](x)
            return self.net["out"](value.relu() * gate.sigmoid())[:, 0]

        def training_step(self, batch, batch_idx):
            Net.steps += 1
            return nn.functional.mse_loss(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))
''')


def test_the_plan_carries_its_proof_and_is_replayed_without_trials(tmp_path, monkeypatch):
    (tmp_path / "gated_net.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    gated_net = importlib.import_module("gated_net")  # written just now

    try:
        torch.manual_seed(0)
        data, old = gated_net.Data(), gated_net.Net(fused=False)
        data.setup("fit")
        optimizer = torch.optim.Adam(old.parameters(), 0.02)
        for _ in range(200):
            optimizer.zero_grad()
            old.training_step(data.rows.tensors, 0).backward()
            optimizer.step()
        checkpoint, config, plan = (tmp_path / name for name in ("old.ckpt", "trainer.yaml", "plan.json"))
        score = {"monitor": "val_loss", "best_model_score": torch.tensor(0.5), "current_score": torch.tensor(0.5)}
        saved = {"state_dict": old.state_dict(), "pytorch-lightning_version": "2.6.0"}
        torch.save(saved | {"callbacks": {"ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}": score}}, checkpoint)
        sections = {"model": {"class_path": "gated_net.Net"}, "data": {"class_path": "gated_net.Data"}}
        config.write_text(yaml.safe_dump(sections), encoding="utf-8")
        assert main(["map", str(checkpoint), "--config", str(config), "--plan", str(plan)]) == 0
        proven = TransferPlan.load(plan)
        assert (proven.proof, proven.proof_by) == ("proven", "data")
        assert proven.measured.transferred < proven.measured.fresh

        new, gated_net.Net.steps = gated_net.Net(), 0
        callback = WeightTransferCallback(checkpoint, plan=plan, verbose=False)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, callbacks=[callback], **quiet)
        trainer.validate(new, datamodule=gated_net.Data(), verbose=False)
        assert gated_net.Net.steps == 0
        assert callback.report.plan.proof == "proven"
        both = [old.net["value"], old.net["gate"]]
        assert torch.equal(new.net["q"].weight, torch.cat([layer.weight for layer in both]))
        now = float(trainer.callback_metrics["val_loss"])
        assert f"val_loss 0.5 recorded by the old run, {now:.4g} measured now" in callback.report.notes
    finally:
        sys.modules.pop("gated_net", None)
