"""The parsers of the command: light to import, so that ``--help`` is quick; the work is in the commands' modules."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, NoReturn, get_origin, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from lit_wsl.errors import did_you_mean, printable
from lit_wsl.matching.options import MatchingOptions


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of descriptions, since they hold examples; tells defaults, but no types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        tell = action.option_strings and action.default not in (None, False, argparse.SUPPRESS, [], {})
        return f"{text} (default: {action.default})" if tell and "default" not in text else text


class _Version(argparse.Action):
    """Looks the version up when it is asked for only: that reads the package's metadata."""

    def __init__(self, option_strings: Any, dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=options["help"])

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print it and exit."""
        from lit_wsl.files import package_version

        print(f"{parser.prog} {package_version()}")
        parser.exit()


class _Parser(ArgumentParser):
    """Says what is wrong in a line or two, without the page of usage and without types."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and where the options are explained; exit code 2."""
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        lacking = re.search(r"required: (\w+)\.", message)
        if lacking is not None and self._subcommands_action is not None:
            parser = self._subcommands_action._name_parser_map.get(lacking[1], parser)
        prog = parser.prog.replace(" [options]", "")
        print(printable(f"{prog}: {_plainly(message, parser)}\n({prog} --help explains the options)"), file=sys.stderr)
        self.exit(2)


def _plainly(message: str, parser: ArgumentParser) -> str:
    """A message of the parser in the command's own words, with what was probably meant."""
    key = re.match(r'Parser key "([^"]+)"[^:]*:\s*(.*)', message, re.S)
    if key is not None:
        option = "--" + key[1].replace("_", "-")
        wanted = re.search(r"Expected an? (?:typing\.|<class ')?(Literal\[.*?\]|\w+)", key[2])
        value = re.search(r"(?:Got|Given) value: (.*)", key[2], re.S)
        if wanted is None or value is None:
            return f"{option}: {key[2]}"
        choices = re.findall(r"'([^']+)'", wanted[1])
        kinds = {"int": "a whole number", "float": "a number", "dict": f"given by keys: {option}.KEY VALUE"}
        wish = f"one of {', '.join(map(repr, choices))}" if choices else kinds.get(wanted[1], f"a {wanted[1]}")
        return f"{option} must be {wish}; got {value[1]!r}.{did_you_mean(value[1], choices)}"
    if message.startswith('expected "subcommand"'):
        return f"name a command: {', '.join(parser._subcommands_action._name_parser_map)}."  # type: ignore[union-attr]
    unknown = re.match(r"unrecognized arguments: ([^\s=]+)", message, re.I)
    known = [option for action in parser._actions for option in action.option_strings]
    choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
    if choice is not None:
        unknown, known = choice, re.findall(r"[\w-]+", choice[2])
    meant = did_you_mean(unknown[1], known) if unknown is not None else ""
    lacking = re.match(r"(the following arguments are required: )(.*)", message)
    if lacking is not None:
        spelt = {action.dest: "/".join(action.option_strings) for action in parser._actions if action.option_strings}
        names = (name.rpartition(".")[2] for name in lacking[2].split(", "))
        return lacking[1] + ", ".join(spelt.get(name, name) for name in names)
    return f"{message}.{meant}" if meant else message


FILE: dict[str, Any] = {"type": str, "metavar": "FILE"}
NAME: dict[str, Any] = {"type": str, "metavar": "MODULE:NAME"}


def _parser(description: str) -> ArgumentParser:
    return _Parser(description=description.strip(), formatter_class=_HelpFormatter)


