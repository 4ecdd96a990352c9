"""One pair: build both sides, transfer, compare every tensor with the truth."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.refactors.config import Config, draw
from benchmarks.refactors.forms import drawn
from benchmarks.refactors.network import ClashError, Net, Side, names_lie, pieces_of, randomise, true_tensors
from benchmarks.refactors.operators import Regime
from benchmarks.refactors.structures import Split
from lit_wsl import LitWslError, TransferReport, transfer_weights


@dataclass(frozen=True)
class Judged:
    """What became of one target tensor.

    Attributes:
        name: Its name.
        verdict: ``right``; ``wrong`` (something that is not its own, or its own in a wrong layout); ``unseen`` (its
            own, in a layout that neither names nor shapes show: a square that is stored transposed under a Linear's
            own names, parts that are interleaved by head, parts of a whole in an order that its name does not spell);
            ``assumed`` (from the member of its own name and number, but of a list that is counted from its other end
            on one side, or has more or fewer members, of which another than the last was dropped or added; where
            nothing belongs there also from a unit whose tensors have the same telling names: another batch norm);
            ``missing``, ``open`` (left alone, a choice is listed);
            ``nothing`` (left alone, and rightly so).
        layout: Whether what is wrong holds the right values in the wrong places.
        buffer: Whether it is a buffer.
        sources: What it was filled from.
        reason: The entry's reason.
        evidence: The kind of evidence that the entry names, if it does.
        margin: The entry's margin.
        wanted: What belongs there.
    """

    name: str
    verdict: str
    layout: bool = False
    buffer: bool = False
    sources: tuple[str, ...] = ()
    reason: str = ""
    evidence: str = ""
    margin: float = 0.0
    wanted: str = ""


@dataclass(frozen=True)
class Result:
    """A pair with its verdicts."""

    config: Config
    tensors: tuple[Judged, ...]
    error: str = ""

    @property
    def counts(self) -> Counter[str]:
        return Counter(tensor.verdict for tensor in self.tensors)

    @property
    def wrong(self) -> tuple[Judged, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.verdict == "wrong")

    def to_dict(self) -> dict[str, Any]:
        """The wrong ones, and what it takes to see them again."""
        return {"config": self.config.to_dict(), "error": self.error, "wrong": [asdict(t) for t in self.wrong]}


class Pair:
    """Both sides of a configuration, with values.

    Attributes:
        old: The old network.
        new: The new one, filled with values of its own.
        state: What the checkpoint holds.
        truth: What each tensor of the new network should hold; ``None`` where the old one has nothing for it.
        before: What it holds before.
    """

    def __init__(self, config: Config) -> None:
        """Build both sides.

        Raises:
            ClashError: If a side cannot be written as a module.
        """
        self.config = config
        source, target = config.sides()
        self.old, self.new = Net(source), Net(target)
        if names_lie(self.old, self.new):
            raise ClashError("a word means another thing on the other side")
        self.state = {name: t for name, t in true_tensors(self.old).items() if t is not None} | source.extra
        if source.shadow:
            self.state |= _averages(self.state, source.shadow)
        self.truth = true_tensors(self.new, pieces_of(self.old))
        self.before = randomise(self.new)
        self.hidden = _unseen(source) | _unseen(target)

    def source(self, folder: Path | None = None) -> Mapping[str, Tensor] | Path:
        """The checkpoint as it arrives."""
        if self.config.file == "safetensors" and folder is not None:
            from safetensors.torch import save_file

            path = folder / "model.safetensors"
            save_file(self.state, path)
            return path
        return self.state if self.config.file == "state_dict" else dict(sorted(self.state.items()))

    def transfer(self, **options: Any) -> TransferReport:
        """Fill the new network."""
        sample = {"example_args": (torch.zeros(1),)} if self.config.sample else {}
        folder: AbstractContextManager[str | None] = nullcontext()
        if self.config.file == "safetensors":
            folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        with folder as where:
            source = self.source(Path(where) if where else None)
            return transfer_weights(self.new, source, **{"min_coverage": 0.0, **sample, **options})

    def judge(self, report: TransferReport) -> tuple[Judged, ...]:
        """Compare every tensor with the truth."""
        unsure = {name for choice in report.plan.ambiguous for name in choice.targets}
        origin = {tensor.numpy().tobytes(): name for name, tensor in self.state.items()}
        buffers = {name for name, _ in self.new.named_buffers()}
        return tuple(
            self._judge(name, tensor, report, name in unsure, name in buffers, origin)
            for name, tensor in self.new.state_dict().items()
        )

    def _judge(
        self, name: str, held: Tensor, report: TransferReport, unsure: bool, buffer: bool, origin: Mapping[bytes, str]
    ) -> Judged:
        truth = self.truth[name]
        if truth is not None and torch.equal(held, truth):
            verdict = "right"
        elif torch.equal(held, self.before[name]):
            verdict = "nothing" if truth is None else "open" if unsure else "missing"
        else:
            verdict = "wrong"
        layout = verdict == "wrong" and truth is not None and _same_values(held, truth)
        entry = report.plan.by_target.get(name)
        mixed = verdict == "wrong" and entry is not None and set(entry.sources) <= self._mixed.get(name, set())
        if (layout and name in self._unseen) or mixed:
            verdict = "unseen"
        wanted = "nothing" if truth is None else origin.get(truth.numpy().tobytes(), "several")
        if verdict == "wrong" and entry and self._is_assumed(entry.sources, name, wanted, truth is None):
            verdict = "assumed"
        judged = Judged(name, verdict, layout, buffer)
        if entry is None:
            return judged
        return replace(
            judged,
            sources=entry.sources,
            reason=entry.reason,
            margin=entry.margin,
            evidence=str(getattr(entry, "evidence", "")),
            wanted=wanted,
        )

    def _is_assumed(self, sources: tuple[str, ...], target: str, wanted: str, new: bool) -> bool:
        """Whether the names along the way say that it is the same, which is wrong only for what nobody can see."""
        if new and self._same_make(sources, target):
            return True
        member = not new and _same_member(sources, target)
        counted = member and (self._other_length or _same_list(sources, wanted))
        return counted or _same_numbers(sources, wanted, target)

    def _same_make(self, sources: tuple[str, ...], target: str) -> bool:
        """Whether the tensors beside both have the same names, which say more than weight and bias."""
        sides = (self.truth, {target}), (self.state, sources)
        named = []
        for tensors, some in sides:
            modules = {name.rpartition(".")[0] for name in some}
            named.append({name.rpartition(".")[2] for name in tensors if name.rpartition(".")[0] in modules})
        return named[0] == named[1] and bool(named[0] - {"weight", "bias"})

    @property
    def _other_length(self) -> bool:
        return any(change.operator.startswith(("prune_", "insert_")) for change in self.config.changes)

    @cached_property
    def _mixed(self) -> dict[str, set[str]]:
        """For tensors of the new model, what holds their parts in an order that nothing shows."""
        found: dict[str, set[str]] = {}
        for old in (placed for placed in self.old.placed if placed.leaf.layout in ("reordered", "interleaved")):
            held = {old.name + slot.suffix for slot in old.form.slots}
            for new in (placed for placed in self.new.placed if set(placed.leaf.pieces) <= set(old.leaf.pieces)):
                for slot in new.form.slots:
                    found.setdefault(new.name + slot.suffix, set()).update(held)
        return found

    @cached_property
    def _unseen(self) -> set[str]:
        """Tensors of the new model whose layout nothing shows."""
        hidden = self.hidden
        return {
            name
            for placed in self.new.placed
            if set(placed.leaf.pieces) & hidden
            for name in (placed.name + slot.suffix for slot in placed.form.slots)
        }


def _same_member(sources: tuple[str, ...], target: str) -> bool:
    """Whether the sources stand in the member of the list, by name and number, that the target stands in."""
    there, here = {_member(source) for source in sources}, _member(target)
    return all(one.endswith(here) or here.endswith(one) for one in there)


def _same_numbers(sources: tuple[str, ...], wanted: str, target: str) -> bool:
    """Whether only a number tells what was taken from what belongs there, and up to it the target is called alike."""
    here, there = target.split("."), wanted.split(".")
    for source in sources:
        parts = source.split(".")
        apart = [at for at, (one, other) in enumerate(zip(parts, there)) if one != other]
        if len(parts) != len(there) or not apart or not all(parts[at].isdigit() for at in apart):
            return False
        upto = apart[-1] + 1
        if [_plain(part) for part in parts[:upto]] != [_plain(part) for part in here[:upto]]:
            return False
    return bool(sources)


def _plain(part: str) -> str:
    return part.replace("_", "").lower()


def _same_list(sources: tuple[str, ...], wanted: str) -> bool:
    """Whether what was taken and what belongs there are called alike but for the numbers."""
    return all(re.sub(r"\d+", "#", source) == re.sub(r"\d+", "#", wanted) for source in sources)


def _member(name: str) -> str:
    """The path down to the last numbered member: ``.blocks.3`` of ``blocks.3.attn.q.weight``."""
    parts = name.split(".")
    last = max((at for at, part in enumerate(parts) if part.isdigit()), default=-1)
    first = next((at for at, part in enumerate(parts) if part[-1:].isdigit()), 0)
    return "." + ".".join(parts[: max(last, first) + 1])


def _averages(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Another value for every tensor, under names without dots."""
    names = {name: f"{prefix}.{name.replace('.', '_')}" for name, t in state.items() if t.is_floating_point()}
    return {flat: drawn(flat, tuple(state[name].shape)) for name, flat in names.items()}


