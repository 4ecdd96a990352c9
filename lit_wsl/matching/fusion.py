"""Units that are one tensor on one side and several on the other: q, k, v <-> qkv; gate, up <-> gate_up.

Shapes tell that parts can make a whole, but not in which order: names tell that, as far as they do. Of several
sets of parts the one is taken whose order is known best and that stands where the whole stands. Where nothing tells,
the parts stay ambiguous.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

from lit_wsl.matching.formula import Letters, spelled
from lit_wsl.matching.likeness import GENERAL
from lit_wsl.matching.regions import FEED, Region
from lit_wsl.matching.replaced import are_called_one, mean_otherwise
from lit_wsl.matching.shapes import join_axis, transpose_shape, transposed
from lit_wsl.matching.tree import (
    Family,
    Item,
    TreeBuilder,
    families_of,
    kind_of,
    of_size,
    owner_path,
    relative,
    role_of,
    uniform,
)
from lit_wsl.matching.words import (
    ABBREVIATION,
    best_pairs_similarity,
    path_tokens,
    plain_words,
    token_similarity,
)
from lit_wsl.plan.operations import Concat, Operation, Split, Stack
from lit_wsl.structure.description import Shape

GATE = "gate"  # stands before up, and its matrix is numbered first (Shazeer, GLU Variants Improve Transformer, 2020)
WHOLES_OF_LETTERS = ("qkv", "kqv", "kv", "vk", "qk")
SPELLED, FORMULA, NUMBERED, UNKNOWN = 1.0, 0.9, 0.7, 0.0


@dataclass(frozen=True)
class PartOrder:
    """An order of parts, and what it rests on."""

    order: tuple[int, ...]  # indices of the parts, in the order in which they stand in the whole
    strength: float  # how strong the evidence is: ``SPELLED``, ``FORMULA``, ``NUMBERED`` or ``UNKNOWN``
    reason: str  # the evidence in words
    unsaid: int = 0  # how many words of the parts a name that spells them does without

    @property
    def known(self) -> bool:
        """Whether anything tells the order."""
        return self.strength != UNKNOWN


def order_of_parts(whole: str, parts: Sequence[str]) -> PartOrder:
    """The order of parts by the strongest evidence there is.

    >>> order_of_parts("attn.qkv.weight", ["attn.v.weight", "attn.q.weight", "attn.k.weight"]).order
    (1, 2, 0)
    >>> order_of_parts("attn.to_qkv.weight", ["attn.to_kv.weight", "attn.wq.weight"]).order
    (1, 0)
    >>> order_of_parts("mlp.in_proj.weight", ["mlp.left.weight", "mlp.right.weight"]).known
    False
    """
    labels = _labels(parts)
    unknown = PartOrder(tuple(range(len(parts))), UNKNOWN, "the order of the parts is unknown")
    found = _spelled(whole, labels, parts) or _by_letters(whole, parts)
    return found or _by_formula(whole, labels) or _by_number(whole, labels) or unknown


def _unsaid(whole: str, parts: Sequence[str]) -> int:
    """How many words that all parts are called by the whole's name does without."""
    shared = set.intersection(*({*plain_words(owner_path(part).rpartition(".")[2])} for part in parts)) - GENERAL
    said = path_tokens(owner_path(whole))
    return sum(all(token_similarity(word, token) < ABBREVIATION for token in said) for word in shared)


def _labels(parts: Sequence[str]) -> list[str]:
    """What tells the parts apart: their paths without common beginning and end, e.g. ``q``, ``k``, ``v``."""
    paths = [owner_path(part) for part in parts]
    head, tail = _shared_letters(paths), _shared_letters([p[::-1] for p in paths])
    labels = [p[head : len(p) - tail] for p in paths]
    if any(not label for label in labels):  # one label begins like another: keep what they share
        cut = max((p[:head].rfind(c) for p in paths for c in "._"), default=-1) + 1
        labels = [p[cut : len(p) - tail] or p[cut:] for p in paths]
    return [label.strip("._").lower() or path.lower() or "_" for label, path in zip(labels, paths)]


def _shared_letters(words: Sequence[str]) -> int:
    """Length of the common beginning."""
    return next((k for k, letters in enumerate(zip(*words)) if len(set(letters)) > 1), min(map(len, words)))


