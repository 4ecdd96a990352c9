"""Layouts that names and shapes can't show: rows of queries and keys, flattened patches, squares that may be turned.

Two implementations of one network may agree on every tensor and every shape, and still not on what a row means. Three
such conventions are common, and a file that follows the other one loads without a complaint and computes something
else:

* *Rotary embeddings* turn pairs of rows of each head of q and k. A pair is two neighbours (RoFormer, the first Llama
  release) or two halves of the head (GPT-NeoX, most libraries).
* *Fused projections* hold q, k and v one after the other, or head by head (Megatron and its descendants).
* *Patches* that a linear layer takes in are flattened as ``(c, p, p)`` or as ``(p, p, c)``.

A transformer that has a table of positions, or convolutions between its tokens, does not rotate, and fuses its
projections one after the other; so, as a rule, does one that is no language model and has norms of the older kind. A
pure renaming keeps every convention. For the rest only the function can tell (:mod:`lit_wsl.matching.proof`), so
without it such tensors are ambiguous.

Whether a linear map is stored as (out, in) or as (in, out) is a question of its own, beside which tensor is its
partner. Matrices that are not square show it; a square one is stored like those beside it, in the module that it stands
in, or like those of its class, where the classes of both sides are known. Where neither shows it and something says
that the make changed (a bare parameter became a module's weight, heads were stored apart, something else is
transposed), it is open.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property, lru_cache

from lit_wsl.matching.formula import is_query_or_key
from lit_wsl.matching.shapes import is_turn, transposed
from lit_wsl.matching.tree import owner_path
from lit_wsl.matching.words import split_numbers
from lit_wsl.plan.entries import Ambiguity, Candidate, PlanEntry
from lit_wsl.plan.operations import Concat, Operation, Reshape, Split
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, ParameterGroup, ParameterInfo, Shape, core, tokenize

LEAST_POSITIONS = 4  # rows of a table of positions; token types and the like have fewer
HEADS = 4  # a head is at least so wide
KINSHIP = 2 / 3  # share of module names that both sides have in common, from which they are one code base
_REMEDY = "source_module= and a sample let the function decide; assume_layouts=True if you know that both sides agree"
ROWS = f"the rows of q and k may stand in rotary pairs or halves, which names and shapes don't show: {_REMEDY}"
FUSED = f"q, k and v may follow one another or alternate head by head, which names and shapes don't show: {_REMEDY}"
PATCHES = f"patches may be flattened as (c, p, p) or (p, p, c), which names and shapes don't show: {_REMEDY}"


def hidden_layouts(plan: TransferPlan, source: ModelDescription, target: ModelDescription) -> dict[str, str]:
    """Entries that are right only under a convention that nothing shows.

    Returns:
        First target of each such entry -> the reason, in the plan's order.
    """
    found = {e.targets[0]: PATCHES for e in plan if _cuts_patches(e, source, target)}
    if _only_renamed(plan, source) or _kinship(plan) >= KINSHIP:
        return found
    inputs = _Inputs(source, target)
    towers: dict[str, bool] = {}
    reasons: dict[tuple[tuple[str, ...], ...], str] = {}
    for entry in plan:
        if entry.kind != "parameter":
            continue
        family = tuple(split_numbers(name)[0] for name in (*entry.targets, *entry.sources))
        if family not in reasons:
            reasons[family] = _attention(entry)
        reason = reasons[family]
        if reason:
            tower = inputs.tower(entry.targets[0])
            if tower not in towers:
                towers[tower] = inputs.may_rotate(tower)
            if towers[tower]:
                found[entry.targets[0]] = reason
    return {e.targets[0]: found[e.targets[0]] for e in plan if e.targets[0] in found}


def leave_open(plan: TransferPlan, reasons: Mapping[str, str]) -> TransferPlan:
    """Turn entries into ambiguities.

    Returns:
        The plan without the entries, their targets listed as ambiguous, with the entry as the only candidate.
    """
    if not reasons:
        return plan
    doubts = tuple(
        Ambiguity(e.targets, (Candidate(e.sources, e.score, e.operations),), e.target_shapes[0], reasons[e.targets[0]])
        for e in plan
        if e.targets[0] in reasons
    )
    entries = tuple(e for e in plan if e.targets[0] not in reasons)
    return replace(plan, entries=entries, ambiguous=(*plan.ambiguous, *doubts))


def _only_renamed(plan: TransferPlan, source: ModelDescription) -> bool:
    """Whether every tensor stands where it stood and nothing is done to any: the same code under other names."""
    whole = [e for e in plan if e.kind == "parameter"]
    if any(op.name not in ("cast", "fan_out") for e in whole for op in e.operations):
        return False
    if plan.ambiguous or any(u.kind == "parameter" for u in (*plan.unmatched_target, *plan.unmatched_source)):
        return False
    places = [source[e.sources[0]].index for e in whole]
    return places == sorted(places)


def _kinship(plan: TransferPlan) -> float:
    """Share of the pairs of families whose modules are called alike."""
    first = {
        split_numbers(e.targets[0])[0]: e
        for e in plan
        if e.kind == "parameter" and len(e.sources) == len(e.targets) == 1
    }
    families = {name: (_words(e.sources[0]), _words(e.targets[0])) for name, e in first.items()}
    if not families:
        return 0.0
    always = [set.intersection(*(set(pair[side]) for pair in families.values())) for side in (0, 1)]
    bare = [tuple([w for w in pair[k] if w not in always[k]] for k in (0, 1)) for pair in families.values()]
    return sum(bool(s) and s == t for s, t in bare) / len(bare)


def _words(name: str) -> list[str]:
    return [word for word in tokenize(owner_path(name).rpartition(".")[2]) if not word.isdigit()]


def rotating_towers(source: ModelDescription, target: ModelDescription) -> Callable[[str], bool]:
    """Whether the tower around one of the model's tensors may take its positions from rotary embeddings."""
    inputs = _Inputs(source, target)
    return lambda name: inputs.may_rotate(inputs.tower(name))


