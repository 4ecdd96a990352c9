"""Harvest the words that public code uses: which module names stand for which role.

    python -m benchmarks.refactors.harvest            in the environment of the benchmarks; some minutes

Models of timm, torchvision, transformers and open_clip are built on the meta device, so nothing is downloaded and no
memory is used, and called once where that works. Roles are told by class and use (``harvest_roles.py``). The result,
``harvested.json``, counts for every group of words the models of each library that use it, and names their families.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import benchmarks.torchvision_guard  # noqa: F401  (before torchvision)
from benchmarks.refactors.harvest_roles import Trace, word_groups
from benchmarks.refactors.vocabulary import HARVESTED, LEXICON, lexicon

Call = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Candidate:
    """A model of a library, how to build and how to call it."""

    library: str
    family: str
    name: str
    build: Callable[[], nn.Module]
    calls: tuple[Call, ...]


def _image(size: int) -> Call:
    return lambda model: model(torch.empty(1, 3, size, size, device="meta"))


def timm_models(each: int) -> Iterator[Candidate]:
    import timm

    for family in timm.list_modules():
        names = sorted(timm.list_models(module=family), key=lambda name: (len(name), name))
        for name in names[:: max(1, len(names) // each)][:each]:
            config = timm.get_pretrained_cfg(name)
            size = config.input_size[-1] if config else 224
            yield Candidate("timm", family, name, lambda name=name: timm.create_model(name), (_image(size),))


def torchvision_models(each: int) -> Iterator[Candidate]:
    import torchvision

    families: dict[str, list[str]] = defaultdict(list)
    for name in torchvision.models.list_models():
        families[torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]].append(name)
    video: Call = lambda model: model(torch.empty(1, 3, 16, 224, 224, device="meta"))  # noqa: E731
    pair: Call = lambda model: model(*torch.empty(2, 1, 3, 256, 256, device="meta"))  # noqa: E731
    for family, names in families.items():
        for name in names[:each]:
            known = inspect.signature(torchvision.models.get_model_builder(name)).parameters
            none = {"weights": None} | ({"weights_backbone": None} if "weights_backbone" in known else {})
            build = lambda name=name, none=none: torchvision.models.get_model(name, **none)  # noqa: E731
            yield Candidate("torchvision", family, name, build, (_image(224), _image(299), video, pair))


def transformers_models(each: int) -> Iterator[Candidate]:
    from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel

    def build(name: str) -> nn.Module:
        config = CONFIG_MAPPING[name]()
        for part in (config, *(v for v in vars(config).values() if hasattr(v, "model_type"))):
            _shallow(part)
        return AutoModel.from_config(config)

    ids = torch.ones(1, 8, dtype=torch.long, device="meta")
    calls: tuple[Call, ...] = (
        lambda m: m(input_ids=ids),
        lambda m: m(input_ids=ids, decoder_input_ids=ids),
        lambda m: m(pixel_values=torch.empty(1, 3, *_size(m.config), device="meta")),
        lambda m: m(input_values=torch.empty(1, 16000, device="meta")),
        lambda m: m(input_features=torch.empty(1, 80, 3000, device="meta"), decoder_input_ids=ids),
        lambda m: m(input_ids=ids, pixel_values=torch.empty(1, 3, *_size(m.config), device="meta")),
    )
    for config in MODEL_MAPPING:
        name = config.model_type
        if name in CONFIG_MAPPING:
            yield Candidate("transformers", name, name, lambda name=name: build(name), calls)


def _size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def _shallow(config: Any) -> None:
    """Two layers are enough to see the names."""
    for key, value in list(vars(config).items()):
        deep = key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
        if deep and isinstance(value, int) and value > 2:
            with contextlib.suppress(Exception):
                setattr(config, key, 2)


def open_clip_models(each: int) -> Iterator[Candidate]:
    import open_clip

    def both(model: nn.Module) -> Any:
        size = getattr(model.visual, "image_size", 224)
        images = torch.empty(1, 3, *(size if isinstance(size, (tuple, list)) else (size, size)), device="meta")
        return model(images, torch.ones(1, model.context_length, dtype=torch.long, device="meta"))

    for name in open_clip.list_models():
        config = open_clip.get_model_config(name) or {}
        if "hf_model_name" in config.get("text_cfg", {}):
            continue  # its text model would be fetched
        family = (
            "coca" if "multimodal_cfg" in config else "timm" if config["vision_cfg"].get("timm_model_name") else "clip"
        )

        def build(name: str = name) -> nn.Module:
            model: nn.Module = open_clip.create_model(name, device="meta", load_weights=False)
            return model

        yield Candidate("open_clip", family, name, build, (both,))


LIBRARIES = {
    "timm": timm_models,
    "torchvision": torchvision_models,
    "transformers": transformers_models,
    "open_clip": open_clip_models,
}


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Give up on a model that takes too long."""

    def stop(*_: object) -> None:
        raise TimeoutError

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def traced(candidate: Candidate) -> Trace:
    """Build a model, and call it in the first way that works."""
    with torch.device("meta"):
        model = candidate.build().eval()
    for call in candidate.calls:
        try:
            return Trace.of(model, call)
        except TimeoutError:
            raise
        except Exception:
            continue
    return Trace.of(model, None)


def harvest(libraries: Mapping[str, Callable[[int], Iterator[Candidate]]], each: int) -> dict[str, Any]:
    """Build the models of some libraries and count their groups of words."""
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    families: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    models: Counter[str] = Counter()
    called: Counter[str] = Counter()
    failed: list[str] = []
    for library, models_of in libraries.items():
        start = time.perf_counter()
        for candidate in models_of(each):
            try:
                with at_most(30), torch.no_grad():
                    trace = traced(candidate)
                    found = word_groups(trace)
            except (Exception, TimeoutError) as error:
                failed.append(f"{library}/{candidate.name}: {type(error).__name__}: {str(error)[:80]}")
                continue
            models[library] += 1
            called[library] += trace.called
            for group, words in found:
                key = json.dumps(words)
                counts[group][key][library] += 1
                families[group][key][f"{library}/{candidate.family}"] += 1
        print(
            f"{library}: {models[library]} models, {called[library]} called, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    for line in failed:
        print("  failed", line)
    groups = {
        group: [
            {
                "words": json.loads(key),
                "counts": dict(sorted(by_library.items())),
                "families": dict(families[group][key].most_common(8)),
            }
            for key, by_library in sorted(entries.items(), key=lambda item: (-sum(item[1].values()), item[0]))
        ]
        for group, entries in sorted(counts.items())
    }
    return {"models": dict(models), "called": dict(called), "groups": groups}


def alone() -> None:
    """One thread, no warnings, nothing from the network."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refactors.harvest", description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="only this one; may be given again")
    parser.add_argument("--each", type=int, default=3, help="models of a family")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    alone()
    chosen = options.library or list(LIBRARIES)
    result = harvest({name: LIBRARIES[name] for name in chosen}, options.each)
    for group, entries in result["groups"].items():
        print(f"{group}: {len(entries)} groups of words, e.g. {[e['words'] for e in entries[:3]]}")
    if not options.dry:
        text = json.dumps(result, indent=None, separators=(",", ":")).replace('{"words"', '\n{"words"')
        HARVESTED.write_text(text + "\n")
        LEXICON.write_text(json.dumps(lexicon(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