def build_parser(arguments: Sequence[str] = ()) -> ArgumentParser:
    """The parser of ``lit-wsl``."""
    first = next(iter(arguments), "")
    parser = _Parser(prog="lit-wsl", formatter_class=_HelpFormatter, description=TOP)
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subcommands(required=True)
    table = (
        ("inspect", _inspect, "what is in a checkpoint, without running any code in it"),
        ("map", _map, "match a checkpoint to a model and write the plan"),
        ("convert", _convert, "write a checkpoint for the new model that training resumes from"),
        ("rename", _rename, "rename the tensors of a checkpoint"),
        ("diff", _diff, "which tensors of two checkpoints differ, and by how much"),
        ("rebasin", _rebasin, "align models that differ by the order of their units, compare and merge them"),
        ("rebase", _rebase, "carry a fine-tuning to another release of its pretrained model"),
    )
    one_only = first in ("-h", "--help", "--version", *(name for name, *_ in table))
    for name, make, line in table:
        sub = _parser("") if one_only and name != first else make()
        sub.add_argument("--debug", action="store_true", help="show where an error came from")
        for action in sub._actions:
            if action.metavar in ("FILE", "FOLDER") or not action.option_strings:
                vars(action)["complete"] = COMPLETE_FILES
        commands.add_subcommand(name, sub, help=line)
    return parser


COMPLETE_FILES = {  # what shtab calls FILE, for completion in shells
    "bash": "_shtab_compgen_files",
    "zsh": "_files",
    "tcsh": "f",
    "fish": "(__fish_complete_path (commandline -ct))",
    "powershell": "_shtab_powershell_compgen_files",
}

TOP = """
Put the weights of one model into another: modules renamed, regrouped, wrapped, fused, split.

The usual way, after a refactor:

  # what is in it?
  lit-wsl inspect old.ckpt
  # match it to the new model; look at the plan, edit it if need be
  lit-wsl map old.ckpt --model my.models:NewNet --plan plan.json
  # trainer.fit(model, ckpt_path="new.ckpt") continues the training
  lit-wsl convert old.ckpt --plan plan.json -o new.ckpt

Exit codes: 0 success, 1 a negative result (coverage below --min-coverage,
checkpoints that differ), 2 wrong usage or unreadable input.
""".strip()


def _inspect() -> ArgumentParser:
    parser = _parser("""
Show what is in a checkpoint: format, tensors (folded by families), and
everything else. Nothing in it is run.

  lit-wsl inspect old.ckpt
  # every tensor whose name holds 'attn', unfolded
  lit-wsl inspect old.ckpt --all --match attn
  # for scripts
  lit-wsl inspect old.ckpt --json - | jq .other
  # sharded models, too
  lit-wsl inspect model.safetensors.index.json
""")
    parser.add_argument("checkpoint", type=str, help="a checkpoint of any format: a file or a folder")
    parser.add_argument("--match", type=str, help="only tensors whose names hold this text")
    parser.add_argument("--all", action="store_true", help="one line per tensor, not per family")
    _add_json(parser)
    _add_weights(parser)
    return parser


def _map() -> ArgumentParser:
    parser = _parser("""
Match a checkpoint to a model. No weights are read: names, shapes and
structure are enough.

  lit-wsl map old.ckpt --model my.models:NewNet --plan plan.json
  lit-wsl map old.ckpt --model my.models:NewNet --model-args.depth 12 \\
      --html report.html
  # the model of a LightningCLI config
  lit-wsl map old.ckpt --config config.yaml --plan plan.json
  # a sample call tells the execution order
  lit-wsl map old.ckpt --model nets.py:build --sample nets.py:batch

Exit code 1 means: less found a place than --min-coverage asks for. The files
are written all the same, so that the plan can be completed by hand.
""")
    parser.add_argument("checkpoint", type=str, help="the old checkpoint, of any format")
    _add_model(parser)
    parser.add_argument("--plan", **FILE, help="write the plan, as .json or .yaml")
    parser.add_argument("--html", **FILE, help="write the report as one HTML page")
    _add_json(parser)
    parser.add_argument(
        "--proof",
        choices=("auto", "off"),
        default="auto",
        help="with --config: let the loss on the config's own data decide what names leave open",
    )
    parser.add_argument("--sample", **NAME, help="a function that gives one sample input")
    parser.add_argument("--source-model", **NAME, help="the old model's class, if still there")
    parser.add_argument("--source-model-args", type=dict[str, Any], default={}, metavar="ARGS", help="its arguments")
    _add_matching(parser)
    _add_min_coverage(parser)
    _add_weights(parser)
    return parser


