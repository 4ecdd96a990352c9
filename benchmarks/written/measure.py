"""One case: loaded from a state dict and from a file, and compared with the truth."""

from __future__ import annotations

import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.written.case import Case
from benchmarks.written.rows import PART, Bare, Row, build, layer, rows_of
from lit_wsl import TransferPlan, transfer_weights

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Wrong:
    """A tensor that was loaded and does not belong there."""

    run: str  # from a "state" dict or a "file"
    tensor: str
    wanted: str  # what belongs there; empty: nothing
    loaded: str  # where the value came from
    reason: str
    evidence: str


@dataclass
class Result:
    """What became of the tensors of one case."""

    case: Case
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[Wrong] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of processor time


@dataclass(frozen=True)
class Wanted:
    """What belongs into one tensor of the new module."""

    words: str
    values: tuple[Tensor, ...]  # any of them is right; none: nothing belongs there


def sides(case: Case) -> tuple[nn.Module, nn.Module]:
    """The old and the new module, not filled yet."""
    rows = list(rows_of(case.rows))
    old = build(((path, row.before) for row in rows for path in row.sources()), case.old_order)
    return old, build(((row.new, row.after) for row in rows if row.new != "-"), case.order)


def measure(case: Case) -> Result:
    result, seed, start = Result(case), zlib.crc32(case.name.encode()), time.process_time()
    rows, (old, new) = list(rows_of(case.rows)), sides(case)
    fill(old, seed)
    state = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    truth = {name: wanted for row in rows if row.new != "-" for name, wanted in _truth(row, state)}
    for run in ("state", "file"):
        fill(new, seed + 1)
        before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
        try:
            plan = _transfer(new, state, run)
        except Exception as error:
            result.counts["error"] += 1
            result.errors.append(f"{run}: {error!r}"[:300])
            continue
        for name, value in new.state_dict().items():
            verdict = _verdict(value, before[name], truth[name].values)
            result.counts[verdict] += 1
            if verdict == "wrong":
                entry, words = plan.by_target.get(name), truth[name].words
                why = (entry.reason, entry.evidence or "") if entry else ("changed, though the plan has it not", "")
                result.wrong.append(Wrong(run, name, words, origin(value, state), *why))
    result.seconds = time.process_time() - start
    return result


def _truth(row: Row, state: State) -> Iterator[tuple[str, Wanted]]:
    module = layer(row.after)
    for name in [""] if isinstance(module, Bare) else [f".{name}" for name in module.state_dict()]:
        words = row.old + name if row.choices() else ""
        yield row.new + name, Wanted(words, tuple(_value(choice, name, state) for choice in row.choices()))


def _value(path: str, name: str, state: State) -> Tensor:
    """What an expression of the old side means for one tensor of the layer."""
    part = PART.fullmatch(path)
    if part:
        return state[part[1] + name].chunk(int(part[3]))[int(part[2])]
    if path.endswith("^T"):
        tensor = state[path.removesuffix("^T") + name]
        return tensor.T if tensor.dim() == 2 else tensor
    if "+" in path:
        return torch.cat([state[one + name] for one in path.split("+")])
    return state[path + name]


def fill(module: nn.Module, seed: int) -> None:
    """Random values; positive where a norm needs them."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            tensor.copy_(torch.randint(1000, 10**6, tensor.shape, generator=generator))
            continue
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
        if name.endswith(("running_var", "norm.weight")):
            tensor.abs_().add_(0.1)


def _transfer(new: nn.Module, state: State, run: str) -> TransferPlan:
    with tempfile.TemporaryDirectory() as folder:
        source: State | Path = dict(state)
        if run == "file":
            source = Path(folder) / "old.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, source)
        return transfer_weights(new, source, min_coverage=0.0).plan


def _verdict(value: Tensor, before: Tensor, true: tuple[Tensor, ...]) -> str:
    if torch.equal(value, before):
        return "missing" if true else "kept"
    right = any(t.numel() == value.numel() and torch.equal(t.reshape(value.shape), value) for t in true)
    return "right" if right else "wrong"


def origin(value: Tensor, state: State) -> str:
    """Where a loaded value came from, in words."""
    flat = value.reshape(-1)
    for name, tensor in state.items():
        if torch.equal(tensor.reshape(-1), flat):
            return name
    for name, tensor in state.items():
        if torch.isin(flat, tensor).all():
            return f"part or transposed {name}"
    return "joined: " + ", ".join(name for name, tensor in state.items() if torch.isin(tensor, flat).any())