class _Inputs:
    """What a model reads, and where: words that it looks up, or the patches of a picture."""

    def __init__(self, source: ModelDescription, target: ModelDescription) -> None:
        self.target = target
        sides = (source, target)
        vectors = {i.shape[0] for i in target.parameters if len(i.shape) == 1 and i.kind == "parameter"}
        tables = [i for i in target.parameters if _looked_up(i) and i.shape[1] in vectors]
        self.words = max((i.shape[0] for i in tables), default=0)
        words = Counter(t.shape for t in tables if t.shape[0] == self.words)
        self.speaks = any(_puts_out_words(side, *each) for each in words.items() for side in sides)
        convolutions = [i for i in target.parameters if _is_convolution(i)]
        self.pictures = _reading_input(convolutions, target)
        self._above = {""}
        for name in (*(i.name for i in tables), *self.pictures):
            while name := name.rpartition(".")[0]:
                self._above.add(name)

    def tower(self, name: str) -> str:
        """Path of the smallest module around a tensor that reads an input.

        A model of several towers may rotate in one and look positions up in another.
        """
        path = self.target[name].module_path.rpartition(".")[0]
        while path not in self._above:
            path = path.rpartition(".")[0]
        return path

    def may_rotate(self, path: str) -> bool:
        """Whether a tower has nowhere else to take positions from than its attention, and looks as if it did.

        Nowhere else: no table of positions, and no convolution between the tokens. Looks like it: it reads words and
        puts out words (a language model that knows no order is no use), or it has norms without a bias, which came
        with rotary embeddings.
        """
        groups = [g for g in self.target.groups if f"{g.module_path}.".startswith(f"{path}." if path else "")]
        inside = [i for g in groups for i in g.members]
        width = _residual_width(inside)
        pictures = any(i.name in self.pictures for i in inside)
        if any(_is_table(i, width, 0 if pictures else self.words) for i in inside):
            return False
        if any(_is_convolution(i) and max(i.shape[2:]) > 1 and i.name not in self.pictures for i in inside):
            return False
        return self.speaks or any(_is_plain_norm(g, width) for g in groups)


