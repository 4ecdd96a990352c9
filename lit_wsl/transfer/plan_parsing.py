"""Read plan files that people have edited, and that may be hostile: everything is checked, and all work is bounded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lit_wsl.errors import PlanError
from lit_wsl.structure.info import Kind, Shape
from lit_wsl.transfer.documents import parse_json, parse_yaml
from lit_wsl.transfer.fields import Fields, shown
from lit_wsl.transfer.folding import ORDERS, Line, unfold_order
from lit_wsl.transfer.operations import OPERATIONS, Operation, operation_from_dict
from lit_wsl.transfer.patterns import Budget, Pattern, expand, parse_side
from lit_wsl.transfer.plan import Ambiguity, Candidate, PlanEntry, Proof, SideSummary, TransferPlan, Unmatched
from lit_wsl.transfer.plan_writing import FORMAT, SECTIONS, VERSION, derived_shapes

MAX_BYTES = 256 * 2**20

Rows = list[tuple[tuple[str, ...], ...]]


def parse_plan(text: str) -> TransferPlan:
    """Read a plan from the text of a JSON or YAML file.

    Raises:
        PlanError: If it is not a valid plan; the message names the line, the entry and the field.
    """
    _know_all_operations()
    document = parse_json(text) if text.lstrip()[:1] == "{" else parse_yaml(text)
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise PlanError(f'this is not a plan: a plan is a mapping that starts with "format": "{FORMAT}".')
    return _PlanReader(text, Fields(document, "the plan")).read()


class _PlanReader:
    """Reads the document; keeps what all entries share."""

    def __init__(self, text: str, document: Fields) -> None:
        self.text = text
        self.document = document
        self.budget = Budget()

    def read(self) -> TransferPlan:
        document = self.document
        document.allow(
            "format", "version", "source", "target", "proof", "options", "notes", "order", "defaults", *SECTIONS
        )
        version = document.integer("version", 1)
        if version > VERSION:
            raise PlanError(f"it has version {version}, but this lit_wsl reads version {VERSION}; install a newer one.")
        order = document.mapping("order", {})
        order.allow(*SECTIONS)
        self.order = {section: order.choice(section, ORDERS, "tree") for section in SECTIONS}
        self.defaults = document.mapping("defaults", {})
        self.defaults.allow("kind", "score", "margin", "reason")
        entries = self.entries()
        filled = {name for entry in entries for name in entry.targets}
        used = {name for entry in entries for name in entry.sources}
        # who adds an entry by hand need not find and remove the name from the lists of what was left over
        ambiguous = (a for a in self.ambiguous() if not all(name in filled for name in a.targets))
        return TransferPlan(
            entries=entries,
            source=_parse_summary(document.mapping("source")),
            target=_parse_summary(document.mapping("target")),
            ambiguous=tuple(ambiguous),
            unmatched_source=tuple(u for u in self.unmatched("unmatched_source") if u.name not in used),
            unmatched_target=tuple(u for u in self.unmatched("unmatched_target") if u.name not in filled),
            options=document.plain_mapping("options", {}),
            proof=document.choice("proof", get_args(Proof), "not tested"),
            notes=tuple(document.strings("notes", [])),
        )

    def entries(self) -> tuple[PlanEntry, ...]:
        made: list[PlanEntry] = []
        lines: list[tuple[int, int]] = []  # number of each entry's line, for messages about duplicates
        sections = self.lines("entries")
        rows_of: list[Line] = []
        for number, fields in sections:
            found = self.line_entries(fields)
            rows_of.append(Line((), tuple(range(len(made), len(made) + len(found)))))
            made += found
            lines += [(number, 0)] * len(found)
        owner: dict[str, int] = {}
        for entry, (number, _) in zip(made, lines):
            for target in entry.targets:
                if target in owner:
                    where = sections[number][1].where
                    other = "the same entry" if owner[target] == number else sections[owner[target]][1].where
                    raise PlanError(f"{where}: target {target!r} is already filled by {other}; remove one of the two.")
                owner[target] = number
        order = unfold_order(self.order["entries"], rows_of, [entry.targets[0] for entry in made])
        return tuple(made[i] for i in order)

    def line_entries(self, fields: Fields) -> list[PlanEntry]:
        fields.allow(
            "map", "sources", "targets", "shape", "shapes", "target_shapes", "ops", "kind", "score", "margin", "reason"
        )
        rows = fields.named(lambda: self.expand_arrow(fields))
        operations = _operations(fields)
        kind: Kind = fields.choice("kind", get_args(Kind), self.defaults.choice("kind", get_args(Kind), "parameter"))
        scores = fields.runs("score", len(rows), Fields.share, self.defaults.share("score", 1.0))
        margins = fields.runs("margin", len(rows), Fields.share, self.defaults.share("margin", 1.0))
        reasons = fields.runs("reason", len(rows), Fields.string, self.defaults.string("reason", ""))
        sources, targets = map(len, rows[0])
        shapes = _source_shapes(fields, sources)
        target_shapes = _target_shapes(fields, operations, shapes, sources, targets)
        return [
            PlanEntry(row[0], row[1], operations, shapes, target_shapes, kind, score, margin, reason)
            for row, score, margin, reason in zip(rows, scores, margins, reasons)
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
        made: list[Ambiguity] = []
        lines: list[Line] = []
        for _, fields in self.lines("ambiguous"):
            fields.allow("targets", "shape", "reason", "candidates")
            candidates = [Fields(c, f"{fields.where}, a candidate") for c in fields.sequence("candidates")]
            for candidate in candidates:
                candidate.allow("sources", "score", "ops")
            sides = [*(candidate.names("sources") for candidate in candidates), fields.names("targets")]
            rows = fields.named(lambda sides=sides: self.expand_sides(sides))  # type: ignore[misc]
            shape, reason = _shape(fields, "shape"), fields.string("reason", "")
            parts = [(candidate.share("score"), _operations(candidate)) for candidate in candidates]
            lines.append(Line((), tuple(range(len(made), len(made) + len(rows)))))
            made += [
                Ambiguity(
                    row[-1],
                    tuple(Candidate(names, score, ops) for names, (score, ops) in zip(row, parts)),
                    shape,
                    reason,
                )
                for row in rows
            ]
        order = unfold_order(self.order["ambiguous"], lines, [a.targets[0] for a in made])
        return [made[i] for i in order]

    def unmatched(self, section: str) -> list[Unmatched]:
        made: list[Unmatched] = []
        lines: list[Line] = []
        for _, fields in self.lines(section):
            fields.allow("name", "shape", "kind", "reason")
            rows = fields.named(lambda fields=fields: self.expand_sides([fields.names("name")]))  # type: ignore[misc]
            shape, reason = _shape(fields, "shape"), fields.string("reason", "")
            kind: Kind = fields.choice("kind", get_args(Kind), "parameter")
            count = sum(len(row[0]) for row in rows)
            lines.append(Line((), tuple(range(len(made), len(made) + count))))
            made += [Unmatched(name, shape, kind, reason) for row in rows for name in row[0]]
        order = unfold_order(self.order[section], lines, [u.name for u in made])
        return [made[i] for i in order]

    def lines(self, section: str) -> list[tuple[int, Fields]]:
        """The lines of a section, each with a way to say where it is."""
        rows = self.document.sequence(section, None if section == "entries" else [])
        return [(number, Fields(row, self.where(section, number, row))) for number, row in enumerate(rows)]

    def where(self, section: str, number: int, row: Any) -> _Where:
        return _Where(self.text, section, number, row)


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
    fields.allow("label", "parameters", "parameter_elements", "buffers", "buffer_elements", "fingerprint")
    return SideSummary(
        label=fields.string("label", ""),
        parameters=fields.integer("parameters", 0),
        parameter_elements=fields.integer("parameter_elements", 0),
        buffers=fields.integer("buffers", 0),
        buffer_elements=fields.integer("buffer_elements", 0),
        fingerprint=fields.string("fingerprint", ""),
    )


def _know_all_operations() -> None:
    """Operations that change values live in a module of their own, which registers them when it is imported."""
    if importlib.util.find_spec("lit_wsl.transfer.adapt") is not None:
        importlib.import_module("lit_wsl.transfer.adapt")


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
            got: object = [list(s) for s in _run(operations, shapes)]
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


def _run(operations: tuple[Operation, ...], shapes: tuple[Shape, ...]) -> list[Shape]:
    from lit_wsl.transfer.operations import run_shapes

    return run_shapes(operations, shapes)
