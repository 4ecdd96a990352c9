"""Value-changing operations that the user asks for by name: what if the checkpoint had the model's shape already?

Each adaptation is tried with the lossless matching itself. A *change* pretends that some tensors of the
source had the shapes of the target (a resized table, a head with the new number of classes, a convolution into which
its batch norm has been folded), and the whole pair is matched again. Only where the matching then pairs the changed
tensors by itself is the change taken, so place, order, names and uniqueness decide as they do everywhere, and what is
not clear stays unmatched, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lit_wsl.matching.adapt_proposals import (
    Change,
    Proposals,
    Propose,
    fold_batchnorm,
    new_input_channels,
    partial_head,
    resize_position_embedding,
)
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.scoring import Context, score_pair
from lit_wsl.plan.entries import Ambiguity, Candidate, PlanEntry, SideSummary, Unmatched
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, ParameterInfo

Matcher = Callable[[ModelDescription, ModelDescription, MatchingOptions], TransferPlan]
MAX_ROUNDS = 3  # of matching for one adaptation
SWEEPS = 2  # what one adaptation could not do, it may do after another
PROPOSERS: tuple[tuple[str, Propose], ...] = (  # in the order in which they are tried
    ("new_input_channels", new_input_channels),
    ("fold_batchnorm", fold_batchnorm),
    ("resize_position_embedding", resize_position_embedding),
    ("partial_head", partial_head),
)


@dataclass(frozen=True)
class _State:
    """What has been decided so far."""

    changes: tuple[Change, ...]  # the changes taken
    source: ModelDescription  # the source as it would be with them
    plan: TransferPlan  # the plan from that source
    reasons: dict[str, str]  # why tensors that an adaptation looked at stay out
    done: frozenset[str] = frozenset()  # the adaptations that found something to do


def adapt_plan(
    plan: TransferPlan, source: ModelDescription, target: ModelDescription, options: MatchingOptions, match: Matcher
) -> TransferPlan:
    """Add the adaptations that the user asked for to a lossless plan, with notes, also on what can't be done."""
    state = _State((), source, plan, {})
    plain = replace(options, adapt=())
    asked = [(name, propose) for name, propose in PROPOSERS if name in options.adapt]
    for name, propose in asked * SWEEPS:
        proposals = propose(state.plan, state.source, target)
        tried = [
            _adapt(name, replace(proposals, changes=changes), state, source, target, plain, match)
            for changes in (proposals.changes, *proposals.others)
        ]
        tried.sort(key=lambda new: -_filled(new.plan, target))
        if len(tried) > 1 and _filled(tried[0].plan, target) == _filled(tried[1].plan, target):
            equal = f"{name}: {len(tried)} choices fit equally well"
            state = replace(state, reasons={**state.reasons, **dict.fromkeys(proposals.changes[0].sources, equal)})
        else:
            state = tried[0]
    return _rewrite(state, source, target, options)


def _adapt(
    name: str,
    proposals: Proposals,
    state: _State,
    source: ModelDescription,
    target: ModelDescription,
    options: MatchingOptions,
    match: Matcher,
) -> _State:
    """Try one adaptation; changes that the matching does not confirm are taken back, and the rest tried again."""
    reasons = {**state.reasons, **proposals.reasons}
    wanted = tuple(_joined(change, state.changes) for change in proposals.changes)
    for _ in range(MAX_ROUNDS):
        if not wanted:
            break
        new = {name for change in wanted for name in change.sources}
        changes = (*(c for c in state.changes if new.isdisjoint(c.sources)), *wanted)
        changed = _pretend(source, changes)
        plan = match(changed, target, options)
        failures = {change: why for change in wanted if (why := _refusal(change, plan))}
        for change in wanted:
            if change not in failures and (low := _entry(change, plan, source, target, options).score) < options.floor:
                failures[change] = f"its score of {low:.2f} is below the threshold {options.floor:.2f}"
        if not failures:
            # A norm that goes moves what stands around it; the other adaptations must leave the rest as it was.
            strife = None if name == "fold_batchnorm" else _contradiction(state.plan, plan)
            if strife is None and _filled(plan, target) >= _filled(state.plan, target):
                return _State(changes, changed, plan, reasons, state.done | {name})
            failures = dict.fromkeys(wanted, strife or "with it, less of the model would be filled than without")
        for change, why in failures.items():
            meant = (f"->{partner}" for partners in change.partners for partner in partners)
            reasons.update(dict.fromkeys((*change.sources, *meant), f"{name}: tried, but {why}"))
        wanted = () if proposals.whole else tuple(change for change in wanted if change not in failures)
    return replace(state, reasons=reasons)


def _joined(change: Change, earlier: Sequence[Change]) -> Change:
    """A change together with the one that makes what it takes."""
    for other in earlier:
        if other.made[0].name in change.sources:
            return change.after(other)
    return change


def _pretend(source: ModelDescription, changes: Sequence[Change]) -> ModelDescription:
    """The source as it would be after the changes."""
    instead = {change.made[0].name: change for change in changes}
    gone = {name for change in changes for name in (*change.sources, *change.dropped)}
    parameters: list[ParameterInfo] = []
    for info in source.parameters:
        if info.name in instead:
            parameters += instead[info.name].made
        elif info.name not in gone:
            parameters.append(info)
    return replace(source, parameters=tuple(replace(info, index=i) for i, info in enumerate(parameters)))


