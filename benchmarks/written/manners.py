"""Blocks of two code bases, each called in its own manner throughout (``tables/manners.txt``), drawn at random.

Maps are squares in every second case, so that shapes tell nothing; attentions stand in modules of their own or beside
the rest; a block may be gone, and a head may be another one.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator

from benchmarks.written.case import Case, listed

IDEAS, VARIANTS = 60, 8
LISTS = ("blocks", "h", "layers", "trunk", "encoder.layers", "body")
ATTENTION_PLACES = ("", "attn.", "self_attn.", "mixer.", "attention.")
FEED_PLACES = ("", "mlp.", "ffn.", "feed_forward.", "ff.")
STEMS = ("embed", "wte", "tok_embeddings", "embeddings.word")
ENDS = ("norm", "ln_f", "final_layernorm", "post", "last_norm")
FUSED = ("qkv", "in_proj", "query_key_value", "c_attn")
OTHER_HEAD = "domain_discriminator"


def _manners() -> dict[str, list[list[str]]]:
    found = defaultdict(list)
    for line in listed("manners"):
        kind, *names = line.split()
        found[kind].append(names)
    return found


def blocks() -> Iterator[list[Case]]:
    """Models of blocks; the variants of an idea have the same parts in other manners."""
    manners = _manners()
    for idea in range(IDEAS):
        rng = random.Random(f"blocks {idea}")
        cross, gated, wide = rng.random() < 0.25, rng.random() < 0.5, rng.choice((8, 16))
        yield [_case(f"manners/{idea}.{variant}", rng, manners, cross, gated, wide) for variant in range(VARIANTS)]


def _case(
    name: str, rng: random.Random, manners: dict[str, list[list[str]]], cross: bool, gated: bool, wide: int
) -> Case:
    both: dict[str, list[list[str]]] = {kind: [rng.choice(rows), rng.choice(rows)] for kind, rows in manners.items()}
    roots = [f"{rng.choice(LISTS)}." for _ in range(2)]
    attention, feed = [rng.choice(ATTENTION_PLACES) for _ in range(2)], [rng.choice(FEED_PLACES) for _ in range(2)]
    fused = rng.choice((None, None, 0, 1))
    first, gone = [rng.choice((0, 0, 1)) for _ in range(2)], rng.random() < 0.15
    rows = [f"{rng.choice(STEMS)} | {rng.choice(STEMS)} | E 19 8"]
    for k in range(2):
        left = f"{roots[0]}{k + first[0]}."
        right = "-" if gone and k else f"{roots[1]}{k + first[1]}."
        for a, b in zip(*both["crossnorms" if cross else "norms"]):
            rows.append(_row(left + a, right, b, "N 8"))
        for place in ("", "cross_")[: 1 + cross]:
            ours, theirs = (f"{place}{p or 'attn.' * cross}" for p in attention)
            rows += _attention(left + ours, right, theirs, both["attention"], fused)
        maps = zip(*both["gated" if gated else "feed"])
        sizes = [f"L 8 {wide}"] * (1 + gated) + [f"L {wide} 8"]
        rows += [_row(left + feed[0] + a, right, feed[1] + b, size) for (a, b), size in zip(maps, sizes)]
    rows.append(f"{rng.choice(ENDS)} | {rng.choice(ENDS)} | N 8")
    heads = list(zip(*both["heads"]))
    if rng.random() < 0.15:
        heads = [(heads[0][0], "-"), ("-", OTHER_HEAD), heads[1]]
    rows += [f"{a} | {b} | L 8 4" for a, b in heads]
    return Case(name, "\n".join(rows))


def _attention(ours: str, right: str, theirs: str, manners: list[list[str]], fused: int | None) -> Iterator[str]:
    """Queries, keys and values, in one layer on one side, and the output."""
    (*old, old_out), (*new, new_out) = manners
    whole = FUSED[len(old[0]) % len(FUSED)]
    if fused is None:
        yield from (_row(ours + a, right, theirs + b, "L 8 8") for a, b in zip(old, new))
    elif fused:
        yield _row("+".join(ours + a for a in old), right, theirs + whole, "L 8 8 => L 8 24")
    else:
        parts = enumerate(new)
        yield from (_row(f"{ours}{whole}[{i}/3]", right, theirs + b, "L 8 24 => L 8 8") for i, b in parts)
    yield _row(ours + old_out, right, theirs + new_out, "L 8 8")


def _row(left: str, right: str, name: str, layer: str) -> str:
    return f"{left} | {right if right == '-' else right + name} | {layer}"
