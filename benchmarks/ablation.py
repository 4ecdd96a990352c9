"""What each rule of the matching adds: switched off one at a time, over pairs whose truth is known.

    python -m benchmarks.ablation --split first --pairs 50 --json benchmarks/results/ablation.json
    python -m benchmarks.ablation --gauntlet ''          the pairs of public implementations, by name
    python -m benchmarks.ablation --written --rules twins  renamings written by hand

Three sorts of rules: *kinds* of evidence (a decision of that kind is not taken, and the tensors go on to what comes
after it), *guards* that keep a decision from being taken, and *means* such as the second pass. A pair is transferred
again only where its plan is another one. ``right`` and ``wrong`` are tensors more (+) or less (-) than with the rule:
a kind that adds nothing loses no right tensor, a guard that adds nothing gains no wrong one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import pkgutil
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

import lit_wsl.matching
from benchmarks.refactors.__main__ import quiet
from benchmarks.refactors.operators import REGIMES, Regime
from benchmarks.refactors.pair import Pair, drawn_pair, run
from benchmarks.refactors.structures import SPLITS, Split
from lit_wsl.errors import LitWslError
from lit_wsl.matching.alignment import BY_HOME
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.matching.regions import Decision, Tie
from lit_wsl.matching.risks import _TOLD
from lit_wsl.transfer.api import prepare_transfer
from lit_wsl.transfer.sides import Source, Target

Patch = tuple[str, Callable[[Any], Any]]  # a name in the matching, and what takes its place, given what stands there


@dataclass(frozen=True)
class Rule:
    """A rule, and what it takes to switch it off."""

    sort: str
    name: str
    patches: tuple[Patch, ...]


class always:  # noqa: N801 - reads as a function
    """A function that gives the same whatever it is asked."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, _: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.value


def first(place: int) -> Callable[[Any], Any]:
    """A function that gives one of its arguments back."""
    return lambda _: lambda *args, **kwargs: args[place]


def without_kind(kind: str) -> tuple[Patch, ...]:
    """No decision of one kind of evidence is taken."""

    def is_off(cell: str | None) -> bool:
        return cell is not None and cell.partition(", ")[0] == kind  # with all its varieties

    def take(original: Any) -> Any:
        def taken(self: Any, decision: Any, s: Any, t: Any) -> Any:
            decision.pairs = [p for p in decision.pairs if not is_off(p.cell)]
            return original(self, decision, s, t)

        return taken

    def by_order(original: Any) -> Any:
        def cell(*args: Any) -> str | None:
            found: str | None = original(*args)
            return None if is_off(found) else found

        return cell

    def of_parts(original: Any) -> Any:
        def cell(*args: Any) -> str:
            found: str = original(*args)
            return "" if is_off(found) else found

        return cell

    patches: tuple[Patch, ...] = (("RegionMatch._take", take), ("order_cell", by_order), ("fusion:_cell", of_parts))
    return (*patches, ("RegionMatch._by_home", always(()))) if kind == BY_HOME else patches


def only_equal_numbers(original: Any) -> Any:
    def found(*args: Any) -> Any:
        answer = original(*args)
        return None if answer is not None and answer[1] != "numbers" else answer

    return found


def no_evidence(original: Any) -> Any:
    """An aligner that learned nothing in the pass before."""

    def aligner(options: Any, builder: Any, evidence: Any, forbidden: Any, sides: Any) -> Any:
        return original(options, builder, type(evidence)(), forbidden, sides)

    return aligner


def one_by_one(_: Any) -> Any:
    """Order that a tie follows pair by pair, whatever speaks against the others of it."""

    def follow(self: Any, tie: Any, cell: str) -> None:
        decision = Decision()
        for f, g in zip(tie.sources, tie.targets):
            if len(f.members) == len(g.members):
                self.aligner.classes._zip(f, g, cell, decision, self.region)
        for p in decision.pairs:
            judged, why = self.aligner.classes.judge(p, self.region)
            if why:
                self._doubt(Tie.of(p.source, p.target, self.region, why))
            else:
                self._take_pair(replace(judged, first=False))
        for inner in decision.ties:
            self._doubt(inner)

    return follow


def as_they_are(_: Any) -> Any:
    return lambda self, match: (match[2], "")


