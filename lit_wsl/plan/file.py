"""Plans as files: JSON or YAML that a person reads, edits and commits; loading checks everything.

The format, version 1::

    {
      "format": "lit_wsl.plan", "version": 1,
      "source": {"label": "old.ckpt", "parameters": 148, ..., "fingerprint": "sha256 of names and shapes"},
      "target": {...},
      "proof": "not tested", "options": {...}, "notes": [...],
      "order": {"entries": "tree"},
      "defaults": {"kind": "parameter", "score": 1.0, "margin": 1.0, "reason": "same name and shape"},
      "entries": [
        {"map": "layers.{0..11}.attn.q.weight -> blocks.{0..11}.attn.wq.weight", "shape": [768, 768]},
        {"map": "layers.{0..11}.qkv.weight -> blocks.{0..11}.[q,k,v].weight", "shape": [2304, 768],
         "ops": [{"split": {"dim": 0, "sizes": [768, 768, 768]}}], "score": 0.93, "margin": 0.4}
      ],
      "ambiguous": [...], "unmatched_source": [...], "unmatched_target": [...]
    }

The notation of names is that of :mod:`lit_wsl.plan.notation`. ``order`` says how the entries of all lines come
together: by modules (``tree``), by name (``sorted``) or line by line (``listed``). A value that is not the same for all
entries of a line is a list of ``[count, value]`` pairs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

from lit_wsl.errors import CheckpointError, PlanError
from lit_wsl.files import atomic_write_text, not_found
from lit_wsl.plan.entries import (
    Ambiguity,
    Candidate,
    Decided,
    Measured,
    PlanData,
    PlanEntry,
    Proof,
    ProofBy,
    SideSummary,
    Unmatched,
    measured_dict,
)
from lit_wsl.plan.fields import Fields, parse_json, parse_yaml, shown
from lit_wsl.plan.notation import ORDERS, Budget, Line, Order, Pattern, expand, fold_rows, parse_side, unfold_order
from lit_wsl.plan.operations import OPERATIONS, Operation, operation_from_dict, run_shapes
from lit_wsl.structure.description import Kind, Shape, require_path

T = TypeVar("T")
FORMAT = "lit_wsl.plan"
VERSION = 1
SECTIONS = ("entries", "ambiguous", "unmatched_source", "unmatched_target")


def plan_to_document(plan: PlanData) -> dict[str, Any]:
    """A plan as plain data."""
    defaults: dict[str, Any] = {
        "kind": _most_common((e.kind for e in plan.entries), "parameter"),
        "score": _most_common((float(e.score) for e in plan.entries), 1.0),
        "margin": _most_common((float(e.margin) for e in plan.entries), 1.0),
        "reason": _most_common((e.reason for e in plan.entries), ""),
        "evidence": _most_common((e.evidence for e in plan.entries), ""),
    }
    folded = {
        "entries": _entries(plan, defaults),
        "ambiguous": _ambiguous(plan),
        "unmatched_source": _unmatched(plan.unmatched_source),
        "unmatched_target": _unmatched(plan.unmatched_target),
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": dataclasses.asdict(plan.source),
        "target": dataclasses.asdict(plan.target),
        "proof": plan.proof,
        **({"proof_by": plan.proof_by} if plan.proof_by else {}),
        **({"measured": measured_dict(plan.measured)} if plan.measured is not None else {}),
        "options": _sorted_keys(plan.options),
        "notes": list(plan.notes),
        "order": {section: order for section, (_, order) in folded.items() if order != "tree"},
        "defaults": defaults,
        **{section: lines for section, (lines, _) in folded.items()},
    }


def _most_common(values: Any, otherwise: Any) -> Any:
    counts = Counter(values)  # keeps the order of appearance, so ties are always decided alike
    return max(counts, key=counts.__getitem__) if counts else otherwise


def _sorted_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted_keys(value[key]) for key in sorted(value)}
    return [_sorted_keys(v) for v in value] if isinstance(value, (list, tuple)) else value


def _entries(plan: PlanData, defaults: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Order]:
    rows = [(entry.sources, entry.targets) for entry in plan.entries]
    keys: list[Hashable] = [(e.operations, e.source_shapes, e.target_shapes, e.kind) for e in plan.entries]
    lines, order = fold_rows(rows, keys)
    documents = []
    for line in lines:
        members = [plan.entries[m] for m in line.members]
        first = members[0]
        document = _arrow(line)
        if first.source_shapes:
            document |= _shapes(first.source_shapes)
        if first.operations:
            document["ops"] = _compact(first.operations)
        if first.target_shapes != derived_shapes(first.operations, first.source_shapes, len(first.targets)):
            document["target_shapes"] = [list(shape) for shape in first.target_shapes]
        document |= {
            key: value
            for key, value in (
                ("kind", first.kind),
                ("score", _runs([float(member.score) for member in members])),
                ("margin", _runs([float(member.margin) for member in members])),
                ("reason", _runs([member.reason for member in members])),
                ("evidence", _runs([member.evidence for member in members])),
            )
            if value != defaults[key]
        }
        documents.append(document)
    return documents, order


def _ambiguous(plan: PlanData) -> tuple[list[dict[str, Any]], Order]:
    rows = [(*(c.sources for c in a.candidates), a.targets) for a in plan.ambiguous]
    keys: list[Hashable] = [
        (a.shape, a.reason, tuple((float(c.score), c.operations) for c in a.candidates)) for a in plan.ambiguous
    ]
    lines, order = fold_rows(rows, keys)
    documents = []
    for line in lines:
        first = plan.ambiguous[line.members[0]]
        candidates = []
        for side, candidate in zip(line.sides, first.candidates):
            operations = {"ops": _compact(candidate.operations)} if candidate.operations else {}
            candidates.append({"sources": _side(side), "score": float(candidate.score), **operations})
        said = {"targets": _side(line.sides[-1]), "shape": list(first.shape), "reason": first.reason}
        documents.append({**said, "candidates": candidates})
    return documents, order


def _unmatched(items: Sequence[Unmatched]) -> tuple[list[dict[str, Any]], Order]:
    lines, order = fold_rows([((u.name,),) for u in items], [(u.shape, u.kind, u.reason) for u in items])
    firsts = [items[line.members[0]] for line in lines]
    return [
        {"name": _side(line.sides[0]), "shape": list(first.shape), "kind": first.kind, "reason": first.reason}
        for line, first in zip(lines, firsts)
    ], order


def _arrow(line: Line) -> dict[str, Any]:
    source, target = line.sides
    if isinstance(source, str) and isinstance(target, str):
        return {"map": f"{source} -> {target}"}
    return {"sources": _side(source), "targets": _side(target)}


def _side(side: str | tuple[str, ...]) -> str | list[str]:
    """A pattern, or the exact names where they cannot be one."""
    return side if isinstance(side, str) else list(side)


def _shapes(shapes: Sequence[Shape]) -> dict[str, Any]:
    """One shape for all sources, or one for each."""
    if len(set(shapes)) == 1:
        return {"shape": list(shapes[0])}
    return {"shapes": [list(shape) for shape in shapes]}


def _runs(values: Sequence[Any]) -> Any:
    """The value, or ``[count, value]`` pairs where it changes."""
    runs: list[list[Any]] = []
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1][0] += 1
        else:
            runs.append([1, value])
    return runs[0][1] if len(runs) == 1 else runs


def _compact(operations: Sequence[Operation]) -> list[Any]:
    return [compact_operation(operation) for operation in operations]


def compact_operation(operation: Operation) -> str | dict[str, Any]:
    """An operation as people write it: its name, or its name with the arguments that differ from the defaults.

    >>> from lit_wsl.plan.operations import Split, Transpose
    >>> compact_operation(Transpose()), compact_operation(Split(0, (2, 2)))
    ('transpose', {'split': {'dim': 0, 'sizes': [2, 2]}})
    """
    arguments = operation.to_dict()
    name = arguments.pop("op")
    for key, field in type(operation).__dataclass_fields__.items():
        if arguments.get(key) == field.default:
            del arguments[key]
    return {name: arguments} if arguments else name


def derived_shapes(operations: Sequence[Operation], shapes: Sequence[Shape], targets: int) -> tuple[Shape, ...] | None:
    """The shapes of the targets as they follow from those of the sources; ``None`` if they don't."""
    if not shapes:
        return ()
    try:
        derived = tuple(run_shapes(operations, shapes))
    except (PlanError, IndexError, ValueError):
        return None
    return derived if len(derived) == targets else None


