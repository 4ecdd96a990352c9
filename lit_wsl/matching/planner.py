"""From two descriptions to a plan: passes of the alignment, buffers, scores, and the reasons of what stays out."""

from __future__ import annotations

import gc
import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

from lit_wsl.matching.alignment import RUN_OTHERWISE, Aligner, Evidence, Match
from lit_wsl.matching.buffers import (
    Paths,
    averaging_norms,
    match_buffers,
    refuse_modules,
    split_kinds,
    twins_of,
    unwrapped,
)
from lit_wsl.matching.copies import one_of_copies, settle
from lit_wsl.matching.entries import EntryWriter
from lit_wsl.matching.hints import hints, scaled_weights
from lit_wsl.matching.layouts import Orientation, hidden_layouts, leave_open
from lit_wsl.matching.numbers import lists_backwards
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.order import ORDER, moved_norms
from lit_wsl.matching.regions import Sides, ends_of, may_wrap
from lit_wsl.matching.risks import margin_of, told
from lit_wsl.matching.scoring import Context
from lit_wsl.matching.selection import IncompatiblePairs, part_of, restrict
from lit_wsl.matching.tree import ROLES, TreeBuilder, layer_kind, stem_of
from lit_wsl.matching.words import plain_words
from lit_wsl.plan.entries import AVERAGE, SideSummary
from lit_wsl.plan.operations import Operation, Transpose
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, ParameterInfo, Shape

# as torch.nn.utils.parametrize, spectral_norm and prune, and weight_norm store the factors of a weight
_PARAMETRIZED = re.compile(r"(?:.*\.)?parametrizations\.[^.]+\.original(\d+)")
_ORIGINAL = "_orig"
_LENGTH, _DIRECTION = "_g", "_v"


def factor_roles(infos: Iterable[ParameterInfo]) -> dict[str, int]:
    """The tensors that are factors of a weight, and which one.

    Returns:
        Name -> place among the factors; of weight norm 0 is the length, 1 the direction; 2 is what is scaled or masked.

    >>> factor_roles([ParameterInfo("fc.weight_g", (7, 1)), ParameterInfo("fc.weight_v", (7, 6))])
    {'fc.weight_g': 0, 'fc.weight_v': 1}
    """
    by_name = {info.name: info for info in infos}
    roles: dict[str, int] = {}
    for name, info in by_name.items():
        found = _PARAMETRIZED.fullmatch(name) if "parametrizations." in name else None
        if found:
            roles[name] = int(found[1])
        elif name.endswith(_ORIGINAL) and any(name.removesuffix(_ORIGINAL) + end in by_name for end in ("_u", "_mask")):
            roles[name] = 2
        elif name.endswith(_LENGTH):
            direction = by_name.get(name.removesuffix(_LENGTH) + _DIRECTION)
            if direction is not None and _is_length(info.shape, direction.shape):
                roles[name], roles[direction.name] = 0, 1
    return roles


def _is_length(length: Shape, direction: Shape) -> bool:
    """Whether a shape is that of norms of a tensor along some of its axes."""
    if length == ():
        return len(direction) > 0
    return len(length) == len(direction) > 1 and all(a in (1, b) for a, b in zip(length, direction))


def same_roles(
    sources: Sequence[ParameterInfo],
    targets: Sequence[ParameterInfo],
    of_source: dict[str, int],
    of_target: dict[str, int],
) -> bool:
    """Whether tensors may become others: none of them a factor, or all of them the same one."""
    if not (of_source or of_target):
        return True
    return len({of_source.get(s.name) for s in sources} | {of_target.get(t.name) for t in targets}) == 1


Matched = tuple[tuple[ParameterInfo, ...], tuple[ParameterInfo, ...], Match]
Sources = tuple[tuple[tuple[ParameterInfo, ...], tuple[Operation, ...]], ...]


@dataclass(frozen=True)
class Alignment:
    """The outcome of the passes, in terms of the tensors themselves."""

    matches: tuple[Matched, ...]  # source tensors, target tensors, the match
    # target tensors, candidates (source tensors and operations), the reason
    doubts: tuple[tuple[tuple[ParameterInfo, ...], Sources, str], ...]