def _convert() -> ArgumentParser:
    parser = _parser("""
Write a checkpoint for the new model. Optimizer states, and whatever else is a
copy of the weights or a list of parameter names, go through the same
operations as the weights; the rest stays as it is:
trainer.fit(model, ckpt_path="new.ckpt") continues as if nothing had happened.

  # match and convert in one step
  lit-wsl convert old.ckpt --model my.models:NewNet -o new.ckpt
  # with a plan from lit-wsl map, reviewed before
  lit-wsl convert old.ckpt --plan plan.json -o new.ckpt
  # where the plan alone does not tell the order of the new parameters
  lit-wsl convert old.ckpt --plan plan.json -o new.ckpt --model my.models:NewNet
  # the weights only
  lit-wsl convert old.ckpt --plan plan.json -o new.safetensors
  # the way back
  lit-wsl convert new.ckpt --plan plan.json --reverse -o back.ckpt \\
      --model my.models:OldNet

Exit code 1 means: less found a place than --min-coverage asks for, and
nothing was written.
""")
    parser.add_argument("checkpoint", type=str, help="the old checkpoint")
    parser.add_argument("--plan", **FILE, help="the plan, from lit-wsl map; without one, --model is matched")
    parser.add_argument("-o", "--output", required=True, **FILE, help="the file to write")
    parser.add_argument("--reverse", action="store_true", help="go the other way: from the new model to the old")
    _add_model(parser)
    parser.add_argument("--weights-only", action="store_true", help="leave optimizers, schedulers and callbacks out")
    _add_json(parser)
    _add_foreign(parser)
    parser.add_argument(
        "--on-lost",
        type=Literal["refuse", "initialize"],
        default="refuse",
        help="what to do where an optimizer state cannot go through an operation",
    )
    parser.add_argument(
        "--parameter-names",
        **FILE,
        help="JSON: for each optimizer the old names in index order, where they cannot be inferred",
    )
    parser.add_argument(
        "--drop",
        type=str,
        action="append",
        default=[],
        metavar="ENTRY",
        help="leave an entry out, such as callbacks/EMA; * stands for any text; may be repeated",
    )
    _add_matching(parser)
    _add_min_coverage(parser)
    _add_weights(parser)
    return parser


def _rename() -> ArgumentParser:
    parser = _parser("""
Rename the tensors of a checkpoint; everything else in the file is kept.
Several changes are made in this order: --map, --prefix, --remove-prefix,
--add-prefix, --regex.

  lit-wsl rename old.ckpt --remove-prefix model -o new.ckpt
  lit-wsl rename old.ckpt --add-prefix net -o new.ckpt
  lit-wsl rename old.ckpt --prefix encoder=backbone.encoder --prefix fc=head \\
      -o new.ckpt
  lit-wsl rename old.ckpt --map fc.weight=head.weight --map fc.bias=head.bias \\
      -o new.ckpt
  # a file of old and new names
  lit-wsl rename old.ckpt --map names.json -o new.ckpt
  # only show what would change
  lit-wsl rename old.ckpt --regex 'layer(\\d+)=layers.\\1' --dry-run
""")
    parser.add_argument("checkpoint", type=str, help="the checkpoint")
    parser.add_argument("-o", "--output", **FILE, help="the file to write")
    parser.add_argument("--map", action="append", type=str, metavar="OLD=NEW", help="a name, or a JSON or YAML file")
    parser.add_argument("--prefix", action="append", type=str, metavar="OLD=NEW", help="a module's path")
    parser.add_argument("--remove-prefix", action="append", type=str, metavar="PATH", help="take a path off all names")
    parser.add_argument("--add-prefix", action="append", type=str, metavar="PATH", help="put a path before all names")
    parser.add_argument("--regex", action="append", type=str, metavar="PATTERN=NEW", help="a regular expression")
    parser.add_argument("--dry-run", action="store_true", help="show the new names, write nothing")
    _add_json(parser)
    _add_foreign(parser)
    return parser