_LINE_BREAKS = re.compile("[\x7f-\xa0\u2028\u2029\ufeff]")


def save_plan(plan: PlanData, path: str | Path) -> None:
    """Write a plan as JSON, or as YAML by the suffix, atomically; the same plan always gives the same bytes."""
    atomic_write_text(path, plan_to_text(plan, yaml=Path(path).suffix.lower() in (".yaml", ".yml")))


def load_plan(path: str | Path) -> dict[str, Any]:
    """Read the fields of a plan from JSON or YAML, and check everything in it."""
    require_path(path, "plan")
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise PlanError(f"{path}: {size:,} bytes are too many for a plan (at most {MAX_BYTES:,}).")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise not_found(path) from error
    except OSError as error:
        raise CheckpointError(f"Cannot read the plan {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is not a plan: it is not UTF-8 text (byte {error.start}).") from error
    try:
        return plan_from_text(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def plan_to_text(plan: PlanData, *, yaml: bool = False) -> str:
    """A plan as the text of its file."""
    try:
        document = plan_to_document(plan)
        if yaml:
            import yaml as pyyaml

            plain = json.dumps(document, allow_nan=False, ensure_ascii=False)
            readable = not _LINE_BREAKS.search(plain)  # PyYAML folds these into spaces unless it escapes them
            return pyyaml.safe_dump(
                document, sort_keys=False, width=120, allow_unicode=readable, default_flow_style=None
            )
        return _json(document)
    except PlanError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"the plan cannot be written as plain data: {error}.") from error


