"""Tell the roles of a model's modules by class and use, and group the words that stand for them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

from torch import Tensor, nn

Words = dict[str, str]
Found = tuple[str, Words]
_MAPS = ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")
_PLAIN = re.compile(r"\w+(\.\w+)*")


@dataclass
class Trace:
    """A model, with the order in which its leaves were first called and what they were called on.

    Attributes:
        model: The model.
        order: Module path -> place; of registration, where no call worked.
        inputs: Module path -> identity of its first input.
        called: Whether a call worked.
    """

    model: nn.Module
    order: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    called: bool = False

    @classmethod
    def of(cls, model: nn.Module, call: Callable[[nn.Module], Any] | None) -> Trace:
        """Run the call with hooks; ``None`` keeps the order of registration."""
        trace = cls(model)
        paths = {id(module): path for path, module in model.named_modules()}
        alive: list[Any] = []  # identities last as long as their objects
        place: dict[str, int] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            path = paths[id(module)]
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            alive.append(first)
            place.setdefault(path, len(place))
            if first is not None:
                trace.inputs.setdefault(path, id(first))

        if call is not None:
            hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules()]
            try:
                call(model)
            finally:
                for hook in hooks:
                    hook.remove()
            trace.called = True
        registered = [path for path, _ in model.named_modules()]
        rest = len(place)
        trace.order = {path: place.get(path, rest + at) for at, path in enumerate(registered)}
        return trace

    def below(self, path: str, chosen: Callable[[nn.Module], bool]) -> list[str]:
        """Paths of the chosen modules at or below a path, in order."""
        prefix = f"{path}." if path else ""
        found = [p for p, m in self.model.named_modules() if (p == path or p.startswith(prefix)) and chosen(m)]
        return sorted(found, key=self.order.__getitem__)

    def get(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)


def word_groups(trace: Trace) -> list[Found]:
    """Every group of words of a model, once."""
    found: dict[str, Found] = {}
    for group, words in _all_groups(trace):
        if all(word == "" or _PLAIN.fullmatch(word) for word in words.values()) and len(set(words.values())) == len(
            words
        ):
            found.setdefault(repr((group, sorted(words.items()))), (group, words))
    return list(found.values())


def _all_groups(trace: Trace) -> Iterator[Found]:
    yield from _blocks(trace)
    yield from _conv_blocks(trace)
    yield from _lists(trace)
    yield from _ends(trace)
    yield from _modalities(trace)


def is_map(module: nn.Module) -> bool:
    return type(module).__name__ in _MAPS or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children()) and _size(module) > 0


def _size(module: nn.Module) -> int:
    return sum(1 for _ in module.parameters(recurse=False))


def sizes(module: nn.Module) -> tuple[int, int]:
    """Width out and in of a map."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    out, inner = weight.shape[:2]
    return (inner, out) if type(module).__name__ == "Conv1D" else (out, inner)


def relative(path: str, above: str) -> str:
    return path[len(above) + 1 :] if above else path


def common(paths: Sequence[str]) -> str:
    """The longest path above all of these."""
    split = [p.split(".") for p in paths]
    shared: list[str] = []
    for parts in zip(*split):
        if len(set(parts)) > 1 or len(shared) + 1 == min(map(len, split)):
            break
        shared.append(parts[0])
    return ".".join(shared)


def _attentions(trace: Trace) -> list[str]:
    """The outermost modules whose class says attention, with two to five maps."""
    found: list[str] = []
    for path, module in trace.model.named_modules():
        says = re.search(r"atten|attn", type(module).__name__.lower()) is not None
        if says and not any(path.startswith(f"{p}.") for p in found):
            maps = trace.below(path, is_map)
            if 2 <= len(maps) <= 5 or isinstance(module, nn.MultiheadAttention):
                found.append(path)
    return found


def _projections(trace: Trace, attention: str) -> dict[str, str] | None:
    """Role -> path, relative to the attention's own container."""
    module = trace.get(attention)
    if isinstance(module, nn.MultiheadAttention):
        return {"qkv": f"{attention}.in_proj", "o": f"{attention}.out_proj"}
    maps = trace.below(attention, is_map)
    shapes = [sizes(trace.get(p)) for p in maps]
    if len(maps) == 4:
        for triple in combinations(maps, 3):
            if lettered := _by_letter(triple):
                return dict(zip("qkvo", [*lettered, next(p for p in maps if p not in triple)]))
        like = shapes[1] == shapes[2] and shapes[0][0] == shapes[3][1] and shapes[0][0] < 2 * shapes[0][1]
        return dict(zip("qkvo", maps)) if like else None
    if len(maps) == 2 and shapes[0][0] > 1.2 * shapes[0][1]:
        return dict(zip(("qkv", "o"), maps))
    if len(maps) == 3:
        wide = [p for p, (out, inner) in zip(maps, shapes) if out == 2 * inner]
        rest = [p for p in maps if p not in wide]
        if len(wide) == 1:
            return {"q": rest[0], "kv": wide[0], "o": rest[1]}
    return None