def _diff() -> ArgumentParser:
    parser = _parser("""
Compare the tensors of two checkpoints: which differ, and by how much.
Exit code 0: all are equal, 1: some differ.

  lit-wsl diff a.ckpt b.ckpt
  # differences up to 1e-6 are taken for equal
  lit-wsl diff a.ckpt b.safetensors --tolerance 1e-6
  # across a refactor: the plan brings the first to the second
  lit-wsl diff old.ckpt new.ckpt --plan plan.json
""")
    parser.add_argument("first", type=str, help="a checkpoint")
    parser.add_argument("second", type=str, help="another checkpoint")
    parser.add_argument("--plan", **FILE, help="a plan that takes the first to the second")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest absolute difference taken for equal")
    parser.add_argument("--limit", type=int, default=30, help="lines to show at most; 0 for all")
    _add_json(parser)
    _add_weights(parser)
    return parser


def _rebasin() -> ArgumentParser:
    parser = _parser("""
Align models that differ by the order of their units (Git Re-Basin), compare
them before and after, and merge them.

  lit-wsl rebasin a.ckpt b.ckpt --base pretrained.ckpt \\
      --model my.models:Net --sample my.models:batch -o aligned/
  # batch norms of the merged model get statistics from training data
  lit-wsl rebasin a.ckpt b.ckpt --on weights --merge average \\
      --model my.models:Net --sample my.models:batch \\
      --data my.data:loader -o merged/

The first checkpoint is the reference. --sample names a function that gives
one input of the model (a tensor, a tuple of arguments, or a dict of keyword
arguments); models with example_input_array need none.

Exit code 1 means: the models could not be aligned, only compared.
""")
    parser.add_argument("checkpoints", type=str, nargs="+", help="two or more, the reference first")
    parser.add_argument("--base", **FILE, help="the pretrained checkpoint, for task vectors")
    _add_spec(parser)
    parser.add_argument("-o", "--output", type=str, metavar="FOLDER", help="where to write aligned checkpoints")
    parser.add_argument("--on", type=Literal["task_vectors", "weights"], default=None, help="what to align")
    parser.add_argument("--merge", type=Literal["average", "task_arithmetic"], default=None, help="how to merge")
    parser.add_argument(
        "--merge-weights", type=float, nargs="+", default=[], metavar="W", help="how much each checkpoint counts"
    )
    parser.add_argument("--merge-scale", type=float, default=None, help="factor of task vectors when merging")
    parser.add_argument(
        "--matching",
        type=Literal["weights", "best"],
        default="weights",
        help="best: match also on how units respond to --data",
    )
    parser.add_argument("--data", **NAME, help="training data: batch norm statistics of the merged model")
    parser.add_argument("--repair-batches", type=int, default=32, help="how many batches of it; 0: keep the mean")
    parser.add_argument("--device", type=str, metavar="DEVICE", help="where to match, e.g. cuda; default: the CPU")
    parser.add_argument("--max-iter", type=int, default=100, help="maximum number of sweeps of the matching")
    parser.add_argument("--seed", type=int, default=0, help="of the matching's random orders")
    _add_json(parser)
    _add_weights(parser)
    return parser