def _residual_width(infos: Sequence[ParameterInfo]) -> int:
    """The most frequent length of a vector: norms and biases of the residual stream."""
    lengths = Counter(i.shape[0] for i in infos if len(i.shape) == 1 and i.kind == "parameter")
    return max(lengths, key=lambda n: (lengths[n], -n), default=0)


def _puts_out_words(side: ModelDescription, vocabulary: Shape, tables: int) -> bool:
    """Whether a head of the vocabulary's shape stands beside its tables, outside of all blocks, or is tied to one."""
    alike = [i.name for i in side.parameters if i.shape == vocabulary and not any(c.isdigit() for c in i.name)]
    return len(alike) > tables or any(first in alike for first in side.tied.values())


def _is_plain_norm(group: ParameterGroup, width: int) -> bool:
    """Whether a module is a norm that scales and does not shift (RMSNorm)."""
    return [(i.leaf, i.shape) for i in group.parameters] == [("weight", (width,))]


def _looked_up(info: ParameterInfo) -> bool:
    return "Embed" in info.module_type and info.leaf == "weight" and len(info.shape) == 2


def _is_convolution(info: ParameterInfo) -> bool:
    return len(info.shape) >= 3 and "Conv" in info.module_type


def _is_table(info: ParameterInfo, width: int, words: int) -> bool:
    """Whether a tensor has a row for each position: of the residual stream's width, or a number for each head."""
    shape = core(info.shape)
    if len(shape) != 2 or not ("Embed" in info.module_type or info.leaf not in ("weight", "bias")):
        return False
    rows, columns = shape
    if columns == width:
        repeated = "Embed" not in info.module_type and any(c.isdigit() for c in info.module_path)  # a matrix in a block
        return rows >= LEAST_POSITIONS and rows not in (width, words) and not repeated
    return columns < rows != width and HEADS * columns <= width


def _attention(entry: PlanEntry) -> str:
    """What is not known of an entry for queries or keys: how they are fused, or how their rows stand."""
    parts = entry.sources if len(entry.sources) > 1 else entry.targets
    named = any(is_query_or_key(owner_path(n)) for n in (*entry.sources, *entry.targets))
    if len(parts) == 1:
        return ROWS if named else ""
    fused = any(isinstance(op, (Split, Concat)) for op in entry.operations)
    return FUSED if fused and (named or len(parts) == 3) else ""


def _cuts_patches(entry: PlanEntry, source: ModelDescription, target: ModelDescription) -> bool:
    """Whether a convolution that reads the input becomes a matrix, or a matrix becomes one."""
    if not entry.operations or not isinstance(entry.operations[0], Reshape):
        return False
    s, t = source[entry.sources[0]], target[entry.targets[0]]
    for kernel, flat, side in ((s, t, source), (t, s, target)):
        if len(kernel.shape) >= 4 and len(flat.shape) == 2 and kernel.shape[0] == flat.shape[0]:
            return kernel.shape[1] > 1 and max(kernel.shape[2:]) > 1 and bool(_reading_input([kernel], side))
    return False


def _reading_input(kernels: Sequence[ParameterInfo], side: ModelDescription) -> set[str]:
    """Names of the convolutions that take in channels which nothing in the model puts out.

    With one channel a convolution may be depthwise, so there only the very first counts.
    """
    puts_out = {i.shape[0] for i in side.parameters if i.kind == "parameter" and i.shape}
    first = next((i.name for i in side.parameters if len(i.shape) >= 3), "")
    return {k.name for k in kernels if k.shape[1] not in puts_out and (k.shape[1] > 1 or k.name == first)}


_TABLE = re.compile("embed|pos|token|table")
OPEN = "a square matrix, and nothing shows whether both sides store it the same way round"
LINEAR = ("Linear", "NonDynamicallyQuantizableLinear", "MultiheadAttention")  # of torch, stored (out, in)
BOTH_WAYS = "it would have to be turned, but a matrix beside it is stored the same way round on both sides"
HEADS_APART = (
    "the heads are stored apart on one side, so that nothing shows whether the matrix is stored the same way round"
)
OTHER_CONVOLUTION = "one is a transposed convolution, the other is not: no copy of the kernel computes the same"

