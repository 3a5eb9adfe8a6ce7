"""The forms of flows about one checkpoint, made from what the command of the same name takes."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, create_model

from flows.params import StoredForm, form_field, title_of
from quantlib.job.command_line import COMMANDS
from quantlib.job.options import JobOptions, option_fields, options_from

# Where on the cluster the worker stands, and what one that computes takes there.
_NODE = ("worker_resources", "worker_labels", "ray_address")
_COMPUTING = ("device", "gpu_model", "threads_per_worker")
# Of one that only reads.
_READING = {"device": "cpu", "threads_per_worker": 1}
_TEXT: Any = Annotated[str, Field(pattern=r"\S")]


def _fields(command: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Of a command's addresses, flags and options, and of further options, in this order."""
    taken = COMMANDS[command]
    own = {name: (_TEXT, ..., words) for name, words in taken.addresses.items()}
    for flag, settings in taken.others:
        name = flag.removeprefix("--").replace("-", "_")
        if name != "json":
            own[name] = (*_kind_and_default(settings), settings["help"])
    fields = {
        name: (
            kind,
            Field(default, title=title_of(name), description=words, json_schema_extra={"position": n}),
        )
        for n, (name, (kind, default, words)) in enumerate(own.items())
    }
    names = dict.fromkeys((*taken.options, *more))
    return fields | {
        name: form_field(*option_fields()[name], position=len(fields) + n) for n, name in enumerate(names)
    }


def _kind_and_default(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    if settings.get("action") == "store_true":
        return bool, False
    return (_TEXT, ...) if settings.get("required") else (_TEXT | None, None)


class OneWorkerParams(StoredForm):
    """What one worker of the cluster does with a checkpoint."""

    @property
    def title(self) -> str:
        """What a run is called: what is done, and the last path part of the first address."""
        address = next(iter(self.model_dump(exclude={"credentials"}).values()))
        return f"{type(self).model_config.get('title')} of {address.rstrip('/').rpartition('/')[2]}"

    def worker_options(self) -> JobOptions:
        """Which cluster, and what the worker takes there; what is of a conversion in it means nothing.

        Raises:
            RecipeError: Resources or labels that cannot be.
        """
        given = self.values_given()
        place = {name: given[name] for name in (*_COMPUTING, *_NODE) if name in given}
        takes = {} if "device" in type(self).model_fields else _READING
        return options_from({"source": "-", "output": "-", "method": "rtn", **takes, **place})


class EvaluateParams(
    create_model("_EvaluateFields", __base__=OneWorkerParams, **_fields("evaluate", (*_COMPUTING, *_NODE)))
):
    """The evaluation of one checkpoint, original or quantized."""

    model_config = ConfigDict(title="Evaluation")


class VerifyParams(create_model("_VerifyFields", __base__=OneWorkerParams, **_fields("verify", _NODE))):
    """The verification of one output."""

    model_config = ConfigDict(title="Verification")


class CleanParams(create_model("_CleanFields", __base__=OneWorkerParams, **_fields("clean", _NODE))):
    """What is to be cleaned of one job."""

    model_config = ConfigDict(title="Cleaning")
