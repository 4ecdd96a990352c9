"""The same network with layers moved, renumbered, dropped, fused, split or regrouped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.written.case import Case, cells

ATTENTIONS = """
q k v | query key value | to_q to_k to_v | q_proj k_proj v_proj | wq wk wv | lin_q lin_k lin_v | theta phi g
receptance key value
"""
FUSED = "qkv in_proj to_qkv Wqkv qkv_proj c_attn kqv fused vkq kvq"
TWO_IN_ONE = """
gate_up gate up | gate_up_proj gate_proj up_proj | w13 w1 w3 | w12 w1 w2 | fc1 value gate | wi wi_0 wi_1 | st s t
st scale shift | film gamma beta | mu_logvar mu logvar | moments mean logvar | heads actor critic | zr z r | rz r z
xz x z | in_proj x_proj z_proj | ab a b | real_imag real imag | mean_std mean std | box_cls box cls
start_end start end | lr left right | start_end begin finish | span start end | qa_outputs start end | reg_cls reg cls
gates update reset | gates input_gate forget_gate | if i f | up_gate up gate
xy x y | wh w h | hw h w | hw height width | latlon lat lon
"""
LISTED = """
low,mid,high | small,medium,large | first,second,third | a,b,c | stem,body,neck,tail | start,middle,end | early,mid,late
bottom,middle,top | query,key,value | red,green,blue | p2,p3,p4,p5 | one,two,three | high,mid,low | top,middle,bottom
large,medium,small | late,mid,early | north,east,south,west | left,right | user,item | cls,box,mask
liver,kidney,spleen | mon,tue,wed,thu,fri | winter,spring,summer,autumn
"""
STEM = "enc.{0,1} | encoder.{0,1} | L 4 4\n"


def turned(rows: str) -> str:
    """The old and the new side exchanged."""
    parts = [[cell.strip() for cell in row.split("|")] for row in rows.strip().splitlines()]
    return "\n".join(f"{new} | {old} | {layer}" for old, new, layer in parts)


def norms() -> Iterator[list[Case]]:
    """Norms that change their block: after a layer, before the next one."""
    olds = [("bn1", "layer", "bn"), ("stem_norm", "blocks", "norm"), ("embed_norm", "layers", "post_norm")]
    news = [("pre_norm", "layers", "final_norm"), ("norm", "stages", "norm_out"), ("norm_in", "blocks", "head_norm")]
    for norm, (first, layer, after), (before, stage, last) in itertools.product(("B 8", "N 8", "G 8"), olds, news):
        found = []
        for inner, kind in (("conv", "C 8 8 3"), ("lin", "L 8 8")):
            rows = (
                f"{first} | {stage}.0.{before} | {norm}\n"
                f"{layer}.{{0-2}}.{inner} | {stage}.{{0-2}}.{inner} | {kind}\n"
                f"{layer}.{{0,1}}.{after} | {stage}.{{1,2}}.{before} | {norm}\n"
                f"{layer}.2.{after} | {last} | {norm}\n"
            )
            order, tag = f"{stage}.{{0-2}}.{before}", f"{norm[0]} {first} {before} {inner}"
            liar = before == "norm"
            found.append(Case(f"moves/norm to next block {tag}", rows, order=order, liar=liar))
            found.append(Case(f"moves/norm to previous block {tag}", turned(rows), old_order=order, liar=liar))
        yield found


def numbers() -> Iterator[list[Case]]:
    """Blocks dropped at an end or renumbered, under names that do not tell by themselves."""
    styles = [("layers.", "blocks."), ("block", "stage"), ("encoder.layer.", "backbone.body."), ("layer_", "unit_")]
    changes = {
        "last dropped": ("{0-2}", "{0-2}", "3"),
        "first dropped": ("{1-3}", "{0-2}", "0"),
        "start 1": ("{0-3}", "{1-4}", ""),
        "start 0": ("{1-4}", "{0-3}", ""),
        "reversed": ("{0-3}", "{3-0}", ""),
    }
    bodies = ("fc1:L 8 8;fc2:L 8 8", "conv:C 8 8 3;bn:B 8", "attn.qkv:L 8 24;attn.proj:L 8 8;norm:N 8")
    for (old, new), (change, (left, right, gone)) in itertools.product(styles, changes.items()):
        found = []
        for body in bodies:
            rows = ["stem.fc | embed.lin | L 4 8", "head.fc | classifier.lin | L 8 3"]
            for path, kind in (part.split(":") for part in body.split(";")):
                rows.append(f"{old}{left}.{path} | {new}{right}.{path} | {kind}")
                if gone:
                    rows.append(f"{old}{gone}.{path} | - | {kind}")
            name = f"moves/{old}N {change} {body.split(':')[0]}"
            found.append(
                Case(
                    name,
                    "\n".join(rows),
                    order=f"embed {new}{{0-4}}",
                    old_order=f"stem {old}{{0-4}}",
                    liar=change in ("reversed", "first dropped"),
                )
            )
        yield found


def descending() -> Iterator[list[Case]]:
    """Decoders whose numbers fall as they run: in a list by their numbers, or as they run."""
    encoder, out = "enc{1-4}.conv | encoder.{0-3}.conv | C 8 8 3\n", "out | out | C 8 2 1\n"
    order = "encoder decoder.{0-2}"
    for name in ("decoder", "neck.p", "upconv", "deconv", "fp", "dec_", "up_stage"):
        as_it_runs = f"{name}{{4-1}}.conv | decoder.{{0-3}}.conv | C 8 8 3\n"
        by_number = f"{name}{{4-1}}.conv | decoder.{{3-0}}.conv | C 8 8 3\n"
        norms = f"enc{{1-4}}.bn | encoder.{{0-3}}.bn | B 8\n{name}{{4-1}}.bn | decoder.{{3-0}}.bn | B 8\n"
        tag, note = f"copies/descending {name}", "number order would be the reverse"
        found = [
            Case(f"{tag} as it runs", encoder + as_it_runs + out, liar=True, note=note),
            Case(f"{tag} by number", encoder + by_number + out, order=order, liar=True),
            Case(f"{tag} by number, with norms", encoder + by_number + norms + out, order=order),
        ]
        for last in (3, 2):
            rows = (
                f"sa{{1-{last}}}.mlp_convs.{{0,1}} | SA.{{0-{last - 1}}}.mlps.0.{{0,3}} | C 8 8 1\n"
                f"sa{{1-{last}}}.mlp_bns.{{0,1}} | SA.{{0-{last - 1}}}.mlps.0.{{1,4}} | B 8\n"
                f"{name}{{{last}-1}}.mlp_convs.{{0,1}} | FP.{{{last - 1}-0}}.mlp.{{0,3}} | C 8 8 1\n"
                f"{name}{{{last}-1}}.mlp_bns.{{0,1}} | FP.{{{last - 1}-0}}.mlp.{{1,4}} | B 8\n"
                "conv1 | fc.0 | K 8 8 1\nbn1 | fc.1 | b 8"
            )
            found.append(Case(f"{tag} points {last}", rows, order="SA FP.0 FP.1"))
            found.append(Case(f"{tag} points {last} back", turned(rows), old_order="SA FP.0 FP.1"))
        yield found


def attentions() -> Iterator[list[Case]]:
    """Queries, keys and values in one layer, in several orders and words."""
    letters = {"kqv": (1, 0, 2), "vkq": (2, 1, 0), "kvq": (1, 2, 0)}
    for words in cells(ATTENTIONS):
        names = words.split()
        found = []
        for fused in FUSED.split():
            ordered = [names[i] for i in letters.get(fused, (0, 1, 2))]
            out = "layers.{0,1}.attn.out | blocks.{0,1}.attn.proj | L 8 8\n"
            whole = f"layers.{{0,1}}.attn.({'+'.join(ordered)}) | blocks.{{0,1}}.attn.{fused} | L 8 8 => L 8 24"
            parts = "".join(
                f"blocks.{{0,1}}.attn.{fused}[{i}/3] | layers.{{0,1}}.attn.{name} | L 8 24 => L 8 8\n"
                for i, name in enumerate(ordered)
            )
            split, back = parts + turned(out), " ".join(f"layers.{{0,1}}.attn.{name}" for name in reversed(names))
            found.append(Case(f"moves/fuse {words} {fused}", f"{whole}\n{out}"))
            found.append(Case(f"moves/split {fused} {words}", split))
            found.append(Case(f"moves/split {fused} {words} registered otherwise", split, order=back))
        yield found
    for fused in ("kv", "to_kv", "kv_proj", "key_value", "vk", "memory"):
        first, second = "vk" if fused == "vk" else "kv"
        query = "dec.{0,1}.cross.q | decoder.{0,1}.xattn.q | L 8 8\n"
        whole = f"dec.{{0,1}}.cross.({first}+{second}) | decoder.{{0,1}}.xattn.{fused} | L 8 8 => L 8 16"
        parts = f"decoder.{{0,1}}.xattn.{fused}[{{0,1}}/2] | dec.{{0,1}}.cross.{{{first},{second}}} | L 8 16 => L 8 8"
        yield [
            Case(f"moves/fuse {fused}", query + whole),
            Case(f"moves/split {fused}", turned(query) + "\n" + parts),
        ]


def pairs() -> Iterator[list[Case]]:
    """Two layers in one."""
    for words in cells(TWO_IN_ONE):
        fused, a, b = words.split()
        whole = STEM + f"out.({a}+{b}) | out.{fused} | L 8 6 => L 8 12"
        parts = f"{turned(STEM)}\nout.{fused}[{{0,1}}/2] | out.{{{a},{b}}} | L 8 12 => L 8 6"
        yield [
            Case(f"moves/fuse pair {words}", whole),
            Case(f"moves/fuse pair {words}, second first", whole, old_order=f"out.{b}"),
            Case(f"moves/split pair {words}", parts),
            Case(f"moves/split pair {words}, second first", parts, order=f"out.{b}"),
        ]


def gates() -> Iterator[list[Case]]:
    """The gates of an LSTM, in every order."""
    for letters in map("".join, itertools.permutations("ifgo")):
        joined = "+".join(f"w_{letter}" for letter in letters)
        whole = f"cell.({joined}) | rnn.w_{letters} | L 8 8 => L 8 32\nout | head | L 8 3"
        parts = f"rnn.w_{letters}[{{0-3}}/4] | cell.w_{{{','.join(letters)}}} | L 8 32 => L 8 8\nhead | out | L 8 3"
        yield [
            Case(f"moves/lstm cell {letters}", whole),
            Case(f"moves/lstm cell split {letters}", parts, order="cell.w_{o,f,g,i}"),
        ]


def lists() -> Iterator[list[Case]]:
    """Lists into named modules and back."""
    for names in cells(LISTED):
        first = int(names.startswith("one"))
        numbers = ",".join(str(first + i) for i, _ in enumerate(names.split(",")))
        back = " ".join(reversed(names.split(",")))
        found, stem = [], "encoder.fc | enc.fc | L 4 4\n"
        for unit, kind in (("conv", "C 8 8 3"), ("fc", "L 8 8")):
            named = f"{stem}branches.{{{numbers}}}.{unit} | {{{names}}}.{unit} | {kind}"
            numbered = f"{stem}{{{names}}}.{unit} | branches.{{{numbers}}}.{unit} | {kind}"
            note = "the order of registration against a list"
            found.append(Case(f"moves/list to {names} {unit}", named))
            found.append(Case(f"moves/{names} to list {unit}", numbered))
            found.append(Case(f"moves/list to {names} {unit} registered backwards", named, order=back, note=note))
        yield found
