"""Layouts that names and shapes can't show: the rows of queries and keys, and patches that were flattened.

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
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lit_wsl.matching.formula import is_query_or_key
from lit_wsl.matching.tree import owner_path
from lit_wsl.matching.words import split_numbers
from lit_wsl.plan.entries import Ambiguity, Candidate, PlanEntry
from lit_wsl.plan.operations import Concat, Reshape, Split
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
        self.speaks = any(_puts_out_words(side, t.shape) for t in tables if t.shape[0] == self.words for side in sides)
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


def _puts_out_words(side: ModelDescription, vocabulary: Shape) -> bool:
    """Whether a head of the vocabulary's shape stands beside it, outside of all blocks, or is tied to it."""
    alike = [i.name for i in side.parameters if i.shape == vocabulary and not any(c.isdigit() for c in i.name)]
    return len(alike) > 1 or any(first in alike for first in side.tied.values())


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
