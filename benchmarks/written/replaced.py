"""A part of every block, or a list beside another one, that gave way to something else of the same shapes.

What stands around it kept its names or changed some; with each exchange goes the same part under another name of its.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from benchmarks.written.case import Case, listed

REST = {
    "attn.qkv": ("attn.qkv", "L 8 24"),
    "attn.proj": ("attn.out", "L 8 8"),
    "norm1": ("ln_1", "N 8"),
    "norm2": ("ln_2", "N 8"),
    "mlp.fc1": ("ffn.w1", "L 8 32"),
    "mlp.fc2": ("ffn.w2", "L 32 8"),
}
CONTAINERS = (
    "layers blocks",
    "blocks blocks",
    "encoder.layers encoder.blocks",
    "h trunk",
    "net.stages body.stages",
    "a.b a.b",
)
PARTS = (("L 8 12",), ("L 8 4", "L 4 8"), ("L 8 8", "L 8 8"), ("C 8 8 3", "B 8"), ("L 8 8",))
INSIDE = (("fc1", "fc2"), ("0", "2"), ("down", "up"))


def parts() -> Iterator[list[Case]]:
    """Parts of blocks."""
    for line in listed("replaced"):
        part, _, same, _, other = line.split()
        found = []
        for k, container in enumerate(CONTAINERS):
            rng = random.Random(f"{line} {container}")
            old, new = container.split()
            layers, inside = rng.choice(PARTS), rng.choice(INSIDE)
            tails = [""] if len(layers) == 1 else [f".{name}" for name in inside]
            renamed = rng.random() < 0.4
            for what, called in (("the same", same), ("kept", part), ("other", other)):
                rows = ["stem | stem | L 5 8"]
                for i in range(2):
                    left, right = f"{old}.{i}.", f"{new}.{i}."
                    rows += [f"{left}{a} | {right}{b if renamed else a} | {layer}" for a, (b, layer) in REST.items()]
                    for tail, layer in zip(tails, layers):
                        rows += _replaced(f"{left}{part}{tail}", f"{right}{called}{tail}", layer, what)
                rows.append("head | head | L 8 4")
                found.append(Case(f"replaced/{line} {k} {what}", "\n".join(rows)))
        yield found


MANNERS = ("{}_blocks.#", "{}.layers.#", "{}.#", "{}_layers.#")
AROUND = ("{}_embed", "{}_norm", "{}_head")


def lists() -> Iterator[list[Case]]:
    """Lists of blocks beside an encoder's."""
    for line in listed("lists"):
        part, _, same, _, other = line.split()
        found = []
        for k, manner in enumerate(MANNERS):
            rng = random.Random(f"{line} {manner}")
            encoder = rng.choice((("blocks", "blocks"), ("encoder.layers", "encoder.blocks"), ("layers", "trunk")))
            wrapper = rng.choice((("", ""), ("", "net."), ("model.", "backbone.")))
            around = AROUND[: rng.choice((0, 2, 3))] if "." not in manner.partition("#")[0][:-1] else ()
            renamed = rng.random() < 0.4
            for what, called in (("the same", same), ("kept", part), ("other", other)):
                rows = [f"{wrapper[0]}stem | {wrapper[1]}stem | L 5 8"]
                for i in range(2):
                    for a, (b, layer) in REST.items():
                        b = b if renamed else a
                        rows.append(f"{wrapper[0]}{encoder[0]}.{i}.{a} | {wrapper[1]}{encoder[1]}.{i}.{b} | {layer}")
                        left, right = (
                            f"{w}{manner.format(name)}".replace("#", str(i)) for w, name in zip(wrapper, (part, called))
                        )
                        rows += _replaced(
                            f"{left}.{a}",
                            f"{right}.{b}",
                            layer.replace("8", "6").replace("24", "18").replace("32", "12"),
                            what,
                        )
                for name, layer in zip(around, ("L 8 6", "N 6", "L 6 4")):
                    rows += _replaced(wrapper[0] + name.format(part), wrapper[1] + name.format(called), layer, what)
                rows.append(f"{wrapper[0]}norm | {wrapper[1]}norm | N 8")
                found.append(Case(f"replaced/{line} {k} {what}", "\n".join(rows)))
        yield found


def _replaced(left: str, right: str, layer: str, what: str) -> list[str]:
    return [f"{left} | - | {layer}", f"- | {right} | {layer}"] if what == "other" else [f"{left} | {right} | {layer}"]
