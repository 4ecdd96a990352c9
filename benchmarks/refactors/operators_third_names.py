"""Operators of the third part: where modules stand, their names, and the order of their registration."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from benchmarks.refactors.network import Leaf, Path, Side, Step
from benchmarks.refactors.operators import LAST, UNORDERED, lists_of, operator, registered
from benchmarks.refactors.operators_names import _numbered, _reworded, _shuffled
from benchmarks.refactors.operators_places import _word

HEADS = (
    "head",
    "heads",
    "click",
    "answer",
    "kind",
    "box",
    "segment",
    "depth",
    "surface",
    "relevance",
    "forecast",
    "mel",
)
NORMS = ("norm", "batch_norm", "group_norm")


# Places -------------------------------------------------------------------------------------------------------------


def _in_members(side: Side, word: str) -> bool:
    """One more level between every member of every list and what it holds."""
    before = list(side.leaves)
    side.leaves = [
        leaf.moved(tuple(s for step in leaf.path for s in ((step, Step(word)) if step.index is not None else (step,))))
        if leaf.path[-1].index is None
        else leaf
        for leaf in side.leaves
    ]
    return side.leaves != before


@operator("third", "places", weight=1.5)
def level_in_members(side: Side, rng: random.Random) -> bool:
    """``blocks.0.attn`` becomes ``blocks.0.layer.attn``: what wrappers of checkpointing and compilation do."""
    return _in_members(side, rng.choice(["=layer", "=_checkpoint_wrapped_module", "=_orig_mod", "=block", "=fn"]))


@operator("third", "places", weight=1.5)
def hoisted_members(side: Side, rng: random.Random) -> bool:
    """The members of one container stand on the level above: heads outside of ``heads``, maps outside of attention."""
    above: Counter[Path] = Counter(leaf.parent for leaf in side.leaves if leaf.path[-1].index is None)
    roles = sorted({path[-1].role for path, many in above.items() if path and path[-1].index is None and many > 1})
    if not roles:
        return False
    role = rng.choice(roles)
    side.leaves = [leaf.moved(tuple(step for step in leaf.path if step != Step(role))) for leaf in side.leaves]
    return True


@operator("third", "places", weight=1.0)
def joined_stages(side: Side, rng: random.Random) -> bool:
    """Lists in a list become one long list: ``stages.1.blocks.0`` becomes ``blocks.3``."""
    places: dict[tuple[Path, str], list[tuple[int, int]]] = {}
    for leaf in side.leaves:
        for depth in range(len(leaf.path) - 1):
            outer, inner = leaf.path[depth : depth + 2]
            if outer.index is not None and inner.index is not None:
                found = places.setdefault((leaf.path[:depth], f"{outer.role}/{inner.role}"), [])
                if (outer.index, inner.index) not in found:
                    found.append((outer.index, inner.index))
    if not places:
        return False
    (above, roles), members = next(iter(places.items()))
    outer_role, inner_role = roles.split("/")
    at = len(above)
    within = [leaf for leaf in side.leaves if leaf.path[:at] == above and leaf.path[at].role == outer_role]
    if any(leaf.path[at + 1].role != inner_role for leaf in within):
        return False  # what stands beside the inner lists would change its place in the order
    members.sort()
    side.leaves = [
        leaf.moved((*above, Step(inner_role, members.index((o.index, i.index))), *leaf.path[at + 2 :]))  # type: ignore[arg-type]
        if len(leaf.path) > at + 1
        and leaf.path[:at] == above
        and (o := leaf.path[at]).role == outer_role
        and (i := leaf.path[at + 1]).role == inner_role
        and i.index is not None
        else leaf
        for leaf in side.leaves
    ]
    return True


@operator("third", "places", LAST, weight=1.0)
def norms_in_lists(side: Side, rng: random.Random) -> bool:
    """The norms of a list's members stand in a list of their own, as in ``bns.0``, after the others."""
    lists = [key for key, many in lists_of(side).items() if many > 1]
    if not lists:
        return False
    above, role = rng.choice(lists)
    at = len(above)
    moved, rest = [], []
    for leaf in side.leaves:
        inside = len(leaf.path) == at + 2 and leaf.path[:at] == above and leaf.path[at].role == role
        if inside and leaf.kind in NORMS and leaf.path[-1].index is None:
            moved.append(leaf.moved((*above, Step(leaf.role, leaf.path[at].index))))
        else:
            rest.append(leaf)
    moved.sort(key=lambda leaf: leaf.role)
    last = max((n for n, leaf in enumerate(rest) if leaf.path[:at] == above), default=-1)
    side.leaves = [*rest[: last + 1], *moved, *rest[last + 1 :]]
    return bool(moved)