def _spelled(name: str, labels: Sequence[str], parts: Sequence[str]) -> PartOrder | None:
    """The order in which a name spells its parts: by initials in one word, by numbers, or by words."""
    *_, above, own = ("", "", *owner_path(name).split("."))
    tokens = (*plain_words(above), *path_tokens(own))
    reason = "the name spells the order of the parts"
    initials = [label[0] for label in labels]
    for order in permutations(range(len(labels))):
        if len(set(initials)) == len(initials) and any(
            tok.endswith("".join(initials[i] for i in order)) and len(tok) <= len(labels) + 1 and tok not in GENERAL
            for tok in tokens
        ):
            return PartOrder(order, SPELLED, reason)
        if all(label.isdigit() for label in labels) and "".join(labels[i] for i in order) in path_tokens(own):
            return PartOrder(order, SPELLED, reason)
    if any(label.isdigit() for label in labels):
        return None  # a number on both sides says nothing
    known = [set(path_tokens(label)) for label in labels]
    places, unsaid = [], 0
    for words in known:
        telling = {w for w in words if sum(w in others for others in known) == 1}
        telling = telling - GENERAL or telling
        said = {w: [k for k, tok in enumerate(tokens) if token_similarity(w, tok) >= ABBREVIATION] for w in telling}
        places.append(max((k for hits in said.values() for k in hits), default=-1))
        unsaid += sum(not hits for hits in said.values())
    if min(places) < 0 or len(set(places)) < len(places):
        return None
    return PartOrder(_sorted_by(places), SPELLED, reason, unsaid + _unsaid(name, parts))


def _by_letters(whole: str, parts: Sequence[str]) -> PartOrder | None:
    """The order in which a word spells letters of which some parts hold more than one: ``wq, to_kv`` of ``to_qkv``."""
    names = [owner_path(path).rpartition(".")[2] for path in (whole, *parts)]
    word, *pieces = (next((w for w in path_tokens(name) if w in WHOLES_OF_LETTERS), "") for name in names)
    pieces = [piece or "".join(spelled(plain_words(name))) for piece, name in zip(pieces, names[1:])]
    places = [word.find(piece) if piece else -1 for piece in pieces]
    if not word or min(places) < 0 or sum(map(len, pieces)) != len(word) or len(set(places)) < len(places):
        return None
    return PartOrder(_sorted_by(places), SPELLED, "the name spells the order of the parts")


def _by_formula(whole: str, labels: Sequence[str]) -> PartOrder | None:
    """Attention(Q, K, V): queries before keys before values."""
    own = path_tokens(owner_path(whole).rpartition(".")[2])
    if any(token_similarity(word, part) >= ABBREVIATION for word in own for part in ("query", "key", "value")):
        return None  # it is one of the three
    initials = [label[:1] for label in labels]
    if sorted(initials) not in (["k", "q", "v"], ["k", "v"], ["k", "q"]):
        return None
    reason = "queries, keys, values stand in the order of the formula"
    return PartOrder(_sorted_by(["qkv".index(initial) for initial in initials]), FORMULA, reason)


def _by_number(whole: str, labels: Sequence[str]) -> PartOrder | None:
    """Parts that are called alike but for a number, where the number is part of a word (``w1``, ``wi_0``)."""
    if not all(label.isdigit() for label in labels) or len(set(labels)) < len(labels):
        return None
    own = path_tokens(owner_path(whole).rpartition(".")[2])
    telling = [word for word in own if len(word) > 1 and word not in GENERAL]
    if (len(telling) > 1 and telling[0] != GATE) or any(set(word) <= set("qkv") for word in telling):
        return None  # it spells other parts, and nothing tells which number is which
    return PartOrder(_sorted_by([int(label) for label in labels]), NUMBERED, "the parts are numbered")


def _sorted_by(places: Sequence[int]) -> tuple[int, ...]:
    """Indices in the order of their places."""
    return tuple(sorted(range(len(places)), key=lambda i: places[i]))


MAX_PARTS = 4


MAX_SIBLINGS = 8
MAX_ORDERS = 24


