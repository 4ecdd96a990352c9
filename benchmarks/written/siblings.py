"""Siblings that only a word, a letter or a number tells apart: renamed, exchanged, added, dropped.

Each function yields, for one line of its table (``tables/*.txt``), the variants of one idea.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.written.case import Case, listed, paired, words_of

BODY = "net.{0,1} | model.{0,1} | L 4 4\n"
WIDER = "net.{0,1} | model.{0,1} | L 6 6\n"
NOTHING = "-"


def backwards(template: str, names: list[str]) -> str:
    """The order of registration in which the last of the new parts comes first."""
    path = template.split("|")[1].strip()
    return " ".join(path.replace("NEW", name) for name in reversed(names) if name != NOTHING)


def abbreviations() -> Iterator[list[Case]]:
    kinds = {
        "linear": "OLD_proj | NEW | L 8 8",
        "same": "OLD_fc | NEW_fc | L 8 8",
        "net": "OLD_net.{0,1} | NEW_branch.{0,1} | L 8 8",
        "embed": "emb_OLD | emb_NEW | E 9 8",
    }
    for line in listed("abbrev"):
        pairs = words_of(line)
        found = []
        for kind, template in kinds.items():
            rows = BODY + paired(pairs, template)
            found.append(Case(f"abbrev/{line} {kind}", rows))
            found.append(Case(f"abbrev/{line} {kind} back", rows, order=backwards(template, [n for _, n in pairs])))
        yield found


def buffers() -> Iterator[list[Case]]:
    places = {
        "same module": ("norm.OLD | norm.NEW | D 6", ""),
        "renamed module": ("norm.OLD | normalizer.NEW | D 6", ""),
        "other module": ("stats.OLD | scaler.NEW | D 6", ""),
        "with layer": ("loss.OLD | criterion.NEW | D 6", "loss.proj | criterion.proj | L 8 8"),
        "with parameter": ("loss.OLD | criterion.NEW | D 6", "loss.bias_p | criterion.bias_p | P 5"),
        "twice": ("{a,b}.stats.OLD | {a,b}.scaler.NEW | D 6", "{a,b}.fc | {a,b}.lin | L 4 4"),
        "list": ("layers.{0,1}.OLD | blocks.{0,1}.NEW | D 6", "layers.{0,1}.fc | blocks.{0,1}.fc | L 4 4"),
    }
    for line in listed("buffers"):
        pairs = words_of(line)
        found = []
        for place, (template, more) in places.items():
            rows = BODY + paired(pairs, template) + more
            found.append(Case(f"buffers/{line} {place}", rows))
            found.append(Case(f"buffers/{line} {place} back", rows, order=backwards(template, [n for _, n in pairs])))
        yield found


def scalars() -> Iterator[list[Case]]:
    kinds = {"scalar": "P 1", "vector": "P 8", "buffer": "D 8"}
    for line in listed("scalars"):
        pairs = words_of(line)
        news = [new for _, new in pairs if new != NOTHING]
        found = []
        for place, path in {"root": "OLD | NEW", "loss": "loss.OLD | criterion.NEW"}.items():
            for order in ("", backwards(path, news))[: len(news)]:
                for kind, layer in kinds.items():
                    name = f"scalars/{line} {kind} {place}{' back' if order else ''}"
                    found.append(Case(name, BODY + paired(pairs, f"{path} | {layer}"), order=order))
        yield found


def letters() -> Iterator[list[Case]]:
    kinds = {
        "param": "P 8",
        "matrix": "P 8 8",
        "linear": "l 8 8",
        "biased": "L 8 8",
        "buffer": "D 8",
        "conv": "C 8 8 3",
        "embed": "E 12 8",
    }
    places = {
        "same": ("cell.OLD | cell.NEW", ""),
        "renamed": ("cell.OLD | unit.NEW", ""),
        "layers": ("layers.{0,1}.cell.OLD | blocks.{0,1}.mix.NEW", "layers.{0,1}.fc | blocks.{0,1}.lin | L 4 4\n"),
    }
    for line in listed("letters"):
        a, b, c = line.split()
        changes = {
            "kept": ([(a, a), (b, b), (c, c)], [a, b, c]),
            "first exchanged": ([(a, NOTHING), (b, b), (NOTHING, c)], []),
            "last exchanged": ([(a, a), (b, NOTHING), (NOTHING, c)], []),
            "first dropped": ([(a, NOTHING), (b, b)], []),
            "one for another": ([(a, NOTHING), (NOTHING, b)], []),
            "one added in front": ([(b, b), (NOTHING, a)], [b, a]),
        }
        found = []
        for kind, layer in kinds.items():
            for place, (path, more) in places.items():
                for change, (pairs, back) in changes.items():
                    rows = WIDER + more + paired(pairs, f"{path} | {layer}")
                    order = backwards(path, back)
                    found.append(Case(f"letters/{line} {kind} {place} {change}", rows, order=order))
        yield found


def marks() -> Iterator[list[Case]]:
    kinds = {
        "linear": "OLD | NEW | L 8 8",
        "net": "OLD.conv{1,2} | NEW.conv{1,2} | C 8 8 3",
        "mlp": "OLD.{0,1} | NEW.{0,1} | L 8 8",
        "vector": "OLD_w | NEW_w | P 8",
    }
    for line in listed("marks"):
        a, b, c, _, d = line.split()
        changes = {
            "last exchanged": [(a, a), (b, b), (c, NOTHING), (NOTHING, d)],
            "first exchanged": [(a, NOTHING), (NOTHING, d), (b, b), (c, c)],
            "one of two": [(a, NOTHING), (b, b)],
            "one more in front": [(a, a), (b, b), (NOTHING, d)],
        }
        found = []
        for kind, template in kinds.items():
            for style, put in {"kept": "NEW", "in a dict": "heads.NEW", "with an ending": "NEW_m"}.items():
                placed = template.replace("NEW", put)
                for change, pairs in changes.items():
                    order = backwards(placed, [d]) if change == "one more in front" else ""
                    name = f"marks/{line} {kind} {style} {change}"
                    found.append(Case(name, BODY + paired(pairs, placed), order=order))
        yield found


def beside() -> Iterator[list[Case]]:
    """A list of layers beside blocks of such layers, registered the other way round."""
    for old, new in words_of("net=model pre=prenet mlp=mlp_head fc=dense proj=projection"):
        for blocks, units in words_of("layers=blocks blocks=stages encoder=enc layer=body"):
            found = []
            for inner, inside in words_of("fc=fc proj=out"):
                name = f"marks/beside {old} {new} {blocks} {units} {inner} {inside}"
                rows = paired([(old, new)], "OLD.{0,1} | NEW.{0,1} | L 4 4")
                rows += paired([(blocks, units)], f"OLD.{{0,1}}.{inner} | NEW.{{0,1}}.{inside} | L 4 4")
                vector = rows + paired([(blocks, units)], "OLD.{0,1}.weight | NEW.{0,1}.weight | D 6")
                found.append(Case(name, rows))
                found.append(Case(f"{name} back", rows, order=units))
                found.append(Case(f"{name} back, vector", vector, order=units))
            yield found


def words() -> Iterator[list[Case]]:
    structures = {
        "linear": ["OLD | NEW | L 8 8"],
        "mlp": ["OLD.{0,2} | NEW.fc{1,2} | L 8 8"],
        "net": ["OLD.conv{1,2} | NEW.c{1,2} | C 8 8 3", "OLD.bn{1,2} | NEW.n{1,2} | B 8"],
        "flat": ["fc_OLD | NEW_proj | L 8 8"],
        "under": ["heads.OLD | outputs.NEW | L 8 3"],
        "tower": ["OLD_net.layers.{0-2} | NEW_tower.{0-2} | L 8 8", "OLD_net.out | NEW_tower.proj | L 8 4"],
        "vector": ["OLD_embed | embeddings.NEW | P 1 8"],
    }
    for line in listed("words"):
        a, b, _, p, q, _, x = line.split()
        changes = {
            "renamed": ([(a, p), (b, q)], ""),
            "other order": ([(a, a), (b, b)], b),
            "renamed, other order": ([(a, p), (b, q)], q),
            "exchanged": ([(a, a), (b, NOTHING), (NOTHING, x)], ""),
            "exchanged in front": ([(a, NOTHING), (NOTHING, x), (b, q)], ""),
            "added in front": ([(a, p), (NOTHING, x)], x),
            "added": ([(a, a), (NOTHING, b)], b),
            "dropped": ([(a, NOTHING), (b, q)], ""),
            "alone": ([(a, NOTHING), (NOTHING, b)], ""),
            "three": ([(a, a), (b, b), (NOTHING, x)], x),
        }
        found = []
        for structure, templates in structures.items():
            for change, (pairs, first) in changes.items():
                order = backwards(templates[0], [first]) if first else ""
                found.append(Case(f"words/{line} {structure} {change}", BODY + paired(pairs, *templates), order=order))
        yield found
