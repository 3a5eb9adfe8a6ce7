"""The command line, made from the table of job options; `quantmill` and ``python -m quantlib`` share it.

Commands are data: which addresses they take, which options of the table, and what else. Values are not
checked by argparse beyond numbers; `options_from` checks them, as it does those of a recipe file and of
the Prefect form, so that every front end says the same.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from quantlib.errors import RecipeError
from quantlib.job.comparison_request import NOT_COMPARED, OUTPUT_HELP, SCHEMES_HELP, comparison_request
from quantlib.job.gates import GATE_OPTIONS
from quantlib.job.hook import check_hook
from quantlib.job.option_table import check_value, kind_of
from quantlib.job.options import JobOptions, option_fields, options_from
from quantlib.job.provenance import with_replayed_values
from quantlib.job.several_formats import only_format, requests_of_formats
from quantlib.job.staged_output import PUBLICATION_OPTIONS
from quantlib.job.text_sources import JOIN, is_mix
from quantlib.recipe import NOT_IN_RECIPES, read_recipe
from quantlib.simulation.hardware import DEFAULT_NETWORK, DEFAULT_STORAGE
from quantlib.storage.uris import join_uri

_JOB_OPTIONS = tuple(
    name for name in option_fields() if name not in NOT_IN_RECIPES and name != "rules"
)  # rules are tables: a recipe file has room for them, a command line has not
# Text that names no object; shown by the last word of the option's name.
_NO_ADDRESSES = ("text_column", "ray_address", "gpu_model", "worker_resources", "worker_labels", "hook")
# Each time with a weight.
_SEVERAL = ("calibration",)
_RECIPE = (
    "--recipe",
    {
        "metavar": "FILE.toml",
        "action": "append",
        "help": "Recipe file; options given here win over it. Several make an output each, OUTPUT/FILE,"
        " from one reading.",
    },
)
_COMPARED = (
    ("--schemes", {"metavar": "ENTRY", "nargs": "+", "help": SCHEMES_HELP}),
    ("--output", {"metavar": "URI", "help": OUTPUT_HELP}),
    (
        "--recipe",
        {
            "metavar": "FILE.toml",
            "help": "Recipe file whose options hold for all entries, but for its scheme; options given here"
            " win over it.",
        },
    ),
)
# What `quantlib.simulation` takes; it reads these values itself.
_CLUSTER = (
    (
        "--cluster",
        {
            "metavar": "GPUS",
            "help": "Predict the job on this cluster instead, such as 8xH100 or 4x8xH100 (nodes x GPUs);"
            " SOURCE is enough, also shapes:NAME.",
        },
    ),
    ("--network", {"metavar": "RATE", "help": f"Network of a node of it. (default: {DEFAULT_NETWORK})"}),
    ("--storage", {"metavar": "RATE", "help": f"Storage of a node of it. (default: {DEFAULT_STORAGE})"}),
    ("--price", {"metavar": "PRICE", "help": "Of a GPU-hour of it."}),
    (
        "--gpu-memory",
        {
            "metavar": "SIZE",
            "help": "Show instead what the weights take in every scheme, and how many GPUs of this size, such"
            " as 80GB, hold them; SOURCE is enough, also shapes:NAME.",
        },
    ),
    ("--rates", {"metavar": "FILE.json", "help": "Measured rates of a GPU, in place of assumed ones."}),
)
# A prediction writes nothing and reads no text.
_NOT_NEEDED = {"output": "(none)", "calibration": "(none)"}
_JSON = ("--json", {"action": "store_true", "help": "Print JSON instead of text."})


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One sub-command.

    Attributes:
        help: One sentence for people.
        addresses: Positional arguments: name -> help.
        options: Names in the table of job options that become flags.
        others: Further flags with their argparse settings.
    """

    help: str
    addresses: Mapping[str, str]
    options: tuple[str, ...] = ()
    others: tuple[tuple[str, Mapping[str, Any]], ...] = ()