def build_plan(
    source: ModelDescription,
    target: ModelDescription,
    options: MatchingOptions | None = None,
    *,
    assume_layouts: bool = False,
) -> TransferPlan:
    """Match two models by structure, order, shape and names, and write down what would be loaded.

    Returns:
        The plan; deterministic, and made without tensor data.
    """
    options = options or MatchingOptions()
    with _no_collections():
        plan = _build(source, target, options)
        if options.adapt:
            from lit_wsl.matching.adapt import adapt_plan

            plan = adapt_plan(plan, source, target, options, _build)
        plan = IncompatiblePairs(options.incompatible_pairs).explain(plan)
        if not (assume_layouts or options.assume_layouts):
            plan = leave_open(plan, hidden_layouts(plan, source, target))
        plan = replace(plan, notes=(*plan.notes, *hints(plan, source, target)))
        return restrict(plan, source, target, options)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without the cyclic garbage collector: planning makes many objects and hardly a cycle, which it would search."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


_STYLES = (  # how torch.nn.utils.parametrizations stores what older functions of the same names store
    (re.compile(r"(^|\.)parametrizations\.([^.]+)\.original0$"), r"\1\2_g"),
    (re.compile(r"(^|\.)parametrizations\.([^.]+)\.original1$"), r"\1\2_v"),
    (re.compile(r"(^|\.)parametrizations\.([^.]+)\.original$"), r"\1\2_orig"),
    (re.compile(r"(^|\.)parametrizations\.([^.]+)\.0\._(u|v)$"), r"\1\2_\3"),
)


def _build(source: ModelDescription, target: ModelDescription, options: MatchingOptions) -> TransferPlan:
    """The plan of lossless operations alone; parametrized weights go by the names that older code gives them."""
    sides, names = [], []
    whole, summary_t = source, SideSummary.of(target)
    inside, around_s = _without_wrappers(part_of(source, options.source_prefix))
    target, around_t = _without_wrappers(target)
    source, copies = one_of_copies(inside, target)
    left_out = [(copies, inside)] if copies else []
    if copies and copies.reason == AVERAGE:  # beside it there may be a teacher
        around, (source, copies) = source, one_of_copies(source, target)
        left_out += [(copies, around)] if copies else []
    for side in (source, target):
        renamed = _plain_leaves(side.parameters)
        renamed |= {i.name: _plain_name(i.name) for i in side.parameters if "parametrizations." in i.name}
        plain, back = _renamed(side, renamed)
        sides.append(plain)
        names.append(back)
    summaries = SideSummary.of(whole), summary_t
    plan = _named_back(_build_lossless(sides[0], sides[1], options, summaries), names[0], names[1])
    for copies, around in reversed(left_out):
        plan = settle(plan, copies, around)
    return _named_back(plan, around_s, around_t)


_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[.]")


def _without_wrappers(side: ModelDescription) -> tuple[ModelDescription, dict[str, str]]:
    """A side without the modules that torch puts around others (compile, FSDP), and by new names the old ones."""
    marked = (i.name for i in side.parameters if "_wrapped_module." in i.name or "_orig_mod." in i.name)
    short = {name: plain for name in marked if (plain := _WRAPPERS.sub("", name)) != name}
    renamed, back = _renamed(side, short)
    if not back:
        return side, {}
    return replace(renamed, tied={alias: short.get(first, first) for alias, first in side.tied.items()}), back


def _renamed(side: ModelDescription, names: Mapping[str, str]) -> tuple[ModelDescription, dict[str, str]]:
    """A side with some tensors under other names, and by these the old ones; as it is if two would have one name."""
    infos = tuple(replace(i, name=names[i.name]) if i.name in names else i for i in side.parameters) if names else ()
    if not names or len({i.name for i in infos}) < len(infos):
        return side, {}
    return replace(side, parameters=infos), {new: old for old, new in names.items()}


def _named_back(plan: TransferPlan, source: Mapping[str, str], target: Mapping[str, str]) -> TransferPlan:
    """The plan with the names that the two sides have."""
    if not (source or target):
        return plan
    back = [lambda name, known=known: known.get(name, name) for known in (source, target)]
    return replace(
        plan,
        entries=tuple(
            replace(e, sources=tuple(map(back[0], e.sources)), targets=tuple(map(back[1], e.targets))) for e in plan
        ),
        ambiguous=tuple(
            replace(
                a,
                targets=tuple(map(back[1], a.targets)),
                candidates=tuple(replace(c, sources=tuple(map(back[0], c.sources))) for c in a.candidates),
            )
            for a in plan.ambiguous
        ),
        unmatched_source=tuple(replace(u, name=back[0](u.name)) for u in plan.unmatched_source),
        unmatched_target=tuple(replace(u, name=back[1](u.name)) for u in plan.unmatched_target),
    )


