"""Operators that change what things are called, how they are counted, and in which order they are registered."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace

from benchmarks.refactors.network import Numbering, Path, Side, Step
from benchmarks.refactors.operators import LAST, UNORDERED, Apply, lists_of, operator, registered


def _reworded(change: Callable[[str], str], share: float = 1.0) -> Apply:
    """Change names of attributes, each wherever it occurs: a role may be two attributes deep (``conv.0.norm``)."""

    def apply(side: Side, rng: random.Random) -> bool:
        words = {role: side.words[role] for role in sorted(side.used()) if side.words.get(role)}
        parts = sorted({part for word in words.values() for part in word.split(".") if not part.isdigit()})
        changed = {part: change(part) for part in parts if rng.random() < share}
        after = {role: ".".join(changed.get(p, p) for p in word.split(".")) for role, word in words.items()}
        side.words.update(after)
        return after != words

    return apply


def _abbreviated(word: str) -> str:
    return word if len(word) < 5 else word[0] + re.sub("[aeiou]", "", word[1:])


def _initials(word: str) -> str:
    return "".join(w[0] for w in word.split("_") if w) if "_" in word.strip("_") else word


def _camel(word: str) -> str:
    return re.sub(r"(?<=[a-zA-Z])_([a-z])", lambda m: m.group(1).upper(), word)


def _typed(word: str) -> str:
    return f"{word}_layer"


operator("first", "names", name="abbreviate")(_reworded(_abbreviated, 0.7))
operator("second", "names", name="initials")(_reworded(_initials, 0.6))
operator("first", "names", name="camel_case")(_reworded(_camel))
operator("second", "names", weight=0.7, name="say_layer")(_reworded(_typed, 0.5))
operator("first", "names", weight=0.7, name="short_words")(_reworded(lambda w: w[:2], 0.5))
operator("second", "names", weight=0.7, name="new_prefix")(_reworded(lambda w: f"my_{w}", 0.7))


@operator("first", "names", LAST)
def hostile_words(side: Side, rng: random.Random) -> bool:
    """Words that say another role: somebody's joke, or another field's language."""
    misleading = ["output", "input", "weight", "norm", "post", "before", "attention", "key", "scale", "head", "embed"]
    roles = sorted(role for role in side.used() if side.words.get(role))
    for role in rng.sample(roles, min(2, len(roles))):
        side.words[role] = rng.choice(misleading) + rng.choice(["", "_layer", "_2"])
    return bool(roles)


@operator("second", "names", LAST)
def nonsense_words(side: Side, rng: random.Random) -> bool:
    """Words that say nothing."""
    roles = sorted(role for role in side.used() if side.words.get(role))
    for role in rng.sample(roles, min(rng.randint(2, 4), len(roles))):
        side.words[role] = rng.choice(["foo", "thing", "x", "tmp", "zeta", "gizmo", "mod"]) + rng.choice("abcdef")
    return bool(roles)


def _positional(side: Side, parents: Callable[[Path], bool]) -> bool:
    """The members of some modules are called by their place, as in ``nn.Sequential``."""
    members: dict[Path, list[Step]] = {}
    for leaf in sorted(side.leaves, key=lambda leaf: leaf.when):
        for depth, step in enumerate(leaf.path):
            above = leaf.path[:depth]
            if parents(above) and step not in members.setdefault(above, []):
                members[above].append(step)
    chosen = {
        above: steps for above, steps in members.items() if all(s.index is None for s in steps) and len(steps) > 1
    }
    side.leaves = [
        leaf.moved(
            tuple(
                Step(f"={chosen[leaf.path[:depth]].index(step)}") if leaf.path[:depth] in chosen else step
                for depth, step in enumerate(leaf.path)
            )
        )
        for leaf in side.leaves
    ]
    return bool(chosen)


@operator("first", "names", weight=1.0)
def sequential_parts(side: Side, rng: random.Random) -> bool:
    """Feed-forwards and convolutions are sequences: ``mlp.0``, ``mlp.1``."""
    return _positional(side, lambda above: bool(above) and above[-1].role in ("mlp", "ff", "time", "ssm"))


@operator("second", "names", LAST)
def sequential_blocks(side: Side, rng: random.Random) -> bool:
    """Whole blocks are sequences: ``blocks.0.0``, ``blocks.0.1.2``."""
    return _positional(side, lambda above: bool(above) and above[-1].index is not None)


@operator("second", "names", LAST, weight=0.5)
def sequential_model(side: Side, rng: random.Random) -> bool:
    """The top level is a sequence."""
    return _positional(side, lambda above: not above)


def _numbered(change: Callable[[Numbering, random.Random], Numbering], every: bool = False) -> Apply:
    def apply(side: Side, rng: random.Random) -> bool:
        roles = sorted({role for _, role in lists_of(side)})
        for role in roles if every else rng.sample(roles, min(1, len(roles))):
            side.numbering[role] = change(side.numbering.get(role, Numbering()), rng)
        return bool(roles)

    return apply


operator("first", "names", name="count_from_one")(_numbered(lambda n, rng: replace(n, first=1), every=True))
operator("second", "names", LAST, name="count_from_elsewhere")(
    _numbered(lambda n, rng: replace(n, first=rng.choice([2, 3, 9])))
)
operator("first", "names", name="underscored_numbers")(_numbered(lambda n, rng: replace(n, joint="_")))
operator("second", "names", name="glued_numbers")(_numbered(lambda n, rng: replace(n, joint="")))
operator("first", "names", LAST, name="count_down")(_numbered(lambda n, rng: replace(n, down=True)))
operator("second", "names", LAST, name="count_down_from_one")(_numbered(lambda n, rng: replace(n, down=True, first=1)))
operator("second", "names", LAST, weight=0.7, name="count_by_two")(_numbered(lambda n, rng: replace(n, stride=2)))


def _shuffled(parents: Callable[[Path], bool], arrange: Callable[[list[Step], random.Random], list[Step]]) -> Apply:
    """Register the members of some modules in another order; what stands below them stays together."""

    def apply(side: Side, rng: random.Random) -> bool:
        seed = rng.random()
        return registered(
            side, lambda above, steps: arrange(list(steps), random.Random(seed)) if parents(above) else steps
        )

    return apply


def _mixed(steps: list[Step], rng: random.Random) -> list[Step]:
    """Members of one list keep their order among themselves, as a ``ModuleList`` has it."""
    roles = sorted({step.role for step in steps})
    rng.shuffle(roles)
    return sorted(steps, key=lambda step: roles.index(step.role))


def _reversed(steps: list[Step], rng: random.Random) -> list[Step]:
    roles = [step.role for step in reversed(steps)]
    return sorted(steps, key=lambda step: roles.index(step.role))


def _inside_block(above: Path) -> bool:
    return any(step.index is not None for step in above)


operator("first", "order", UNORDERED, weight=3, name="shuffle_blocks")(_shuffled(_inside_block, _mixed))
operator("second", "order", UNORDERED, weight=3, name="shuffle_top")(
    _shuffled(lambda above: not _inside_block(above), _mixed)
)
operator("second", "order", UNORDERED, weight=1.5, name="shuffle_everything")(_shuffled(lambda above: True, _mixed))
operator("first", "order", UNORDERED, name="reverse_blocks")(_shuffled(_inside_block, _reversed))
operator("second", "order", UNORDERED, name="reverse_all")(_shuffled(lambda above: True, _reversed))
operator("first", "order", UNORDERED, name="register_by_role")(
    _shuffled(lambda above: True, lambda steps, rng: sorted(steps, key=lambda s: (s.role, s.index or 0)))
)
for _split, _name in (("first", "norms_apart"), ("second", "norms_at_the_end")):  # as torch.nn's own layers do
    operator(_split, "order", name=_name)(  # type: ignore[arg-type]
        _shuffled(_inside_block, lambda steps, rng: sorted(steps, key=lambda s: "norm" in s.role or "bn" in s.role))
    )


@operator("both", "order", LAST, "target", weight=0.7)
def run_otherwise(side: Side, rng: random.Random) -> bool:
    """The new model runs its leaves in another order than it registers them."""
    places = list(range(len(side.leaves)))
    rng.shuffle(places)
    side.leaves = [replace(leaf, when=place) for leaf, place in zip(side.leaves, places)]
    return True