Make = tuple[object, ...]
Infos = Sequence[ParameterInfo]
Matched = tuple[Sequence[ParameterInfo], Sequence[ParameterInfo], tuple[Operation, ...]]
Doubted = tuple[Sequence[ParameterInfo], Sequence[tuple[Sequence[ParameterInfo], tuple[Operation, ...]]]]


class Shown:
    """What the matrices of a pair of models show, by make; whether any was turned, and any kept as it was."""

    def __init__(self, matches: Sequence[Matched], doubts: Sequence[Doubted], tensors: tuple[Infos, Infos]) -> None:
        self.makes: dict[Make, set[bool | None]] = defaultdict(set)
        self.turned = self.kept = False
        known: set[object] = set()
        for sources, targets, operations in matches:
            if len(sources) == len(targets) == 1 or _is_stack(sources, targets):
                traits = (len(sources), len(targets), *_traits(sources[0]), *_traits(targets[0]))
                if traits in known:
                    continue
                known.add(traits)
                self._see(*_members(sources, targets), certain=True)
            else:
                self._see_parts(sources, targets, operations)
        for targets, candidates in doubts:
            for sources, _ in candidates:
                if len(sources) == len(targets) == 1:
                    self._see(sources[0], targets[0], certain=False)
        self._see_left(matches, tensors)

    def _see(self, source: ParameterInfo, target: ParameterInfo, *, certain: bool) -> None:
        s, t = core(source.shape), core(target.shape)
        if len(s) < 2:  # a map to one number
            column = len(source.shape) == len(target.shape) == 2 and source.shape != target.shape
            self.turned = self.turned or column
            return
        turned = s != t
        if len(s) != len(t) or len(s) not in (2, 3) or s[-1] == s[-2] or not (certain or turned):
            return
        if s not in (t, (*t[:-2], t[-1], t[-2])) or _is_looked_up(target):
            return
        self.turned = self.turned or turned
        self.kept = self.kept or not (turned or _leaf(source.leaf) == "own")
        for make in _makes(source, target):
            self.makes[make].add(turned if certain else None)

    def _see_left(self, matches: Sequence[Matched], tensors: tuple[Infos, Infos]) -> None:
        """What found no partner in two modules shows that squares beside it may be turned, if it would fit turned."""
        matched = [{i.name for match in matches for i in match[side]} for side in (0, 1)]
        left: list[dict[object, set[Shape]]] = [defaultdict(set), defaultdict(set)]
        for side, infos in enumerate(tensors):
            for i in infos:
                if len(core(i.shape)) == 2 and i.name not in matched[side]:
                    left[side][_around(i.module_path)].add(core(i.shape))
        ours, theirs = (set().union(*side.values()) for side in left)
        self.turned = self.turned or _fits_only_turned(ours, theirs)
        if not self.turned:
            return
        for sources, targets, _ in matches:
            if len(sources) == len(targets) == 1 and len(core(sources[0].shape)) == 2:
                ours, theirs = (left[k].get(_around(i.module_path), set()) for k, (i,) in enumerate((sources, targets)))
                if _fits_only_turned(ours, theirs):
                    for make in _makes(sources[0], targets[0]):
                        self.makes[make].add(None)

    def _see_parts(
        self, sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo], operations: Sequence[Operation]
    ) -> None:
        """What parts of a whole show: that they stand beside each other, or that only turned they fit."""
        self.turned = self.turned or _joined_across(sources, targets)
        if all(len(i.shape) == 2 for i in (*sources, *targets)) and not _fits_both_ways(sources, targets):
            turned = any(map(is_turn, operations))
            self.turned = self.turned or turned
            for make in {m for s in sources for t in targets for m in _makes(s, t)}:
                self.makes[make].add(turned)


