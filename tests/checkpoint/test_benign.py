"""Checkpoints with hyper-parameters of every kind give bit-equal tensors, and survive being written again."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import re
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict
from omegaconf import OmegaConf

from lit_wsl.checkpoint import atomic_save, load_checkpoint_as_dict, open_checkpoint
from lit_wsl.errors import CheckpointError


class Color(enum.Enum):
    RED = 1


class Flags(enum.IntFlag):
    A = 1
    B = 2


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 3
    name: str = "x"


@dataclasses.dataclass
class Slotted:
    __slots__ = ("depth", "path")
    depth: int
    path: Path


class Point(NamedTuple):
    x: int
    y: float


class Custom:
    def __init__(self) -> None:
        self.inner = {"a": [1, 2]}
        self.me = self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and self.inner == other.inner

    def method(self) -> int:
        return 1


class Named(dict):
    """A dict of a class of its own."""


class WithReduce:
    def __reduce__(self) -> Any:
        return (WithReduce, (), {"state": 1}, iter([]), iter([]))

    def __setstate__(self, state: dict) -> None:
        self.state = state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithReduce)


class WithKeywords:
    def __new__(cls, *, size: int = 0) -> WithKeywords:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple:
        return (), {"size": 4}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithKeywords)


HPARAMS: dict[str, Any] = {
    "namespace": argparse.Namespace(lr=0.1, layers=[1, 2]),
    "path": pathlib.Path("data/images"),
    "windows_path": pathlib.PureWindowsPath("C:/x"),
    "numpy_float": np.float32(0.5),
    "numpy_int": np.int64(7),
    "numpy_bool": np.bool_(True),
    "numpy_array": np.arange(6.0).reshape(2, 3),
    "omegaconf": OmegaConf.create({"model": {"width": 3, "sizes": [1, 2]}, "path": "${model.width}"}),
    "enum": Color.RED,
    "flag": Flags.A | Flags.B,
    "dataclass": Config(),
    "slots": Slotted(3, Path("x")),
    "datetime": datetime.datetime(2024, 1, 2, 3, 4, tzinfo=datetime.timezone.utc),
    "timedelta": datetime.timedelta(days=1, seconds=3),
    "date": datetime.date(2024, 1, 2),
    "custom": Custom(),
    "function": len,
    "own_function": re.escape,
    "partial": functools.partial(int, base=2),
    "class": Custom,
    "method": Custom().method,
    "ordered_dict": collections.OrderedDict(b=1, a=2),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "defaultdict_of_own": collections.defaultdict(Custom),
    "counter": collections.Counter("aabc"),
    "deque": collections.deque([1, 2], maxlen=3),
    "dtype": torch.bfloat16,
    "device": torch.device("cuda", 1),
    "size": torch.Size([2, 3]),
    "decimal": decimal.Decimal("1.25"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=5),
    "namedtuple": Point(1, 2.5),
    "set": {1, "a", (2, 3)},
    "frozenset": frozenset({1, 2}),
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"abc"),
    "complex": 1 + 2j,
    "huge_int": 1 << 200,
    "nan_and_inf": [float("inf"), -0.0],
    "range": range(3, 9, 2),
    "slice": slice(1, None, 2),
    "ellipsis": ...,
    "not_implemented": NotImplemented,
    "regex": re.compile("a+"),
    "mapping_proxy_source": types.SimpleNamespace(a=1),
    "attribute_dict": AttributeDict(lr=0.1, nested=AttributeDict(a=1)),
    "named_dict": Named(a=1),
    "reduce": WithReduce(),
    "keywords": WithKeywords(),
    "unicode": "\u00e4\U0001f600\n",
    "nested": {"a": [(1, {"b": argparse.Namespace(c={Color.RED: Path("x")})})]},
    "tensor_inside": argparse.Namespace(weights=torch.arange(3.0)),
    "rng_state": torch.get_rng_state(),
}
WEIGHTS = {
    "net.weight": torch.randn(4, 3),
    "net.bias": torch.randn(4),
    "norm.running_mean": torch.zeros(4, dtype=torch.float64),
    "half": torch.randn(3).to(torch.bfloat16),
    "eight": torch.randn(3).to(torch.float8_e4m3fn),
    "flag": torch.tensor([True, False]),
    "count": torch.tensor(3),
    "wave": torch.randn(2, dtype=torch.complex64),
    "turned": torch.randn(3, 4).t(),
    "part": torch.randn(10)[2:5],
    "none": torch.empty(0, 5),
}


def same(a: Any, b: Any) -> bool:
    """Equality that also looks into containers of tensors and arrays, and at types."""
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return type(a) is type(b) and a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, argparse.Namespace):
        return same(vars(a), vars(b))
    if isinstance(a, functools.partial):
        return (a.func, a.args, a.keywords) == (b.func, b.args, b.keywords)
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__
    if isinstance(a, dict) and type(a) is dict:
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def assert_equal_bits(checkpoint: Any) -> None:
    assert list(checkpoint) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        found = checkpoint[name]
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert found.stride() == tensor.stride() or not tensor.numel()
        assert torch.equal(
            found.contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        )
        meta = checkpoint.meta(name)
        assert meta.is_meta
        assert (meta.shape, meta.dtype) == (tensor.shape, tensor.dtype)


def test_the_corpus_is_large_enough() -> None:
    assert len(HPARAMS) >= 15


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", sorted(HPARAMS))
def test_tensors_are_bit_equal(tmp_path: Path, kind: str, protocol: int) -> None:
    file = tmp_path / "a.ckpt"
    torch.save({"hyper_parameters": HPARAMS[kind], "state_dict": WEIGHTS, "epoch": 2}, file, pickle_protocol=protocol)
    checkpoint = open_checkpoint(file)
    assert_equal_bits(checkpoint)
    assert checkpoint.content["epoch"] == 2
    assert "hyper_parameters" in checkpoint.content


@pytest.mark.parametrize("kind", sorted(HPARAMS))
def test_legacy_files_too(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.ckpt"
    torch.save({"hp": HPARAMS[kind], "state_dict": WEIGHTS}, file, _use_new_zipfile_serialization=False)
    assert_equal_bits(open_checkpoint(file))


CALLS = {"enum", "flag", "nested", "method", "reduce"}  # Color(1), getattr(object, "method"), WithReduce()


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("kind", sorted(HPARAMS))
def test_written_again_it_means_the_same(tmp_path: Path, kind: str, protocol: int) -> None:
    first, second = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    torch.save({"hp": HPARAMS[kind], "state_dict": WEIGHTS}, first, pickle_protocol=protocol)
    content = load_checkpoint_as_dict(first)
    calls = kind in CALLS or (kind, protocol) == ("keywords", 2)  # which says getattr(cls, "__new__")
    if calls:  # a call of a name that nobody knows here, as a hostile file has it
        with pytest.raises(CheckpointError, match=r"calls .* in 'hp[/a]*'\. Nothing of it was run.*keep_foreign=True"):
            atomic_save(content, second)
        assert not second.exists()
    atomic_save(content, second, keep_foreign=calls)
    assert_equal_bits(open_checkpoint(second))
    trusted = torch.load(second, weights_only=False)  # our own file: shows that the objects are what they were
    assert same(trusted["hp"], HPARAMS[kind])


def test_self_reference_survives(tmp_path: Path) -> None:
    torch.save({"hp": HPARAMS["custom"], "state_dict": WEIGHTS}, tmp_path / "a.ckpt")
    atomic_save(load_checkpoint_as_dict(tmp_path / "a.ckpt"), tmp_path / "b.ckpt")
    found = torch.load(tmp_path / "b.ckpt", weights_only=False)["hp"]
    assert found.me is found


def test_foreign_classes_are_named(tmp_path: Path) -> None:
    torch.save({"hp": argparse.Namespace(p=Path("x")), "state_dict": WEIGHTS}, tmp_path / "a.ckpt")
    stubbed = open_checkpoint(tmp_path / "a.ckpt").stubbed
    assert "argparse.Namespace" in stubbed
    assert any(name.startswith("pathlib") for name in stubbed)
    torch.save({"state_dict": WEIGHTS}, tmp_path / "b.ckpt")
    assert open_checkpoint(tmp_path / "b.ckpt").stubbed == ()


class Net(pl.LightningModule):
    def __init__(self, cfg: Any, where: Path, act: Callable = torch.tanh, mode: Color = Color.RED) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(2, 2)

    def training_step(self, batch: Any, _: int) -> Any:
        return self.net(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def test_a_real_lightning_checkpoint(tmp_path: Path) -> None:
    model = Net(OmegaConf.create({"a": [1]}), Path("x"))
    trainer = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu",
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.ones(4, 2)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = open_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint.format == "lightning"
    assert checkpoint.prefix == ("state_dict",)
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint[name], tensor)
    assert checkpoint.content["global_step"] == 1
    assert torch.is_tensor(checkpoint.content["optimizer_states"][0]["state"][0]["exp_avg"])