def _json(document: Mapping[str, Any]) -> str:
    """JSON with one line per entry, so that changes are easy to read in a diff."""

    def one_line(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    fields = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"    {one_line(row)}" for row in value)
            fields.append(f"  {one_line(key)}: [\n{rows}\n  ]")
        else:
            fields.append(f"  {one_line(key)}: {one_line(value)}")
    text = "{\n" + ",\n".join(fields) + "\n}\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair in a name; JSON can escape it
        return json.dumps(document, allow_nan=False, indent=1) + "\n"
    return text


MAX_BYTES = 256 * 2**20
Rows = list[tuple[tuple[str, ...], ...]]


def plan_from_text(text: str) -> dict[str, Any]:
    """Read the fields of a plan from the text of a JSON or YAML file."""
    document = parse_json(text) if text.lstrip()[:1] == "{" else parse_yaml(text)
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise PlanError(f'this is not a plan: a plan is a mapping that starts with "format": "{FORMAT}".')
    return _PlanReader(text, Fields(document, "the plan")).read()


def _parse_measured(document: Fields) -> Measured:
    data = document.mapping("measured")
    data.allow(*(f.name for f in dataclasses.fields(Measured)))
    decisions = []
    for line in data.sequence("decisions", []):
        try:
            known: dict[str, Any] = {f.name: line[f.name] for f in dataclasses.fields(Decided) if f.name in line}
            known |= {key: _loss(known[key]) for key in ("loss", "rival_loss", "risk") if key in known}
            decisions.append(Decided(**known))
        except (TypeError, ValueError, KeyError) as error:
            raise data.error("decisions", f"must be a list of decisions ({error})") from error
    kinds = (int, float, type(None))
    numbers = {
        key: _loss(data.get(key, 0.0, kinds, "a number"))
        for key in ("fresh", "transferred", "passes", "seconds", "spread")
    }
    return Measured(**numbers, decisions=tuple(decisions))


