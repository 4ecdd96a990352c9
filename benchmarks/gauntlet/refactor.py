"""Refactor a module the way people do, by machine: other names, no names, one flat list, another registration order.

The module keeps running: the code of its ``forward`` still asks for the old attribute names, and a subclass made on the
fly translates them. So the truth, which is read off the identity of the tensors, can be proven by equal outputs.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

Kind = Literal["synonyms", "numbers", "flat", "shuffled", "shuffled_synonyms"]
KINDS: tuple[Kind, ...] = ("synonyms", "numbers", "flat", "shuffled", "shuffled_synonyms")
LEAVES = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "in_proj_weight", "in_proj_bias"}

# What a person might write instead of a part of a name. Several per word, so that models differ in their choice.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "attn": ("attention", "mixer", "sa"),
    "attention": ("attn", "mha", "self_attend"),
    "selfattention": ("attend_self", "sa", "inner_attention"),
    "encdecattention": ("attend_memory", "ca", "cross_attention"),
    "self": ("core", "own", "inner"),
    "cross": ("memory", "xattn", "context"),
    "norm": ("normalization", "ln", "normalize"),
    "layernorm": ("ln", "norm_layer", "normalization"),
    "ln": ("norm", "layer_norm", "normalizer"),
    "bn": ("batchnorm", "norm", "batch_normalization"),
    "conv": ("convolution", "cnv", "filter"),
    "mlp": ("feed_forward", "ffn", "ff"),
    "fc": ("linear", "dense", "lin"),
    "dense": ("linear", "fc", "projection"),
    "linear": ("dense", "fc", "lin"),
    "proj": ("projection", "out_map", "output"),
    "projection": ("proj", "mapping", "map"),
    "query": ("q", "q_map", "queries"),
    "key": ("k", "k_map", "keys"),
    "value": ("v", "v_map", "values"),
    "q": ("query", "queries", "wq"),
    "k": ("key", "keys", "wk"),
    "v": ("value", "values", "wv"),
    "o": ("output", "out", "wo"),
    "qkv": ("query_key_value", "in_map", "packed"),
    "layer": ("stage", "level", "block"),
    "layers": ("blocks", "stack", "body"),
    "blocks": ("layers", "trunk", "stack"),
    "block": ("unit", "cell", "layer"),
    "stages": ("levels", "groups", "phases"),
    "features": ("backbone", "extractor", "body"),
    "classifier": ("head", "predictor", "logits"),
    "head": ("classifier", "out", "to_logits"),
    "heads": ("outputs", "classifiers", "tops"),
    "downsample": ("shortcut", "skip", "reduce"),
    "encoder": ("enc", "backbone", "context_net"),
    "decoder": ("dec", "generator", "output_net"),
    "embeddings": ("inputs", "embedder", "embed"),
    "embed": ("embedding", "table", "emb"),
    "embedding": ("embed", "lookup", "emb"),
    "token": ("word", "tok", "symbol"),
    "tokens": ("words", "vocabulary", "symbols"),
    "word": ("token", "vocab", "tok"),
    "position": ("pos", "place", "location"),
    "positions": ("pos", "places", "locations"),
    "positional": ("pos", "place", "location"),
    "pos": ("position", "place", "positional"),
    "patch": ("tile", "stem", "image"),
    "class": ("cls", "category", "summary"),
    "cls": ("class", "summary", "global"),
    "gate": ("gating", "switch", "w_act"),
    "up": ("expand", "rise", "wide"),
    "down": ("contract", "shrink", "narrow"),
    "input": ("pre", "before", "entry"),
    "post": ("after", "second", "late"),
    "output": ("result", "after", "out"),
    "intermediate": ("hidden", "expand", "middle"),
    "final": ("last", "closing", "end"),
    "pooler": ("pool", "summary_head", "pooling"),
    "stem": ("entry", "root", "first"),
    "scale": ("gain", "factor", "multiplier"),
    "gamma": ("gain", "layer_scale", "ls"),
    "lambda": ("gain", "factor", "gamma"),
    "branch": ("path", "arm", "stream"),
    "pool": ("pooling", "aggregate", "reduce"),
    "relative": ("rel", "offset", "rpb"),
    "table": ("lut", "weights", "grid"),
    "transition": ("shrink", "bridge", "trans"),
    "avgpool": ("gap", "pooling", "mean_pool"),
    "se": ("squeeze", "excite", "gate"),
    "reduction": ("reduce", "merge", "narrow"),
    "visual": ("image_tower", "vision", "img"),
    "transformer": ("trunk", "tower", "body"),
    "resblocks": ("layers", "blocks", "stack"),
    "model": ("net", "network", "core"),
    "lm": ("language", "vocab", "next_token"),
    "shared": ("common", "vocabulary", "tied"),
    "denselayer": ("unit", "grow", "dl"),
    "denseblock": ("stage", "group", "db"),
    "inception": ("mixed", "module", "multi"),
    "h": ("blocks", "layer", "trunk"),
    "wte": ("tok_emb", "word_table", "vocabulary"),
    "wpe": ("pos_emb", "place_table", "positions"),
    "c": ("lin", "map", "w"),
    "wi": ("w_in", "expand", "up"),
    "wo": ("w_out", "contract", "down"),
    "tokenmixing": ("spatial", "mix_places", "across"),
}
_WORDS = {"0": "zeroth", "1": "first", "2": "second", "3": "third", "4": "fourth", "5": "fifth"}


def _number(text: str) -> int:
    return zlib.crc32(text.encode())


def _parts(name: str) -> list[str]:
    return re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)


def synonym(name: str, style: int) -> str:
    """Another name for an attribute; the same style gives the same answer wherever the name stands."""
    words: list[str] = []
    whole = name.lower().replace("_", "")
    for part in [name] if whole in SYNONYMS else _parts(name):
        key = part.lower().replace("_", "")
        if key.isdigit():
            words.append(key)
        elif key in SYNONYMS:
            words.append(SYNONYMS[key][style % 3])
        else:
            words.append(key)
    if style % 4 == 1:  # norm1 -> first_normalization
        words = [_WORDS[w] for w in words if w in _WORDS] + [w for w in words if w not in _WORDS]
    if style % 4 == 2:  # camel case
        return words[0] + "".join(w.title().replace("_", "") for w in words[1:])
    return "_".join(words)


def kept(name: str, style: int) -> str:
    """Nearly the same name: another case, a number set off, a suffix."""
    words = [part.lower() for part in _parts(name)] or [name]
    if style % 3 == 0:
        return words[0] + "".join(w.title() for w in words[1:])
    if style % 3 == 1:
        return "_".join(words)
    return name + ("" if name[-1:].isdigit() else "_module")


def _aliased(cls: type[nn.Module]) -> type[nn.Module]:
    def __getattr__(self: nn.Module, name: str) -> Any:  # noqa: N807
        return cls.__getattr__(self, self.__dict__.get("_aliases", {}).get(name, name))

    return type(cls.__name__, (cls,), {"__getattr__": __getattr__, "__module__": cls.__module__})


def _rename(module: nn.Module, new_name: Callable[[str], str], shuffle: int | None) -> None:
    """Rename what a module holds directly, and register it in another order; its code does not notice."""
    aliases: dict[str, str] = {}
    container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    if shuffle is not None and not container:
        names = list(module._modules)
        key = f"{shuffle}/{type(module).__name__}/{'/'.join(names)}"  # blocks of a class stay alike
        random.Random(_number(key)).shuffle(names)
        children = {name: module._modules[name] for name in names}
        module._modules.clear()
        module._modules.update(children)
    for held in (module._modules, module._parameters, module._buffers):
        fixed = held is module._modules and (isinstance(module, nn.ModuleDict) or all(n.isdigit() for n in held))
        renamed: dict[str, Any] = {}
        for name, value in held.items():
            new = name if fixed or name in LEAVES else new_name(name)
            while new in renamed or (new in aliases.values() and new != name):
                new += "_b"
            renamed[new] = value
            if new != name:
                aliases[name] = new
        held.clear()
        held.update(renamed)
    if aliases:
        if isinstance(module, nn.Module) and module._non_persistent_buffers_set:
            module._non_persistent_buffers_set = {aliases.get(n, n) for n in module._non_persistent_buffers_set}
        module.__class__ = _aliased(type(module))
        module.__dict__["_aliases"] = aliases


def _number_children(module: nn.Module) -> None:
    held = [*module._modules]
    places = {name: str(i) for i, name in enumerate(held)}
    if isinstance(module, nn.ModuleDict):
        places = {}
    own = [n for n in [*module._parameters, *module._buffers] if n not in LEAVES]
    places |= {name: f"p{i}" for i, name in enumerate(own)}
    _rename(module, lambda name: places.get(name, name), None)


class Numbered(nn.Module):
    """``m.0.3.1.weight``."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.m = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.m(*args, **kwargs)


