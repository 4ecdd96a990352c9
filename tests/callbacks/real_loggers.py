"""A run with the real W&B, MLflow and Comet loggers, without network, and what they wrote, read back as JSON.

A process of its own: these libraries start threads, and patch others on import.
``python real_loggers.py FOLDER wandb mlflow comet``
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from tiny import InInit, loader

from lit_wsl import RebasinCallback, WeightTransferCallback

OFFLINE = {
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # the only store of mlflow-skinny
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "COMET_START_ONLINE": "0",  # Lightning's CometLogger(online=False) makes a run that writes nothing at all
    "COMET_DISABLE_AUTO_LOGGING": "1",
    "COMET_LOGGING_CONSOLE": "ERROR",
}


def make_logger(name: str, folder: Path):
    from lightning.pytorch.loggers import CometLogger, MLFlowLogger, WandbLogger

    if name == "wandb":
        return WandbLogger(project="p", save_dir=str(folder), offline=True, log_model=False)
    if name == "mlflow":
        return MLFlowLogger(experiment_name="e", tracking_uri=f"file:{folder / 'mlruns'}")
    return CometLogger(project="p", offline_directory=str(folder))


def run(folder: Path, loggers) -> None:
    """Fit from a checkpoint that lacks the head, with another run to compare with."""
    torch.manual_seed(0)
    state = InInit().state_dict()
    torch.save({"state_dict": state}, folder / "pretrained.ckpt")
    partial = {name: value for name, value in state.items() if not name.startswith("net.4")}
    torch.save({"state_dict": {**partial, "unknown.weight": torch.ones(11, 13)}}, folder / "partial.ckpt")
    moved = {n: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for n, v in state.items()}
    torch.save({"state_dict": moved}, folder / "reference.ckpt")
    callbacks = [
        WeightTransferCallback(folder / "partial.ckpt", min_coverage=0.1, verbose=False),
        RebasinCallback(folder / "pretrained.ckpt", folder / "reference.ckpt", save_weights=False),
    ]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        log_every_n_steps=1,
        logger=loggers,
        default_root_dir=str(folder),
        callbacks=callbacks,
        **quiet,
    ).fit(InInit(), loader())


def wandb_records(path: Path):
    """Records of an offline ``.wandb`` file: seven bytes of header, then LevelDB's log format."""
    data, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's rest is too short for a header
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def read_wandb(folder: Path) -> dict:
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    scalars, steps = {}, {}
    for raw in wandb_records(path):
        record = Record.FromString(raw)
        if record.WhichOneof("record_type") == "history":
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            for key, value in row.items():
                scalars.setdefault(key, value)
                steps.setdefault(key, row.get("trainer/global_step"))
    files = path.parent / "files"
    return {
        "scalars": {key: value for key, value in scalars.items() if isinstance(value, (int, float))},
        "table": json.loads((files / scalars["weight_transfer/coverage/path"]).read_text()),
        "table_step": steps["weight_transfer/coverage/path"],
        "page": (files / scalars["weight_transfer/report/path"]).read_text(encoding="utf-8"),
    }


def read_mlflow(folder: Path) -> dict:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{folder / 'mlruns'}")
    (found,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    run_id = found.info.run_id
    files = {item.path: Path(client.download_artifacts(run_id, item.path)) for item in client.list_artifacts(run_id)}
    return {
        "scalars": {key: client.get_metric_history(run_id, key)[0].value for key in found.data.metrics},
        "status": found.info.status,
        "text": files["weight_transfer.txt"].read_text(encoding="utf-8"),
        "page": files["weight_transfer.html"].read_text(encoding="utf-8"),
    }


def read_comet(folder: Path) -> dict:
    (path,) = folder.glob("*.zip")
    scalars, html, page = {}, "", ""
    with zipfile.ZipFile(path) as archive:
        for line in archive.read("messages.json").decode().splitlines():
            message = json.loads(line)
            payload = message["payload"]
            if payload.get("metric"):
                scalars.setdefault(payload["metric"]["metricName"], payload["metric"]["metricValue"])
            html += payload.get("htmlOverride") or payload.get("html") or ""
            if payload.get("file_path") and str(payload.get("additional_params", {}).get("fileName")).endswith(".html"):
                page = archive.read(Path(payload["file_path"]).name).decode()
    return {"scalars": scalars, "html": html, "page": page}


def main() -> None:
    os.environ.update(OFFLINE)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise):
        loggers = {name: make_logger(name, folder) for name in names}
        run(folder, list(loggers.values()))
        if "wandb" in loggers:
            loggers["wandb"].experiment.finish()
        if "comet" in loggers:
            loggers["comet"].experiment.end()
        found = {name: globals()[f"read_{name}"](folder) for name in names}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
