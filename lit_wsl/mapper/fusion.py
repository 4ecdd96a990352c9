"""Units that are one tensor on one side and several on the other: q, k, v <-> qkv; gate, up <-> gate_up.

Shapes tell that parts can make a whole, but not in which order: that is :mod:`lit_wsl.mapper.part_order`. Of several
sets of parts the one is taken whose order is known best and that stands where the whole stands. Where nothing tells,
the parts stay ambiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from lit_wsl.mapper.evidence import ORDER_WEIGHT, Evidence
from lit_wsl.mapper.families import Family, families_of, of_size, uniform
from lit_wsl.mapper.names import best_pairs_similarity, path_tokens
from lit_wsl.mapper.pairing import Region
from lit_wsl.mapper.part_order import NUMBERED, SPELLED, PartOrder, order_of_parts
from lit_wsl.mapper.shapes import join_axis, transpose_shape
from lit_wsl.mapper.tree import Item, owner_path, role_of
from lit_wsl.transfer.operations import Concat, Operation, Permute, Split, Transpose

MAX_PARTS = 4
MAX_SIBLINGS = 8
MARGIN = 0.08


@dataclass(frozen=True)
class Step:
    """Operations from source ordinals to target ordinals."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Fusion:
    """One whole and its parts, with what has to be done; in doubt if the order of the parts is unknown."""

    items: tuple[Item, ...]
    steps: tuple[Step, ...]
    source_positions: tuple[int, ...]
    target_positions: tuple[int, ...]
    margin: float
    reason: str
    doubt: bool = False

    @property
    def settled(self) -> tuple[set[int], set[int]]:
        """Source and target ordinals that the fusion matches, or leaves in doubt."""
        if self.doubt:
            return set(self.source_positions), set(self.target_positions)
        return {p for step in self.steps for p in step.sources}, {p for step in self.steps for p in step.targets}


@dataclass(frozen=True)
class _Choice:
    """Parts in the order in which they stand in the whole, what that rests on, and a score against other choices."""

    parts: tuple[Family, ...]
    order: PartOrder
    score: float


def find_fusions(
    sources: Sequence[Item],
    targets: Sequence[Item],
    region: Region,
    evidence: Evidence,
    turned: bool,
) -> list[Fusion]:
    """Find wholes on one side whose parts are on the other.

    Args:
        sources: Left-over units of the source, in registration order.
        targets: Left-over units of the target, in registration order.
        region: Where they stand. If it is not complete, numbers in the parts' names are no evidence that something else
            is made of them.
        evidence: The dictionary of this pair of models.
        turned: Whether the pair stores its matrices the other way round.

    Returns:
        Fusions that use no unit twice.
    """
    found: list[Fusion] = []
    gone: set[int] = set()
    for whole_is_target in (True, False):
        wholes, parts = (targets, sources) if whole_is_target else (sources, targets)
        root_w, root_p = (region.target, region.source) if whole_is_target else (region.source, region.target)
        wholes = [i for i in wholes if id(i) not in gone and i.rank >= 2]
        other_profiles = {i.profile_key for i in parts}
        for whole in sorted(uniform(families_of(wholes, root_w)), key=lambda f: (-f.members[0].numel, f.start)):
            free = [i for i in parts if id(i) not in gone and i.rank >= 2]
            choice, margin = _choose(whole, free, wholes, root_p, evidence)
            if choice is None:
                continue
            if whole.members[0].profile_key in other_profiles and choice.order.strength != SPELLED:
                continue  # something else has the size of the whole, so only its name can make it one
            if not region.complete and choice.order.strength == NUMBERED:
                continue
            for k, member in enumerate(whole.members):
                fusion = _build(member, [p.members[k] for p in choice.parts], whole_is_target, choice, margin, turned)
                if fusion is not None:
                    found.append(fusion)
                    gone.update(id(i) for i in fusion.items)
    return found


def _choose(
    whole: Family, parts: list[Item], rivals: Sequence[Item], root: Item, evidence: Evidence
) -> tuple[_Choice | None, float]:
    """The best parts for a whole, in order, and the margin over the next best."""
    families = of_size(uniform(families_of(parts, root)), len(whole.members))
    sets = {frozenset(id(p) for p in subset): subset for subset in _sets_of_parts(whole, families)}
    choices = [_judge(whole, subset, families, rivals, evidence) for subset in sets.values()]
    choices.sort(key=lambda c: (-c.score, [p.start for p in c.parts]))
    if not choices:
        return None, 0.0
    margin = choices[0].score - choices[1].score if len(choices) > 1 else choices[0].score
    return choices[0], min(margin, 1.0)


