"""What a norm with running statistics remembers of its inputs, compared with what reaches it.

At the right place such a norm finds the mean and the variance that it has recorded, as long as all that runs before it
is right. So layers can be assigned one after the other in the order in which the model runs them: of what may stand
before a norm, and of the norms that may stand there, those are taken that agree best. Which norm it is takes no pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lit_wsl.matching.changes import Choice, options_of, part_of
from lit_wsl.matching.trials import Trials
from lit_wsl.matching.witnesses import AGREES as HEARD
from lit_wsl.matching.witnesses import risk_of

SAME = 0.03  # divergence of what a norm finds from what it recorded, at most, where nothing else is tried
NEAR = 0.3  # the same, where the norms count as agreeing
NOISE = 0.01  # what samples make of it at the right place
JOINT = 128  # most choices of what stands before a norm
SHARE = 0.4  # of the budget
LAST = 1  # passes beyond it that the last comparisons may take
LEAVES = ("running_mean", "running_var")


@dataclass
class _Inputs:
    """Sums over what reached a norm, channel by channel."""

    count: int = 0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """More of it."""
        x = x.detach().double().transpose(0, 1).flatten(1)
        self.count += x.shape[1]
        self.first, self.second = self.first + x.sum(1), self.second + x.square().sum(1)

    def divergence(self, mean: Tensor, variance: Tensor) -> Tensor:
        """From what a norm recorded, channel by channel: that of two normal distributions, both ways, as a log."""
        own = torch.as_tensor(self.first) / self.count
        spread = (torch.as_tensor(self.second) / self.count - own.square()).clamp_min(0)
        mean, variance = mean.double().cpu(), variance.double().cpu()
        own, spread = own.cpu(), spread.cpu()
        least = 1e-3 * variance.mean().clamp_min(1e-12)
        spread, variance = spread + least, variance + least
        apart = (own - mean).square() * (1 / spread + 1 / variance)
        return ((spread / variance + variance / spread + apart) / 2 - 1).clamp_min(0).log1p()


@dataclass
class _Pass:
    """What one pass showed: the modules in the order of their first calls, and what reached the norms."""

    order: list[str] = field(default_factory=list)
    inputs: dict[str, _Inputs] = field(default_factory=dict)


class Moments:
    """Assigns layers by what norms have recorded.

    Args:
        trials: Runs the model.
    """

    def __init__(self, trials: Trials) -> None:
        self.trials, self.space = trials, trials.space
        self._passes: dict[tuple[frozenset[Any], bool], _Pass] = {}
        modules = dict(trials.meter.model.named_modules())
        self.paths = {id(module): path for path, module in modules.items()}
        self.norms = {path for path, module in modules.items() if all(_recorded(module, leaf) for leaf in LEAVES)}
        self.parts = {
            name: part for part in self.space.parts for unit in part.target for name in unit.all_names
        }  # by the names of what they fill

    def arranged(self, choice: Choice) -> tuple[Choice, bool]:
        """The choice that the norms agree with best, one norm after the other; and whether this tells all."""
        done: set[str] = set()
        seen = self._run(choice) if any(self._decisions([path], choice) for path in self.norms) else _Pass()
        places = [k for k, path in enumerate(seen.order) if path in self.norms]
        for start, stop in zip((0, *(k + 1 for k in places)), places):
            path, before = seen.order[stop], seen.order[start:stop]
            choice = self._at(path, before, choice, done)
            done |= set(self._filled([*before, path], choice))
            if not self.trials.budget.left(SHARE):
                break
        return choice, self.hold(choice)

    def hold(self, choice: Choice) -> bool:
        """Whether all that is open runs before some norm, and all norms find what they recorded."""
        asked = {
            name.rpartition(".")[0]
            for part in self.space.parts
            if any(len(self.space.decisions[d].options) > 1 for d in part.decisions)
            for unit in part.target
            for name in unit.all_names
        }
        if not self.norms or not asked or not self._can(choice):
            return False
        seen = self._run(choice)
        last = max((k for k, path in enumerate(seen.order) if path in self.norms), default=0)
        found = [self._divergence(path, choice) for path in seen.inputs]
        return asked <= set(seen.order[: last + 1]) and all(len(d) and float(d.mean()) <= NEAR for d in found)

    def risk(self, rival: Choice, choice: Choice, *, whole: bool = False) -> float:
        """Risk of calling a rival worse by what norms have recorded: all that tell them apart, if the first one agrees.

        It is heard only where the norms agree with the choice. On the whole batch they tell more than on the samples of
        the screening.
        """
        if not self.norms or not self._can(choice, rival, whole=whole):
            return 1.0
        own, other = self._told(choice, whole), self._told(rival, whole)
        sides = [(ours, other.get(path, ours)) for path, ours in own.items()]
        apart = [(a, b) for a, b in sides if len(a) and len(a) == len(b) and not torch.equal(a, b)]
        if not apart or any(float(ours.mean()) > NEAR for ours, _ in apart):
            return 1.0
        first, every = (_risk(pairs) for pairs in (apart[:1], apart))
        return every if first < HEARD else 1.0

    def _told(self, choice: Choice, whole: bool) -> dict[str, Tensor]:
        seen = self._run(choice, whole)
        return {path: self._divergence(path, choice, seen) for path in seen.inputs}

    def _divergence(self, path: str, choice: Choice, seen: _Pass | None = None) -> Tensor:
        """How far what reaches a norm is from what it recorded; nothing where it recorded nothing."""
        values = self._values(path, choice)
        found = (seen or self._run(choice)).inputs.get(path)
        return found.divergence(*values) if found is not None and len(values) == len(LEAVES) else torch.zeros(0)

    def _at(self, path: str, before: Sequence[str], choice: Choice, done: set[str]) -> Choice:
        """The choice with the layers before a norm, and the norm, that agree best."""
        kept = self._filled(done, choice)
        best, least = choice, float("inf")
        ways = list(self._varied(before, choice, kept))
        for made in ways if len(ways) < JOINT else [choice]:  # where there are more, the right one is hardly among them
            if least <= SAME or not self.trials.budget.left(SHARE):
                break
            seen = self._run(made)
            for both in self._varied([path], made, kept | self._filled(before, made)):
                off = self._divergence(path, both, seen)
                if len(off) and float(off.mean()) < least:
                    best, least = both, float(off.mean())
        return best

    def _varied(self, modules: Sequence[str], choice: Choice, kept: Mapping[str, Any]) -> Iterator[Choice]:
        """The choice, and others that fill some modules otherwise, each way once, and leave alone what is done."""
        ways = {self._means(modules, choice): choice}
        for d in self._decisions(modules, choice):
            # Where two of the modules take their layers from the same ones, each may have to change.
            part = part_of(self.space, d)
            names = {name.rpartition(".")[0] for unit in part.target for name in unit.all_names} if part else set()
            for _ in range(max(1, len(names.intersection(modules)))):
                more = [one for way in ways.values() for one in options_of(self.space, way, d)]
                for one in more[: 2 * JOINT]:
                    means = self._means(modules, one)
                    if means not in ways and len(ways) < JOINT and self._filled(kept, one) == kept:
                        ways[means] = one
        yield from ways.values()

    def _means(self, modules: Sequence[str], choice: Choice) -> frozenset[tuple[str, Any]]:
        return frozenset(self._filled(modules, choice).items())

    def _decisions(self, modules: Sequence[str], choice: Choice) -> list[int]:
        """What is open about some modules."""
        parts = {id(p): p for name, p in self.parts.items() if name.rpartition(".")[0] in modules}
        numbers = [number for number, part in enumerate(self.space.parts) if id(part) in parts]
        found = dict.fromkeys(d for number in numbers for d in self.space.all_of(number))
        return [d for d in found if len(self.space.decisions[d].options) > 1 and choice[d] >= 0]

    def _filled(self, places: Iterable[str], choice: Choice) -> dict[str, Any]:
        """What fills modules, or tensors, by name of the tensor."""
        own = set(places)
        return {
            name: entry
            for entry, _ in self.space.entries(choice)
            for name in entry.targets
            if name in own or name.rpartition(".")[0] in own
        }

    def _values(self, path: str, choice: Choice) -> list[Tensor]:
        """What the norm that stands at a path has recorded."""
        state = self.trials.state(choice)
        return [state[f"{path}.{leaf}"] for leaf in LEAVES if f"{path}.{leaf}" in state]

    def _key(self, choice: Choice, whole: bool) -> tuple[frozenset[Any], bool]:
        """What norms recorded themselves is no part of what reaches them."""
        return frozenset(e for e in self.space.meaning(choice) if e.kind == "parameter"), whole

    def _can(self, *choices: Choice, whole: bool = False) -> bool:
        """Whether what reaches the norms is known, or may still be measured, be it with the last of the budget."""
        budget, unknown = self.trials.budget, [c for c in choices if self._key(c, whole) not in self._passes]
        last = budget.in_time() and budget.meter.passes + len(unknown) <= budget.passes + LAST
        return not unknown or (last if whole else budget.left())

    def _run(self, choice: Choice, whole: bool = False) -> _Pass:
        """What reaches the norms, measured once."""
        key = self._key(choice, whole)
        if key not in self._passes:
            self._passes[key] = self._measure(choice, whole)
        return self._passes[key]

    def _measure(self, choice: Choice, whole: bool) -> _Pass:
        """One pass; of single vectors the whole batch is needed to tell."""
        seen, trials, flat = _Pass(), self.trials, whole

        def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal flat
            path = self.paths.get(id(module))
            if path is None:
                return
            if path not in seen.order:
                seen.order.append(path)
            x = args[0] if args else None
            if path in self.norms and isinstance(x, Tensor) and x.dim() > 1:
                flat |= x.dim() == 2
                seen.inputs.setdefault(path, _Inputs()).add(x)

        handle = register_module_forward_pre_hook(watch)
        try:
            trials.meter.losses(trials.state(choice), 0, 0, trials.screen)
            if flat and trials.size > trials.screen:
                trials.meter.losses(trials.state(choice), 0, trials.screen, trials.size)
        finally:
            handle.remove()
        return seen


def _risk(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """That of calling the second of each pair larger, over all channels, by how many times."""
    ours, theirs = ((torch.cat(side) + NOISE).log().tolist() for side in zip(*pairs))
    return risk_of(theirs, ours)


def _recorded(module: nn.Module, leaf: str) -> bool:
    return isinstance(dict(module.named_buffers(recurse=False)).get(leaf), Tensor)