@operator("third", "places", weight=1.5)
def norm_goes_inside(side: Side, rng: random.Random) -> bool:
    """A norm moves into the module that it stands before: ``attn.norm``, and the rest perhaps into ``attn.fn``."""
    word, inner = rng.choice([("norm", ""), ("norm", "fn"), ("layer_norm", ""), ("pre_norm", "module"), ("ln", "net")])
    entered: dict[Path, Leaf] = {}
    for leaf, after in zip(side.leaves, side.leaves[1:]):
        container = after.path[: len(leaf.path)]
        before = leaf.kind in NORMS and len(after.path) > len(leaf.path) and leaf.parent == container[:-1]
        if before and container[-1].index is None and leaf.path[-1].index is None:
            entered.setdefault(container, leaf)
    norms = {id(leaf): container for container, leaf in entered.items()}
    out = []
    for leaf in side.leaves:
        if id(leaf) in norms:
            out.append(leaf.moved((*norms[id(leaf)], Step(f"={word}"))))
            continue
        container = next((c for c in entered if leaf.path[: len(c)] == c), None)
        out.append(
            leaf.moved((*container, Step(f"={inner}"), *leaf.path[len(container) :])) if container and inner else leaf
        )
    side.leaves = out
    return bool(entered)


@operator("third", "places", weight=1.0)
def last_norm_in_the_head(side: Side, rng: random.Random) -> bool:
    """The last norm and the last map form a head: ``head.norm``, ``head.fc``."""
    *rest, norm, head = side.leaves if len(side.leaves) > 1 else (*side.leaves, *side.leaves)
    if norm.kind not in NORMS or numbered(norm) or numbered(head) or len(side.leaves) < 2:
        return False
    word = Step(rng.choice(["=head", "=classifier", "=out", "=final", "=projection_out"]))
    first, second = rng.choice([("norm", "fc"), ("0", "1"), ("ln", "linear"), ("layernorm", "projection"), ("1", "4")])
    side.leaves = [*rest, norm.moved((word, Step(f"={first}"))), head.moved((word, Step(f"={second}")))]
    return True


def numbered(leaf: Leaf) -> bool:
    return any(step.index is not None for step in leaf.path)


@operator("third", "places", LAST, weight=1.0)
def numbered_stages(side: Side, rng: random.Random) -> bool:
    """A list becomes stages of uneven length: ``blocks.0 .. 3`` to ``layer1.0``, ``layer2.0``, ``layer2.1``..."""
    lists = [(key, many) for key, many in lists_of(side).items() if many > 1]
    if not lists:
        return False
    (above, role), many = rng.choice(lists)
    cuts = [0, *sorted(rng.sample(range(1, many), min(many - 1, rng.choice([1, 2])))), many]
    word, at = rng.choice(["layer", "stage", "level_", "block", "group"]), len(above)
    side.leaves = [
        leaf.moved((*above, _staged(word, cuts, step.index), *leaf.path[at + 1 :]))
        if len(leaf.path) > at
        and leaf.path[:at] == above
        and (step := leaf.path[at]).role == role
        and step.index is not None
        else leaf
        for leaf in side.leaves
    ]
    return True


def _staged(word: str, cuts: list[int], index: int) -> Step:
    stage = max(n for n, cut in enumerate(cuts) if cut <= index)
    return Step(f"={word}{stage + 1}.{index - cuts[stage]}")


@operator("third", "places", weight=1.5)
def halves_in_modules(side: Side, rng: random.Random) -> bool:
    """``attn.query`` becomes ``attn.self.query`` and ``attn.out`` ``attn.output.out``; of feed-forwards alike."""
    inner, outer = rng.choice(
        [("self", "output"), ("core", "projection"), ("inner", "outer"), ("intermediate", "output")]
    )
    chosen = rng.choice([("qkv", ("o",)), (("fc1", "gate", "up"), ("fc2", "down"))])
    levels = {role: Step(f"={word}") for roles, word in zip(chosen, (inner, outer)) for role in roles}
    before = list(side.leaves)
    side.leaves = [
        leaf.moved((*leaf.parent, levels[leaf.role], leaf.path[-1])) if leaf.role in levels else leaf
        for leaf in side.leaves
    ]
    return side.leaves != before