def _by_letter(paths: Sequence[str]) -> list[str] | None:
    """Queries, keys, values by the letter that tells their names apart."""
    words = [p.rpartition(".")[2].lower() for p in paths]
    start = next((i for i, letters in enumerate(zip(*words)) if len(set(letters)) > 1), None)
    if start is None:
        return None
    by_letter = {word[start]: path for word, path in zip(words, paths)}
    return [by_letter[letter] for letter in "qkv"] if set(by_letter) == set("qkv") else None


def _feed_forward(trace: Trace, maps: Sequence[str]) -> tuple[str, Words] | None:
    """The two or three maps of a feed-forward by their sizes: wide, then back."""
    shapes = [sizes(trace.get(p)) for p in maps]
    if len(maps) == 2 and shapes[0] == shapes[1][::-1]:
        return "mlp", dict(zip(("fc1", "fc2"), maps))
    if len(maps) == 2 and shapes[0][1] == shapes[1][0] and shapes[0][0] == 2 * shapes[1][1]:
        return "gated_fused", dict(zip(("gate_up", "down"), maps))
    if len(maps) == 3 and shapes[0] == shapes[1] == shapes[2][::-1]:
        return "gated", dict(zip(("gate", "up", "down"), maps))
    return None


def _blocks(trace: Trace) -> Iterator[Found]:
    """Blocks of attention (one or two) and a feed-forward, with the norm that belongs to each."""
    attentions = _attentions(trace)
    done: set[str] = set()
    for attention in attentions:
        parts = _projections(trace, attention)
        if parts:
            yield "attention", {role: relative(p, common(list(parts.values()))) for role, p in parts.items()}
        above = attention
        while above:
            above = above.rpartition(".")[0]
            inside = [a for a in attentions if a == above or a.startswith(f"{above}.")]
            maps = [m for m in trace.below(above, is_map) if not any(m.startswith(f"{a}.") for a in inside)]
            if len(maps) >= 2 or not above:
                break
        if not above or above in done or len(inside) > 2:
            continue
        done.add(above)
        forward = _feed_forward(trace, maps)
        if forward is None:
            continue
        group, roles = forward
        container = common(list(roles.values()))
        yield group, {role: relative(p, container) for role, p in roles.items()}
        inside.sort(key=lambda a: trace.order[a])
        norms = [
            n
            for n in trace.below(above, is_norm)
            if not any(n.startswith(f"{a}.") and _deep(trace, n, a) for a in inside)
        ]
        if len(norms) != len(inside) + 1:
            continue
        mlp = relative(container, above) if container.startswith(above) else ""
        places = [relative(a, above) for a in inside]
        named = [relative(n, above) for n in norms]
        if len(inside) == 1 and _exchanged(*named):
            continue
        if len(inside) == 1:
            yield "block", {"norm1": named[0], "attn": places[0], "norm2": named[1], "mlp": mlp}
        else:
            yield (
                "cross",
                dict(
                    zip(
                        ("norm_self", "self", "norm_cross", "cross", "norm_ff", "ff"),
                        (named[0], places[0], named[1], places[1], named[2], mlp),
                    )
                ),
            )


def _deep(trace: Trace, norm: str, attention: str) -> bool:
    """A norm of queries or keys: inside an attention, narrower than its input."""
    parts = _projections(trace, attention) or {}
    first = next(iter(parts.values()), "")
    try:
        width = sizes(trace.get(first))[1]
    except AttributeError:
        return True
    weight = getattr(trace.get(norm), "weight", None)
    return not isinstance(weight, Tensor) or weight.shape[0] != width


def _conv_blocks(trace: Trace) -> Iterator[Found]:
    """Two convolutions with a norm each, and the shortcut that starts from the block's own input."""
    attends = [path for path, m in trace.model.named_modules() if re.search("atten|attn", type(m).__name__.lower())]
    is_conv = lambda m: isinstance(m, nn.Conv2d) and m.groups == 1  # noqa: E731
    done: list[str] = []
    for path, module in reversed(list(trace.model.named_modules())):
        if not re.search(r"block|bottleneck|layer|unit|residual", type(module).__name__.lower()):
            continue
        if any(p.startswith(f"{path}.") for p in (*done, *attends)):
            continue
        steps = [p for p in trace.below(path, lambda m: is_conv(m) or is_norm(m)) if p != path]
        kinds = "".join("c" if is_conv(trace.get(p)) else "n" for p in steps)
        if not 4 <= len(steps) <= 8 or not kinds.startswith("cn"):
            continue
        done.append(path)
        pairs = [(steps[i], steps[i + 1]) for i in range(len(steps) - 1) if kinds[i : i + 2] == "cn"]
        entry = trace.inputs.get(pairs[0][0])
        short = [p for p in pairs[1:] if entry is not None and trace.inputs.get(p[0]) == entry]
        trunk = [p for p in pairs if p not in short]
        if len(trunk) < 2:
            continue
        roles = dict(zip(("conv1", "bn1", "conv2", "bn2"), (*trunk[0], *trunk[1])))
        if short:
            roles |= dict(zip(("short_conv", "short_bn"), short[0]))
        yield "convs", {role: relative(p, path) for role, p in roles.items()}


