"""Every format gives the tensors that were saved: nests, averages, modules, shards, distributed folders, DeepSpeed."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import subprocess
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lit_wsl.checkpoint import load_checkpoint_as_dict, open_checkpoint
from lit_wsl.errors import CheckpointError


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "body.0.weight": torch.randn(4, 3, generator=generator),
        "body.0.bias": torch.randn(4, generator=generator),
        "head.weight": torch.randn(2, 4, generator=generator),
    }


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def saved(tmp_path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, tmp_path / "file.any", **options)
    return tmp_path / "file.any"


NESTS = [
    (),
    ("model",),
    ("state_dict",),
    ("model_state_dict",),
    ("module",),
    ("net", "params"),
    ("checkpoint", "model", "sd"),
]


@pytest.mark.parametrize("path", NESTS)
def test_nests(tmp_path: Path, path: tuple[str, ...]) -> None:
    content: Any = weights()
    for key in reversed(path):
        content = {"epoch": 1, key: content, "best": torch.tensor(0.5)}
    checkpoint = open_checkpoint(saved(tmp_path, content))
    assert_same(checkpoint, weights())
    assert checkpoint.prefix == path
    assert set(checkpoint.content) == ({"epoch", "best"} if path else set())


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_states_are_not_weights(tmp_path: Path, optimizer: Any) -> None:
    model = nn.Linear(3, 2)
    optim = optimizer(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optim.step()
    large = {"state": {0: {"exp_avg": torch.zeros(1000)}}, "param_groups": [{"params": [0]}]}
    flat = {"state.weight.exp_avg": torch.zeros(1000), "param_groups.weight.lr": 0.1}
    content = {"optimizer": optim.state_dict(), "second": large, "third": flat, "model": model.state_dict()}
    assert_same(open_checkpoint(saved(tmp_path, content)), model.state_dict())


@pytest.mark.parametrize("key", ["ema", "model_ema", "state_dict_ema", "ema_state_dict", "averaged_model", "swaState"])
def test_averages_are_taken_on_request_only(tmp_path: Path, key: str) -> None:
    for order in (1, -1):
        content = dict([("model", weights(0)), (key, weights(1)), ("epoch", 1)][::order])
        path = saved(tmp_path, content)
        plain, average = open_checkpoint(path), open_checkpoint(path, weights="ema")
        assert_same(plain, weights(0))
        assert_same(average, weights(1))
        assert any("EMA" in note and key in note for note in plain.notes)
        assert average.weights == f"ema:{key}"
        assert_same(open_checkpoint(path, weights="model"), weights(0))


def test_an_average_deep_in_a_callback(tmp_path: Path) -> None:
    content = {"state_dict": weights(0), "callbacks": {"EMACallback{'decay': 0.9}": {"weights": weights(1), "step": 3}}}
    assert_same(open_checkpoint(saved(tmp_path, content), weights="ema"), weights(1))
    assert_same(open_checkpoint(saved(tmp_path, content)), weights(0))


@pytest.mark.parametrize("dots", [True, False])
@pytest.mark.parametrize("inner", ["", "module."])
def test_an_average_that_is_a_submodule(tmp_path: Path, inner: str, dots: bool) -> None:
    model = {f"net.{name}": tensor for name, tensor in weights(0).items()}
    average = {f"ema.{inner}{name if dots else name.replace('.', '')}": t for name, t in weights(1).items()}
    path = saved(tmp_path, {"state_dict": {**model, **average}})
    assert_same(open_checkpoint(path), {**model, **average})
    assert_same(open_checkpoint(path, weights="model"), model)
    assert_same(open_checkpoint(path, weights="ema"), {f"net.{name}": t for name, t in weights(1).items()})


class Normed(nn.Module):
    """A model whose buffers have the shapes of no parameter, so that a list of parameters fits in one way."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
        self.register_buffer("mask", torch.ones(5, 5))
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.emb.weight


def test_an_average_that_is_a_list_of_parameters(tmp_path: Path) -> None:
    model = Normed()
    shadow = [torch.randn_like(parameter) for parameter in model.parameters()]
    path = saved(tmp_path, {"model": model.state_dict(), "ema": {"decay": 0.9, "shadow_params": shadow}})
    found = open_checkpoint(path, weights="ema")
    assert list(found) == list(model.state_dict())
    for (name, _), tensor in zip(model.named_parameters(), shadow, strict=True):
        assert torch.equal(found[name], tensor)
    assert torch.equal(found["out.weight"], shadow[0]), "tied weights follow"
    assert torch.equal(found["mask"], model.mask)
    assert found.weights == "ema:ema.shadow_params"
    assert_same(open_checkpoint(path), model.state_dict())
    assert any("ema.shadow_params" in note for note in open_checkpoint(path).notes)