def _plain_leaves(infos: Sequence[ParameterInfo]) -> dict[str, str]:
    """Names of scales and shifts, and the same as ``weight`` and ``bias``: what a norm calls its own is no evidence.

    Only for modules that hold one scale, or a scale and a shift, and nothing below: ``gamma`` beside other modules is
    something else. Matrices keep their names, which may tell how they are stored.
    """
    odd = {i.module_path for i in infos if len(i.shape) == 1 and i.leaf not in ROLES and layer_kind(i.leaf)}
    if not odd:
        return {}
    own: dict[str, list[ParameterInfo]] = {}
    above: set[str] = set()
    for info in infos:
        path = info.module_path
        if path in odd:
            own.setdefault(path, []).append(info)
        while path and (path := path.rpartition(".")[0]) not in above:
            above.add(path)
    found: dict[str, str] = {}
    for path, members in own.items():
        kinds = {i.leaf: layer_kind(i.leaf) for i in members if len(i.shape) == 1}
        named = {kind: leaf for leaf, kind in kinds.items() if kind}
        count = sum(bool(kind) for kind in kinds.values())
        if path in above or not path or "scale" not in named or count != len(named):
            continue
        if any(len(i.shape) > 1 for i in members) or (len(kinds) > count == 1):
            continue  # scale and margin are no norm
        plain = {named["scale"]: "weight", named.get("shift", ""): "bias"}
        found |= {i.name: f"{path}.{plain[i.leaf]}" for i in members if plain.get(i.leaf, i.leaf) != i.leaf}
    return found


def _plain_name(name: str) -> str:
    for pattern, plain in _STYLES:
        name = pattern.sub(plain, name)
    return name