class Orientation:
    """Judges the matrices of one pair of models.

    Args:
        matches: Source tensors, target tensors and operations of all matches.
        doubts: Target tensors and their candidates, of what is open: where only a turned matrix would fit, or names
            speak for one, something was stored the other way round, though nobody knows what.
        tensors: All tensors of both sides: where those left over fit only turned, so may the squares beside them.
    """

    def __init__(
        self, matches: Sequence[Matched], doubts: Sequence[Doubted] = (), tensors: tuple[Infos, Infos] = ((), ())
    ) -> None:
        self._given = matches, doubts, tensors
        self._judged: dict[object, tuple[tuple[Operation, ...] | None, str]] = {}

    @cached_property
    def _seen(self) -> Shown:
        """What all matrices show; where nothing has to be judged by it, nobody looks."""
        return Shown(*self._given)

    def judge(self, match: Matched) -> tuple[tuple[Operation, ...] | None, str]:
        """The operations of a match as they should be; ``None`` and the reason where nothing tells."""
        sources, targets, operations = match
        if not len(sources) == len(targets) == 1:
            return self._judge(match)
        key = (*_traits(sources[0]), *_traits(targets[0]), operations)
        if key not in self._judged:
            self._judged[key] = self._judge(match)
        return self._judged[key]

    def _judge(self, match: Matched) -> tuple[tuple[Operation, ...] | None, str]:
        sources, targets, operations = match
        if len({"Transpose" in i.module_type for i in (*sources, *targets) if "Conv" in i.module_type}) == 2:
            return None, OTHER_CONVOLUTION
        if len(sources) == len(targets) == 1:
            return self._judge_pair(sources[0], targets[0], operations)
        if _is_stack(sources, targets):
            s, t = _members(sources, targets)
            square = len(s.shape) == 2 and s.shape[0] == s.shape[1] and not _is_looked_up(t)
            if square and _only(self._nearest(_makes(s, t))) is not any(map(is_turn, operations)):
                return None, OPEN
            return operations, ""
        if any(isinstance(op, (Split, Concat)) for op in operations) and _fits_both_ways(sources, targets):
            wanted = self._verdict(sources[0], targets[0])
            as_it_is = not any(map(is_turn, operations)) and not _are_square(_parts_and_whole(sources, targets)[0])
            if wanted is None or (as_it_is if wanted else _joined_across(sources, targets)):
                return None, OPEN
        return operations, ""

    def _judge_pair(
        self, s: ParameterInfo, t: ParameterInfo, operations: tuple[Operation, ...]
    ) -> tuple[tuple[Operation, ...] | None, str]:
        a, b = core(s.shape), core(t.shape)
        if len(a) < 2:
            return operations, ""
        if a != b:
            if {len(a), len(b)} == {2, 3} and any(isinstance(op, Reshape) for op in operations):
                rows, columns = min(a, b, key=len)
                if rows == columns and "Conv" not in (t.module_type[:4], s.module_type[:4]):
                    return None, HEADS_APART
            kept = any(map(is_turn, operations)) and self._is_kept_beside(s, t)
            return (None, BOTH_WAYS) if kept else (operations, "")
        if len(a) not in (2, 3) or a[-1] != a[-2] or _is_looked_up(t):
            return operations, ""
        wanted = self._verdict(s, t)
        if wanted is None:
            return None, OPEN
        if wanted == any(map(is_turn, operations)):
            return operations, ""
        rest = tuple(op for op in operations if not is_turn(op))
        turn = transposed(s.shape) if len(s.shape) == len(a) else ()
        if not wanted:
            return rest, ""
        return ((*turn, *rest), "") if turn else (None, OPEN)

    def _verdict(self, s: ParameterInfo, t: ParameterInfo) -> bool | None:
        """Whether a square matrix is stored the other way round; ``None`` where nothing tells."""
        seen = self._nearest(_makes(s, t))
        if seen:
            return _only(seen)
        same_make = _leaf(s.leaf) == _leaf(t.leaf) and len(core(s.shape)) == len(core(t.shape))
        kernel = len(s.shape) != len(t.shape)  # of one by one, where there was a matrix, or the other way round
        return False if same_make and not self._seen.turned and (self._seen.kept or not kernel) else None

    def _is_kept_beside(self, s: ParameterInfo, t: ParameterInfo) -> bool:
        """Whether a matrix beside one that has to be turned is stored the same way round on both sides."""
        return False in self._seen.makes.get(_makes(s, t)[0], ())

    def _nearest(self, makes: Sequence[Make]) -> Set[bool | None]:
        """What the nearest make that shows anything shows."""
        return next((seen for make in makes if (seen := self._seen.makes.get(make))), frozenset())