def _rebase() -> ArgumentParser:
    parser = _parser("""
Carry a fine-tuning to another release of its pretrained model.

  lit-wsl rebase finetuned.ckpt --base old.ckpt --onto new.ckpt \\
      --model my.models:Net --sample my.models:batch -o rebased.ckpt
  # unlabelled batches: much more arrives, and how much is measured
  lit-wsl rebase finetuned.ckpt --base old.ckpt --onto new.ckpt \\
      --model my.models:Net --data my.data:loader -o rebased.ckpt

--model is the fine-tuned one. A base of another implementation is mapped to
its names first; what no base has, such as a new head, is carried whole.

Exit code 1 means: nothing of the model can be permuted, nothing was written.
""")
    parser.add_argument("checkpoint", type=str, help="the fine-tuned checkpoint")
    parser.add_argument("--base", required=True, **FILE, help="what it was fine-tuned from")
    parser.add_argument("--onto", required=True, **FILE, help="the new release")
    _add_spec(parser)
    parser.add_argument("--data", **NAME, help="batches of the task; labels are not used")
    parser.add_argument("--max-batches", type=int, default=32, help="how many of them")
    parser.add_argument("-o", "--output", required=True, **FILE, help="the checkpoint to write")
    parser.add_argument(
        "--method", type=Literal["auto", "add", "permute", "turn", "fit"], default="auto", help="how to carry it"
    )
    parser.add_argument("--alpha", type=float, default=1.0, help="factor of the task vector")
    parser.add_argument("--seed", type=int, default=0, help="of the matching's random orders")
    _add_json(parser)
    _add_weights(parser)
    return parser


def _add_model(parser: ArgumentParser) -> None:
    """How to name the model: a class or function, or the config of a LightningCLI."""
    parser.add_argument("--model", **NAME, help="a class or function that gives the model, e.g. my.models:Net")
    parser.add_argument(
        "--model-args", type=dict[str, Any], default={}, metavar="ARGS", help="its arguments: --model-args.depth 12"
    )
    parser.add_argument("--config", **FILE, help="a LightningCLI config that has the model")


def _add_spec(parser: ArgumentParser) -> None:
    """The model, and what tells which of its units may be permuted."""
    _add_model(parser)
    parser.add_argument("--sample", **NAME, help="a function that gives one sample input")
    parser.add_argument("--outputs", **NAME, help="a function that picks what counts of what it returns")
    parser.add_argument("--spec", **FILE, help="a permutation spec (JSON), instead of a sample")


def _add_min_coverage(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--min-coverage", type=float, default=0.5, metavar="SHARE", help="minimum share of elements that is matched"
    )


def _add_matching(parser: ArgumentParser) -> None:
    """An option for each of :class:`MatchingOptions`, with its type, its default and what its docstring says of it."""
    kinds = get_type_hints(MatchingOptions)
    for option in fields(MatchingOptions):
        found = re.search(rf"^ +{option.name}: (.*?)(?=^ +\w+: |^ *$)", MatchingOptions.__doc__ or "", re.M | re.S)
        text = " ".join((found[1] if found else "").replace("`", "").split())
        text = text[:1].lower() + text[1:].rstrip(".") + SPELLED.get(option.name, "")
        how: dict[str, Any] = {"type": kinds[option.name], "default": option.default, "metavar": "VALUE"}
        if kinds[option.name] is bool:
            how = {"action": "store_true"}
        elif get_origin(kinds[option.name]) is tuple:
            how |= {"type": str, "nargs": "+", "default": []}
        elif option.default is MISSING:
            how |= {"type": dict[str, float] | None, "default": None}
        parser.add_argument(f"--{option.name.replace('_', '-')}", **how, help=text)


SPELLED = {
    "weights": ": --weights.shape 0.5 --weights.name 0.3 --weights.hierarchy 0.2",
    "incompatible_pairs": "; here: encoder,stem:decoder backbone:head",
}


def _add_json(parser: ArgumentParser) -> None:
    """The result as JSON, the same way everywhere."""
    parser.add_argument(
        "--json", type=str, nargs="?", const="-", metavar="FILE", help="write the result as JSON; - is standard output"
    )


def _add_foreign(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--keep-foreign",
        action="store_true",
        help="keep the file's calls of functions, which run when the new file is loaded with weights_only=False; "
        "for files that you trust",
    )


def _add_weights(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint-weights",
        type=Literal["auto", "model", "ema"],
        default="auto",
        help="which weights of the file: the model's, or their running average",
    )