@operator("third", "places", weight=1.0)
def lists_in_a_container(side: Side, rng: random.Random) -> bool:
    """The lists at the top stand in a body of their own; what comes before and after them does not."""
    word = Step(rng.choice(["=transformer", "=encoder_body", "=trunk_net", "=core", "=main_stack"]))
    before = list(side.leaves)
    places = [n for n, leaf in enumerate(side.leaves) if leaf.path[0].index is not None]
    if not places or len(places) == len(side.leaves):
        return False
    between = range(places[0], places[-1] + 1)
    side.leaves = [leaf.moved((word, *leaf.path)) if n in between else leaf for n, leaf in enumerate(side.leaves)]
    return side.leaves != before


@operator("third", "places", weight=1.0)
def parts_in_a_dict(side: Side, rng: random.Random) -> bool:
    """All heads and branches stand in one container, as in a ``ModuleDict``."""
    word = Step(rng.choice(["=heads", "=branches", "=decoders", "=parts"]))
    chosen = [leaf for leaf in side.leaves if leaf.path[0].role in HEADS]
    if len({leaf.path[0] for leaf in chosen}) < 2:
        return False
    side.leaves = [leaf.moved((word, *leaf.path)) if leaf in chosen else leaf for leaf in side.leaves]
    return True


@operator("third", "places", LAST, weight=0.7)
def names_repeat_the_level(side: Side, rng: random.Random) -> bool:
    """``attention.query`` becomes ``attention.attention_query``, as scopes of variables do."""
    done = False
    for at, leaf in enumerate(side.leaves):
        if len(leaf.path) > 1 and leaf.path[-1].index is None and leaf.path[-2].index is None:
            above, below = (_word(side, step).replace(".", "_") for step in leaf.path[-2:])
            if above and below:
                side.leaves[at] = leaf.moved((*leaf.parent, Step(f"={above}_{below}")))
                done = True
    return done


# Names --------------------------------------------------------------------------------------------------------------

LONG = {
    "attn": "attention", "att": "attention", "mha": "multi_head_attention", "proj": "projection", "emb": "embedding",
    "embed": "embedding", "enc": "encoder", "dec": "decoder", "conv": "convolution", "fc": "fully_connected",
    "ln": "layer_norm", "bn": "batch_norm", "ff": "feed_forward", "ffn": "feed_forward_network", "pos": "position",
    "lin": "linear", "q": "query", "k": "key", "v": "value", "o": "output", "norm": "normalization",
    "mlp": "multilayer_perceptron", "out": "output", "in": "input", "dw": "depthwise", "pw": "pointwise",
    "cls": "classification", "reg": "regression", "seg": "segmentation", "rel": "relative", "se": "squeeze_excite",
    "adv": "advantage", "val": "value", "msa": "multiple_alignment", "tri": "triangle", "grn": "gated_residual_network",
}  # fmt: skip
BRITISH = {
    "normalization": "normalisation", "normalize": "normalise", "norm": "normalise", "center": "centre",
    "color": "colour", "neighbor": "neighbour", "quantizer": "quantiser", "tokenizer": "tokeniser",
    "regularizer": "regulariser", "gray": "grey", "analyzer": "analyser", "initializer": "initialiser",
    "summarizer": "summariser", "layer": "layer_normaliser", "program": "programme", "fiber": "fibre",
}  # fmt: skip
ORDINAL = ("zeroth", "first", "second", "third", "fourth", "fifth", "sixth")


def _translated(table: dict[str, str]) -> Callable[[str], str]:
    """Every word of a name that is in the table; a letter that is a level of its own stays."""

    def level(part: str) -> str:
        return re.sub(r"[A-Za-z]+", lambda m: table.get(m.group(), m.group()), part.replace("_", "~")).replace("~", "_")

    return lambda word: ".".join(level(part) if len(part) > 1 or part == word else part for part in word.split("."))


def _singular(word: str) -> str:
    parts = []
    for part in word.split("."):
        plural = part.endswith("s") and not part.endswith("ss") and len(part) > 3
        singular = part.isalpha() and len(part) > 2 and not part.endswith("s")
        parts.append(part[:-1] if plural else f"{part}s" if singular else part)
    return ".".join(parts)