GUARDS = (
    ("another head", (("other_head", always(False)),)),
    ("words of a neighbour", (("ClassSolver._near", always(frozenset())),)),
    ("letters of an attention", (("letters_apart", always(False)),)),
    ("words that mean the opposite", (("_are_opposite", always(False)),)),
    ("a namesake of another size", (("_has_namesake", always(False)),)),
    ("a function of the other's values", (("_is_function", always(False)),)),
    ("renamed alone", (("renamed_alone", always(False)),)),
    ("counted to another number", (("counted_apart", always(False)), ("_is_number_taken", always(False)))),
    ("counted the other way", (("counted_down", always(False)),)),
    ("blocks that stand elsewhere too", (("_repeats_elsewhere", always(False)),)),
    ("names against an order", (("against_order", always("")),)),
    ("copies of one network", (("one_of_copies", lambda _: lambda source, target: (source, None)),)),
    ("numbers that count alike", (("Region.same_numbers", always(True)),)),
    ("queries, keys, values in another order", (("spell_otherwise", always(False)),)),
    ("runs in another order", (("RegionMatch._runs_otherwise", always(False)),)),
    ("a tie follows order together", (("RegionMatch._follow_order", one_by_one),)),
    ("where norms may have moved", (("is_moved", always(False)),)),
    ("lists registered the other way round", (("runs_apart", always(False)),)),
    ("blocks that stand the other way round", (("is_mirrored", always(False)),)),
    ("lists of sizes that run backwards", (("lists_backwards", always(frozenset())),)),
    ("numbers that are names", (("_number_names", always(False)),)),
    ("a list that goes on elsewhere", (("_counts_on", always(False)),)),
    ("lists in each other, crosswise", (("_crosswise", always(())), ("_may_be_crosswise", always(False)))),
    ("lists renumbered beside", (("Renumbered.deny", always(False)),)),
    ("front and end of a model", (("are_front_and_end", always(False)),)),
    ("letters of twins", (("lettered_apart", always(False)),)),
    ("towers that share nothing", (("_stand_in_other_towers", always(False)),)),
    ("a module left without its layer", (("_left_home", always(False)),)),
    ("lists in lists exchanged", (("_are_lists_exchanged", always(False)),)),
    ("a layer's weight and a tensor alone", (("_is_of_other_make", always(False)),)),
    ("numbers in a row kept beside", (("_leaves_row", always(False)),)),
    ("names kept apart", (("are_kept_apart", always(False)),)),
    ("the last ones left, of other names", (("are_others", always(False)),)),
    ("a twin elsewhere", (("RegionMatch._parts_twins", always(False)),)),
    ("its own path, in another size", (("RegionMatch._changed_size", always(False)),)),
    ("small modules of one size", (("RegionMatch._coincides", always(False)),)),
    ("alphabetical registration", (("by_alphabet", always(False)),)),
    ("modules in pieces", (("has_order", always(True)),)),
    ("transposed though biases say no", (("_turned_for_nothing", always(False)),)),
    ("turned, by names", (("ClassSolver._named_turned", always(False)),)),
    ("feed-forwards that fit turned", (("ClassSolver._leave_turned", always(None)),)),
    ("words of a task at the end", (("_is_for_more", always(False)),)),
    ("order: namesakes moved", (("_moves_namesakes", always(False)),)),
    ("order: counted backwards", (("_counted_backwards", always(False)), ("told_otherwise", always(False)))),
    ("order: the letters of a formula", (("_leaves_formula", always(False)),)),
    ("order: lists cut", (("_is_list_cut", always(False)),)),
    ("order: twins renamed", (("_are_twins_renamed", always(False)),)),
    ("order: towers", (("_are_towers", always(False)),)),
    ("order kept elsewhere", (("kept_elsewhere", always("")),)),
    ("the same path is not given away", (("planner:twins_of", always({})),)),
    ("factors of a weight", (("same_roles", always(True)),)),
    ("a bias goes with its weight", (("companions_together", first(0)),)),
    ("scale and shift", (("same_kind", always(True)),)),
    ("which way round a matrix is stored", (("Orientation.judge", as_they_are),)),
    ("layouts that nothing shows", (("hidden_layouts", always({})),)),
    ("order of execution", (("_with_execution_order", first(0)),)),
    ("minimum score", (("MatchingOptions.floor", lambda _: property(lambda self: 0.0)),)),
    ("risks", (("may_load", always(True)),)),
)
MEANS = (
    ("second pass", (("planner:Aligner", no_evidence),)),
    ("fusing and splitting", (("find_fusions", always([])),)),
    ("stacking", (("fold_run", always(None)),)),
    ("families cut by a number", (("evened", lambda _: lambda fs, ft: (fs, ft)),)),
    ("norms and vectors taken out of modules", (("RegionMatch._loosen", lambda _: lambda self, s, t: (s, t)),)),
    ("wrapped layers", (("may_wrap", always(False)),)),
    ("members that only ascend", (("number_map", only_equal_numbers),)),
    ("buffers", (("match_buffers", always([])),)),
)