def _loss(value: Any) -> float:
    return math.nan if value is None else float(value)


class _PlanReader:
    """Reads the document; keeps what all entries share."""

    def __init__(self, text: str, document: Fields) -> None:
        self.text = text
        self.document = document
        self.budget = Budget()

    def read(self) -> dict[str, Any]:
        document = self.document
        document.allow(
            *("format", "version", "source", "target", "proof", "proof_by", "measured", "options", "notes"),
            *("order", "defaults", *SECTIONS),
        )
        version = document.integer("version", 1)
        if version > VERSION:
            raise PlanError(f"it has version {version}, but this lit_wsl reads version {VERSION}; install a newer one.")
        order = document.mapping("order", {})
        order.allow(*SECTIONS)
        self.order = {section: order.choice(section, ORDERS, "tree") for section in SECTIONS}
        self.defaults = document.mapping("defaults", {})
        self.defaults.allow("kind", "score", "margin", "reason", "evidence")
        entries = self.entries()
        filled = {name for entry in entries for name in entry.targets}
        used = {name for entry in entries for name in entry.sources}
        # who adds an entry by hand need not find and remove the name from the lists of what was left over
        ambiguous = (a for a in self.ambiguous() if not all(name in filled for name in a.targets))
        return dict(  # noqa: C408
            entries=entries,
            source=_parse_summary(document.mapping("source")),
            target=_parse_summary(document.mapping("target")),
            ambiguous=tuple(ambiguous),
            unmatched_source=tuple(u for u in self.unmatched("unmatched_source") if u.name not in used),
            unmatched_target=tuple(u for u in self.unmatched("unmatched_target") if u.name not in filled),
            options=document.plain_mapping("options", {}),
            proof=document.choice("proof", get_args(Proof), "not tested"),
            proof_by=document.choice("proof_by", get_args(ProofBy), ""),
            measured=_parse_measured(document) if "measured" in document else None,
            notes=tuple(document.strings("notes", [])),
        )

    def entries(self) -> tuple[PlanEntry, ...]:
        lines = self.lines("entries")
        groups = [self.line_entries(fields) for fields in lines]
        owner: dict[str, int] = {}
        for number, group in enumerate(groups):
            for target in (target for entry in group for target in entry.targets):
                if target in owner:
                    where = lines[number].where
                    other = "the same entry" if owner[target] == number else lines[owner[target]].where
                    raise PlanError(f"{where}: target {target!r} is already filled by {other}; remove one of the two.")
                owner[target] = number
        return tuple(self.ordered("entries", groups, lambda entry: entry.targets[0]))

    def ordered(self, section: str, groups: Sequence[Sequence[T]], name: Callable[[T], str]) -> list[T]:
        """What all lines of a section stand for, in the order that the plan had it in."""
        rows = [row for group in groups for row in group]
        ends = pairwise(accumulate(map(len, groups), initial=0))
        lines = [Line((), tuple(range(start, end))) for start, end in ends]
        return [rows[i] for i in unfold_order(self.order[section], lines, [name(row) for row in rows])]

    def line_entries(self, fields: Fields) -> list[PlanEntry]:
        fields.allow(
            *("map", "sources", "targets", "shape", "shapes", "target_shapes"),
            *("ops", "kind", "score", "margin", "reason", "evidence"),
        )
        rows = fields.named(lambda: self.expand_arrow(fields))
        operations = _operations(fields)
        kind: Kind = fields.choice("kind", get_args(Kind), self.defaults.choice("kind", get_args(Kind), "parameter"))
        scores = fields.runs("score", len(rows), Fields.share, self.defaults.share("score", 1.0))
        margins = fields.runs("margin", len(rows), Fields.share, self.defaults.share("margin", 1.0))
        reasons = fields.runs("reason", len(rows), Fields.string, self.defaults.string("reason", ""))
        kinds = fields.runs("evidence", len(rows), Fields.string, self.defaults.string("evidence", ""))
        sources, targets = map(len, rows[0])
        shapes = _source_shapes(fields, sources)
        target_shapes = _target_shapes(fields, operations, shapes, sources, targets)
        return [
            PlanEntry(row[0], row[1], operations, shapes, target_shapes, kind, score, margin, reason, evidence)
            for row, score, margin, reason, evidence in zip(rows, scores, margins, reasons, kinds)
        ]

    def expand_arrow(self, fields: Fields) -> Rows:
        if "map" in fields:
            if "sources" in fields or "targets" in fields:
                raise fields.error("map", "stands in place of 'sources' and 'targets'; give one of the two")
            sides = fields.string("map").split("->")
            if len(sides) != 2:
                raise fields.error("map", 'must have one arrow, as in "old.name -> new.name"')
            return self.expand_sides(list(sides))
        return self.expand_sides([fields.names("sources"), fields.names("targets")])

    def expand_sides(self, sides: Sequence[str | tuple[str, ...]]) -> Rows:
        """Expand patterns; exact names (a tuple) stand for themselves."""
        parsed: list[Sequence[Pattern]] = []
        for side in sides:
            if isinstance(side, str):
                parsed.append(parse_side(side.strip(), self.budget))
            else:
                parsed.append([(name,) for name in side])
        return list(expand(parsed, self.budget))

    def ambiguous(self) -> list[Ambiguity]:
        return self.ordered(
            "ambiguous", list(map(self.line_questions, self.lines("ambiguous"))), lambda a: a.targets[0]
        )

    def line_questions(self, fields: Fields) -> list[Ambiguity]:
        fields.allow("targets", "shape", "reason", "candidates")
        candidates = [Fields(c, f"{fields.where}, a candidate") for c in fields.sequence("candidates")]
        for candidate in candidates:
            candidate.allow("sources", "score", "ops")
        sides = [*(candidate.names("sources") for candidate in candidates), fields.names("targets")]
        rows = fields.named(lambda: self.expand_sides(sides))
        shape, reason = _shape(fields, "shape"), fields.string("reason", "")
        parts = [(candidate.share("score"), _operations(candidate)) for candidate in candidates]
        return [
            Ambiguity(
                row[-1], tuple(Candidate(names, score, ops) for names, (score, ops) in zip(row, parts)), shape, reason
            )
            for row in rows
        ]

    def unmatched(self, section: str) -> list[Unmatched]:
        return self.ordered(section, [self.line_unmatched(f) for f in self.lines(section)], lambda u: u.name)

    def line_unmatched(self, fields: Fields) -> list[Unmatched]:
        fields.allow("name", "shape", "kind", "reason")
        rows = fields.named(lambda: self.expand_sides([fields.names("name")]))
        shape, reason = _shape(fields, "shape"), fields.string("reason", "")
        kind: Kind = fields.choice("kind", get_args(Kind), "parameter")
        return [Unmatched(name, shape, kind, reason) for row in rows for name in row[0]]

    def lines(self, section: str) -> list[Fields]:
        """The lines of a section, each with a way to say where it is."""
        rows = self.document.sequence(section, None if section == "entries" else [])
        return [Fields(row, _Where(self.text, section, number, row)) for number, row in enumerate(rows)]


