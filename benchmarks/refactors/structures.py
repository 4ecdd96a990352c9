"""Networks as lists of leaves: transformers and their kin, each a function that writes a draft.

A leaf's path is written ``blocks#0/attn/q``; the roles in it are named by words later. The path is the leaf's identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.refactors.network import Leaf, parse_path

Split = Literal["first", "second", "third", "fourth", "validate"]  # of the last, only counts are read
SPLITS: tuple[Split, ...] = ("first", "second", "third", "fourth", "validate")


@dataclass(frozen=True)
class Sizes:
    """The knobs of a structure; small enough to run thousands, equal often enough that shapes decide little."""

    width: int = 8
    hidden: int = 16
    depth: int = 2
    stages: int = 2
    experts: int = 3
    kv: int = 8
    outputs: int = 4
    vocabulary: int = 19
    bias: bool = True
    same_heads: bool = True


@dataclass
class Draft:
    """Leaves in the order in which they are registered and run."""

    sizes: Sizes
    leaves: list[Leaf] = field(default_factory=list)

    def add(self, path: str, kind: str, *sizes: int, bias: bool | None = None) -> None:
        bias = self.sizes.bias if bias is None else bias
        self.leaves.append(Leaf(parse_path(path), kind, (path,), (sizes,), bias=bias, when=len(self.leaves)))

    def linear(self, path: str, out: int, inner: int, bias: bool | None = None) -> None:
        self.add(path, "linear", out, inner, bias=bias)

    def norm(self, path: str, bias: bool = True) -> None:
        self.add(path, "norm", self.sizes.width, bias=bias)

    def conv(self, path: str, out: int, inner: int, size: int = 3, bias: bool | None = None) -> None:
        self.add(path, "conv2d", out, inner, size, bias=bias)

    def attention(self, at: str, bias: bool | None = None) -> None:
        s = self.sizes
        for role, out in (("q", s.width), ("k", s.kv), ("v", s.kv), ("o", s.width)):
            self.linear(f"{at}/{role}", out, s.width, bias)

    def mlp(self, at: str) -> None:
        self.linear(f"{at}/fc1", self.sizes.hidden, self.sizes.width)
        self.linear(f"{at}/fc2", self.sizes.width, self.sizes.hidden)

    def gated(self, at: str) -> None:
        for role in ("gate", "up"):
            self.linear(f"{at}/{role}", self.sizes.hidden, self.sizes.width, bias=False)
        self.linear(f"{at}/down", self.sizes.width, self.sizes.hidden, bias=False)

    def block(self, at: str) -> None:
        self.norm(f"{at}/norm1")
        self.attention(f"{at}/attn")
        self.norm(f"{at}/norm2")
        self.mlp(f"{at}/mlp")

    def conv_block(self, at: str, out: int, inner: int) -> None:
        for role, width in (("1", inner), ("2", out)):
            self.conv(f"{at}/conv{role}", out, width, bias=False)
            self.add(f"{at}/bn{role}", "batch_norm", out)


@dataclass(frozen=True)
class Structure:
    """A kind of network, and the part of the corpus that it belongs to."""

    name: str
    split: Split
    groups: tuple[str, ...]
    write: Callable[[Draft], None]


STRUCTURES: dict[str, Structure] = {}


def structure(split: Split, *groups: str) -> Callable[[Callable[[Draft], None]], Callable[[Draft], None]]:
    """Register a structure with the groups of words that name its roles."""

    def register(write: Callable[[Draft], None]) -> Callable[[Draft], None]:
        STRUCTURES[write.__name__] = Structure(write.__name__, split, groups, write)
        return write

    return register


@structure("first", "patches", "position", "list", "block", "attention", "mlp", "neck", "head")
def vision_transformer(d: Draft) -> None:
    s = d.sizes
    d.add("cls", "table", 1, 1, s.width)
    d.add("pos", "table", 1, 7, s.width)
    d.conv("patches", s.width, 3, 2)
    for i in range(s.depth):
        d.block(f"blocks#{i}")
    d.norm("neck")
    d.linear("head", s.outputs, s.width)


@structure("first", "tokens", "list", "block", "attention", "gated", "neck", "head")
def language_model(d: Draft) -> None:
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    for i in range(s.depth):
        at = f"blocks#{i}"
        d.norm(f"{at}/norm1", bias=False)
        d.attention(f"{at}/attn", bias=False)
        d.norm(f"{at}/norm2", bias=False)
        d.gated(f"{at}/mlp")
    d.norm("neck", bias=False)
    d.linear("head", s.vocabulary, s.width, bias=False)


@structure("second", "tokens", "position", "coder", "list", "cross", "attention", "mlp", "neck", "head")
def encoder_decoder(d: Draft) -> None:
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    d.add("pos", "embedding", 11, s.width)
    for i in range(s.depth):
        at = f"coder/blocks#{i}"
        d.norm(f"{at}/norm_self")
        d.attention(f"{at}/self")
        d.norm(f"{at}/norm_ff")
        d.mlp(f"{at}/ff")
    d.norm("coder/neck")
    for i in range(s.depth):
        at = f"decoder/blocks#{i}"
        d.norm(f"{at}/norm_self")
        d.attention(f"{at}/self")
        d.norm(f"{at}/norm_cross")
        d.attention(f"{at}/cross")
        d.norm(f"{at}/norm_ff")
        d.mlp(f"{at}/ff")
    d.norm("decoder/neck")
    d.linear("head", s.vocabulary, s.width, bias=False)


@structure("first", "tokens", "list", "block", "attention", "experts", "gated", "neck", "head")
def expert_model(d: Draft) -> None:
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    for i in range(s.depth):
        at = f"blocks#{i}"
        d.norm(f"{at}/norm1", bias=False)
        d.attention(f"{at}/attn", bias=False)
        d.norm(f"{at}/norm2", bias=False)
        d.linear(f"{at}/mlp/router", s.experts, s.width, bias=False)
        for j in range(s.experts):
            d.gated(f"{at}/mlp/experts#{j}")
    d.norm("neck", bias=False)
    d.linear("head", s.vocabulary, s.width, bias=False)


@structure("second", "tokens", "list", "block", "attention", "gated", "adapter", "neck", "head")
def adapted_transformer(d: Draft) -> None:
    """Bottleneck adapters after attention and after the feed-forward."""
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    for i in range(s.depth):
        at = f"blocks#{i}"
        d.norm(f"{at}/norm1")
        d.attention(f"{at}/attn")
        d.linear(f"{at}/adapter1/squeeze", 2, s.width)
        d.linear(f"{at}/adapter1/widen", s.width, 2)
        d.norm(f"{at}/norm2")
        d.gated(f"{at}/mlp")
        d.linear(f"{at}/adapter2/squeeze", 2, s.width)
        d.linear(f"{at}/adapter2/widen", s.width, 2)
    d.norm("neck")
    d.linear("head", s.outputs, s.width)


@structure("second", "patches", "list", "mixer", "mlp", "neck", "head")
def mixer(d: Draft) -> None:
    """Mixing over one axis, then over the other, then over channels; squares throughout."""
    s = d.sizes
    d.conv("patches", s.width, 3, 2)
    for i in range(s.depth):
        at = f"blocks#{i}"
        d.norm(f"{at}/norm_mix")
        d.linear(f"{at}/rows", s.width, s.width)
        d.linear(f"{at}/columns", s.width, s.width)
        d.norm(f"{at}/norm_mlp")
        d.mlp(f"{at}/mlp")
    d.norm("neck")
    d.linear("head", s.outputs, s.width)


@structure(
    "second", "tokens", "patches", "position", "modalities", "list", "block", "attention", "mlp", "neck", "projection"
)
def image_and_text(d: Draft) -> None:
    """Two towers of the same make, and a projection of each."""
    s = d.sizes
    d.conv("image/patches", s.width, 3, 2)
    d.add("image/pos", "table", 1, 7, s.width)
    for i in range(s.depth):
        d.block(f"image/blocks#{i}")
    d.norm("image/neck")
    d.add("text/tokens", "embedding", s.vocabulary, s.width)
    d.add("text/pos", "table", 1, 7, s.width)
    for i in range(s.depth):
        d.block(f"text/blocks#{i}")
    d.norm("text/neck")
    d.linear("image_projection", s.width, s.width, bias=False)
    d.linear("text_projection", s.width, s.width, bias=False)
    d.add("scale", "table")


@structure("first", "towers", "list", "neck", "tower_heads")
def two_towers(d: Draft) -> None:
    """An actor and a critic, two streams: the same stack of linear maps twice."""
    s = d.sizes
    for tower in ("first", "second"):
        for i in range(s.depth + 1):
            d.linear(f"{tower}/blocks#{i}", s.width, s.width)
        d.norm(f"{tower}/neck")
    d.linear("first_head", s.outputs, s.width)
    d.linear("second_head", s.outputs if s.same_heads else s.outputs - 1, s.width)


@structure("first", "tokens", "list", "block", "attention", "mlp", "outputs", "neck")
def many_outputs(d: Draft) -> None:
    """One trunk, several heads, some of the same size."""
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    for i in range(s.depth):
        d.block(f"blocks#{i}")
    d.norm("neck")
    d.linear("output_a", s.outputs, s.width)
    d.linear("output_b", s.outputs if s.same_heads else s.outputs - 1, s.width)
    d.linear("output_c", 1, s.width)


@structure("second", "tokens", "list", "state_space", "neck", "head")
def state_space(d: Draft) -> None:
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    for i in range(s.depth):
        at = f"blocks#{i}"
        d.norm(f"{at}/norm_mix", bias=False)
        d.linear(f"{at}/ssm/in", 2 * s.hidden, s.width, bias=False)
        d.add(f"{at}/ssm/short", "conv1d", s.hidden, 1, 3, bias=True)
        d.linear(f"{at}/ssm/select", 2 + 2 * 4, s.hidden, bias=False)
        d.linear(f"{at}/ssm/step", s.hidden, 2, bias=True)
        d.add(f"{at}/ssm/decay", "table", s.hidden, 4)
        d.add(f"{at}/ssm/skip", "table", s.hidden)
        d.linear(f"{at}/ssm/out", s.width, s.hidden, bias=False)
    d.norm("neck", bias=False)
    d.linear("head", s.vocabulary, s.width, bias=False)