def test_a_list_that_fits_in_two_ways_is_not_guessed(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(3)  # weight, bias and both running statistics have one shape
    shadow = [torch.randn_like(parameter) for parameter in model.parameters()]
    path = saved(tmp_path, {"model": model.state_dict(), "ema": {"shadow_params": shadow}})
    with pytest.raises(CheckpointError, match="no averaged"):
        open_checkpoint(path, weights="ema")


def test_no_average_is_an_error_that_lists_what_is_there(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": weights()})
    with pytest.raises(CheckpointError, match=r"file\.any.*no averaged.*'model'"):
        open_checkpoint(path, weights="ema")


def test_only_an_average_is_taken_and_told(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, {"ema": weights(1), "model": None}))
    assert_same(checkpoint, weights(1))
    assert checkpoint.weights == "ema:ema"
    assert checkpoint.notes


def test_averaged_model_of_torch(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    averaged = AveragedModel(model)
    content = {"model": model.state_dict(), "swa_model": averaged.state_dict()}
    found = open_checkpoint(saved(tmp_path, content), weights="ema")
    assert torch.equal(found["module.weight"], model.weight)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def training_step(self, batch: Any, _: int) -> Any:
        return self.net(batch).pow(2).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False,
                      enable_model_summary=False, **options)  # fmt: skip


def test_lightning_weight_averaging(tmp_path: Path) -> None:
    class SaveInside(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "wa.ckpt")
            self.current = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    save = SaveInside()
    runner = trainer(max_epochs=1, callbacks=[EMAWeightAveraging(decay=0.5), save])
    runner.fit(Net(), torch.utils.data.DataLoader(torch.ones(4, 2)))
    raw = torch.load(tmp_path / "wa.ckpt", weights_only=True)
    assert_same(open_checkpoint(tmp_path / "wa.ckpt", weights="model"), save.current)
    average = open_checkpoint(tmp_path / "wa.ckpt", weights="ema")
    assert_same(average, raw["state_dict"])
    assert not torch.equal(average["net.weight"], save.current["net.weight"])
    auto = open_checkpoint(tmp_path / "wa.ckpt")
    assert_same(auto, raw["state_dict"])
    assert any("WeightAveraging" in note for note in auto.notes)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.again = self.conv
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("dropped", torch.arange(9.0), persistent=False)
        self.register_parameter("absent", None)
        self.tied = nn.Parameter(self.conv.weight.data)
        self.act = torch.relu


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_whole_pickled_modules(tmp_path: Path, protocol: int) -> None:
    model = nn.Sequential(Block(), nn.Sequential(nn.Linear(2, 3), nn.LSTM(3, 3)))
    checkpoint = open_checkpoint(saved(tmp_path, model, pickle_protocol=protocol))
    assert checkpoint.format == "pickled-module"
    assert_same(checkpoint, model.state_dict())
    assert any(name.endswith("Block") for name in checkpoint.stubbed)
    assert checkpoint["0.conv.weight"].data_ptr() == checkpoint["0.again.weight"].data_ptr()
    assert_same(load_checkpoint_as_dict(tmp_path / "file.any"), model.state_dict())


def test_a_module_in_a_nest(tmp_path: Path) -> None:
    model, ema = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    path = saved(
        tmp_path, {"epoch": 1, "ema": ema, "model": model, "optimizer": torch.optim.SGD(model.parameters(), 1.0)}
    )
    assert_same(open_checkpoint(path), model.state_dict())
    assert_same(open_checkpoint(path, weights="ema"), ema.state_dict())
    assert open_checkpoint(path).content["epoch"] == 1


def test_script_modules(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(model).save(str(tmp_path / "a.pt"))
    found = open_checkpoint(tmp_path / "a.pt")
    assert set(found) == set(model.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_numpy_arrays(tmp_path: Path, protocol: int) -> None:
    arrays = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.turned": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "a.big": np.arange(3, dtype=">f8"),
        "a.wave": np.arange(3).astype(">c8"),
        "a.half": np.ones(2, np.float16),
        "a.flag": np.array([True, False]),
        "a.zero": np.zeros((0, 3), np.float32),
        "a.scalar": np.array(2.5),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol))
    found = open_checkpoint(tmp_path / "a.pkl")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(found[name].numpy(), array)
        assert found[name].numpy().dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zip_form", [True, False])
def test_lightning_checkpoints_in_both_forms(tmp_path: Path, zip_form: bool, protocol: int) -> None:
    content = {"pytorch-lightning_version": "2.6", "state_dict": weights(), "epoch": 3}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=zip_form, pickle_protocol=protocol)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "lightning"
    assert_same(checkpoint, weights())


