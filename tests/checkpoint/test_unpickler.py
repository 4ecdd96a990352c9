# ruff: noqa: E501
"""The pickle machine agrees with Python's own on plain data, and with torch's weights_only reader on plain files."""

from __future__ import annotations

import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_wsl.checkpoint.allowlist import BUILDERS, RefusedError, Storage
from lit_wsl.checkpoint.one_file import MappedFile, read_zip
from lit_wsl.checkpoint.records import ForeignName, ForeignObject
from lit_wsl.checkpoint.unpickler import OPERATIONS, unpickle

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.complex_numbers(allow_nan=False),
)
KEYS = st.one_of(st.text(), st.integers(-(2**59), 2**59), st.tuples(st.text(), st.booleans()))
DATA = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner), st.dictionaries(KEYS, inner), st.tuples(inner, inner), st.tuples(inner), st.sets(KEYS), st.frozensets(KEYS),
        st.binary().map(bytearray), st.dictionaries(KEYS, inner).map(OrderedDict),
    ),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(DATA, st.integers(0, 5))
def test_plain_data_reads_as_python_reads_it(value: Any, protocol: int) -> None:
    found = unpickle(pickle.dumps(value, protocol))
    assert found.value == value
    assert type(found.value) is type(value)
    assert found.stubbed == ()


@settings(max_examples=50, deadline=None)
@given(DATA, st.integers(0, 5))
def test_the_python_pickler_in_its_slow_form_too(value: Any, protocol: int) -> None:
    assert unpickle(pickle._dumps(value, protocol)).value == value  # type: ignore[attr-defined]


@pytest.mark.parametrize("protocol", range(6))
def test_sharing_and_cycles_are_kept(protocol: int) -> None:
    inner: list = [1]
    value: dict = {"a": inner, "b": inner}
    value["self"] = [value]
    found = unpickle(pickle.dumps(value, protocol)).value
    assert found["a"] is found["b"]
    assert found["self"][0] is found


def test_a_global_is_a_name() -> None:
    found = unpickle(pickle.dumps([print, pickle.Pickler]))
    assert found.value == [ForeignName("builtins", "print"), ForeignName("_pickle", "Pickler")]
    assert set(found.stubbed) == {"builtins.print", "_pickle.Pickler"}


def test_an_object_keeps_its_orders() -> None:
    found = unpickle(pickle.dumps(slice(1, 2))).value
    assert isinstance(found, ForeignObject)
    assert found.type_name == "builtins.slice"
    assert found.args == (1, 2, None)


def test_the_allowlist_holds_no_function_of_another_module() -> None:
    assert {builder.__module__ for builder in BUILDERS.values()} == {
        "lit_wsl.checkpoint.allowlist",
    }


def test_every_cut_of_a_pickle_is_an_error() -> None:
    data = pickle.dumps({"a": [1, 2.5, "text", b"bytes"], "b": (True, None)}, 4)
    for length in range(len(data)):
        with pytest.raises(RefusedError):
            unpickle(data[:length])


def trees_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and a.layout != torch.strided:
        return a.layout == b.layout and torch.equal(a.to_dense(), b.to_dense())
    if isinstance(a, torch.Tensor):
        return (
            type(a) is type(b) and a.dtype == b.dtype and a.stride() == b.stride() and a.requires_grad == b.requires_grad
            and a.layout == b.layout and torch.equal(a.detach(), b.detach())
        )  # fmt: skip
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(trees_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(trees_equal, a, b))
    return type(a) is type(b) and a == b


def test_plain_files_read_as_torch_reads_them(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(2, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 6, 4)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "views": [base, base[3:7], base.view(4, 6).t(), base.view(2, 3, 4)[:, 1:, ::2], base[0], base.expand(2, 24)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "grad": torch.ones(2, requires_grad=True),
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "dtypes": [torch.zeros(2).to(dtype) for dtype in (torch.uint16, torch.uint64, torch.float8_e5m2, torch.int8)],
        "meta": [torch.float16, torch.Size([1, 2]), torch.device("cpu"), OrderedDict(a=1), {1, 2}],
        "loops": {"fit": {"state": {}, "total": 3}, "none": None},
    }
    torch.save(content, tmp_path / "a.pt")
    ours = read_zip(MappedFile(tmp_path / "a.pt")).value
    assert trees_equal(torch.load(tmp_path / "a.pt", weights_only=True), ours)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_tensors(tmp_path: Path) -> None:
    values = torch.randn(3, 4)
    scales, zeros = torch.rand(4) + 0.1, torch.arange(4)
    quantized = {
        "tensor": torch.quantize_per_tensor(values, 0.1, 2, torch.qint8),
        "channel": torch.quantize_per_channel(values, scales, zeros, 1, torch.quint8),
    }
    torch.save(quantized, tmp_path / "a.pt")
    found = read_zip(MappedFile(tmp_path / "a.pt")).value
    for name, tensor in quantized.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].qscheme() == tensor.qscheme()
        assert torch.equal(found[name].int_repr(), tensor.int_repr())
        assert torch.equal(found[name].dequantize(), tensor.dequantize())


def test_tensors_that_share_memory_still_do(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    torch.save({"a": base, "b": base[2:]}, tmp_path / "a.pt")
    tree = read_zip(MappedFile(tmp_path / "a.pt")).value
    tree["a"][2] = 99
    assert tree["b"][0] == 99
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"][2] == 2, "the file itself is never written to"


def random_program(random_: random.Random) -> bytes:
    """A program of valid operations in random order, rich in names, storages and tensors."""
    from hostile_corpus import body, name, storage, tensor

    plain = [
        1,
        -1,
        2.5,
        "a",
        "_parameters",
        "_modules",
        None,
        True,
        (2, 3),
        (3, 1),
        [],
        {},
        "cpu",
        b"x",
        {"a": 1},
        [("a", 1)],
    ]
    values = [body(value) for value in plain]
    names = [
        name(module, attribute)
        for module, attribute in [*sorted(BUILDERS), ("os", "system"), ("torch", "FloatStorage")]
    ]
    with_operands = b"IFLVSgpPT\x8d\x8e\x96X\x8bUB\x95"
    operations = [bytes([code]) for code in sorted(OPERATIONS) if code not in with_operands]
    choices = [
        values,
        names,
        [storage(), tensor()],
        [b"q\x00", b"q\x01", b"h\x00", b"h\x01"],
        [bytes([code]) for code in b"(tusaeRb\x81}]"],
        operations,
    ]
    picked = random_.choices(choices, weights=[6, 2, 2, 3, 2, 5], k=random_.randrange(1, 40))
    return b"\x80\x04" + b"".join(random_.choice(options) for options in picked) + b"."


def test_random_programs_end_in_a_value_or_a_refusal() -> None:
    data = torch.arange(24.0).untyped_storage()

    def load(dtype: torch.dtype, key: str, numel: int) -> Storage:
        if numel * dtype.itemsize > data.nbytes():
            raise RefusedError("beyond the file")
        return Storage(key, dtype, data)

    random_ = random.Random(0)
    values = refusals = 0
    for _ in range(6000):
        try:
            unpickle(random_program(random_), 0, load)
            values += 1
        except RefusedError:
            refusals += 1
    assert values > 100
    assert refusals > 100
