"""Build the model that a command speaks of: from a class or function, or from the config of a LightningCLI."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_wsl.cli.console import remark
from lit_wsl.errors import LitWslError, did_you_mean
from lit_wsl.files import not_found
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.structure.execution_order import is_lazy
from lit_wsl.structure.running import Call, as_call


class UsageError(LitWslError):
    """The command was given something that it cannot use."""


def list_of_names(words: Sequence[str]) -> list[str]:
    """A list option: plain names, with blanks or commas between, or a JSON list.

    >>> list_of_names(["a", "b,c"]), list_of_names(['["a", "b"]'])
    (['a', 'b', 'c'], ['a', 'b'])
    """
    found: list[str] = []
    for word in words:
        if word.startswith("["):
            try:
                found += json.loads(word)
            except ValueError as error:
                raise UsageError(f"{word} is no list of names: {error}.") from error
        else:
            found += [name for name in word.split(",") if name]
    return found


def matching_options(options: Any) -> MatchingOptions:
    """The options of the matching, which :mod:`lit_wsl.cli.parser` offers as they are."""
    lists = {name: list_of_names(getattr(options, name)) for name in ("adapt", "only", "skip")}
    return MatchingOptions.of({**vars(options), **lists, "incompatible_pairs": _pairs(options.incompatible_pairs)})


def _pairs(words: Sequence[str]) -> list[tuple[set[str], set[str]]]:
    """Pairs of words: ``encoder,stem:decoder``, or a JSON list of pairs of lists."""
    pairs: list[tuple[set[str], set[str]]] = []
    for word in words:
        if word.startswith("["):
            try:
                pairs += [(set(one), set(other)) for one, other in json.loads(word)]
            except (ValueError, TypeError) as error:
                raise UsageError(f"{word} is no list of pairs of lists of words: {error}.") from error
            continue
        one, mark, other = word.partition(":")
        if not (one and mark and other):
            raise UsageError(f"--incompatible-pairs takes WORDS:WORDS, such as backbone:head, got {word!r}.")
        pairs.append((set(list_of_names([one])), set(list_of_names([other]))))
    return pairs


def wanted(options: Any) -> bool:
    """Whether the options name a model."""
    return options.model is not None or options.config is not None


def build_model(options: Any, *, meta: bool = True) -> nn.Module:
    """Build the model of ``--model`` or ``--config``."""
    if options.config is not None:
        return _on_meta(lambda: _from_config(options), meta)
    if options.model is None:
        raise UsageError("name the model: --model my.models:Net, or --config config.yaml of a LightningCLI.")
    return _on_meta(lambda: build_from(options.model, options.model_args), meta)


def build_from(path: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call a class or function named ``module:name`` or ``file.py:name``."""
    made = look_up(path)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise UsageError(f"{path} is a {type(made).__name__}, not a class or function that gives a model.")
        try:
            made = made(**arguments)
        except (LitWslError, NotImplementedError):
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise UsageError(f"{path} with arguments {dict(arguments)} fails: {told}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"{path} gives a {type(made).__name__}, not a torch.nn.Module.")
    return _configured(made)


def look_up(path: str) -> Any:
    """Import what ``package.module:name`` or ``file.py:name`` names; the current folder counts as installed."""
    place, mark, name = path.rpartition(":")
    if not mark and path.endswith(".py"):
        raise UsageError(f"{path} is a file; say what is meant in it: {path}:Net.")
    if not mark and os.path.exists(path):
        raise UsageError(
            f"{path} is a file, not a name in Python code: write my.models:Net, or models.py:Net. A checkpoint comes "
            "first, without an option."
        )
    if not mark:
        place, _, name = path.rpartition(".")
    if not place or not name:
        raise UsageError(f"{path!r} does not name anything: write my.models:Net, or models.py:Net.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        for part in name.split("."):
            found = getattr(found, part)
    except LitWslError:
        raise
    except AttributeError as error:
        raise UsageError(f"{place} has no {name!r}.{did_you_mean(part, dir(found))}") from error
    except Exception as error:
        raise UsageError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    return found


def _import_file(file: Path) -> Any:
    if not file.is_file():
        raise not_found(file)
    name = f"lit_wsl_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _on_meta(build: Any, meta: bool) -> nn.Module:
    """Build without memory for weights, or with where the model needs them to be built."""
    if meta:
        try:
            with torch.device("meta"):
                model = build()
            if not is_lazy(model):
                return model
        except (UsageError, NotImplementedError, RuntimeError):
            pass  # reads values of its own weights, or has a fault of its own that shows below
    return build()


def _configured(model: nn.Module) -> nn.Module:
    """Let a LightningModule that builds its layers later do so."""
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities.model_helpers import is_overridden

    if isinstance(model, LightningModule):
        for hook, arguments in (("setup", ("fit",)), ("configure_model", ())):
            if is_overridden(hook, model):
                try:
                    getattr(model, hook)(*arguments)
                except Exception as error:
                    remark(f"note: {type(model).__name__}.{hook} fails outside of a run ({error}); left out")
    return model


def read_yaml(file: str) -> Any:
    """What a YAML or JSON file holds."""
    import yaml

    try:
        return yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise not_found(Path(file)) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def data_from_config(file: str) -> Any:
    """The datamodule of a LightningCLI config, as LightningCLI would build it; ``None`` if it names none."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    document = read_yaml(file)
    section = _section(document, "data", ("fit", "validate"))
    if section is None or "class_path" not in section:
        return None
    made = look_up(section["class_path"])
    if not (isinstance(made, type) and issubclass(made, LightningDataModule)):
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(made, "data", fail_untyped=False)
    return parser.instantiate_classes(parser.parse_object({"data": dict(section.get("init_args") or {})})).data


def _from_config(options: Any) -> nn.Module:
    """The model of a LightningCLI config, as LightningCLI would build it."""
    section = _section(read_yaml(options.config), "model", ("fit", "validate", "test", "predict"))
    if section is None:
        raise UsageError(f"{options.config} is no LightningCLI config: it has no section 'model'.")
    if "class_path" in section:
        path, arguments = section["class_path"], section.get("init_args") or {}
    elif options.model is not None:
        path, arguments = options.model, section
    else:
        raise UsageError(
            f"{options.config} does not say which class its model is (no class_path): give --model my.models:Net too."
        )
    return _instantiate(path, {**arguments, **options.model_args}, options.config)


def _section(document: Any, name: str, commands: Sequence[str]) -> Mapping[str, Any] | None:
    """A section of a config, at the top or inside a subcommand's (``fit``)."""
    places = [document, *(document.get(command) for command in commands)] if isinstance(document, Mapping) else []
    for section in (place.get(name) for place in places if isinstance(place, Mapping)):
        if isinstance(section, (str, Mapping)):
            return {"class_path": section} if isinstance(section, str) else section
    return None


def _instantiate(path: str, arguments: Mapping[str, Any], file: str) -> nn.Module:
    """Build with jsonargparse, so that nested class_path arguments become objects."""
    from jsonargparse import ArgumentError, ArgumentParser

    made = look_up(path)
    if not isinstance(made, type):
        return build_from(path, arguments)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(made, "model", fail_untyped=False)
    try:
        chosen = parser.parse_object({"model": dict(arguments)})
        model = parser.instantiate_classes(chosen).model
    except LitWslError:
        raise
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())
        raise UsageError(
            f"{file}: the model {path} cannot be built: {text}. Arguments that LightningCLI links from elsewhere can "
            "be given with --model-args."
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{path} gives a {type(model).__name__}, not a torch.nn.Module.")
    return _configured(model)


def sample_call(path: str | None, model: nn.Module) -> Call | None:
    """One call of the model: from ``--sample``, or from its ``example_input_array``."""
    if path is not None:
        found = look_up(path)
        try:
            value = found() if callable(found) else found
        except Exception as error:
            raise UsageError(f"{path} fails: {type(error).__name__}: {error}") from error
    else:
        value = getattr(model, "example_input_array", None)
    return None if value is None else as_call(value)