def _build_lossless(
    source: ModelDescription,
    target: ModelDescription,
    options: MatchingOptions,
    summaries: tuple[SideSummary, SideSummary],
) -> TransferPlan:
    """The plan of lossless operations alone."""
    weights_s, buffers_s, weights_t, buffers_t = split_kinds(source, target, alone=not options.excludes_buffers)
    ties = Counter(source.tied.values())
    known = {name: count + 1 for name, count in ties.items()}
    written = source.is_module or not is_sorted(source)
    written = written and not (by_alphabet(source.parameters) or by_alphabet(target.parameters))
    ordered = written and (source.is_module or has_order(source))
    norms = averaging_norms(source, buffers_s), averaging_norms(target, buffers_t)
    if not all(norms):
        norms = set(), set()  # a file may hold weights alone, and a model other norms in place of all batch norms
    paths = unwrapped(source.parameters, target.parameters)
    bare = not (buffers_s or buffers_t)
    alignment = align(weights_s, weights_t, options, Sides(known, ordered, written), norms, paths if bare else None)
    if target.has_execution_order:
        alignment = _with_execution_order(alignment, weights_s, weights_t, options, norms, ordered=ordered)
    names = ([[info.name for info in side] for side in match[:2]] for match in alignment.matches)
    writer = EntryWriter(source, target, options, Context((s, t) for s, t in names))
    orientation = Orientation(
        [(sources, targets, match.operations) for sources, targets, match in alignment.matches],
        [(targets, candidates) for targets, candidates, _ in alignment.doubts],
        (weights_s, weights_t),
    )
    twins = twins_of(source.parameters, target.parameters, paths)
    factors_s, factors_t = factor_roles(source.parameters), factor_roles(target.parameters)
    notes: list[str] = []
    scaled = scaled_weights(source.parameters)
    for sources, targets, match in alignment.matches:
        if scaled and any(s.name in scaled and s.dtype != t.dtype for s in sources for t in targets):
            continue
        if not same_roles(sources, targets, factors_s, factors_t):
            notes.append(
                f"{sources[0].name} does not fill {targets[0].name}: one is a weight, the other a factor of one "
                "(weight_norm); remove the parametrization on one side first"
            )
            continue
        twin = next((twins[t.name] for t in targets if t.name in twins and twins[t.name] not in sources), None)
        if twin is not None:
            writer.doubt(targets, [((twin,), ()), (sources, match.operations)], TWIN)
            continue
        operations, why = orientation.judge((sources, targets, match.operations))
        if operations is None:
            both = (match.operations, (Transpose(), *match.operations))
            square = len(set(sources[0].shape)) == 1 and len(sources[0].shape) == len(targets[0].shape) == 2
            choice = both if square else both[:1]
            writer.doubt(targets, [(sources, operations) for operations in choice], why)
            continue
        writer.add(sources, targets, operations, margin_of(match.cell), match.cell, told(match.cell))
    for targets, candidates, reason in alignment.doubts:
        writer.doubt(targets, candidates, reason)
    filled = writer.filled()
    rest_t = [i for i in target.parameters if i.kind == "buffer" and i.name not in filled]
    if rest_t and not options.excludes_buffers:
        used = writer.used()
        rest_s = [i for i in source.parameters if i.name not in used]
        running = {i.name for i in buffers_s}
        evidence = writer.evidence_by_module()
        units = {i.module_path for i in target.parameters if i.kind == "parameter"}
        follow = {i.name for i in buffers_t}  # others were aligned like weights: what was left open stays so
        at_path = twins_of(source.parameters, target.parameters, paths, within=True)
        at_path = {name: twin for name, twin in at_path.items() if name in follow or name == twin.name}
        for s, t, reason in match_buffers(writer.pairs(), running, rest_s, rest_t, units, at_path):
            writer.add((s,), (t,), (), 1.0, evidence.get(t.module_path, reason), reason)
    if options.buffers == "strict":
        refuse_modules(writer, source, target)
    entries, ambiguous, unmatched_source, unmatched_target = writer.finish()
    return TransferPlan(
        entries=entries,
        source=summaries[0],
        target=summaries[1],
        ambiguous=ambiguous,
        unmatched_source=unmatched_source,
        unmatched_target=unmatched_target,
        options=options.to_dict(),
        notes=tuple(notes),
    )


TWIN = "the checkpoint has a tensor of this very name and shape, but what stands around both says otherwise"


def is_sorted(side: ModelDescription) -> bool:
    """Whether a side's tensors stand in alphabetical order, as in safetensors files, or in that of several files."""
    if side.label.endswith((".safetensors", ".safetensors.index.json")):
        return True
    names = [info.name for info in side.parameters]
    runs = 1 + sum(a > b for a, b in pairwise(names))
    return len(names) >= RUN * runs or runs == 1 or all(a <= b for a, b in pairwise(n.split(".") for n in names))


def has_order(side: ModelDescription) -> bool:
    """Whether the order of a side's tensors, if it is not sorted, may be that in which a model registered them."""
    written = [info for info in side.parameters if info.kind == "parameter"]
    return _in_one_piece(i.module_path for i in written) and not _in_two_minds(written)


RUN = 12  # so many names in a row are in alphabetical order only where they were sorted


def _in_two_minds(infos: Iterable[ParameterInfo]) -> bool:
    """Whether the bias stands now before the weight, now behind it, or members of a list in neither direction."""
    leaves: dict[str, list[str]] = {}
    paths: dict[str, None] = {}
    lists: dict[str, dict[int, None]] = {}
    for info in infos:
        leaves.setdefault(info.module_path, []).append(info.leaf)
        paths[info.name if info.leaf.isdigit() else info.module_path] = None
    known = {""}
    for path in paths:
        while path not in known:
            known.add(path)
            path, _, part = path.rpartition(".")
            if part.isdigit():
                lists.setdefault(path, {})[int(part)] = None
    firsts = {own[0] for own in leaves.values() if len(own) == 2 and {*own} == {"bias", "weight"}}
    return len(firsts) > 1 or any(list(row) not in (sorted(row), sorted(row, reverse=True)) for row in lists.values())


def _in_one_piece(modules: Iterable[str]) -> bool:
    """Whether the tensors of each module stand together, as they do where a model was written down."""
    known, last = {""}, ""
    for path in modules:
        if path == last:
            continue
        around = path
        while around not in known:
            known.add(around)
            around = around.rpartition(".")[0]
        if around and not f"{last}.".startswith(f"{around}."):
            return False  # it was left before
        last = path
    return True


