"""Whole parts of one structure beside each other: in another order, one exchanged, copies, two towers.

Each function yields the variants of one idea together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from benchmarks.written.case import Case, cells, listed, paired, words_of

BODIES = {
    "list": ["OLD.{0,1} | NEW.{0,1} | L 8 8"],
    "fc": ["OLD.{0,1}.fc | NEW.{0,1}.lin | L 8 8"],
    "same inside": ["OLD.{0,1}.fc | NEW.{0,1}.fc | L 8 8"],
    "conv": ["OLD.conv{1,2} | NEW.conv{1,2} | C 8 8 3", "OLD.bn{1,2} | NEW.norm{1,2} | B 8"],
    "attn": [
        "OLD.{0,1}.{q,k,v,o} | NEW.{0,1}.{q_proj,k_proj,v_proj,out} | L 8 8",
        "OLD.{0,1}.norm | NEW.{0,1}.ln | N 8",
    ],
}
TOWER = [
    "OLD.blocks.{0,1}.norm1 | NEW.blocks.{0,1}.norm1 | N 8",
    "OLD.blocks.{0,1}.attn.qkv | NEW.blocks.{0,1}.attn.qkv | L 8 24",
    "OLD.blocks.{0,1}.attn.proj | NEW.blocks.{0,1}.attn.proj | L 8 8",
    "OLD.blocks.{0,1}.norm2 | NEW.blocks.{0,1}.norm2 | N 8",
    "OLD.blocks.{0,1}.mlp.fc1 | NEW.blocks.{0,1}.mlp.fc1 | L 8 16",
    "OLD.blocks.{0,1}.mlp.fc2 | NEW.blocks.{0,1}.mlp.fc2 | L 16 8",
    "OLD.norm | NEW.norm | N 8",
    "OLD.proj_out | NEW.proj_out | l 8 6",
]
COPIES = """
net net_ema | model ema_model | model shadow | online_network target_network | student teacher | encoder_q encoder_k
module swa_module | net avg_net | fold_0 fold_1 | members.0 members.1 | last best | policy ref_policy | actor actor_old
orig pruned | base tuned
"""
COPY = [
    "OLD.conv.{0,1} | NEW.layers.{0,1} | C 8 8 3",
    "OLD.bn.{0,1} | NEW.bn.{0,1} | B 8",
    "OLD.head.fc | NEW.head.fc | L 8 4",
]
NET = [
    "OLD.stem.conv | NEW.stem.conv | C 3 8 3",
    "OLD.layers.{0-1}.conv | NEW.layers.{0-1}.conv | C 8 8 3",
    "OLD.layers.{0-1}.bn | NEW.layers.{0-1}.bn | B 8",
    "OLD.fc | NEW.fc | L 8 10",
]
TRANSLATOR = """
enc_embed | ENC.embed | E 20 8
dec_embed | DEC.embed | E 20 8
enc.{0,1}.self_attn.{q,k,v,o} | ENC.layers.{0,1}.attn.{q,k,v,o} | L 8 8
enc.{0,1}.ff.{0,1} | ENC.layers.{0,1}.ffn.fc{1,2} | L 8 8
dec.{0,1}.self_attn.{q,k,v,o} | DEC.layers.{0,1}.self_attention.{q,k,v,o} | L 8 8
dec.{0,1}.src_attn.{q,k,v,o} | DEC.layers.{0,1}.cross_attention.{q,k,v,o} | L 8 8
dec.{0,1}.ff.{0,1} | DEC.layers.{0,1}.ffn.fc{1,2} | L 8 8
"""


def orders() -> Iterator[list[Case]]:
    for line in listed("order"):
        pairs = words_of(line)
        back = " ".join(new for _, new in reversed(pairs))
        unknown = [(pairs[0][0], "zeta"), *((new, new) for _, new in pairs[1:])]
        kept = [(old, old) for old, _ in pairs[:-1]]
        found = []
        for body, templates in BODIES.items():
            name, rows = f"order/{line} {body}", paired(pairs, *templates)
            buffer = paired(pairs, "OLD.weight_b | NEW.weight_b | D 5")
            extra = paired([("-", "extra")], templates[0])
            gone = paired([*kept, (pairs[-1][0], "-"), ("-", "omega")], *templates)
            found += [
                Case(f"{name} kept", rows),
                Case(f"{name} reversed", rows, order=back),
                Case(f"{name} reversed, one more in front", rows + extra, order=f"extra {back}"),
                Case(f"{name} with a buffer", rows + buffer, order=back),
                Case(
                    f"{name} one unknown name",
                    paired(unknown, *templates),
                    order=" ".join(new for _, new in reversed(unknown)),
                ),
                Case(f"{name} last dropped", gone, liar=True, note="omega may be the new name of the dropped one"),
            ]
        yield found


def towers() -> Iterator[list[Case]]:
    for line in listed("towers"):
        a, b, _, c, d, _, e = line.split()
        nested = [(f"model.{part}", f"encoders.{part}.backbone") for part in (a, b)]
        variants = [
            ("renamed", [(a, c), (b, d)], ""),
            ("renamed, other order", [(a, c), (b, d)], d),
            ("same names, other order", [(a, a), (b, b)], b),
            ("second exchanged", [(a, a), (b, "-"), ("-", e)], ""),
            ("second exchanged, renamed", [(a, c), (b, "-"), ("-", e)], ""),
            ("first dropped, renamed", [(a, "-"), (b, d)], ""),
            ("one for the other", [(a, "-"), ("-", d)], ""),
            ("third in front", [(a, a), (b, b), ("-", e)], e),
            ("third in front, renamed", [(a, c), (b, d), ("-", e)], e),
            ("to list", [(a, "towers.0"), (b, "towers.1")], ""),
            ("from list", [("towers.0", c), ("towers.1", d)], ""),
            ("nested", nested, f"encoders.{b}"),
        ]
        yield [
            Case(f"multimodal/{a} {b} {what}", paired(pairs, *TOWER), order=order) for what, pairs, order in variants
        ]


def copies() -> Iterator[list[Case]]:
    for words in cells(COPIES):
        a, b = words.split()
        alike = words.endswith(("1", "best"))  # folds, members and snapshots: none is the average of another
        variants = [
            ("other order", [(a, a), (b, b)], b, ""),
            ("wrapped, other order", [(a, f"m.{a}"), (b, f"m.{b}")], f"m.{b}", ""),
            ("second dropped, first named", [(a, a), (b, "-")], "", ""),
            ("first dropped, second named", [(a, "-"), (b, b)], "", ""),
            ("one left, unnamed", [(f"({a}/{b})", "network")], "", "either is right, or none"),
            ("first saved, second wanted", [(a, "-"), ("-", b)], "", "another copy: a decision"),
            ("second saved, both wanted", [(b, b), ("-", a)], a, "the first stays fresh"),
        ]
        yield [
            Case(
                f"multimodal/copy {a} {b} {what}",
                paired(pairs, *COPY),
                order,
                liar=alike and "saved, sec" in what,
                note=note,
            )
            for what, pairs, order, note in variants
        ]


def averages() -> Iterator[list[Case]]:
    """Two copies renamed, or one of them left out."""
    for line in listed("copies"):
        a, b, _, c, d = line.split()
        yield [
            Case(f"copies/{a} {b} -> {c} {d}", paired([(a, c), (b, d)], *NET)),
            Case(f"copies/{b} {a} -> {d} {c}", paired([(b, d), (a, c)], *NET)),
        ]


def translators() -> Iterator[list[Case]]:
    for words in ("encoder decoder", "src_net tgt_net", "reader writer", "source target", "contextualizer generator"):
        encoder, decoder = words.split()
        rows = TRANSLATOR.replace("ENC", encoder).replace("DEC", decoder)
        alone = re.sub(rf"\| {encoder}\S+", "| -", rows)
        yield [
            Case(f"language/translator {words}", rows),
            Case(f"language/translator {words}, decoder first", rows, order=decoder),
            Case(f"language/translator {words}, decoder alone", alone),
        ]