class _Joined(argparse.Action):
    """An option that may be given several times; its value is all of them, as a recipe would name them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, _option: Any = None) -> None:
        before = getattr(namespace, self.dest, None)
        joined = values if before is None else f"{before}{JOIN}{values}"
        if before is not None and not is_mix(joined):
            parser.error(f"--{self.dest} given several times needs a weight each time, as in {values}=0.5")
        setattr(namespace, self.dest, joined)


def _job_addresses() -> dict[str, str]:
    return {name: option_fields()[name][1].help for name in NOT_IN_RECIPES}


_OUTPUT = {"output": "A quantized checkpoint: s3://, file:// or a path."}

COMMANDS: dict[str, Command] = {
    "plan": Command(
        help="What would be done: blocks, shards, bytes in and out, memory, rough time.",
        addresses=_job_addresses(),
        options=_JOB_OPTIONS,
        others=(_RECIPE, *_CLUSTER, _JSON),
    ),
    "quantize": Command(
        help="Convert a checkpoint, or finish a conversion that was interrupted.",
        addresses=_job_addresses(),
        options=_JOB_OPTIONS,
        others=(_RECIPE, _JSON),
    ),
    "compare": Command(
        help="Convert a checkpoint by several schemes and methods from one reading: one table of sizes,"
        " losses and seconds.",
        addresses={"source": option_fields()["source"][1].help},
        options=tuple(name for name in _JOB_OPTIONS if name not in NOT_COMPARED),
        others=(*_COMPARED, _JSON),
    ),
    "verify": Command(
        help="Re-read every shard of an output and compare it with its record.",
        addresses=_OUTPUT,
        options=("storage_engine",),
        others=(
            ("--source", {"metavar": "URI", "help": "Account for every tensor of this source too."}),
            ("--against", {"metavar": "URI", "help": "Compare with this output too, tensor by tensor."}),
            _JSON,
        ),
    ),
    "clean": Command(
        help="Abort what killed runs left unfinished, and remove the work prefix of a finished output.",
        addresses={"output": "The output of a job: s3://, file:// or a path."},
        options=("work", "storage_engine"),
        others=(
            (
                "--discard",
                {
                    "action": "store_true",
                    "help": "Remove the shards and records of an unfinished or staged job too.",
                },
            ),
            _JSON,
        ),
    ),
    "publish": Command(
        help="Publish an output that is staged, if it keeps its gates and its hook agrees; converts nothing.",
        addresses={"output": "The output of a job: s3://, file:// or a path."},
        options=("work", "storage_engine", *GATE_OPTIONS, "hook", "hook_timeout"),
        others=(_JSON,),
    ),
    "evaluate": Command(
        help="Perplexity of an original or quantized checkpoint, block by block.",
        addresses={"model": "Checkpoint to evaluate: s3://, file:// or a path."},
        options=(
            "text_column",
            "sequence_length",
            "evaluation_sequences",
            "threads_per_worker",
            "device",
            "storage_engine",
        ),
        others=(
            (
                "--text",
                {
                    "metavar": "URI",
                    "required": True,
                    "help": "Text to predict: a parquet, jsonl or txt object.",
                },
            ),
            _JSON,
        ),
    ),
    "inspect": Command(
        help="What a checkpoint is: architecture, tensors, dtypes, sizes, quantization.",
        addresses={"uri": "Any checkpoint: s3://, file:// or a path."},
        options=("storage_engine",),
        others=(_JSON,),
    ),
    "report": Command(
        help="Show the report of a run, published or staged.",
        addresses=_OUTPUT,
        options=("work", "storage_engine"),
        others=(_JSON,),
    ),
}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with 2.

    Attributes:
        program: Name in error lines.
        may_lack: Positional arguments that may be absent, in order.
    """

    program = "quantmill"
    may_lack: tuple[str, ...] = ()

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse, but what may be absent need not stand together.

        argparse takes such arguments for absent once it has met one of them and then an option.
        """
        parsed, rest = super().parse_known_args(*args, **kwargs)
        if self.may_lack and not any(word.startswith("-") for word in rest):
            missing = [name for name in self.may_lack if not hasattr(parsed, name)]
            for name, word in zip(missing, rest, strict=False):
                setattr(parsed, name, word)
            rest = rest[len(missing) :]
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.program}: error: {message} (see {self.prog} --help)\n")


def build_parser(program: str, commands: Mapping[str, Command] = COMMANDS) -> argparse.ArgumentParser:
    """A parser with one sub-command for each entry.

    The result of its ``parse_args`` has ``command`` and ``verbose``; options of the table that were not given
    are absent from it: read them with `requests_of` or `values_of`.

    Args:
        program: Name in usage and error lines.
        commands: Sub-commands by name.
    """
    parser = _Parser(
        prog=program,
        description="Convert large language models into quantized checkpoints, storage to storage.",
        allow_abbrev=False,
    )
    parser.program = program
    # Without the metavar argparse repeats all names in usage lines that are long enough already.
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in commands.items():
        sub = subparsers.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        sub.program = program
        _fill(sub, command)
    return parser


def _fill(parser: _Parser, command: Command) -> None:
    # A replay knows its addresses; whether there is one, a recipe may say.
    presence: dict[str, Any] = {}
    if "replay" in command.options:
        parser.may_lack = tuple(command.addresses)
        presence = {"nargs": "?", "default": argparse.SUPPRESS}
    for name, help_text in command.addresses.items():
        parser.add_argument(name, metavar=name.upper(), help=help_text, **presence)
    for flag, settings in command.others:
        parser.add_argument(flag, **settings)
    parser.add_argument("--verbose", action="store_true", help="Show logs, and tracebacks of errors.")
    groups: dict[str, Any] = {}
    table = option_fields()
    for name in command.options:
        section = table[name][1].section
        group = groups.setdefault(section, None) or parser.add_argument_group(section)
        groups[section] = group
        group.add_argument(f"--{name.replace('_', '-')}", **_settings(name))


def _settings(name: str) -> dict[str, Any]:
    found, option = option_fields()[name]
    default = "" if found.default is None else f" (default: {found.default})"
    help_text = (option.help + default).replace("%", "%%")
    if kind_of(found) is bool:
        yes_or_no = argparse.BooleanOptionalAction
        return {"action": yes_or_no, "default": argparse.SUPPRESS, "help": help_text}
    metavar = "{" + ",".join(option.choices) + "}" if option.choices else "URI"
    metavar += "[,...]" * option.several
    if kind_of(found) in (int, float):
        metavar = "N"
    elif name in _NO_ADDRESSES:
        metavar = name.rpartition("_")[2].upper()
    return {
        **({"action": _Joined} if name in _SEVERAL else {}),
        "type": kind_of(found),
        "default": argparse.SUPPRESS,
        "metavar": metavar,
        "help": help_text,
    }


def requests_of(arguments: argparse.Namespace) -> tuple[JobOptions, ...]:
    """The requests behind ``plan`` or ``quantize``: recorded run, recipe over it, command line over both.

    Of several recipes there is one request for each, whose output and work prefix are those named with the
    recipe's file name below them; of several layouts likewise, below these. With ``--cluster`` or
    ``--gpu-memory`` output and calibration text need not be named.

    Raises:
        RecipeError: With ``before_work`` set; see `read_recipe`, `with_replayed_values`, `options_from`; or
            something is said of a cluster that is not named, or of which one thing is predicted; or two
            recipes have one name.
        StorageError: The provenance to be replayed cannot be read; likewise.
    """
    try:
        files = [Path(file) for file in arguments.recipe or ()]
        if len(files) < 2:
            options = _request(arguments, read_recipe(files[0]) if files else {})
            if _is_prediction(arguments):
                only_format(options, "a prediction")
            return requests_of_formats(options)
        _refuse_ambiguous(arguments, files)
        placed = [_placed(_request(arguments, read_recipe(file)), file.stem) for file in files]
        return tuple(options for each in placed for options in requests_of_formats(each))
    except RecipeError as error:
        error.before_work = True
        raise


def _request(arguments: argparse.Namespace, recipe: Mapping[str, Any]) -> JobOptions:
    values = with_replayed_values({**recipe, **_given(arguments)})
    return options_from({**_not_needed(arguments), **values})


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in option_fields() if hasattr(arguments, name)}


def comparison_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``compare`` is asked for, as plain values that `comparison_request` takes.

    Raises:
        RecipeError: With ``before_work`` set; see `read_recipe` and `comparison_request`.
    """
    try:
        recipe = {} if arguments.recipe is None else read_recipe(arguments.recipe)
        recipe.pop("scheme", None)
        values = {**recipe, **_given(arguments), "schemes": arguments.schemes}
        comparison_request(values)
    except RecipeError as error:
        error.before_work = True
        raise
    return values