@dataclass(frozen=True)
class Step:
    """Operations from source ordinals to target ordinals."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Fusion:
    """One whole and its parts: what has to be done and by which evidence, or what stays open.

    ``open`` holds for each tensor the steps that each set and order of parts would need; there are no steps then.
    """

    items: tuple[Item, ...]
    steps: tuple[Step, ...]
    cell: str
    whole_is_target: bool = True
    open: tuple[tuple[Step, ...], ...] = ()
    reason: str = ""

    @property
    def settled(self) -> tuple[set[int], set[int]]:
        """Source and target ordinals that the fusion matches, or leaves in doubt."""
        steps = [*self.steps, *(step for steps in self.open for step in steps)]
        return {p for step in steps for p in step.sources}, {p for step in steps for p in step.targets}


@dataclass(frozen=True)
class _Choice:
    """Parts in the order in which they stand in the whole, what that rests on, and what speaks for this choice."""

    parts: tuple[Family, ...]
    order: PartOrder
    near: float

    @property
    def key(self) -> tuple[float, float, float]:
        """What names tell: how the order is known and how much of it is said, then how alike the surroundings are."""
        return self.order.strength, -self.order.unsaid, self.near


def find_fusions(sources: Sequence[Item], targets: Sequence[Item], region: Region, turned: bool) -> list[Fusion]:
    """Find wholes on one side whose parts are on the other."""
    found: list[Fusion] = []
    gone: set[int] = set()
    idle = True
    for settled in (True, False):  # what stays open takes nothing away from what is known
        for whole_is_target in (True, False):
            for fusion in _fusions(sources, targets, region, whole_is_target, turned, gone):
                idle = False
                if bool(fusion.steps) == settled and not any(id(i) in gone for i in fusion.items):
                    found.append(fusion)
                    gone.update(id(i) for i in fusion.items)
        if idle:
            break
    return found


def _fusions(
    sources: Sequence[Item],
    targets: Sequence[Item],
    region: Region,
    whole_is_target: bool,
    turned: bool,
    gone: Container[int],
) -> Iterator[Fusion]:
    """Wholes of one side whose parts are on the other, the largest first; ``gone`` is taken."""
    wholes, parts = (targets, sources) if whole_is_target else (sources, targets)
    root_w, root_p = (region.target, region.source) if whole_is_target else (region.source, region.target)
    wholes = [i for i in wholes if id(i) not in gone and i.rank >= 2]
    other_profiles = {i.profile_key for i in parts}
    judged = []
    for whole in uniform(families_of(wholes, root_w)):
        free = [i for i in parts if id(i) not in gone and i.rank >= 2]
        choices = _choices(whole, free, root_p, region.letters[int(not whole_is_target)])
        choices = [c for c in choices if _same_letters(whole, c.parts, region, whole_is_target)]
        if choices:
            judged.append((whole, choices))
    for whole, choices in sorted(judged, key=lambda w: (-w[0].members[0].numel, w[0].start)):
        choices = [c for c in choices if not any(id(m) in gone for p in c.parts for m in p.members)]
        if not choices:
            continue
        best = choices[0]
        if whole.members[0].profile_key in other_profiles and best.order.strength != SPELLED:
            continue  # something else has the size of the whole, so only its name can make it one
        if not region.complete and best.order.strength == NUMBERED:
            continue
        told = region.letters_of(whole.members[0], int(whole_is_target))  # the letters of an attention
        others = not told and _stand_in_others(whole, best.parts, root_w, root_p)
        cell = "" if others else _cell(whole, best, choices, judged)
        for k, member in enumerate(whole.members):
            fusion = _build(member, k, choices, whole_is_target, cell, turned)
            if fusion is not None:
                yield fusion


def _same_letters(whole: Family, parts: Sequence[Family], region: Region, whole_is_target: bool) -> bool:
    """Whether parts are called after the same of an attention as their whole, as far as either name says it."""
    ours = region.letters_of(whole.members[0], int(whole_is_target))
    theirs = frozenset[str]().union(*(region.letters_of(p.members[0], int(not whole_is_target)) for p in parts))
    if theirs and region.part_of(whole.members[0], int(whole_is_target)) == FEED:
        return False
    return ours == theirs or (not theirs if ours else "o" not in theirs)


def _stand_in_others(whole: Family, parts: Sequence[Family], root_w: Item, root_p: Item) -> bool:
    """Whether what the parts stand in is called after something else than what the whole stands in."""
    places = [_ancestor(relative(f.members[0].main, root), 1) for f, root in ((whole, root_w), (parts[0], root_p))]
    names = [tuple(plain_words(place)) for place in places]
    return mean_otherwise(*names) and not are_called_one(*names)


def _cell(
    whole: Family,
    best: _Choice,
    choices: Sequence[_Choice],
    judged: Sequence[tuple[Family, list[_Choice]]],
) -> str:
    """The evidence for a choice; empty where several fit as well, or the order of the parts is unknown."""
    if not best.order.known:
        return ""
    name = {SPELLED: "spelled", FORMULA: "formula", NUMBERED: "numbered"}[best.order.strength]
    mine = {id(p.members[0]) for p in best.parts}
    rivals = [c.key for c in choices[1:]]
    for other, theirs in judged:  # another whole that could be made of the same parts
        if other is not whole:
            rivals += [c.key for c in theirs if mine & {id(p.members[0]) for p in c.parts}]
    return f"parts {name}" if all(best.key > key for key in rivals) else ""


def _choices(whole: Family, parts: list[Item], root: Item, letters: Letters) -> list[_Choice]:
    """The sets of parts that a whole could be made of, each in its order; the best first."""
    kind = kind_of(whole.members[0].main.path)
    parts = [p for p in parts if {kind, kind_of(p.main.path)} != {"scale", "shift"}]
    families = of_size(uniform(families_of(parts, root)), len(whole.members))
    sets = {frozenset(id(p) for p in subset): subset for subset in _sets_of_parts(whole, families)}
    choices = [_judge(whole, subset, root, letters) for subset in sets.values()]
    return sorted(choices, key=lambda c: (*(-x for x in c.key), [p.start for p in c.parts]))


def _sets_of_parts(whole: Family, families: Sequence[Family]) -> Iterator[tuple[Family, ...]]:
    """Sets of siblings (then of cousins) whose shapes make up the whole's; some come twice."""
    shape = whole.members[0].main.shape
    for up in (1, 2):
        groups: dict[tuple[str, int], list[Family]] = {}
        for family in families:
            path = owner_path(family.members[0].path)
            groups.setdefault((_ancestor(path, up), path.count(".")), []).append(family)
        for siblings in groups.values():
            if len(siblings) > MAX_SIBLINGS:
                continue
            for n in range(2, min(MAX_PARTS, len(siblings)) + 1):
                for subset in combinations(siblings, n):
                    if join_axis(shape, [p.members[0].main.shape for p in subset]) is not None:
                        yield subset