class Holder(nn.Module):
    """Parameters and buffers that a module with children holds itself."""

    def __init__(self, module: nn.Module):
        super().__init__()
        for name, value in module._parameters.items():
            self.register_parameter(name if name in LEAVES else f"p{len(self._parameters)}", value)
        for name, value in module._buffers.items():
            persistent = name not in module._non_persistent_buffers_set
            self.register_buffer(name if name in LEAVES else f"b{len(self._buffers)}", value, persistent=persistent)


class Flat(nn.Module):
    """All layers in one list, in the order of their registration; the tree that calls them is not registered."""

    def __init__(self, net: nn.Module):
        super().__init__()
        layers: list[nn.Module] = []
        for module in net.modules():
            holds = any(v is not None for v in [*module._parameters.values(), *module._buffers.values()])
            if not holds:
                continue
            if not list(module.children()):
                layers.append(module)
            else:
                layers.append(Holder(module))
        self.layers = nn.ModuleList(layers)
        self.__dict__["_net"] = [net]

    def train(self, mode: bool = True) -> Flat:
        self.__dict__["_net"][0].train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_net"][0](*args, **kwargs)


def refactor(net: nn.Module, kind: Kind, style: int) -> nn.Module:
    """Refactor a module in place.

    Args:
        net: The module; its parameters stay the same objects.
        kind: What is done to it.
        style: Which of the possible names and orders.

    Returns:
        The refactored module, which computes what ``net`` did.
    """
    if kind == "flat":
        return Flat(net)
    modules = list(net.modules())
    if kind == "numbers":
        for module in modules:
            _number_children(module)
        return Numbered(net)
    naming = synonym if "synonyms" in kind else kept
    for module in modules:
        _rename(module, lambda name: naming(name, style), style if "shuffled" in kind else None)
    return net