def _placed(options: JobOptions, name: str) -> JobOptions:
    """Below the output that was named, and below the work prefix if one was."""
    work = None if options.work is None else join_uri(options.work, name)
    return dataclasses.replace(options, output=join_uri(options.output, name), work=work)


def _refuse_ambiguous(arguments: argparse.Namespace, files: Sequence[Path]) -> None:
    names = [file.stem for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(
            f"two recipes are named {twice}, and so would their outputs be; rename one of the files",
            recipe=twice,
        )
    if _is_prediction(arguments):
        raise RecipeError("a prediction is of one recipe; leave the others out", option="cluster")


def _is_prediction(arguments: argparse.Namespace) -> bool:
    return any(getattr(arguments, name, None) is not None for name in ("cluster", "gpu_memory"))


def _not_needed(arguments: argparse.Namespace) -> Mapping[str, str]:
    """Values for options that a prediction does without."""
    if _is_prediction(arguments):
        return _NOT_NEEDED
    for name in ("network", "storage", "price", "rates"):
        if getattr(arguments, name, None) is not None:
            raise RecipeError(f"{name} is about a cluster and none is named; add --cluster", option="cluster")
    return {}


def values_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The table's options of any other command, checked, with defaults for those not given.

    Raises:
        RecipeError: With ``before_work`` set, when a value is out of its range.
    """
    values: dict[str, Any] = {}
    for name in COMMANDS[arguments.command].options:
        found, _ = option_fields()[name]
        values[name] = getattr(arguments, name, found.default)
        try:
            check_value(name, values[name], found)
        except RecipeError as error:
            error.before_work = True
            raise
    return values


def publication_wishes(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``publish`` is asked for in place of what the run was, checked.

    Raises:
        RecipeError: With ``before_work`` set, when a value is out of its range, or a hook is none.
    """
    checked = values_of(arguments)
    wanted = (name for name in PUBLICATION_OPTIONS if name in checked)
    given = {name: checked[name] for name in wanted if hasattr(arguments, name)}
    try:
        if "hook" in given:
            check_hook(given["hook"])
    except RecipeError as error:
        error.before_work = True
        raise
    return given


def after_interrupt(arguments: argparse.Namespace) -> str:
    """What the same command would do after it was interrupted."""
    if arguments.command == "compare" and arguments.output is None:
        return "nothing is kept, the same command starts over"
    return "the same command continues the job"