def test_big_endian_files(tmp_path: Path) -> None:
    numbers = torch.arange(5, dtype=torch.int16)
    path = saved(tmp_path, {"w": numbers, "p": Path("x"), "part": numbers[2:]})
    with zipfile.ZipFile(path) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    with zipfile.ZipFile(path, "w") as opened:
        for name, data in members.items():
            swapped = numbers.numpy().byteswap().tobytes() if name.endswith("data/0") else data
            opened.writestr(name, b"big" if name.endswith("byteorder") else swapped)
    assert open_checkpoint(path)["w"].tolist() == [0, 1, 2, 3, 4]
    assert open_checkpoint(path)["part"].tolist() == [2, 3, 4]


def test_safetensors(tmp_path: Path) -> None:
    tensors = {**weights(), "half": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    save_file(tensors, tmp_path / "x.bin", metadata={"format": "pt", "who": "me"})
    checkpoint = open_checkpoint(tmp_path / "x.bin")
    assert checkpoint.format == "safetensors"
    assert checkpoint.metadata == {"format": "pt", "who": "me"}
    assert checkpoint.content == {}
    assert set(checkpoint) == set(tensors)
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in tensors.items())
    assert {name: meta.dtype for name, meta in checkpoint.meta_items()} == {n: t.dtype for n, t in tensors.items()}
    assert set(load_checkpoint_as_dict(tmp_path / "x.bin")) == set(tensors)


def shard(folder: Path, kind: str) -> Path:
    """A Hugging Face folder of two shards and an index."""
    suffix = "safetensors" if kind == "safetensors" else "bin"
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = list(weights())
    parts = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, members in parts.items():
        tensors = {name: weights()[name] for name in members}
        save_file(tensors, folder / file) if kind == "safetensors" else torch.save(tensors, folder / file)
    weight_map = {name: next(file for file, members in parts.items() if name in members) for name in names}
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_sharded_folders(tmp_path: Path, kind: str) -> None:
    index = shard(tmp_path, kind)
    for path in (tmp_path, index):
        checkpoint = open_checkpoint(path)
        assert checkpoint.format == f"{kind}-sharded"
        assert_same(checkpoint, weights())


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    shard(tmp_path, "torch")
    shard(tmp_path, "safetensors")
    assert open_checkpoint(tmp_path).format == "safetensors-sharded"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path, "safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "sub/model.safetensors"])
def test_an_index_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(weights(), tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"head.weight": name}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(folder)


def test_a_tensor_that_no_shard_has_is_named(tmp_path: Path) -> None:
    index = shard(tmp_path, "safetensors")
    content = json.loads(index.read_text())
    content["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"lost\.weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "{" * 100000, '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "any.safetensors", "pytorch_model.bin", "last.ckpt"])
def test_a_folder_with_one_file(tmp_path: Path, name: str) -> None:
    save_file(weights(), tmp_path / name) if name.endswith("safetensors") else torch.save(weights(), tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    found = open_checkpoint(tmp_path)
    assert {key: tensor.tolist() for key, tensor in found.items()} == {k: t.tolist() for k, t in weights().items()}


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    """A folder as Lightning's strategies write it, from one process."""
    content = {
        "state_dict": weights(),
        "optimizer_0": {"state": {"head.weight": {"exp_avg": torch.ones(2, 4), "step": torch.tensor(2.0)}},
                        "param_groups": [{"lr": 0.1, "params": ["head.weight"]}]},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=str(tmp_path / "d.ckpt"))
    torch.save(
        {"epoch": 3, "pytorch-lightning_version": "2.6", "hyper_parameters": Path("x")}, tmp_path / "d.ckpt" / "meta.pt"
    )
    return tmp_path / "d.ckpt"


def test_distributed_folders(distributed: Path) -> None:
    checkpoint = open_checkpoint(distributed)
    assert checkpoint.format == "dcp"
    assert_same(checkpoint, weights())
    assert checkpoint.content["epoch"] == 3
    assert checkpoint.content["optimizer_0"]["param_groups"][0]["lr"] == 0.1
    assert torch.equal(checkpoint.content["optimizer_0"]["state"]["head.weight"]["exp_avg"], torch.ones(2, 4))
    assert any(name.startswith("pathlib") for name in checkpoint.stubbed)
    assert_same(load_checkpoint_as_dict(distributed)["state_dict"], weights())


def test_a_distributed_folder_without_its_index(distributed: Path) -> None:
    (distributed / ".metadata").unlink()
    (distributed / "meta.pt").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        open_checkpoint(distributed)


def test_a_distributed_folder_without_a_shard(distributed: Path) -> None:
    (distributed / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        open_checkpoint(distributed)


def test_a_truncated_shard(distributed: Path) -> None:
    file = distributed / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"d\.ckpt"):
        open_checkpoint(distributed)


def test_a_hostile_index_runs_nothing(distributed: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "canary",))

    (distributed / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Evil()}))
    with pytest.raises(CheckpointError, match="not an index"):
        open_checkpoint(distributed)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("change", ["hole", "overlap", "outside", "other_file"])