def _refusal(change: Change, plan: TransferPlan) -> str:
    """Why the matching does not bear out a change; empty if it does."""
    for info in change.made:
        users = plan.by_source.get(info.name, ())
        if len(users) != 1 or len(users[0].sources) != 1 or len(users[0].targets) != 1:
            return f"{info.name} finds no single place in the model even so"
        further = [op.name for op in users[0].operations if op.name != "cast"]
        if further and (len(change.made) > 1 or any(op.needs_target for op in change.operations)):
            return f"{info.name} would have to go through {further[0]} as well"
    for info, partners in zip(change.made, change.partners):
        if plan.by_source[info.name][0].targets[0] not in partners:
            return f"{info.name} finds its place elsewhere then"
    places = {plan.by_source[info.name][0].targets[0].rpartition(".")[0] for info in change.made}
    if len(places) > 1:
        return f"{change.made[0].name} and {change.made[1].name} go to different modules"
    return ""


def _contradiction(before: TransferPlan, after: TransferPlan) -> str | None:
    """What the two plans see differently, in words."""
    for entry in before.entries:
        for name in entry.targets:
            other = after.by_target.get(name)
            if other is None or other.sources != entry.sources or other.operations != entry.operations:
                return f"{name} would be filled in another way than without it"
    return None


def _filled(plan: TransferPlan, target: ModelDescription) -> int:
    return sum(target[name].numel for entry in plan.entries if entry.kind == "parameter" for name in entry.targets)


def _rewrite(
    state: _State, source: ModelDescription, target: ModelDescription, options: MatchingOptions
) -> TransferPlan:
    """The plan in terms of the real source: pretended tensors become entries with the operations that make them."""
    made = {info.name: change for change in state.changes for info in change.made}
    entries: list[PlanEntry] = []
    notes: list[str] = []
    written: set[Change] = set()
    for entry in state.plan.entries:
        change = made.get(entry.sources[0]) if entry.sources else None
        if change is None:
            entries.append(entry)
            continue
        if change in written:
            continue
        written.add(change)
        adapted = _entry(change, state.plan, source, target, options)
        entries.append(adapted)
        notes.append(f"{', '.join(adapted.targets)}: {change.badge}, {change.reason}")
    used = {name for entry in entries for name in entry.sources}
    theirs = {u.name: u for u in state.plan.unmatched_source}
    dropped = {name: change for change in state.changes for name in change.dropped}
    unmatched = []
    for info in source.parameters:
        if info.name in used:
            continue
        reason = theirs[info.name].reason if info.name in theirs else "stays out of the lossless matching"
        if info.name in dropped:
            reason = f"not needed once {dropped[info.name].badge} is done"
        unmatched.append(Unmatched(info.name, info.shape, info.kind, state.reasons.get(info.name, reason)))
    return replace(
        state.plan,
        entries=tuple(entries),
        source=SideSummary.of(source),
        ambiguous=tuple(_real(a, made, source) for a in state.plan.ambiguous),
        unmatched_source=tuple(unmatched),
        unmatched_target=tuple(
            replace(u, reason=state.reasons.get(f"->{u.name}", u.reason)) for u in state.plan.unmatched_target
        ),
        options=options.to_dict(),
        notes=(*state.plan.notes, *notes, *(_idle(name, state) for name in options.adapt if name not in state.done)),
    )


def _idle(name: str, state: _State) -> str:
    """Why an adaptation that was asked for did nothing, in words."""
    found = next((why for why in state.reasons.values() if why.startswith(f"{name}: ")), "")
    return f"{name}: nothing was adapted; {found.partition(': ')[2] or 'nothing that is left over calls for it'}"


def _entry(
    change: Change, plan: TransferPlan, source: ModelDescription, target: ModelDescription, options: MatchingOptions
) -> PlanEntry:
    """The entry that makes a change and fills the targets with it."""
    plain = [plan.by_source[info.name][0] for info in change.made]
    targets = tuple(entry.targets[0] for entry in plain)
    given = [source[name] for name in change.sources]
    context = Context((e.sources, e.targets) for e in plan if e.kind == "parameter")
    scores = []
    for made, name in zip(change.made, targets):
        real = source.by_name.get(made.name, made)
        scores.append(score_pair(real, target[name], options, operation=True, context=context).total)
    return PlanEntry(
        sources=change.sources,
        targets=targets,
        operations=(*change.operations, *plain[0].operations),
        source_shapes=tuple(info.shape for info in given),
        target_shapes=tuple(target[name].shape for name in targets),
        kind=plain[0].kind,
        score=round(sum(scores) / len(scores), 4),
        margin=min(entry.margin for entry in plain),
        reason=f"{change.reason}; {plain[0].reason}",
    )


def _real(ambiguity: Ambiguity, made: dict[str, Change], source: ModelDescription) -> Ambiguity:
    """Name the real tensors behind pretended candidates."""
    candidates = []
    for candidate in ambiguity.candidates:
        changes = [made[name] for name in candidate.sources if name in made]
        if changes:
            candidates.append(Candidate(changes[0].sources, candidate.score, changes[0].operations))
        elif all(name in source for name in candidate.sources):
            candidates.append(candidate)
    return replace(ambiguity, candidates=tuple(candidates))
