"""Which words name different things: those of modules that stand beside each other in public models.

    python -m benchmarks.refactors.contrasts            in the environment of the benchmarks; some minutes

``self_attn`` and ``cross_attn`` stand in one block, so ``self`` never became ``cross``; ``mlp`` and ``ffn`` never stand
beside each other. One model of every family of timm, torchvision, transformers and open_clip is built on the meta
device. Two words count where siblings of one class differ in them alone, in at least three families; words
for any layer say nothing, but for an ``output`` there is an ``input``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import nn

import benchmarks.torchvision_guard  # noqa: F401  (before torchvision)
from benchmarks.refactors.harvest import LIBRARIES, at_most
from benchmarks.refactors.vocabulary import CONTRASTS
from lit_wsl.matching.likeness import LAYER_NAMES, liken
from lit_wsl.matching.words import plain_words

FAMILIES = 3  # so many use two words beside each other


def beside_each_other(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Words in which alone two siblings of one class differ."""
    for module in model.modules():
        names = [(type(child).__name__, plain_words(name)) for name, child in module.named_children()]
        names += [(f"{p.ndim} axes", plain_words(name)) for name, p in module.named_parameters(recurse=False)]
        for (class_a, a), (class_b, b) in combinations(names, 2):
            likeness = liken(a, b)
            if class_a == class_b and len(likeness.left_s) == len(likeness.left_t) == 1:
                pair = sorted((*likeness.left_s, *likeness.left_t))
                if min(map(len, pair)) > 1 and LAYER_NAMES.isdisjoint({*pair} - {"out", "output"}):
                    yield pair[0], pair[1]


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    torch.set_num_threads(1)
    families: dict[tuple[str, str], set[str]] = defaultdict(set)
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
    rows = sorted(pair for pair, found in families.items() if len(found) >= FAMILIES)
    CONTRASTS.write_text("[\n" + ",\n".join(json.dumps(pair) for pair in rows) + "\n]\n")
    print(f"{len(rows)} pairs of words in {CONTRASTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
