"""A directed pair of models, and the proof of its truth."""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gauntlet.truth import Rule, Tensors, TruthError, apply_rules, invert

Sample = tuple[tuple[Any, ...], dict[str, Any]]
Call = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]

CONSTANT = r"(^|\.)(position_ids|relative_position_index|rel_pos_index|attn_mask|causal_mask|masked_bias|inv_freq)$"


def outputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the module as a user does and compare all it returns."""
    return module(*args, **kwargs)


def pick(key: str | int) -> Call:
    """Compare one field, or one item, of what the module returns."""

    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = module(*args, **kwargs)
        return getattr(result, key) if isinstance(key, str) else result[key]

    return call


def method(name: str) -> Call:
    """Compare what a method other than ``forward`` returns."""
    return lambda module, args, kwargs: getattr(module, name)(*args, **kwargs)


def input_of(path: str) -> Call:
    """Compare what goes into a submodule: the function of all that comes before a new head."""

    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen: list[Any] = []
        handle = module.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            module(*args, **kwargs)
        finally:
            handle.remove()
        return seen[0]

    return call


def output_of(path: str, key: str | int | None = None) -> Call:
    """Compare what comes out of a submodule."""

    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen: list[Any] = []
        handle = module.get_submodule(path).register_forward_hook(lambda _, __, result: seen.append(result))
        try:
            module(*args, **kwargs)
        finally:
            handle.remove()
        if key is None:
            return seen[0]
        return getattr(seen[0], key) if isinstance(key, str) else seen[0][key]

    return call


def images(size: int = 64, channels: int = 3, batch: int = 2) -> Callable[[], Sample]:
    """A batch of random images, NCHW."""
    return lambda: ((torch.randn(batch, channels, size, size),), {})


def tokens(vocabulary: int = 96, length: int = 11, key: str | None = None, batch: int = 2) -> Callable[[], Sample]:
    """A batch of random token numbers, (batch, length); never 0 or 1, which some models keep for padding."""

    def sample() -> Sample:
        ids = torch.randint(2, vocabulary, (batch, length))
        return ((ids,), {}) if key is None else ((), {key: ids})

    return sample


@dataclass(frozen=True)
class Built:
    """A pair's models, ready to be tried.

    Attributes:
        source: The source, random values everywhere.
        target: The target, other random values everywhere.
        source_state: The source's state dict.
        truth: What the target should hold.
    """

    source: nn.Module
    target: nn.Module
    source_state: Tensors
    truth: Tensors


@dataclass(frozen=True)
class Pair:
    """A source, a target, and where each of the target's tensors comes from.

    Attributes:
        name: ``family/source-to-target``.
        source: Builds the source model; its state dict is all that a default transfer sees.
        target: Builds the target model.
        rules: Truth: source state dict -> target state dict. For a partial pair a part of it.
        sample: Random input of the target's ``forward``; of the source's too unless ``source_sample`` is given.
        source_sample: Input of the source that means the same, made from the same random numbers.
        source_call: What of the source is compared in the proof.
        target_call: What of the target is compared in the proof.
        new: Pattern of target names without a source.
        permute: The truth needs a permutation of axes (interleaved heads, rotary layout).
        source_dtype: Floating point type of the source's state dict; by default that of the target, float32.
        insensitive: Pattern of target parameters that the output does not depend on (a key's bias under softmax); the
            rule holds by analogy for them.
        tolerance: Largest difference of outputs, relative to the largest output, in float64.
        tags: Which operations and architectures the pair covers.
    """

    name: str
    source: Callable[[], nn.Module]
    target: Callable[[], nn.Module]
    rules: Sequence[Rule]
    sample: Callable[[], Sample]
    source_sample: Callable[[], Sample] | None = None
    source_call: Call = outputs
    target_call: Call = outputs
    new: str | None = None
    permute: bool = False
    source_dtype: torch.dtype | None = None
    insensitive: str | None = None
    tolerance: float = 1e-6
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def partial(self) -> bool:
        """Whether the target has tensors without a source."""
        return self.new is not None

    def seed(self, salt: str) -> int:
        """A number that depends on the pair's name and on nothing else."""
        return zlib.crc32(f"{self.name}/{salt}".encode())

    def build_source(self) -> nn.Module:
        """The source model with random values everywhere."""
        return _build(self.source, self.seed("source"))

    def build_target(self) -> nn.Module:
        """The target model with other random values everywhere."""
        return _build(self.target, self.seed("target"))

    def target_sample(self) -> Sample:
        """Input of the target."""
        torch.manual_seed(self.seed("sample"))
        return self.sample()

    def matching_source_sample(self) -> Sample:
        """Input of the source that means the same as :meth:`target_sample`."""
        torch.manual_seed(self.seed("sample"))
        return (self.source_sample or self.sample)()

    def expected(self, source: Mapping[str, Tensor], target: nn.Module) -> Tensors:
        """The truth: target name -> the value that belongs there; tied names of the target included."""
        truth = apply_rules(self.rules, source)
        held = target.state_dict(keep_vars=True)
        by_storage: dict[int, list[str]] = {}
        for name, value in held.items():
            if value.numel():
                by_storage.setdefault(id(value), []).append(name)
        for names in by_storage.values():
            known = [name for name in names if name in truth]
            for name in names:
                if known and name not in truth:
                    truth[name] = truth[known[0]]
        return {name: truth[name].contiguous() for name in held if name in truth} | {
            name: value for name, value in truth.items() if name not in held
        }

    def build(self) -> Built:
        """Both models with random values, and the truth between them.

        Raises:
            TruthError: If a rule does not fit.
        """
        source, target = self.build_source(), self.build_target()
        if self.source_dtype is not None:  # round the source's values, then compute with the rounded ones
            source = source.to(self.source_dtype).float()
        state = {
            name: value.detach().to(self.source_dtype or value.dtype) if value.is_floating_point() else value.detach()
            for name, value in source.state_dict().items()
        }
        return Built(source, target, state, self.expected(state, target))

    def prove(self, built: Built | None = None) -> list[str]:
        """Load the truth into the target and compare the outputs of both models on random input, in float64.

        Args:
            built: What :meth:`build` returned; it is not changed.

        Returns:
            The target parameters that the output did not react to, all of them allowed by ``insensitive``.

        Raises:
            TruthError: If names or shapes don't fit, if a target tensor is neither in the truth nor new, if the outputs
                differ, or if the output does not depend on a parameter that the truth claims to place.
        """
        built = built or self.build()
        truth, held = built.truth, built.target.state_dict()
        for name, value in truth.items():
            if name not in held:
                raise TruthError(f"{self.name}: the target has no {name!r}")
            if held[name].shape != value.shape:
                raise TruthError(f"{self.name}: {name!r} is {tuple(held[name].shape)}, truth {tuple(value.shape)}")
        unplaced = [n for n in held if n not in truth and not re.search(CONSTANT, n) and not self._is_new(n)]
        if unplaced:
            raise TruthError(f"{self.name}: no truth for {unplaced[:8]}, {len(unplaced)} in all")
        both = [name for name in truth if self._is_new(name)]
        if both:
            raise TruthError(f"{self.name}: declared new, yet placed: {both[:8]}")
        source, target = copy.deepcopy(built.source).double(), copy.deepcopy(built.target).double()
        fill(target, truth)
        if not truth:
            return []  # nothing of the source belongs into the target, so there is nothing to compare
        parameters = [(n, p) for n, p in target.named_parameters() if n in truth]
        with torch.no_grad():
            args, kwargs = _as_double(self.matching_source_sample())
            wanted = _flat(self.source_call(source, args, kwargs))
        args, kwargs = _as_double(self.target_sample())
        for parameter in target.parameters():
            parameter.requires_grad_(True)
        found = _flat(self.target_call(target, args, kwargs))
        if len(wanted) != len(found):
            raise TruthError(f"{self.name}: {len(wanted)} outputs against {len(found)}")
        score = torch.zeros((), dtype=torch.float64)
        for a, b in zip(wanted, found, strict=True):
            self._compare(a, b.detach())
            score = score + (b * torch.randn(b.shape, dtype=b.dtype)).sum() / b.detach().abs().max()
        gradients = torch.autograd.grad(score, [p for _, p in parameters], allow_unused=True)
        silent = []
        for (name, parameter), gradient in zip(parameters, gradients, strict=True):
            effect = 0.0 if gradient is None else float((gradient * parameter).abs().max())
            if effect < 1e-9:
                silent.append(name)
        unproven = [n for n in silent if self.insensitive is None or not re.search(self.insensitive, n)]
        if unproven:
            raise TruthError(f"{self.name}: the output does not depend on {unproven[:8]}, {len(unproven)} in all")
        return silent

    def _is_new(self, name: str) -> bool:
        return self.new is not None and re.search(self.new, name) is not None

    def _compare(self, a: Tensor, b: Tensor) -> None:
        if a.shape != b.shape:
            raise TruthError(f"{self.name}: output {tuple(a.shape)} against {tuple(b.shape)}")
        largest = float(a.abs().max())
        if not torch.isfinite(a).all() or largest == 0 or float(a.std()) < 1e-4 * largest:
            raise TruthError(f"{self.name}: the output says nothing (largest {largest}, deviation {float(a.std())})")
        difference = float((a - b).abs().max()) / largest
        if not difference <= self.tolerance:
            raise TruthError(f"{self.name}: outputs differ by {difference:.2e} of the largest")

    def same_function(self, source: nn.Module, target: nn.Module) -> bool:
        """Whether both models, as they are, give equal outputs (float64; neither is changed)."""
        source, target = copy.deepcopy(source).double().eval(), copy.deepcopy(target).double().eval()
        with torch.no_grad():
            args, kwargs = _as_double(self.matching_source_sample())
            wanted = _flat(self.source_call(source, args, kwargs))
            args, kwargs = _as_double(self.target_sample())
            found = _flat(self.target_call(target, args, kwargs))
        try:
            for a, b in zip(wanted, found, strict=True):
                self._compare(a, b)
        except (TruthError, ValueError):
            return False
        return True

    def reverse(self, name: str | None = None, new: str | None = None, **changes: Any) -> Pair:
        """The pair target -> source, its truth inverted element by element and proven like any other.

        Args:
            name: Name of the reversed pair; by default ``a-to-b`` becomes ``b-to-a``.
            new: Pattern of this pair's source names that the target has nothing for.
            **changes: Other fields to replace.
        """
        if name is None:
            family, _, ends = self.name.rpartition("/")
            a, _, b = ends.partition("-to-")
            name = f"{family}/{b}-to-{a}"
        return replace(
            self,
            name=name,
            source=self.target,
            target=self.source,
            rules=(_Inverse(self),),
            sample=self.source_sample or self.sample,
            source_sample=self.sample,
            source_call=self.target_call,
            target_call=self.source_call,
            new=new,
            **changes,
        )


@dataclass(frozen=True)
class _Inverse:
    """The inverse of a pair's rules; the source is only built when needed."""

    pair: Pair

    def __call__(self, state: Tensors) -> Tensors:
        return invert(self.pair.rules, self.pair.source().state_dict())(state)


def fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into a module by name."""
    held = module.state_dict()
    with torch.no_grad():
        for name, value in values.items():
            held[name].copy_(value)


def _build(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = factory().float()
    randomize(module, seed)
    return module.eval()


def randomize(module: nn.Module, seed: int) -> None:
    """Fill parameters and batch statistics with random values that keep activations in a sound range.

    Nothing stays one or zero: norm gains are in (0.5, 1.5), biases are normal, running statistics and the counts of
    batches differ between layers, so an equal value says where a tensor came from. Other buffers (index tables, masks,
    frequencies) are constants of an architecture and stay.
    """
    generator = torch.Generator().manual_seed(seed)
    convolution = tuple(c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d))
    done: set[int] = set()
    with torch.no_grad():
        for path, child in module.named_modules():
            for name, value in child.named_parameters(recurse=False):
                if id(value) not in done and value.numel():
                    done.add(id(value))
                    value.copy_(_values(name, value, isinstance(child, convolution), generator))
            for name, value in child.named_buffers(recurse=False):
                if name == "running_mean":
                    value.copy_(0.2 * torch.randn(value.shape, generator=generator))
                elif name == "running_var":
                    value.copy_(0.5 + torch.rand(value.shape, generator=generator))
                elif name == "num_batches_tracked":
                    value.fill_(1000 + zlib.crc32(f"{seed}{path}".encode()) % 100_000_007)


def _values(name: str, value: Tensor, convolution: bool, generator: torch.Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator)
    if "bias" in name and value.dim() == 1:
        return 0.2 * noise
    if value.dim() < 2 or value.numel() == max(value.shape):  # a norm's gain, a layer scale of any layout
        return 0.5 + torch.rand(value.shape, generator=generator)
    fan_in = value.numel() // value.shape[0] if convolution else value.shape[-1]
    return noise / fan_in**0.5


def _as_double(sample: Sample) -> Sample:
    def cast(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = sample
    return tuple(cast(a) for a in args), {k: cast(v) for k, v in kwargs.items()}


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.double()]
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, (tuple, list)):
        return [tensor for item in result for tensor in _flat(item)]
    return []