class _Where:
    """Says where an entry is; only looked for when a message needs it."""

    def __init__(self, text: str, section: str, number: int, row: Any) -> None:
        self.text, self.section, self.number, self.row = text, section, number, row

    def __str__(self) -> str:
        label = {"entries": "entry"}.get(self.section, self.section)
        named = [self.row.get(key) for key in ("map", "targets", "name")] if isinstance(self.row, Mapping) else []
        name = next((n for n in named if isinstance(n, str) and n), None)
        if name is None:
            return f"{label} {self.number + 1}"
        at = self.text.find(name)
        line = f"line {self.text.count(chr(10), 0, at) + 1}, " if at >= 0 else ""
        return f"{line}{label} {self.number + 1} ({shown(name)})"


def _parse_summary(fields: Fields) -> SideSummary:
    names = [field.name for field in dataclasses.fields(SideSummary)]
    fields.allow(*names)
    texts = ("label", "fingerprint")
    return SideSummary(**{n: fields.string(n, "") if n in texts else fields.integer(n, 0) for n in names})  # type: ignore[arg-type]


def _operations(fields: Fields) -> tuple[Operation, ...]:
    made: list[Operation] = []
    for item in fields.sequence("ops", []):
        if isinstance(item, str):
            name, arguments = item, dict[str, Any]()
        elif isinstance(item, Mapping) and len(item) == 1 and isinstance(next(iter(item.values())), Mapping):
            ((name, arguments),) = item.items()
        else:
            raise fields.error(
                "ops",
                f'takes names or {{"name": {{arguments}}}}, such as {{"split": {{"dim": 0, "sizes": [2, 2]}}}}; '
                f"known are {', '.join(sorted(OPERATIONS))}; got {shown(item)}",
            )
        try:
            made.append(operation_from_dict({**arguments, "op": name}))
        except (PlanError, TypeError) as error:
            raise fields.error("ops", f"is wrong: {error}") from error
    return tuple(made)