def _pascal(word: str) -> str:
    return ".".join("".join(w[:1].upper() + w[1:] for w in part.split("_")) for part in word.split("."))


def _ordinal(word: str) -> str:
    def spelled(match: re.Match[str]) -> str:
        return f"{ORDINAL[int(match.group(2))]}_{match.group(1)}"

    return ".".join(re.sub(r"^([A-Za-z_]*[A-Za-z])_?([0-6])$", spelled, part) for part in word.split("."))


def _reversed_words(word: str) -> str:
    return ".".join("_".join(reversed(part.split("_"))) if "_" in part.strip("_") else part for part in word.split("."))


operator("third", "names", name="spelled_out")(_reworded(_translated(LONG), 0.9))
operator("third", "names", weight=0.8, name="british_spelling")(
    _reworded(_translated({word: other for word, other in BRITISH.items() if word != "layer"}))
)
operator("third", "names", name="plural_and_singular")(_reworded(_singular, 0.7))
operator("third", "names", name="pascal_case")(_reworded(_pascal))
operator("third", "names", name="ordinal_words")(_reworded(_ordinal))
operator("third", "names", name="words_turned_round")(_reworded(_reversed_words, 0.8))
operator("third", "names", weight=0.7, name="private_names")(_reworded(lambda w: f"_{w}", 0.6))
operator("third", "names", weight=0.7, name="versioned_names")(
    _reworded(lambda w: w if w.rpartition(".")[2].isdigit() else f"{w}_v2", 0.5)
)
operator("third", "names", name="no_underscores")(_reworded(lambda w: w.replace("_", ""), 0.8))


@operator("third", "names", weight=1.0)
def norms_named_after_parts(side: Side, rng: random.Random) -> bool:
    """``norm1`` and ``norm2`` are called after what they stand before, or after what they stand behind."""
    style = rng.choice(["{}_norm", "pre_{}_norm", "norm_{}", "{}_layer_norm", "ln_{}", "before_{}"])
    after = rng.choice(["post_{}_norm", "{}_out_norm", "norm_after_{}"]) if rng.random() < 0.4 else ""
    done = False
    for leaf, left, right in zip(side.leaves[1:], side.leaves, side.leaves[2:]):
        if leaf.kind not in NORMS or not numbered(leaf) or leaf.path[-1].index is not None:
            continue
        neighbour, pattern = (left, after) if after else (right, style)
        depth = len(leaf.path) - 1
        if neighbour.path[:depth] == leaf.parent and len(neighbour.path) > depth + 1 and not leaf.role.startswith("="):
            word = _word(side, neighbour.path[depth]).replace(".", "_")
            if word:
                side.words[leaf.role] = pattern.format(word)
                done = True
    return done


@operator("third", "names", weight=1.0)
def norms_counted(side: Side, rng: random.Random) -> bool:
    """The norms of a block are counted in the order in which they stand: ``norm_0``, ``norm_1``."""
    word, first = rng.choice(["norm_", "ln", "layer_norm_", "n"]), rng.choice([0, 1])
    places: dict[Path, list[Step]] = {}
    for leaf in side.leaves:
        if leaf.kind in NORMS and numbered(leaf) and leaf.path[-1].index is None:
            places.setdefault(leaf.parent, []).append(leaf.path[-1])
    side.leaves = [
        leaf.moved((*leaf.parent, Step(f"={word}{first + places[leaf.parent].index(leaf.path[-1])}")))
        if leaf.kind in NORMS and leaf.path[-1] in places.get(leaf.parent, ())
        else leaf
        for leaf in side.leaves
    ]
    return bool(places)


@operator("third", "names", weight=1.5)
def sequences_with_gaps(side: Side, rng: random.Random) -> bool:
    """Members of some modules are called by their place, and what holds no weights takes places too: 0, 3, 6."""
    gap = rng.choice([1, 2, 2])
    members: dict[Path, list[Leaf]] = {}
    for leaf in sorted(side.leaves, key=lambda leaf: leaf.when):
        members.setdefault(leaf.parent, []).append(leaf)
    roles = sorted({above[-1].role for above, leaves in members.items() if above and len(leaves) > 1})
    if not roles:
        return False
    chosen = rng.choice(roles)
    named: dict[str, int] = {}
    for above, leaves in members.items():
        direct = sum(leaf.path[: len(above)] == above for leaf in side.leaves)
        if (
            not above
            or above[-1].role != chosen
            or direct > len(leaves)
            or any(x.path[-1].index is not None for x in leaves)
        ):
            continue
        place = 0
        for number, leaf in enumerate(leaves):
            named[repr(leaf.path)] = place
            norm_next = number + 1 < len(leaves) and leaves[number + 1].kind in NORMS
            place += 1 if norm_next else 1 + gap
    side.leaves = [
        leaf.moved((*leaf.parent, Step(f"={named[repr(leaf.path)]}"))) if repr(leaf.path) in named else leaf
        for leaf in side.leaves
    ]
    return bool(named)