def _lists(trace: Trace) -> Iterator[Found]:
    """Names of lists of like modules; of lists of lists."""
    members: dict[str, list[nn.Module]] = defaultdict(list)
    for path, module in trace.model.named_modules():
        above, _, last = path.rpartition(".")
        if last.isdigit() and above:
            members[above].append(module)
    like = {
        p: len(ms) > 1 and len({type(m) for m in ms}) == 1 and sum(1 for _ in ms[0].children()) > 0
        for p, ms in members.items()
    }
    for path in members:
        word = path.rpartition(".")[2]
        if not like[path] or word.isdigit():
            continue
        nested = any(other.startswith(f"{path}.") and like[other] for other in members)
        yield ("stages", {"stages": word}) if nested else ("list", {"blocks": word})


def _ends(trace: Trace) -> Iterator[Found]:
    """The first and the last layers: tables, patches, stem, last norm, head."""
    inside = re.compile(r"(^|\.)\d+\.")
    outside = lambda chosen: [p for p in trace.below("", chosen) if not inside.search(p)]  # noqa: E731
    tables = outside(lambda m: isinstance(m, nn.Embedding))
    if tables:
        words = max(tables, key=lambda p: trace.get(p).num_embeddings)  # type: ignore[arg-type,return-value]
        yield "tokens", {"tokens": _tail(words)}
    convs = outside(lambda m: isinstance(m, nn.Conv2d))
    if convs:
        conv: Any = trace.get(convs[0])
        if conv.stride == conv.kernel_size and conv.stride[0] > 1:
            yield "patches", {"patches": _tail(convs[0])}
        else:
            after = [n for n in outside(is_norm) if trace.order[n] > trace.order[convs[0]]]
            if after and after[0].rpartition(".")[0] == convs[0].rpartition(".")[0]:
                yield "stem", {"stem_conv": _tail(convs[0]), "stem_bn": _tail(after[0])}
    position = {}
    for name, tensor in trace.model.named_parameters():
        if not inside.search(name) and tensor.dim() == 3 and tensor.shape[0] == 1:
            position.setdefault("pos" if tensor.shape[1] > 2 else "cls", name.rpartition(".")[2])
    if "pos" in position:
        yield "position", {"pos": position["pos"], "cls": position.get("cls", "cls_token")}
    norms = outside(is_norm)
    if (
        norms
        and trace.called
        and any(re.search(r"\.\d+\.", p) and trace.order[p] < trace.order[norms[-1]] for p in trace.order)
    ):
        yield "neck", {"neck": _tail(norms[-1])}
    maps = outside(lambda m: isinstance(m, nn.Linear))
    if (
        maps
        and trace.called
        and trace.order[maps[-1]] > max((trace.order[p] for p in trace.order if re.search(r"\.\d+$", p)), default=0)
    ):
        yield "head", {"head": _tail(maps[-1])}


def _exchanged(first: str, second: str) -> bool:
    """Whether two norms are registered the other way round: ``post_attention_layernorm`` before ``input_layernorm``."""
    return bool(re.search("mlp|post", first) and re.search("attention|input", second))


def _tail(path: str) -> str:
    """At most the last two levels."""
    return ".".join(path.split(".")[-2:])


def _modalities(trace: Trace) -> Iterator[Found]:
    """The parts of a model that begin with patches and with words; an encoder and a decoder that looks at it."""
    attentions = _attentions(trace)
    children = [name for name, _ in trace.model.named_children()]
    per = {c: [a for a in attentions if a.startswith(f"{c}.")] for c in children}
    first: dict[str, str] = {}
    for name, child in trace.model.named_children():
        kinds = {type(m) for m in child.modules()}
        if nn.Conv2d in kinds and (per[name] or len(kinds) > 6):
            first.setdefault("image", name)
        elif per[name] and nn.Conv2d not in kinds:
            first.setdefault("text", name)
    if len(first) == 2:
        yield "modalities", {"image": first["image"], "text": first["text"]}
    blocks = {c: len({re.sub(r"\d+", "#", a) for a in found}) for c, found in per.items()}
    for one, two in pairwise(children):
        if blocks[one] == 1 and blocks[two] == 2:
            yield "coder", {"coder": one, "decoder": two}


__all__ = ["Trace", "is_map", "is_norm", "sizes", "word_groups"]
