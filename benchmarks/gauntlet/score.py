"""Score a transfer against the truth of a pair.

All weights of the gauntlet are random and different, so the value that a target tensor holds after a transfer says
where it came from: equal to the truth is right, equal to what it held before is missing, anything else is wrong. A
tensor without truth (a new head, a constant table) must hold what it held before.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.gauntlet.pair import Pair
from benchmarks.gauntlet.peers import Peer
from benchmarks.gauntlet.truth import Tensors

Mode = Literal["state_dict", "sample", "source_module"]
MODES: tuple[Mode, ...] = ("state_dict", "sample", "source_module")
_BIG = 50_000_000  # parameters; above, an incomplete transfer is not run to see whether it matters


@dataclass(frozen=True)
class Score:
    """How one method did on one pair.

    Attributes:
        pair: The pair's name.
        method: ``lit_wsl`` with its mode, or a peer.
        right: Parameters that hold the truth.
        wrong: Parameters that hold something else, or were touched without a truth.
        missing: Parameters that kept what they had although the truth knows better.
        buffers: The same three counts for batch statistics and other persistent buffers.
        kept: Whether the target now computes what the source computes.
        seconds: Time of the transfer alone.
        unlisted: Missing names that the report lists neither as missing nor as ambiguous, and loaded names that it
            does not list as loaded. Always empty for peers, which list nothing.
        wrong_names: What is wrong.
        missing_names: What is missing.
        right_names: What is right.
        error: Why nothing happened, if so.
        digest: Digest of the plan, equal for equal plans.
    """

    pair: str
    method: str
    right: int
    wrong: int
    missing: int
    buffers: tuple[int, int, int]
    kept: bool
    seconds: float
    unlisted: tuple[str, ...] = ()
    wrong_names: tuple[str, ...] = ()
    missing_names: tuple[str, ...] = ()
    right_names: tuple[str, ...] = ()
    error: str = ""
    digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data: counts, and the first few of the names that are not right."""
        data = {key: value for key, value in asdict(self).items() if key != "right_names"}
        data["seconds"] = round(self.seconds, 4)
        for key in ("unlisted", "wrong_names", "missing_names"):
            names = data.pop(key)
            if names and self.method.startswith("lit_wsl"):
                data[key] = names[:6]
        return {key: value for key, value in data.items() if value != ""}


@dataclass(frozen=True)
class Arena:
    """A pair built and proven once, on which all methods are tried one after the other."""

    pair: Pair
    source: nn.Module
    target: nn.Module
    source_state: Tensors
    truth: Tensors
    before: Tensors

    @classmethod
    def of(cls, pair: Pair, prove: bool = True) -> Arena:
        """Build a pair's models, after its proof.

        Raises:
            TruthError: If the proof fails.
        """
        built = pair.build()
        if prove:
            pair.prove(built)
        before = {name: value.detach().clone() for name, value in built.target.state_dict().items()}
        return cls(pair, built.source, built.target, built.source_state, built.truth, before)

    def peer(self, name: str, peer: Peer) -> Score:
        """Score a peer."""
        start = time.perf_counter()
        peer(self.target, self.source_state)
        return self._score(name, time.perf_counter() - start)

    def lit_wsl(self, mode: Mode, transfer: Callable[..., Any] | None = None) -> Score:
        """Score ``lit_wsl.transfer_weights`` at default options."""
        if transfer is None:
            from lit_wsl.transfer.api import transfer_weights as transfer
        from lit_wsl.errors import LitWslError

        options: dict[str, Any] = {"min_coverage": 0.0}
        if mode != "state_dict":
            args, kwargs = self.pair.target_sample()
            options |= {"example_args": args, "example_kwargs": kwargs}
        if mode == "source_module":
            options["source_module"] = self.source
        error, report = "", None
        start = time.perf_counter()
        try:
            report = transfer(self.target, dict(self.source_state), **options)
        except LitWslError as problem:
            error = f"{type(problem).__name__}: {problem}"
        seconds = time.perf_counter() - start
        return self._score(f"lit_wsl {mode}", seconds, report, error)

    def _score(self, method: str, seconds: float, report: Any = None, error: str = "") -> Score:
        after = self.target.state_dict(keep_vars=True)
        counts = {"parameter": [0, 0, 0], "buffer": [0, 0, 0]}
        names: tuple[list[str], list[str], list[str]] = ([], [], [])
        unlisted = []
        seen: set[int] = set()
        listed = None if report is None else {*report.missing, *report.ambiguous}
        loaded = None if report is None else set(report.loaded)
        for name, value in after.items():
            if id(value) in seen:
                continue
            seen.add(id(value))
            changed = not _equal(value, self.before[name])
            if name in self.truth:
                verdict = 0 if _equal(value, self.truth[name]) else (1 if changed else 2)
            elif changed:
                verdict = 1
            else:
                continue
            counts["parameter" if isinstance(value, nn.Parameter) else "buffer"][verdict] += 1
            names[verdict].append(name)
            if listed is not None and loaded is not None and (name not in (listed if verdict == 2 else loaded)):
                unlisted.append(name)
        complete = not names[1] and not names[2]
        big = sum(p.numel() for p in self.target.parameters()) > _BIG
        kept = complete or (not big and self.pair.same_function(self.source, self.target))
        with torch.no_grad():
            for name, value in after.items():
                value.copy_(self.before[name])
        return Score(
            pair=self.pair.name,
            method=method,
            right=counts["parameter"][0],
            wrong=counts["parameter"][1],
            missing=counts["parameter"][2],
            buffers=tuple(counts["buffer"]),
            kept=kept,
            seconds=seconds,
            unlisted=tuple(unlisted),
            right_names=tuple(names[0]),
            wrong_names=tuple(names[1]),
            missing_names=tuple(names[2]),
            error=error,
            digest="" if report is None else _digest(report.plan),
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach(), b.to(a.dtype))


def _digest(plan: Any) -> str:
    return hashlib.sha256(repr((plan.entries, plan.ambiguous)).encode()).hexdigest()[:16]