def _sets_of_parts(whole: Family, families: Sequence[Family]) -> Iterator[tuple[Family, ...]]:
    """Sets of siblings (then of cousins) whose shapes make up the whole's; some come twice."""
    shape = whole.members[0].main.shape
    for up in (1, 2):
        groups: dict[str, list[Family]] = {}
        for family in families:
            groups.setdefault(_ancestor(family.members[0].path, up), []).append(family)
        for siblings in groups.values():
            if len(siblings) > MAX_SIBLINGS:
                continue
            for n in range(2, min(MAX_PARTS, len(siblings)) + 1):
                for subset in combinations(siblings, n):
                    if join_axis(shape, [p.members[0].main.shape for p in subset]) is not None:
                        yield subset


def _ancestor(path: str, up: int) -> str:
    path = owner_path(path)
    for _ in range(up):
        path = path.rpartition(".")[0]
    return path


def _judge(
    whole: Family, parts: tuple[Family, ...], families: list[Family], rivals: Sequence[Item], evidence: Evidence
) -> _Choice:
    """Put parts in the order in which they stand in the whole, and score the evidence for it."""
    name = whole.members[0].path
    order = order_of_parts(name, [p.members[0].path for p in parts])
    around_w = [w for w in path_tokens(_ancestor(name, 1)) if not w.isdigit()]
    around_p = [w for w in path_tokens(_ancestor(parts[0].members[0].path, 1)) if not w.isdigit()]
    near = best_pairs_similarity(around_w[-2:], around_p[-2:], evidence.dictionary)
    balance = _balance(parts, families, rivals)
    in_place = _in_place(whole, parts, families, rivals)
    total = (order.strength + 0.2 * near + 0.3 * balance + ORDER_WEIGHT * in_place) if order.known else 0.0
    return _Choice(tuple(parts[i] for i in order.order), order, total)


def _balance(parts: tuple[Family, ...], families: list[Family], rivals: Sequence[Item]) -> float:
    """Whether the siblings that are left find as many units of their shape on the whole's side."""
    size = len(parts[0].members)
    taken = {id(p) for p in parts}
    profiles = {p.members[0].profile_key for p in parts}
    fits = 0
    for profile in profiles:
        left = sum(1 for f in families if id(f) not in taken and f.members[0].profile_key == profile)
        there = sum(1 for i in rivals if i.profile_key == profile)
        fits += left * size == there
    return fits / len(profiles)


def _in_place(whole: Family, parts: tuple[Family, ...], families: list[Family], rivals: Sequence[Item]) -> bool:
    """Whether the parts follow one another, and siblings of their shape stand around them as around the whole."""
    profiles = {p.members[0].profile_key for p in parts}
    home = _ancestor(parts[0].members[0].path, 1)
    row = sorted(
        f.start for f in families if f.members[0].profile_key in profiles and _ancestor(f.members[0].path, 1) == home
    )
    run = sorted(p.start for p in parts)
    if len(profiles) > 1 or run[0] not in row:
        return False
    before = row.index(run[0])
    first = whole.members[0]
    around = [
        i.positions[0] < first.positions[0]
        for i in rivals
        if i.profile_key in profiles and _ancestor(i.path, 1) == _ancestor(first.path, 1)
    ]
    return row[before : before + len(run)] == run and (sum(around), len(around)) == (before, len(row) - len(run))


def _build(
    whole: Item, parts: list[Item], whole_is_target: bool, choice: _Choice, margin: float, turned: bool
) -> Fusion | None:
    """The steps for one whole: its weight, its bias and whatever else both sides have."""
    all_parts = tuple(pos for p in parts for pos in p.positions)
    sides = (all_parts, whole.positions) if whole_is_target else (whole.positions, all_parts)
    items = (whole, *parts)
    if not choice.order.known or margin < MARGIN:
        why = "several sets of parts fit as well" if choice.order.known else choice.order.reason
        return Fusion(items, (), *sides, margin=margin, reason=why, doubt=True)
    steps = []
    for tensor in whole.tensors:
        members = [_same_role(tensor, whole, p) for p in parts]
        if any(m is None for m in members):
            continue
        step = _join(tensor, [m for m in members if m is not None], whole_is_target, turned)
        if step is not None:
            steps.append(step)
    return Fusion(items, tuple(steps), *sides, margin=margin, reason=choice.order.reason) if steps else None


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
    turning: tuple[Operation, ...] = ()
    if turn:
        turning = (Transpose(),) if len(whole.shape) == 2 else (Permute((0, 2, 1)),)
    sizes = tuple(transpose_shape(p.shape)[axis] if turn else p.shape[axis] for p in parts)
    places = tuple(pos for p in parts for pos in p.positions)
    part = parts[0]  # what makes it, if it is virtual, is the same for all parts: they are siblings
    if whole_is_target:
        return Step(places, whole.positions, (*part.operations, *turning, Concat(axis, sizes), *whole.undoing))
    return Step(whole.positions, places, (*whole.operations, Split(axis, sizes), *turning, *part.undoing))