def spell_otherwise(s: Item, t: Item) -> bool:
    """Whether the names of two units spell the same parts in another order: ``qkv`` and ``kqv``."""
    spelled = [
        {word for word in path_tokens(owner_path(i.main.path)) if len(word) > 1 and set(word) <= set("qkv")}
        for i in (s, t)
    ]
    return any(sorted(a) == sorted(b) for a in spelled[0] for b in spelled[1]) and not spelled[0] & spelled[1]


def _ancestor(path: str, up: int) -> str:
    path = owner_path(path)
    for _ in range(up):
        path = path.rpartition(".")[0]
    return path


def _judge(
    whole: Family,
    parts: tuple[Family, ...],
    root: Item,
    letters: Letters,
) -> _Choice:
    """Put parts in the order in which they stand in the whole, and score the evidence for it."""
    name = whole.members[0].path
    order = order_of_parts(name, [p.members[0].path for p in parts])
    if order.strength == NUMBERED and _siblings(parts[0].members[0], root) > len(parts):
        order = PartOrder(order.order, UNKNOWN, "numbers alone don't tell which of the siblings are the parts")
    around_w, around_p = (plain_words(_ancestor(path, 1)) for path in (name, parts[0].members[0].path))
    near = best_pairs_similarity(around_w[-2:], around_p[-2:])
    if order.strength == FORMULA and not all(letters.get(relative(p.members[0].main, root)) for p in parts):
        order = PartOrder(order.order, UNKNOWN, "queries and keys of several modules make up no whole")
    if order.strength == NUMBERED and not near:
        order = PartOrder(order.order, UNKNOWN, "numbers alone don't tell that these are the parts")
    return _Choice(tuple(parts[i] for i in order.order), order, near)


def _siblings(part: Item, root: Item) -> int:
    """How many units of a part's shape stand beside it, itself included, decided or not."""
    home = _ancestor(part.path, 1)
    return sum(u.main.shape == part.main.shape and _ancestor(u.path, 1) == home for u in root.units)