def rules() -> list[Rule]:
    """Every rule that can be switched off."""
    kinds = [Rule("kind", kind, without_kind(kind)) for kind in _TOLD]
    return [*kinds, *(Rule("guard", *row) for row in GUARDS), *(Rule("means", *row) for row in MEANS)]


def _matching_modules() -> Iterator[Any]:
    for found in pkgutil.iter_modules(lit_wsl.matching.__path__):
        yield importlib.import_module(f"lit_wsl.matching.{found.name}")


def listening(rule: Rule, heard: set[str]) -> Rule:
    """Patches that change nothing, but tell whether a rule was asked; of one that may be silenced, whether it spoke."""

    def wrapped(instead: Any) -> Callable[[Any], Any]:
        def wrap(original: Any) -> Any:
            if not callable(original):
                heard.add(rule.name)
                return original

            def asked(*args: Any, **kwargs: Any) -> Any:
                answer = original(*args, **kwargs)
                if not isinstance(instead, always) or answer != instead.value:
                    heard.add(rule.name)
                return answer

            return asked

        return wrap

    return Rule(rule.sort, rule.name, tuple((path, wrapped(instead)) for path, instead in rule.patches))


@contextlib.contextmanager
def switched_off(rule: Rule | None) -> Iterator[bool]:
    """Without a rule; yields whether everything that it takes was found."""
    with contextlib.ExitStack() as stack:
        complete = True
        for path, instead in rule.patches if rule else ():
            module, _, name = path.rpartition(":")
            owner, _, attribute = name.rpartition(".")
            places = []
            for place in _matching_modules():
                if module and place.__name__.rpartition(".")[2] != module:
                    continue
                home = getattr(place, owner, None) if owner else place
                if home is not None and attribute in vars(home) and home not in places:
                    places.append(home)
            complete = complete and bool(places)
            for home in places:
                stack.enter_context(mock.patch.object(home, attribute, instead(vars(home)[attribute])))
        yield complete


@dataclass(frozen=True)
class Case:
    """A pair of models: how to plan, and how to count what a transfer gets right and wrong."""

    plan: Callable[[], Any]
    score: Callable[[], Counter[str]]


def _planned(source: Source, target: Target) -> Any:
    try:
        plan = prepare_transfer(source, target, MatchingOptions(), min_coverage=0.0).plan
    except LitWslError as error:
        return repr(error)
    return [(e.sources, e.targets, e.operations) for e in plan.entries]


def refactored(split: Split, regime: Regime, seed: int, sample: bool, folder: Path) -> Case:
    """A random refactor."""
    pair = drawn_pair(split, regime, seed, sample=sample)
    given: Any = pair.source(folder)
    source = Source.open(given if isinstance(given, Path) else dict(given))
    target = Target.of(pair.new, [((torch.zeros(1),), {})] if pair.config.sample else [])

    def score() -> Counter[str]:
        return Counter(run(Pair(pair.config)).counts)

    return Case(lambda: _planned(source, target), score)


def implementations(name: str) -> Iterator[Case]:
    """Pairs of public implementations whose names contain this, in the first two modes."""
    from benchmarks.gauntlet import all_pairs
    from benchmarks.gauntlet.score import Arena

    for pair in all_pairs():
        if not re.search(name, pair.name):
            continue
        arena = Arena.of(pair, prove=False)
        source = Source.open(dict(arena.source_state))
        for mode in ("state_dict", "sample"):
            target = Target.of(arena.target, [pair.target_sample()] if mode == "sample" else [])

            def score(arena: Any = arena, mode: Any = mode) -> Counter[str]:
                found = arena.lit_wsl(mode)
                return Counter(right=found.right, wrong=found.wrong, missing=found.missing)

            yield Case(lambda source=source, target=target: _planned(source, target), score)  # type: ignore[misc]