def test_a_lying_index(distributed: Path, change: str) -> None:
    metadata = pickle.loads((distributed / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["state_dict.head.weight"]
    if change == "hole":
        entry.size = torch.Size([3, 4])
    elif change == "overlap":
        entry.chunks.append(entry.chunks[0])
    elif change == "outside":
        entry.size = torch.Size([1, 4])
    else:
        info = next(value for key, value in metadata.storage_data.items() if key.fqn == "state_dict.head.weight")
        object.__setattr__(info, "relative_path", "../meta.pt")
    (distributed / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"d\.ckpt"):
        open_checkpoint(distributed)


SHARDED_RUN = """
    import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, Replicate, distribute_tensor
    rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    full = {"a.weight": torch.randn(5, 3), "a.bias": torch.randn(5), "b.weight": torch.randn(4, 7)}
    placed = {"a.weight": [Shard(0)], "a.bias": [Replicate()], "b.weight": [Shard(1)]}
    sharded = {name: distribute_tensor(tensor, mesh, placed[name]) for name, tensor in full.items()}
    dcp.save({"state_dict": sharded}, checkpoint_id=folder)
    if rank == 0:
        torch.save(full, folder + "/full.pt")
    dist.barrier()
    dist.destroy_process_group()
"""


def test_a_folder_written_by_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SHARDED_RUN))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path / "dist"
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), port, str(folder)], stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=800)
        assert rank.returncode == 0, errors.decode()[-2000:]
    full = torch.load(folder / "full.pt", weights_only=True)
    assert len(list(folder.glob("*.distcp"))) == 2
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint) == set(full)
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in full.items())
    assert {name: meta.shape for name, meta in checkpoint.meta_items()} == {n: t.shape for n, t in full.items()}
    next(folder.glob("__1_*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="__1_0"):
        open_checkpoint(folder)


LIGHTNING_RUN = """
    import sys, torch, lightning.pytorch as pl
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    class Net(pl.LightningModule):
        def configure_model(self):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch, _):
            return self.net(batch).pow(2).sum()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    if __name__ == "__main__":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=2, logger=False,
                             enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        model = Net()
        trainer.fit(model, torch.utils.data.DataLoader(torch.ones(8, 5), batch_size=2))
        trainer.save_checkpoint(sys.argv[1])
        full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        if trainer.global_rank == 0:
            torch.save(full, sys.argv[1] + ".full")
"""


def test_a_folder_written_by_lightnings_model_parallel_strategy(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(LIGHTNING_RUN))
    folder = tmp_path / "model.ckpt"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    full = torch.load(f"{folder}.full", weights_only=True)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "dcp"
    assert checkpoint.prefix == ("state_dict",)
    assert_same(checkpoint, full)
    assert checkpoint.content["global_step"] == 2
    moments = checkpoint.content["optimizer_0"]["state"]["net.0.weight"]["exp_avg"]
    assert moments.shape == (3, 5)


def test_opening_reads_no_data(tmp_path: Path) -> None:
    """Ninety tensors of a mebibyte: opening and describing them touches next to none of their pages."""
    import psutil

    large = {f"layer.{i}.weight": torch.full((512, 512), float(i)) for i in range(90)}
    torch.save({"state_dict": large, "p": Path("x")}, tmp_path / "a.ckpt")
    save_file(large, tmp_path / "b.safetensors")
    del large
    for path in (tmp_path / "a.ckpt", tmp_path / "b.safetensors"):
        open_checkpoint(path)
        before = psutil.Process().memory_info().rss
        checkpoint = open_checkpoint(path)
        shapes = [meta.shape for _, meta in checkpoint.meta_items()]
        assert len(shapes) == 90
        assert psutil.Process().memory_info().rss - before < 20 << 20
        assert float(checkpoint["layer.7.weight"][3, 3]) == 7.0


def test_damage_in_the_weights_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.arange(100.0)})
    data = bytearray(path.read_bytes())
    at = data.index(torch.arange(100.0).numpy().tobytes())
    data[at + 50] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="CRC"):
        open_checkpoint(path)


def test_verify_counts_what_it_compared(tmp_path: Path) -> None:
    assert open_checkpoint(saved(tmp_path, {"w": torch.arange(100.0)})).verify() >= 400
    legacy = saved(tmp_path, {"w": torch.arange(100.0)}, _use_new_zipfile_serialization=False)
    assert open_checkpoint(legacy).verify() == 0


def test_a_copy_of_the_file_can_go_while_tensors_stay(tmp_path: Path) -> None:
    path = saved(tmp_path, weights())
    checkpoint = open_checkpoint(path)
    shutil.move(path, tmp_path / "moved")
    assert_same(checkpoint, weights())