BY_CHANCE = 100  # one model in so many is in alphabetical order without meaning to


def by_alphabet(infos: Sequence[ParameterInfo]) -> bool:
    """Whether all modules of a side are registered in alphabetical order, which no other order is by chance."""
    below: dict[str, list[str]] = {}
    known = {""}
    for info in infos:
        path = info.module_path
        while path not in known:
            known.add(path)
            around, _, part = path.rpartition(".")
            if len(part) > 1 and not part.isdigit():  # letters count
                names = below.setdefault(around, [])
                if names and names[-1] > part:
                    return False
                names.append(part)
            path = around
    orders = (
        math.factorial(min(len({plain_words(n) for n in names}), 10)) for names in set(map(tuple, below.values()))
    )
    return math.prod(orders) >= BY_CHANCE


def align(
    source: Sequence[ParameterInfo],
    target: Sequence[ParameterInfo],
    options: MatchingOptions,
    sides: Sides,
    norms: tuple[Container[str], Container[str]],
    paths: Paths | None = None,
) -> Alignment:
    """Align two sides, twice: the first time tells what order, orientation and other blocks are worth."""
    if not source or not target:
        return Alignment((), ())
    builder = TreeBuilder()
    root_s, order_s = builder.build(source, norms[0])
    root_t, order_t = builder.build(target, norms[1])
    forbidden = IncompatiblePairs(options.incompatible_pairs)
    twins = {}
    if names := twins_of(order_s, order_t, paths or unwrapped(order_s, order_t), within=True):
        place_s, place_t = ({i.name: k for k, i in enumerate(order)} for order in (order_s, order_t))
        twins = {place_s[s.name]: place_t[t] for t, s in names.items()}
    executed = tuple(info.execution_order for info in order_t)
    backwards = lists_backwards(root_s.lists, root_t.lists)
    wraps = may_wrap(order_s, order_t)
    moved = moved_norms(root_s, root_t, sides.ordered)
    sides = replace(sides, execution=executed, heads=ends_of(order_t), twins=twins, backwards=backwards, wraps=wraps)
    sides = replace(sides, moved=moved)
    aligner = Aligner(options, builder, Evidence(), forbidden, sides)
    aligner.align(root_s, root_t)
    outcome = Aligner(options, builder, aligner.gathered, forbidden, sides).align(root_s, root_t)
    flat, unsure = outcome.flat()
    at_s, at_t = order_s.__getitem__, order_t.__getitem__
    matches = tuple([(tuple(map(at_s, m.sources)), tuple(map(at_t, m.targets)), m) for m in flat])
    doubts = tuple(
        (
            tuple(map(at_t, d.targets)),
            tuple((tuple(map(at_s, s)), operations) for s, operations in d.candidates),
            d.reason,
        )
        for d in unsure
    )
    return Alignment(companions_together(matches, source, target), doubts)


def companions_together(
    matches: Sequence[Matched], source: Sequence[ParameterInfo], target: Sequence[ParameterInfo]
) -> tuple[Matched, ...]:
    """Drop what would part a bias from its weight: the smaller tensors of a unit go where its largest goes.

    A bias that comes from another module than the weight beside it, or alone from a module that has a weight of its
    own, is no match but a coincidence of sizes.
    """
    main_t = _mains(target)
    minor = {i.name: main_t[_unit(i)] for i in target} if len(main_t) < len(target) else {}
    minor = {name: main for name, main in minor.items() if main.name != name}
    if any(op.name == "transpose" for *_, how in matches for op in how.operations):
        ours, theirs = (
            {_unit(i): i.numel for i in side if len(i.shape) == 1 and i.leaf != "weight"} for side in (source, target)
        )
        matches = [m for m in matches if not _turned_for_nothing(m, ours, theirs)]
    if not minor:
        return tuple(matches)
    main_s = _mains(source)
    single = {ts[0].name: ss[0] for ss, ts, _ in matches if len(ss) == len(ts) == 1}
    fused = {t.name for ss, ts, _ in matches if len(ss) != 1 or len(ts) != 1 for t in ts}
    kept = []
    for sources, targets, match in matches:
        beside = minor.get(targets[0].name)
        if len(sources) == len(targets) == 1 and beside is not None and beside.name not in fused:
            s, partner = sources[0], single.get(beside.name)
            alone = main_s[_unit(s)].name != s.name if partner is None else _unit(partner) != _unit(s)
            if alone:
                continue
        kept.append((sources, targets, match))
    return tuple(kept)


