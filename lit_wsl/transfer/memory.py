"""What a module remembers of the transfers it has had, so that training is never undone.

The memory lies in the modules themselves: each that holds tensors of its own carries a mark saying which parameters
these are. So it goes where the module goes: to another trainer, another callback, into another LightningModule, into
deep copies and pickled files. A layer that is built anew has no mark. Marks hold parameters weakly, and are pickled as
plain dicts, so that a module saved as a whole can be loaded where this package is not installed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from lit_wsl.checkpoint.reader import is_address
from lit_wsl.structure.running import is_sharded
from lit_wsl.transfer.ranks import ends_of, held_part

_ENDS = 32  # values at either end of each
_MARK = "_weight_transfer"  # the attribute of a module that holds its mark
_METADATA = "weight_transfer"  # the entry of a state dict's metadata, beside torch's version

Held = Mapping[str, "weakref.ref[nn.Parameter]"]


def transfer_key(source: object, *how: object) -> str:
    """What tells one transfer from another: the source, and everything that decides what is taken from it how."""
    parts = [_place(source), *(_place(part) if isinstance(part, (str, os.PathLike)) else repr(part) for part in how)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def shown(source: object) -> str:
    """What to call a source where it is kept or shown: no absolute path of this machine."""
    if not isinstance(source, (str, os.PathLike)):
        return f"a {type(source).__name__}"
    given = os.fspath(source)
    if is_address(given) or not os.path.isabs(given):
        return given
    inside = os.path.relpath(given)
    return os.path.join(*Path(given).parts[-2:]) if inside.startswith("..") else inside


def _place(source: object) -> str:
    if not isinstance(source, (str, os.PathLike)):
        return f"{type(source).__name__} {id(source)}"
    return os.fspath(source) if is_address(source) else os.path.realpath(os.path.expanduser(source))


class _Mark:
    """The parameters that a module, with all below it, held when somebody last looked.

    Attributes:
        transfers: What was filled in, by key, with words for a person; nothing where somebody loaded a state dict of
            unknown origin by hand.
        held: For each name the parameter, and its version when it was filled; ``None`` where it may have changed.
        reloaded: Whether somebody has loaded a state dict of unknown origin since then.
    """

    def __init__(
        self, transfers: Mapping[str, str], held: Mapping[str, tuple[nn.Parameter, int | None]], reloaded: bool = False
    ) -> None:
        self.transfers, self.reloaded = dict(transfers), reloaded
        self.held = {name: (weakref.ref(parameter), version) for name, (parameter, version) in held.items()}

    def alive(self) -> Iterator[tuple[nn.Parameter, int | None]]:
        """Yield the parameters that still exist."""
        for ref, version in self.held.values():
            parameter = ref()
            if parameter is not None:
                yield parameter, version

    def own(self) -> Iterator[str]:
        """Yield the names of the module's own parameters."""
        return (name for name in self.held if "." not in name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mark:
        copies = {}
        for name, (ref, version) in self.held.items():
            parameter = ref()
            copied = None if parameter is None else memo.get(id(parameter))  # a module's parameters are copied first
            if copied is not None:
                copies[name] = copied, _version(copied) if version == _version(parameter) else None
        return _Mark(self.transfers, copies, self.reloaded)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ({"transfers": self.transfers, "held": list(self.held)},)


@dataclass(frozen=True)
class Memory:
    """What a model remembers."""

    transfers: Mapping[str, str]  # what it was filled with, by key, with words for a person
    fresh: frozenset[str]  # state-dict names of the tensors of layers that were built anew, or added, since then
    # parameters that were exchanged in a module that stayed, as ``load_state_dict(assign=True)`` does: whether they are
    # trained or fresh cannot be told
    replaced: tuple[str, ...]
    untouched: bool  # whether nothing has been written to any parameter since it was filled

    def words(self) -> str:
        """What the model was filled with."""
        return ", ".join(dict.fromkeys(self.transfers.values()))


def remember(
    model: nn.Module, key: str = "", words: str = "", *, filled: bool = False, only: frozenset[str] | None = None
) -> None:
    """Mark all tensors of a model as being what they should be: filled, trained, or left as they are on purpose."""
    marks = _marks(model)
    versions = {id(p): version for mark in marks.values() for p, version in mark.alive()}
    transfers = _transfers(marks) | ({key: words} if key else {})
    still_given = {
        sub
        for path, sub in model.named_modules()
        if is_given(marks.get(sub)) and (not key or (only is not None and not _own_names(path, sub) & only))
    }
    theirs = {id(p) for sub in still_given for p in sub.parameters(recurse=False)}
    for sub in model.modules():
        if sub not in still_given and (sub is model or _holds_tensors(sub)):
            inside = {n: p for n, p in sub.named_parameters(remove_duplicate=False) if id(p) not in theirs}
            held = {n: (p, _version(p) if filled else versions.get(id(p))) for n, p in inside.items()}
            sub.__dict__[_MARK] = _Mark(transfers, held)


def write_memory(model: nn.Module, state: Any, prefix: str = "") -> None:
    """Let a state dict tell what the model was filled with; nothing for a model that was not."""
    metadata = getattr(state, "_metadata", None)
    transfers = _transfers(_marks(model))
    if metadata is not None and transfers:
        metadata.setdefault(prefix[:-1], {})[_METADATA] = transfers


def read_memory(model: nn.Module, state: Mapping[str, Any], transfers: Mapping[str, str] | None = None) -> bool:
    """Let a model that has just loaded a state dict remember what it tells, for all modules whose tensors it has."""
    told = {p: e.get(_METADATA) for p, e in (getattr(state, "_metadata", None) or {}).items() if isinstance(e, dict)}
    if transfers is not None:
        told[""] = transfers
    found = False
    for path, known in told.items():
        if not isinstance(known, Mapping) or not all(isinstance(v, str) for pair in known.items() for v in pair):
            continue
        found = True
        _mark_loaded(model, path, state, known)
    return found


def note_given(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Let a model remember which of its modules have just loaded a state dict of unknown origin."""
    _mark_loaded(model, "", state, {})


def _mark_loaded(model: nn.Module, path: str, state: Mapping[str, Any], transfers: Mapping[str, str]) -> None:
    marks = _marks(model)
    for name, sub in model.get_submodule(path).named_modules(prefix=path):
        inside = dict(sub.named_parameters(name, remove_duplicate=False))
        own = dict(sub.named_parameters(name, recurse=False, remove_duplicate=False))
        if (name != path or not transfers) and (not _holds_tensors(sub) or any(n not in state for n in own)):
            continue
        if not transfers and sub in marks and not is_given(marks[sub]):
            marks[sub].reloaded = True  # with what it was before it was filled, or what training made of it
            continue
        start = len(name) + 1 if name else 0
        sub.__dict__[_MARK] = _Mark(transfers, {n[start:]: (p, None) for n, p in inside.items() if n in state})


def is_given(mark: _Mark | None) -> bool:
    """Whether a mark says that somebody loaded a state dict of unknown origin by hand, and nothing was filled since."""
    return mark is not None and not mark.transfers


def given_by_hand(model: nn.Module) -> list[str]:
    """The outermost modules into which somebody loaded a state dict of unknown origin by hand, by path."""
    given = {sub for sub, mark in _marks(model).items() if is_given(mark)}
    found: list[str] = []
    for path, sub in model.named_modules():
        holders = [inner for inner in sub.modules() if _holds_tensors(inner)]
        inside = any(not outer or path.startswith(f"{outer}.") for outer in found)
        if holders and given.issuperset(holders) and not inside:
            found.append(path)
    return found


def recall(model: nn.Module, before: Held | None = None, *, given: bool = False) -> Memory | None:
    """What a model remembers; ``None`` if no part of it was ever filled."""
    marks = {sub: mark for sub, mark in _marks(model).items() if given or not is_given(mark)}
    if not marks:
        return None
    held = [(parameter, version) for mark in marks.values() for parameter, version in mark.alive()]
    known = {id(parameter) for parameter, _ in held}
    fresh: set[int] = set()
    replaced: list[str] = []
    for path, sub in model.named_modules():
        new = {n: p for n, p in sub.named_parameters(path, recurse=False) if id(p) not in known}
        mark = marks.get(sub)
        for name, parameter in new.items():
            if parameter.grad is None and _is_built_anew(model, path, name, parameter, marks, known, before or {}):
                fresh.add(id(parameter))
            else:
                replaced.append(name)
        if mark is None and all(id(p) in fresh for p in sub.parameters(recurse=False)):
            fresh.update(id(buffer) for buffer in sub.buffers(recurse=False))
    state = model.state_dict(keep_vars=True)
    return Memory(
        transfers=_transfers(marks),
        fresh=frozenset(name for name, tensor in state.items() if id(tensor) in fresh),
        replaced=tuple(replaced),
        untouched=not replaced and all(version is not None and version == _version(p) for p, version in held),
    )


def _is_built_anew(
    model: nn.Module,
    path: str,
    name: str,
    parameter: nn.Parameter,
    marks: Mapping[nn.Module, _Mark],
    known: set[int],
    before: Held,
) -> bool:
    """Whether a parameter that nobody has seen belongs to a layer built anew, and was not made of a trained one."""
    parts = path.split(".") if path else []
    for depth in range(len(parts) + 1):  # from the root: a module that lost a parameter was converted, with all in it
        outer = model.get_submodule(".".join(parts[:depth]))
        mark = marks.get(outer)
        if mark is not None and any(n not in outer._parameters for n in mark.own()):
            return False
    owner = model.get_submodule(path)
    mark = marks.get(owner)
    if mark is None:
        return True
    if name.rpartition(".")[2] not in mark.held:  # added, or made of what has gone (a parametrization)
        return set(mark.held) <= {n for n, _ in owner.named_parameters(remove_duplicate=False)}
    was = before.get(name)
    if was is not None and was() is not parameter and not is_sharded(parameter):
        return True
    # load_state_dict(assign=True) exchanges every parameter inside a module, and no module
    rest = [p for sub in owner.modules() if sub in marks for p in sub.parameters(recurse=False)]
    return any(id(p) in known for p in rest) or any(
        sub not in marks for sub in owner.modules() if any(True for _ in sub.parameters(recurse=False))
    )


def _own_names(path: str, module: nn.Module) -> set[str]:
    return {
        name
        for own in (module.named_parameters, module.named_buffers)
        for name, _ in own(path, recurse=False, remove_duplicate=False)
    }


def _holds_tensors(module: nn.Module) -> bool:
    return any(t is not None for own in (module._parameters, module._buffers) for t in own.values())


_trained: set[str] = set()  # what models of this process held when they were saved, or when a run of theirs ended
_fresh: set[str] = set()  # what they held before: with one seed, the next model starts from the same values


def note_trained(model: nn.Module) -> None:
    """Know these weights again in a model that is made of them, as by ``load_from_checkpoint`` after a fit."""
    memory = recall(model)
    if memory is not None and not memory.untouched and (own := _fingerprint(model)) not in _fresh:
        _trained.add(own)


def look_at_values(model: nn.Module) -> None:
    """Let a model remember what its values tell: that they were trained in this process, or never.

    Fresh values are known again when the model, or its twin, is given them back by hand, as for the next fold of a
    cross-validation.
    """
    memory, own = recall(model), _fingerprint(model)
    if memory is None and own in _trained:
        remember(model, "trained", "an earlier run of this process")
    elif own in _fresh and any(is_given(mark) or mark.reloaded for mark in _marks(model).values()):
        put_marks(model, {})
    elif memory is None and not given_by_hand(model) and not was_trained_here(model):
        _fresh.add(own)


_stepped: Any = WeakIdKeyDictionary()  # parameters over which an optimizer of this process has stepped
_watched: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()


def watch_optimizers() -> None:
    """Note from now on which parameters optimizers train, whoever runs them."""
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(_note_step))
        nn.Parameter.__deepcopy__ = _as_trained_as(nn.Parameter.__deepcopy__)  # type: ignore[method-assign]


def _as_trained_as(copied: Callable[[Any, dict[int, Any]], Any]) -> Callable[[Any, dict[int, Any]], Any]:
    """Let the copy of a trained parameter count as trained too."""

    @functools.wraps(copied)
    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        result = copied(self, memo)
        if self in _stepped:
            _stepped[result] = True
        return result

    return deepcopy


_watching: list[Any] = []


def _note_step(optimizer: Optimizer, *_: Any) -> None:
    size = sum(len(group["params"]) for group in optimizer.param_groups)
    if _watched.get(optimizer) != size:  # groups may be added
        _watched[optimizer] = size
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                _stepped[parameter] = True


def was_trained_here(model: nn.Module) -> bool:
    """Whether optimizers of this process have trained most of what is trainable in a model, or was before a freeze."""
    trainable = [p for p in model.parameters() if (p.requires_grad or p in _stepped) and not is_lazy(p)]
    trained = sum(p.numel() for p in trainable if p in _stepped)
    return bool(trained) and 2 * trained >= sum(p.numel() for p in trainable)


def _fingerprint(model: nn.Module) -> str:
    """A digest of a few values of each parameter; training changes all of them."""
    digest = hashlib.sha256()
    parameters = sorted((name, p) for name, p in model.named_parameters() if not (p.is_meta or is_lazy(p)))
    for name, parameter in parameters:
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        with suppress(RuntimeError, TypeError, NotImplementedError):  # kinds of tensors that have no plain values
            digest.update(ends_of(held_part(parameter), _ENDS))
    return digest.hexdigest()


def glance(model: nn.Module) -> Held:
    """The parameters of a model as they are now, held weakly."""
    return {name: weakref.ref(p) for name, p in model.named_parameters(remove_duplicate=False)}


def marks_of(model: nn.Module) -> dict[nn.Module, Any]:
    """All marks of a model, for :func:`put_marks`."""
    return {sub: sub.__dict__[_MARK] for sub in model.modules() if _MARK in sub.__dict__}


def put_marks(model: nn.Module, marks: Mapping[nn.Module, Any]) -> None:
    """Let a model remember what it did when :func:`marks_of` looked, and nothing else."""
    for sub in model.modules():
        sub.__dict__.pop(_MARK, None)
        if sub in marks:
            sub.__dict__[_MARK] = marks[sub]


def _marks(model: nn.Module) -> dict[nn.Module, _Mark]:
    """The marks of a model; those that come from a pickle become marks again, of the parameters that are there."""
    found: dict[nn.Module, _Mark] = {}
    for sub in model.modules():
        mark = sub.__dict__.get(_MARK)
        if isinstance(mark, dict):
            inside = dict(sub.named_parameters(remove_duplicate=False))
            mark = _Mark(mark["transfers"], {n: (inside[n], None) for n in mark["held"] if n in inside})
            sub.__dict__[_MARK] = mark
        if isinstance(mark, _Mark):
            found[sub] = mark
    return found


def _transfers(marks: Mapping[nn.Module, _Mark]) -> dict[str, str]:
    return {key: words for mark in marks.values() for key, words in mark.transfers.items()}


def _version(tensor: Tensor | None) -> int | None:
    """How often a tensor was written to; ``None`` where that is not counted."""
    return None if tensor is None or tensor.is_inference() else tensor._version