def written(every: int, folder: Path) -> Iterator[Case]:
    """Renamings that a person wrote to break the matching, but for those whose names deceive; one of so many."""
    from benchmarks.written.__main__ import cases as all_cases
    from benchmarks.written.measure import measure, sides

    for found in [case for case in all_cases() if not case.liar][::every]:
        old, new = sides(found)
        state, path = dict(old.state_dict()), folder / "old.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        sources, target = [Source.open(state), Source.open(path)], Target.of(new, [])
        yield Case(
            lambda sources=sources, target=target: [_planned(source, target) for source in sources],  # type: ignore[misc]
            lambda case=found: measure(case).counts,  # type: ignore[misc]
        )


def cases(options: argparse.Namespace, folder: Path) -> Iterator[Case]:
    if options.written:
        yield from written(options.every, folder)
        return
    if options.gauntlet is not None:
        yield from implementations(options.gauntlet)
        return
    for regime in REGIMES if options.regime == "all" else (options.regime,):
        for sample in (False, True):
            for seed in range(options.seed, options.seed + options.pairs):
                yield refactored(options.split, regime, seed, sample, folder)


def compare(case: Case, chosen: Sequence[Rule], counts: dict[str, Counter[str]]) -> None:
    """Count, for every rule, what one pair loses and gains without it."""
    heard: set[str] = set()
    with contextlib.ExitStack() as stack:
        complete = {rule.name: stack.enter_context(switched_off(listening(rule, heard))) for rule in chosen}
        plan, score = case.plan(), None
    for rule in chosen:
        row = counts.setdefault(rule.name, Counter())
        row["gone"] += not complete[rule.name]
        row["heard"] += rule.name in heard
        if rule.name not in heard:
            continue  # what said nothing changes nothing
        with switched_off(rule):
            if case.plan() == plan:
                continue
            row["pairs"] += 1
            after = case.score()
        score = score if score is not None else case.score()
        row["right"] += after["right"] - score["right"]
        row["wrong"] += after["wrong"] - score["wrong"]


def markdown(counts: dict[str, Counter[str]], chosen: Sequence[Rule], total: int, command: str) -> str:
    """The table of the ablation."""
    lines = [f"`{command}`: {total:,} pairs.", "", "| rule off | sort | plans that change | right | wrong |"]
    lines.append("|---|---|---:|---:|---:|")
    for rule in chosen:
        row = counts.get(rule.name, Counter())
        numbers = (
            ("no longer there", "", "") if row["gone"] else (row["pairs"], f"{row['right']:+}", f"{row['wrong']:+}")
        )
        lines.append("| " + " | ".join(map(str, (rule.name, rule.sort, *numbers))) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Switch every rule off in turn, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="first")
    parser.add_argument("--regime", choices=(*REGIMES, "all"), default="all")
    parser.add_argument("--pairs", type=int, default=50, help="pairs per regime, each without and with a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gauntlet", metavar="REGEX", help="instead: pairs of public implementations")
    parser.add_argument("--written", action="store_true", help="instead: renamings written by hand")
    parser.add_argument("--every", type=int, default=1, help="of the written renamings one of so many")
    parser.add_argument("--rules", default="", metavar="REGEX", help="only rules whose name contains this")
    parser.add_argument("--json", type=Path, help="write the counts here, and the table beside it as .md")
    options = parser.parse_args(argv)
    quiet()
    chosen = [rule for rule in rules() if re.search(options.rules, rule.name)]
    counts: dict[str, Counter[str]] = {}
    command = " ".join(["python -m benchmarks.ablation", *(argv or sys.argv[1:])])
    total, text = 0, ""
    with tempfile.TemporaryDirectory() as folder:
        for total, case in enumerate(cases(options, Path(folder)), 1):  # noqa: B007
            compare(case, chosen, counts)
    text = markdown(counts, chosen, total, command)
    print(text)
    if options.json:
        rows = {rule.name: {"sort": rule.sort, **counts.get(rule.name, {})} for rule in chosen}
        options.json.write_text(json.dumps({"command": command, "pairs": total, "rules": rows}, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(f"# The rules of the matching, switched off\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