@operator("third", "names", LAST, weight=0.5)
def counted_by_kind(side: Side, rng: random.Random) -> bool:
    """Every layer is called after its kind and counted through the model: ``dense_4``, ``batch_normalization_2``."""
    kinds = {
        "linear": "dense", "conv2d": "conv2d", "conv1d": "conv1d", "norm": "layer_normalization",
        "batch_norm": "batch_normalization", "embedding": "embedding", "conv3d": "conv3d", "lstm": "lstm",
        "depthwise": "depthwise_conv2d", "group_norm": "group_normalization",
    }  # fmt: skip
    counts: Counter[str] = Counter()
    for at, leaf in enumerate(side.leaves):
        if leaf.kind in kinds and not leaf.layout.startswith(("bare", "rows")) and leaf.path[-1].index is None:
            word = kinds[leaf.kind]
            number = f"_{counts[word]}" if counts[word] else ""
            counts[word] += 1
            side.leaves[at] = leaf.moved((*leaf.parent, Step(f"={word}{number}")))
    return bool(counts)


operator("third", "names", weight=1.0, name="padded_numbers")(
    _numbered(lambda n, rng: replace(n, joint=rng.choice(["_", ""]), digits=2), every=True)
)
operator("third", "names", LAST, weight=0.7, name="letters_for_numbers")(
    _numbered(lambda n, rng: replace(n, joint="_", letters=True))
)
operator("third", "names", LAST, weight=0.7, name="count_by_tens")(
    _numbered(lambda n, rng: replace(n, first=10, stride=10))
)


# Order --------------------------------------------------------------------------------------------------------------


def _put(chosen: Callable[[Path, Step, list[Step]], bool], first: bool) -> Callable[[Side, random.Random], bool]:
    """Some members of every module are registered before or after all others; ``chosen`` sees path, step, siblings."""

    def apply(side: Side, rng: random.Random) -> bool:
        return registered(
            side, lambda above, steps: sorted(steps, key=lambda step: chosen(above, step, steps) != first)
        )

    return apply


def _is_norm_word(above: Path, step: Step, steps: list[Step]) -> bool:
    return bool(above) and ("norm" in step.role or "bn" in step.role)


def _second_half(above: Path, step: Step, steps: list[Step]) -> bool:
    return not above and steps.index(step) >= (len(steps) + 1) // 2


operator("third", "order", UNORDERED, weight=1.5, name="norms_registered_last")(_put(_is_norm_word, False))
operator("third", "order", UNORDERED, weight=1.0, name="norms_registered_first")(_put(_is_norm_word, True))
operator("third", "order", UNORDERED, weight=1.5, name="decoder_registered_first")(_put(_second_half, True))
operator("third", "order", UNORDERED, weight=1.5, name="inputs_registered_last")(
    _put(lambda above, step, steps: not above and step == steps[0], False)
)
operator("third", "order", UNORDERED, weight=1.0, name="output_map_registered_first")(
    _put(lambda above, step, steps: step.role in ("o", "fc2", "down", *HEADS), True)
)
operator("third", "order", UNORDERED, weight=1.0, name="attention_after_feed_forward")(
    _put(lambda above, step, steps: step.role in ("attn", "self", "mha", "over_time", "attend"), False)
)


def _by_name(side: Side) -> Callable[[Step], str]:
    return lambda step: _word(side, step)


@operator("third", "order", UNORDERED, weight=1.0)
def registered_by_alphabet(side: Side, rng: random.Random) -> bool:
    """Members are registered in the order of their names, as code that is kept sorted does."""
    word = _by_name(side)
    return _shuffled(lambda above: True, lambda steps, _: sorted(steps, key=lambda s: (word(s), s.index or 0)))(
        side, rng
    )