def _same_values(held: Tensor, truth: Tensor) -> bool:
    return held.numel() == truth.numel() and torch.equal(held.flatten().sort().values, truth.flatten().sort().values)


def _unseen(side: Side) -> set[str]:
    """Pieces whose layout nothing shows: turned squares, unless another turned one is no square; mixed parts."""
    turned = [leaf for leaf in side.leaves if leaf.layout == "transposed"]
    shown = any(sum(size[0] for size in leaf.sizes) != leaf.sizes[0][1] for leaf in turned)
    mixed = ("interleaved", "reordered", "channels_within")
    hidden = [leaf for leaf in side.leaves if leaf.layout in mixed] + ([] if shown else turned)
    return {piece for leaf in hidden for piece in leaf.pieces}


def drawn_pair(split: Split, regime: Regime, seed: int, *, sample: bool = False) -> Pair:
    """The pair of a seed: the first attempt that can be written."""
    for attempt in range(50):
        try:
            return Pair(draw(split, regime, seed, sample=sample, attempt=attempt))
        except ClashError:
            continue
    raise RuntimeError(f"no pair could be drawn from seed {seed}")


def run(pair: Pair, **options: Any) -> Result:
    """Transfer once and judge."""
    try:
        report = pair.transfer(**options)
    except LitWslError as error:  # a refusal loads nothing: everything that had a source is missing
        left = tuple(Judged(n, "missing" if t is not None else "nothing") for n, t in pair.truth.items())
        return Result(pair.config, left, f"{type(error).__name__}: {error}")
    return Result(pair.config, pair.judge(report))
