"""Networks whose layers have roles, which a spelling gives any names, in any order, joined, turned or stacked.

The forward of a network asks for its layers by role, so that one class is as many implementations of a function as
there are spellings. A spelling is a mapping in the order of registration: path -> roles, joined by ``+``, then flags
behind a bar: ``T`` stored the other way round, ``C`` a convolution of size one, ``S`` stacked under a new axis, ``R``
rotary rows in pairs, a number for parts that alternate by so many heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.gauntlet.truth import Tensors

Spelling = Mapping[str, str]
Made = nn.Module | nn.Parameter


class Turned(nn.Module):
    """A linear layer that keeps its matrix as (in, out)."""

    def __init__(self, into: int, out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(into, out) * into**-0.5)
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Pointwise(nn.Conv1d):
    """A linear layer that is a convolution of size one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x.flatten(0, -2)[..., None], self.weight, self.bias)[..., 0].unflatten(0, x.shape[:-1])


def under(path: str, role: str, own: Spelling) -> dict[str, str]:
    """The spelling of a module at a path, whose roles begin with some words."""
    return {f"{path}.{a}": "+".join(f"{role}.{one}" for one in b.split("+")) for a, b in own.items()}


def repeated(count: int, path: str, own: Spelling, *, backwards: bool = False) -> dict[str, str]:
    """The spelling of as many blocks with roles ``0.norm``, ``1.norm``, ...; ``{}`` in a path is the block's number."""
    out = {}
    for k in range(count):
        for name, text in own.items():
            roles, bar, flags = text.partition("|")
            at = path.replace("{}", str(k))
            number = count - 1 - k if backwards else k
            out[f"{at}.{name}" if "{}" not in name else name.replace("{}", str(k))] = (
                "+".join(f"{number}.{role}" for role in roles.split("+")) + bar + flags
            )
    return out


class Spelled(nn.Module):
    """A network in one of its spellings; that by roles if none is given."""

    head = 8  # width of a head

    def layers(self) -> dict[str, Made]:
        """The layers by role."""
        raise NotImplementedError

    def __init__(self, spelling: Spelling | None = None) -> None:
        super().__init__()
        made = self.layers()
        self.spelling = dict(spelling or {role: role for role in made})
        self._at: dict[str, Callable[..., Tensor]] = {}
        for path, text in self.spelling.items():
            roles, flags = _read(text)
            for role, call in self._spelled(path, [made[role] for role in roles], flags):
                self._at[roles[role]] = call
        assert set(self._at) == set(made), set(self._at) ^ set(made)

    def _spelled(self, path: str, parts: list[Made], flags: str) -> list[tuple[int, Callable[..., Tensor]]]:
        first = parts[0]
        if isinstance(first, nn.Parameter):
            whole = self._put(path, first if len(parts) == 1 else nn.Parameter(_together(parts)))
            if len(parts) == 1:
                return [(0, lambda: self._get(path))]
            if first.dim() == 1:
                return [(k, lambda k=k: self._get(path)[k]) for k in range(len(parts))]
            sizes = [len(p) for p in parts]
            return [(k, lambda k=k: self._get(path).split(sizes)[k]) for k in range(len(parts))]
        if "S" in flags:
            stack = torch.stack([p.weight.mT if "T" in flags else p.weight for p in parts]).detach()
            self._put(path, nn.Parameter(stack.clone()))
            return [(k, lambda x, k=k: self._stacked(path, k, x, "T" in flags)) for k in range(len(parts))]
        if len(parts) == 1 and not flags:
            whole = self._put(path, first)
            return [(0, whole)]
        into, sizes, bias = first.in_features, [p.out_features for p in parts], first.bias is not None
        if "T" in flags:
            whole = Turned(into, sum(sizes), bias)
        elif "C" in flags:
            whole = Pointwise(into, sum(sizes), 1, bias=bias)
        else:
            whole = nn.Linear(into, sum(sizes), bias=bias)
        self._put(path, whole)
        groups = int(re.sub(r"\D", "", flags) or 1)

        def part(x: Tensor, k: int) -> Tensor:
            y = whole(x).unflatten(-1, (groups, -1)).split([size // groups for size in sizes], -1)[k].flatten(-2)
            return y.unflatten(-1, (-1, self.head // 2, 2)).mT.flatten(-3) if "R" in flags else y

        return [(k, lambda x, k=k: part(x, k)) for k in range(len(parts))]

    def _put(self, path: str, made: Made) -> Made:
        home: nn.Module = self
        *above, leaf = path.split(".")
        for word in above:
            if not hasattr(home, word):
                home.add_module(word, nn.Module())
            home = getattr(home, word)
        setattr(home, leaf, made)
        return made

    def _get(self, path: str) -> Tensor:
        return self.get_parameter(path)

    def _stacked(self, path: str, k: int, x: Tensor, turned: bool) -> Tensor:
        weight = self._get(path)[k]
        return x @ weight if turned else x @ weight.mT

    def at(self, role: str, *args: Tensor) -> Tensor:
        """What the layer of a role computes, or a bare parameter."""
        return self._at[role](*args)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, rotary: bool = False) -> Tensor:
        """Attention of ``(B, T, heads * D)`` queries to as many or fewer heads of keys and values."""
        q, k, v = (x.unflatten(-1, (-1, self.head)).transpose(1, 2) for x in (q, k, v))
        if rotary:
            q, k = turn(q), turn(k)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def turn(x: Tensor) -> Tensor:
    """Rotary embedding of ``(B, H, T, D)``, in halves."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 100.0 ** (-torch.arange(half) / half)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


def spelled(state: Tensors, usual: Spelling, other: Spelling, head: int) -> Tensors:
    """The tensors of one spelling in another; the first one joins nothing."""
    roles = {role: path for path, role in usual.items()}
    out: Tensors = {}
    for path, text in other.items():
        names, flags = _read(text)
        own = [roles[name] for name in names]
        if own[0] in state:
            out[path] = state[own[0]] if len(own) == 1 else _together([state[o] for o in own])
            continue
        for name in [n for n in state if n.startswith(f"{own[0]}.")]:
            leaf = name[len(own[0]) + 1 :]
            values = [state[f"{o}.{leaf}"] for o in own]
            if "R" in flags:
                values = [v.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2) for v in values]
            if "S" in flags:
                out[path] = torch.stack([v.mT if "T" in flags else v for v in values])
                continue
            groups = int(re.sub(r"\D", "", flags) or 1)
            value = values[0]
            if len(values) > 1:
                value = torch.cat([v.unflatten(0, (groups, -1)) for v in values], 1).flatten(0, 1)
            if leaf == "weight":
                value = value.mT if "T" in flags else value[..., None] if "C" in flags else value
            out[f"{path}.{leaf}"] = value
    return out


def _read(text: str) -> tuple[list[str], str]:
    roles, _, flags = text.partition("|")
    return roles.split("+"), flags


def _together(parts: list[Tensor]) -> Tensor:
    parts = [p.detach() for p in parts]
    return torch.stack(parts) if parts[0].dim() == 1 else torch.cat(parts)
