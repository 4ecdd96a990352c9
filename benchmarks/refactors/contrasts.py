"""Which words name different things: those of modules that stand beside each other in public code.

    python -m benchmarks.refactors.contrasts            in the environment of the benchmarks; some minutes
    python -m benchmarks.refactors.contrasts --code DIR also reads the packages of a folder, some minutes, filled by
        pip download --no-deps --dest DIR $(cat benchmarks/refactors/packages.txt)

``self_attn`` and ``cross_attn`` stand in one block, so ``self`` never became ``cross``; ``mlp`` and ``ffn`` never stand
beside each other. One model of every family of timm, torchvision, transformers and open_clip is built on the meta
device. Two words count where siblings of one class differ in them alone, in at least three families; words
for any layer say nothing, but for an ``output`` there is an ``input``.

Of packages the code is read, not run: what a class assigns to ``self`` or registers in one method, where two names
differ in one word alone (``actor_net``, ``critic_net``) and either share another word or are made by the same call. Two
words count if three packages say them; of the first 88 packages two were enough, or five classes of one. Words for
kinds of layers don't count here, nor do those that stand for one thing in the lexicon. Where three packages have
classes that are called after the one and hold the other, and none has attributes that are called so and no more, the
first is the whole: an ``FPN`` holds ``lateral_convs``.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from pathlib import Path

import torch
from torch import nn

import benchmarks.torchvision_guard  # noqa: F401  (before torchvision)
from benchmarks.refactors.harvest import LIBRARIES, alone, at_most
from benchmarks.refactors.vocabulary import CONTRASTS
from lit_wsl.matching.likeness import BLOCKS, KINDS, LAYER_NAMES, LISTS, liken, of_one_role, strength
from lit_wsl.matching.words import plain_words

Pair = tuple[str, str]
FAMILIES = 3  # so many use two words beside each other
PACKAGES = 3  # or so many packages
WHOLES = 3  # so many packages have one within a class of the other
REGISTER = {"register_buffer": "Buffer", "register_parameter": "Parameter"}
ATTRIBUTES = 60  # of one method; larger ones hold settings
WAYS = ({"in", "out"}, {"input", "output"}, {"down", "up"})  # these words are opposites of each other alone
KINDS_OF_LAYERS = (
    *("norm", "norms", "convs", "bns", "act", "activation", "fn", "dropout", "loss", "gate"),
    *("self", "res", "bias", "biases", "weights", "emb", "temb", "drop", "identity", "transform", "transformer"),
)
LAYER_KINDS = (BLOCKS | LISTS | KINDS | {*KINDS_OF_LAYERS}) - {"forward"}


def _differing(a: tuple[str, ...], b: tuple[str, ...], general: frozenset[str], *, shared: bool = False) -> Pair | None:
    """The words in which alone two names differ; with ``shared`` only if they have another one in common."""
    likeness = liken(a, b)
    if not len(likeness.left_s) == len(likeness.left_t) == 1 or (shared and not likeness.shared):
        return None
    first, second = sorted((*likeness.left_s, *likeness.left_t))
    if min(len(first), len(second)) < 2 or not general.isdisjoint({first, second} - {"out", "output"}):
        return None
    return first, second


def beside_each_other(model: nn.Module) -> Iterator[Pair]:
    """Words in which alone two siblings of one class differ."""
    for module in model.modules():
        names = [(type(child).__name__, plain_words(name)) for name, child in module.named_children()]
        names += [(f"{p.ndim} axes", plain_words(name)) for name, p in module.named_parameters(recurse=False)]
        for (class_a, a), (class_b, b) in combinations(names, 2):
            if class_a == class_b and (pair := _differing(a, b, LAYER_NAMES)):
                yield pair


def in_models() -> set[Pair]:
    """The pairs of words of models that are built."""
    families: dict[Pair, set[str]] = defaultdict(set)
    for library, models_of in LIBRARIES.items():
        for candidate in models_of(1):
            try:
                with at_most(30), torch.device("meta"):
                    model = candidate.build()
            except (Exception, TimeoutError):
                continue
            for pair in beside_each_other(model):
                families[pair].add(f"{library}/{candidate.family}")
        print(f"{library}: {len(families)} pairs of words", flush=True)
    return {pair for pair, found in families.items() if len(found) >= FAMILIES}


def _files_of(package: Path) -> Iterator[bytes]:
    if package.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(package) as archive:
            yield from (archive.read(name) for name in archive.namelist() if name.endswith(".py"))
    elif package.name.endswith(".tar.gz"):
        with tarfile.open(package) as packed:
            members = (packed.extractfile(m) for m in packed if m.isfile() and m.name.endswith(".py"))
            yield from (member.read() for member in members if member is not None)


def _assigned(method: ast.FunctionDef) -> dict[str, str]:
    """What a method assigns to ``self`` or registers, and the name of what it calls for that."""
    found = {}
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in REGISTER:
            found |= {name.value: REGISTER[node.func.attr] for name in node.args[:1] if _is_word(name)}
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            call = node.value.func
            name = call.attr if isinstance(call, ast.Attribute) else call.id if isinstance(call, ast.Name) else ""
            for to in node.targets:
                if isinstance(to, ast.Attribute) and isinstance(to.value, ast.Name) and to.value.id == "self":
                    found[to.attr] = name
    return found


def _is_word(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def in_class(node: ast.ClassDef) -> set[Pair]:
    """Words in which alone two attributes differ that a class makes in one method."""
    found: set[Pair] = set()
    for method in (m for m in node.body if isinstance(m, ast.FunctionDef)):
        made = _assigned(method)
        if len(made) <= ATTRIBUTES:
            for (a, call_a), (b, call_b) in combinations(made.items(), 2):
                if not (_makes_modules(call_a) or _makes_modules(call_b)):
                    continue
                words = plain_words(a), plain_words(b)
                pair = _differing(*words, LAYER_NAMES - {"cls"}, shared=call_a != call_b)
                found |= {pair} if pair else set()
    return found


def _makes_modules(call: str) -> bool:
    return call[:1].isupper() or any(word in call for word in ("build", "make", "mlp", "create"))


def _wholes_in(node: ast.ClassDef) -> tuple[set[Pair], set[Pair]]:
    """Words of a class's name, each with one of an attribute's; and pairs of attributes of a word each."""
    whole = {*plain_words(node.name)}
    held: set[Pair] = set()
    alone: set[Pair] = set()
    for method in (m for m in node.body if isinstance(m, ast.FunctionDef)):
        names = {plain_words(name) for name in _assigned(method)}
        held |= {(w, p) for name in names if whole.isdisjoint(name) for w in whole for p in name}
        alone |= {*combinations(sorted(name[0] for name in names if len(name) == 1), 2)}
    return held, alone


def in_code(folder: Path) -> set[tuple[str, ...]]:
    """The pairs of words of the packages in a folder, and the one of them that is the whole, where one is."""
    counts: dict[Pair, Counter[str]] = defaultdict(Counter)
    held: dict[Pair, set[str]] = defaultdict(set)
    beside: set[Pair] = set()
    for package in sorted(folder.iterdir()):
        for source in _files_of(package):
            try:
                tree = ast.parse(source) if b"torch" in source else None
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree) if tree else ():
                if isinstance(node, ast.ClassDef):
                    for pair in in_class(node):
                        counts[pair][package.name.split("-")[0]] += 1
                    inside, alone = _wholes_in(node)
                    beside |= alone
                    for pair in inside:
                        held[pair].add(package.name)
    found = [p for p, c in counts.items() if len(c) >= PACKAGES and _says_something(*p)]
    return {(*p, *_whole_of(p, held if p not in beside else {})) for p in found}


def _whole_of(pair: Pair, held: Mapping[Pair, Collection[str]]) -> list[str]:
    wholes = [a for a, b in (pair, pair[::-1]) if len(held.get((a, b), ())) >= WHOLES]
    return wholes if len(wholes) == 1 else []


def _says_something(a: str, b: str) -> bool:
    ways = set().union(*WAYS)
    if ({a, b} & ways and {a, b} not in WAYS) or {a, b} & LAYER_KINDS:
        return False
    return not of_one_role((a,), (b,)) and not strength(a, b)[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refactors.contrasts")
    parser.add_argument("--code", type=Path, help="folder of packages to read, beside the models that are built")
    parser.add_argument("--only-code", action="store_true", help="add to the pairs that are known; build no models")
    options = parser.parse_args()
    alone()
    known = json.loads(CONTRASTS.read_text()) if options.only_code else in_models()
    rows = {(a, b): (a, b) for a, b, *_ in known}
    rows |= {(a, b): (a, b, *whole) for a, b, *whole in in_code(options.code)} if options.code else {}
    CONTRASTS.write_text("[\n" + ",\n".join(json.dumps(rows[pair]) for pair in sorted(rows)) + "\n]\n")
    print(f"{len(rows)} pairs of words in {CONTRASTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