def _build(
    whole: Item, k: int, choices: Sequence[_Choice], whole_is_target: bool, cell: str, turned: bool
) -> Fusion | None:
    """The steps for one whole: its weight, its bias and whatever else both sides have."""
    parts = [p.members[k] for p in choices[0].parts]
    if cell:
        steps = tuple(s for s in _steps(whole, parts, whole_is_target, turned) if s is not None)
        return Fusion((whole, *parts), steps, cell, whole_is_target) if steps else None
    known = choices[0].order.known
    orders = [[p.members[k] for p in c.parts] for c in choices if c.order.known == known][:MAX_ORDERS]
    if not known:  # and what else may be the parts is no more certain to be something else
        sets = [[p.members[k] for p in c.parts] for c in choices if c.key == choices[0].key]
        orders = [list(order) for parts in sets for order in permutations(parts)][:MAX_ORDERS]
    rows: dict[tuple[str, tuple[int, ...]], list[Step]] = {}
    for order in orders:
        for step in _steps(whole, order, whole_is_target, turned):
            if step is not None:
                row = rows.setdefault((whole.path, step.targets), [])
                row.append(step)
    why = "several sets of parts fit as well" if known else choices[0].order.reason
    items = tuple({id(i): i for i in (whole, *(m for order in orders for m in order))}.values())
    return Fusion(items, (), "", whole_is_target, tuple(tuple(row) for row in rows.values()), why) if rows else None


def _steps(whole: Item, parts: Sequence[Item], whole_is_target: bool, turned: bool) -> Iterator[Step | None]:
    for tensor in whole.tensors:
        members = [_same_role(tensor, whole, p) for p in parts]
        if all(m is not None for m in members):
            yield _join(tensor, [m for m in members if m is not None], whole_is_target, turned)


def _same_role(tensor: Item, whole: Item, part: Item) -> Item | None:
    if tensor is whole.main:
        return part.main
    return next((t for t in part.tensors if t is not part.main and role_of(t.path) == role_of(tensor.path)), None)


def _join(whole: Item, parts: list[Item], whole_is_target: bool, turned: bool) -> Step | None:
    found = join_axis(whole.shape, [p.shape for p in parts])
    if found is None:
        return None
    axis, turn = found
    square = len(whole.shape) == 2 and all(p.shape[0] == p.shape[1] for p in parts)
    if square and turned and not turn:
        turn = True  # square parts fit both ways; the rest of the model says which
    elif square and turn and not turned:
        return None
    turning = transposed(whole.shape) if turn else ()
    sizes = tuple(transpose_shape(p.shape)[axis] if turn else p.shape[axis] for p in parts)
    places = tuple(pos for p in parts for pos in p.positions)
    part = parts[0]  # what makes it, if it is virtual, is the same for all parts: they are siblings
    if whole_is_target:
        return Step(places, whole.positions, (*part.operations, *turning, Concat(axis, sizes), *whole.undoing))
    return Step(whole.positions, places, (*whole.operations, Split(axis, sizes), *turning, *part.undoing))


def fold_run(items: Sequence[Item], waiting: Sequence[Item], builder: TreeBuilder) -> list[Item] | None:
    """Stack repeated siblings into virtual tensors where the other side holds such stacks.

    Returns:
        One module of virtual tensors per run of siblings, or ``None`` if the other side holds no stack of them.
    """
    stacks = {t.shape for i in waiting for t in i.tensors if len(t.shape) >= 2}
    if not stacks or len({i.structure for i in items}) != 1:
        return None
    shapes = {t.shape for t in items[0].tensors}
    out: list[Item] = []
    for family in families_of(items, items[0]):
        axis = next((a for a in reversed(family.axes()) if _is_stacked(len(family.split(a)), shapes, stacks)), None)
        if axis is None:
            return None
        count = len(family.split(axis))
        runs: dict[tuple[int, ...], list[Item]] = {}
        for member, numbers in zip(family.members, family.numbers):
            runs.setdefault((*numbers[:axis], *numbers[axis + 1 :]), []).append(member)
        if any(len(run) != count for run in runs.values()):
            return None
        out += [_stack(run, builder) for run in runs.values()]
    return out


def _is_stacked(count: int, shapes: set[Shape], stacks: set[Shape]) -> bool:
    return any(s[0] == count and any(sorted(s[1:]) == sorted(shape) for shape in shapes) for s in stacks)


def _stack(run: list[Item], builder: TreeBuilder) -> Item:
    count = len(run)
    parent = run[0].path.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    children = []
    for k, tensor in enumerate(run[0].tensors):
        positions = tuple(p for member in run for p in member.tensors[k].positions)
        path = prefix + relative(tensor, run[0])
        children.append(builder.tensor(path, (count, *tensor.shape), positions, (*tensor.operations, Stack(0, count))))
    return children[0] if len(children) == 1 else builder.group(parent, children, 2)