def _shape(fields: Fields, key: str) -> Shape:
    return _as_shape(fields, key, fields.sequence(key, []))


def _as_shape(fields: Fields, key: str, value: Any) -> Shape:
    sizes = tuple(value) if isinstance(value, list) else None
    if sizes is None or len(sizes) > 64 or any(type(n) is not int or not 0 <= n < 2**62 for n in sizes):
        raise fields.error(key, f"takes shapes such as [768, 768], got {shown(value)}")
    return sizes


def _source_shapes(fields: Fields, sources: int) -> tuple[Shape, ...]:
    if "shape" in fields:
        if "shapes" in fields:
            raise fields.error("shape", "is the shape of all sources, 'shapes' gives one for each; give one of the two")
        return (_shape(fields, "shape"),) * sources
    shapes = tuple(_as_shape(fields, "shapes", shape) for shape in fields.sequence("shapes", []))
    if shapes and len(shapes) != sources:
        raise fields.error("shapes", f"must give one shape for each of the {sources} sources, got {len(shapes)}")
    return shapes


def _target_shapes(
    fields: Fields, operations: tuple[Operation, ...], shapes: tuple[Shape, ...], sources: int, targets: int
) -> tuple[Shape, ...]:
    """The shapes of the targets; they must follow from the operations."""
    if not operations and sources != targets:
        raise fields.error(
            "ops", f"must say how {sources} sources become {targets} targets: concat, split, stack, unstack, fan_out..."
        )
    derived = derived_shapes(operations, shapes, targets)
    if derived is None:
        try:
            got: object = [list(s) for s in run_shapes(operations, shapes)]
        except (PlanError, IndexError, ValueError) as error:
            raise fields.error("ops", f"does not fit the sources: {error}") from error
        raise fields.error("ops", f"gives {len(got)} tensors for {targets} targets")  # type: ignore[arg-type]
    if "target_shapes" not in fields:
        return derived
    given = tuple(_as_shape(fields, "target_shapes", shape) for shape in fields.sequence("target_shapes"))
    if given and len(given) != targets:
        raise fields.error("target_shapes", f"must give one shape for each of the {targets} targets, got {len(given)}")
    if given and derived and given != derived:
        raise fields.error("target_shapes", f"is {list(given)}, but the operations give {list(derived)}")
    return given