def _only(seen: Set[bool | None]) -> bool | None:
    return next(iter(seen)) if len(seen) == 1 else None


def _fits_only_turned(ours: Set[Shape], theirs: Set[Shape]) -> bool:
    """Whether a matrix of one side has the shape of one on the other turned, and of none as it is."""
    return any(a != b and (b, a) in theirs and (a, b) not in theirs for a, b in ours)


def _is_stack(sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]) -> bool:
    """Whether a tensor of one side is made of those of the other along an axis of its own."""
    fewer, more = sorted((sources, targets), key=len)
    return len(fewer) == 1 < len(more) and len(fewer[0].shape) == len(more[0].shape) + 1


def _members(sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]) -> tuple[ParameterInfo, ParameterInfo]:
    """A pair to compare: of a stack a part, and the whole without its axis of the parts."""
    s, t = sources[0], targets[0]
    if len(sources) == len(targets):
        return s, t
    return (replace(s, shape=s.shape[1:]), t) if len(targets) > 1 else (s, replace(t, shape=t.shape[1:]))


def _parts_and_whole(
    sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]
) -> tuple[Sequence[ParameterInfo], Sequence[ParameterInfo]]:
    return (targets, sources) if len(targets) > 1 else (sources, targets)


def _fits_both_ways(sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]) -> bool:
    """Whether parts make up a whole turned and as they are: where they are squares, or it is."""
    return any(map(_are_square, _parts_and_whole(sources, targets)))


def _joined_across(sources: Sequence[ParameterInfo], targets: Sequence[ParameterInfo]) -> bool:
    """Whether parts make up a whole along its last axis, as matrices stored (in, out) do."""
    parts, whole = _parts_and_whole(sources, targets)
    if not _fits_both_ways(sources, targets) or any(len(i.shape) != 2 for i in (*parts, *whole)):
        return False
    return all(i.shape[0] == whole[0].shape[0] and i.shape[1] != whole[0].shape[1] for i in parts)


def _are_square(matrices: Sequence[ParameterInfo]) -> bool:
    return all(len(m.shape) == 2 and m.shape[0] == m.shape[1] for m in matrices)


@lru_cache(maxsize=4096)
def _leaf(leaf: str) -> str:
    """What a tensor is called inside its module: weight or kernel; any other name is one of its own."""
    last = leaf.rpartition("_")[2]
    return last if last in ("weight", "kernel") else "own"


def _traits(info: ParameterInfo) -> tuple[object, ...]:
    """All of a tensor that counts here."""
    return _around(info.module_path), info.leaf, info.shape, info.module_type


def _make(info: ParameterInfo) -> Make:
    return info.module_type, _leaf(info.leaf), len(core(info.shape))


@lru_cache(maxsize=100_000)
def _around(path: str) -> tuple[str, ...]:
    """The pattern of what a module stands in."""
    return split_numbers(path.rpartition(".")[0])[0]


@lru_cache(maxsize=100_000)
def _block(path: str) -> tuple[str, ...]:
    """The pattern of the block of a list that a module stands in."""
    parts = path.split(".")
    last = max((k for k, part in enumerate(parts) if part.isdigit()), default=-1)
    return ("block", *split_numbers(".".join(parts[: last + 1]))[0])


def _makes(s: ParameterInfo, t: ParameterInfo) -> tuple[Make, ...]:
    """What a pair of matrices shares its orientation with, the nearest first.

    The matrices of the module that it stands in, on both sides, or on the source's, and there in the block of a list,
    where it is known how torch stores the target's; all of its kind, where the kinds of both are known.
    """
    both = (_make(s), _make(t))
    around = _around(s.module_path), _around(t.module_path)
    makes: list[Make] = [(around, *both)]
    if t.module_type in LINEAR:
        makes += [(around[0], both[0]), (_block(s.module_path), both[0])]
    return (*makes, both) if s.module_type and t.module_type else tuple(makes)


def _is_looked_up(info: ParameterInfo) -> bool:
    """Whether a matrix is looked up, not multiplied: tables are never stored the other way round."""
    return "Embed" in info.module_type or bool(_TABLE.search(info.leaf.lower()))