def _turned_for_nothing(match: Matched, ours: Mapping[Unit, int], theirs: Mapping[Unit, int]) -> bool:
    """Whether a matrix is transposed though the biases beside it say that both sides store outputs by inputs."""
    sources, targets, how = match
    if not len(sources) == len(targets) == 1 or not any(op.name == "transpose" for op in how.operations):
        return False
    s, t = sources[0], targets[0]
    shifts = ours.get(_unit(s)), theirs.get(_unit(t))
    return s.shape != t.shape and shifts == (s.shape[0], t.shape[0])


Unit = tuple[str, str]


def _unit(info: ParameterInfo) -> Unit:
    path, _, leaf = info.name.rpartition(".")
    return path, stem_of(leaf)


def _mains(infos: Sequence[ParameterInfo]) -> dict[tuple[str, str], ParameterInfo]:
    """The largest tensor of each unit, the first of equals."""
    mains: dict[tuple[str, str], ParameterInfo] = {}
    for info in infos:
        known = mains.setdefault(_unit(info), info)
        if known is not info and info.numel > known.numel:
            mains[_unit(info)] = info
    return mains


def _with_execution_order(
    first: Alignment,
    source: Sequence[ParameterInfo],
    target: Sequence[ParameterInfo],
    options: MatchingOptions,
    norms: tuple[Container[str], Container[str]],
    *,
    ordered: bool,
) -> Alignment:
    """Let execution order decide what is still open: it only turns missing into right."""
    matched = {t.name for _, targets, _ in first.matches for t in targets}
    both_traced = any(info.execution_order is not None for info in source)
    if not (ordered or both_traced) or (len(matched) == len(target) and not both_traced):
        return first
    second = align(_by_execution(source), _by_execution(target), options, Sides(), norms)
    if both_traced:
        first = _doubt_contradictions(first, second)
        matched = {t.name for _, targets, _ in first.matches for t in targets}
    used = {s.name for sources, _, _ in first.matches for s in sources}
    agreed = {(tuple(s.name for s in ss), tuple(t.name for t in ts)) for ss, ts, _ in first.matches}
    if any(
        (tuple(s.name for s in ss), tuple(t.name for t in ts)) not in agreed
        for ss, ts, _ in second.matches
        if any(t.name in matched for t in ts) or any(s.name in used for s in ss)
    ):
        return first  # the two orders contradict each other somewhere, so neither may add to the other
    settled = matched | {t.name for targets, _, why in first.doubts if why == RUN_OTHERWISE for t in targets}
    extra = tuple(m for m in second.matches if not any(t.name in settled for t in m[1]))
    decided = matched | {t.name for _, targets, _ in extra for t in targets}
    doubts = tuple(d for d in first.doubts if not all(t.name in decided for t in d[0]))
    return Alignment((*first.matches, *extra), doubts)


def _doubt_contradictions(first: Alignment, second: Alignment) -> Alignment:
    """Take back what only order decided, where the other order gives the target another source."""
    theirs = {t.name: (ss, m.operations) for ss, ts, m in second.matches for t in ts}
    kept, doubts = [], []
    for sources, targets, match in first.matches:
        rivals = [theirs[t.name] for t in targets if t.name in theirs and theirs[t.name][0] != sources]
        if rivals and match.cell.startswith(ORDER):
            reason = "the orders of registration and of execution contradict each other"
            doubts.append((targets, ((sources, match.operations), *rivals), reason))
        else:
            kept.append((sources, targets, match))
    return Alignment(tuple(kept), (*first.doubts, *doubts))


def _by_execution(infos: Sequence[ParameterInfo]) -> list[ParameterInfo]:
    """Sort by execution order; tensors the sample never reached go last."""
    late = len(infos) + max((i.execution_order or 0 for i in infos), default=0)
    return sorted(infos, key=lambda i: (late if i.execution_order is None else i.execution_order, i.index))
