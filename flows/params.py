"""The forms of a conversion, of a comparison and of a pass over a prefix, from the table of job options.

Prefect stores a model's JSON schema with a deployment. Its server checks every submitted run against it
(a wrong value is refused before a run exists) and its UI draws the form from it. So all that can be said in
the schema is said there; what is left (a regular expression that does not compile, gptq without calibration
text) is found by `options_from` when the run starts.
"""

import dataclasses
import os
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, create_model

from flows.credentials import BLOCK_HELP, BLOCK_NAME
from quantlib.errors import RecipeError
from quantlib.job.comparison_request import (
    NOT_COMPARED,
    OUTPUT_HELP,
    SCHEMES_HELP,
    ComparisonRequest,
    comparison_request,
)
from quantlib.job.hook import NAME_PATTERN, is_name
from quantlib.job.incoming import OF_A_CHECKPOINT, Incoming
from quantlib.job.option_table import REQUIRED, Option, fields_of, is_optional, kind_of
from quantlib.job.options import JobOptions, default_of, options_from
from quantlib.job.provenance import with_replayed_values
from quantlib.job.rules import Rule
from quantlib.job.targets import default_format
from quantlib.schemes import DEFAULT_GROUP_SIZE, group_tag, has_own_groups

T = TypeVar("T")

# Literal with choices known only at run time; a type checker sees no type in it.
_LITERAL: Any = Literal
# Below the fields of any table.
LAST = 1000
# What most people fill in comes first; the form is long.
_FIRST = (
    "source",
    "output",
    "calibration",
    "evaluation",
    "scheme",
    "group_size",
    "method",
    "format",
    "target",
    "sequences",
    "sequence_length",
    "evaluation_sequences",
)
_SPELLED = {"kl": "KL", "gpu": "GPU", "gpus": "GPUs"}
# In a flow the work is always spread over Ray workers; one process is the command line's business.
_FLOW_RUNNERS = ("ray",)


class Form(BaseModel):
    """What all generated forms share: unknown keys are refused, text is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def values_given(self) -> dict[str, Any]:
        """The values that are not the defaults, with which a form fills in what was left alone.

        A Ray address that was left alone is that of this process's environment: whoever deploys knows it, and
        need not put it into every form.
        """
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        values = self.model_dump(exclude_unset=True, exclude={"credentials"})
        given = {name: value for name, value in values.items() if value != defaults[name]}
        if "ray_address" in defaults and (address := os.environ.get("RAY_ADDRESS")):
            return {"ray_address": address, **given}
        return given


class StoredForm(Form):
    """What is read from and written to object storage, with credentials that a block holds."""

    credentials: Annotated[str, Field(pattern=f"^{BLOCK_NAME.pattern}$")] | None = Field(
        None, title="Credentials", description=BLOCK_HELP, json_schema_extra={"position": LAST}
    )


def form_field(found: dataclasses.Field[Any], option: Option, position: int) -> tuple[Any, Any]:
    """Type and field of a form for one entry of a table of options."""
    schema: dict[str, Any] = {"position": position}
    kind: Any = kind_of(found)
    if option.choices is not None and option.several:
        one = rf"\s*({'|'.join(option.choices)})\s*"
        kind = Annotated[str, Field(pattern=f"^{one}(,{one})*$")]
        schema["examples"] = list(option.choices)
    elif option.choices is not None:
        kind = _LITERAL[option.choices]
    elif kind is float:
        kind = Annotated[float, Field(ge=option.minimum, le=option.maximum)]
    elif option.minimum is not None:
        below = sorted(option.also_allowed) or [option.minimum]
        lowest, highest = below[0], below[-1]
        assert highest <= option.minimum and len(below) == highest - lowest + 1
        kind = Annotated[int, Field(ge=lowest, le=option.maximum)]
        # Neighbouring numbers below a range: what lies between is cut out. An anyOf would be exact too, but
        # the form shows it as two tabs.
        if highest < option.minimum - 1:
            between = {"exclusiveMinimum": highest, "exclusiveMaximum": option.minimum}
            schema["not"] = {"type": "integer", **between}
    elif kind is str:
        kind = Annotated[str, Field(pattern=r"\S")]
    elif kind is tuple:
        kind = list[RuleParams]
    annotation = kind | None if is_optional(found) else kind
    title = title_of(found.name)
    return annotation, Field(_default(found), title=title, description=option.help, json_schema_extra=schema)


def title_of(name: str) -> str:
    """What stands above a field.

    >>> title_of("max_kl"), title_of("gpu_model")
    ('Max KL', 'GPU model')
    """
    words = " ".join(_SPELLED.get(word, word) for word in name.split("_"))
    return words[0].upper() + words[1:]


def _default(found: dataclasses.Field[Any]) -> Any:
    if found.default is REQUIRED:
        return ...
    # The schema's default must be what JSON can hold.
    return list(found.default) if isinstance(found.default, tuple) else found.default


def _fields(table: type, first: Sequence[str] = ()) -> dict[str, Any]:
    known = fields_of(table)
    names = dict.fromkeys((*first, *known))
    return {name: form_field(*known[name], position) for position, name in enumerate(names)}


def _job_fields() -> dict[str, Any]:
    fields = _fields(JobOptions, _FIRST)
    found, option = fields_of(JobOptions)["runner"]
    position = list(fields).index("runner")
    fields["runner"] = form_field(found, dataclasses.replace(option, choices=_FLOW_RUNNERS), position)
    # Whoever fills in a form may choose among the operator's hooks, and not run commands of their own.
    name: Any = Annotated[str, Field(pattern=NAME_PATTERN)]
    fields["hook"] = (name | None, fields["hook"][1])
    return fields


def _comparison_fields() -> dict[str, Any]:
    """Those of a job, with the entries in place of the scheme, and an output that may be absent."""
    fields = _job_fields()
    places: dict[str, dict[str, Any]] = {name: {"position": n} for n, name in enumerate(fields)}
    text: Any = Annotated[str, Field(pattern=r"\S")]
    schemes = Field(..., title="Schemes", description=SCHEMES_HELP, json_schema_extra=places["scheme"])
    output = Field(None, title="Output", description=OUTPUT_HELP, json_schema_extra=places["output"])
    return {
        **{name: field for name, field in fields.items() if name not in NOT_COMPARED},
        "schemes": (Annotated[list[text], Field(min_length=1)], schemes),
        "output": (text | None, output),
    }


def _recipe_fields() -> dict[str, Any]:
    """Those of a job that do not follow from the checkpoint, after a name in the place of the source."""
    fields = {name: field for name, field in _job_fields().items() if name not in OF_A_CHECKPOINT}
    shown: dict[str, Any] = {"position": 0}
    name = Field(..., title="Name", description="Last part of the output's address.", json_schema_extra=shown)
    return {"name": (Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], name), **fields}


class RuleParams(create_model("_RuleFields", __base__=Form, **_fields(Rule))):
    """An exception for some linears; the first rule that matches a linear decides."""

    model_config = ConfigDict(title="Rule")


class QuantizeParams(create_model("_JobFields", __base__=StoredForm, **_job_fields())):
    """A conversion of one checkpoint."""

    model_config = ConfigDict(title="Conversion")
    # Of a request that is complete already. A form cannot hold it: forms come back with every default filled
    # in, so that what equals a default counts as not given there, and a replay would fill it in again.
    _options: JobOptions | None = PrivateAttr(default=None)

    @property
    def title(self) -> str:
        """What a run is called: the model's last path part and the scheme."""
        values = self.model_dump()
        layout = values["format"] or default_format(values["target"], values["scheme"])
        model = values["source"].rstrip("/").rpartition("/")[2]
        own = has_own_groups(values["scheme"])
        size = values["group_size"]
        groups = "" if own else f" {group_tag(DEFAULT_GROUP_SIZE if size is None else size)}"
        return f"{model} to {values['scheme']}{groups} {layout}"

    def to_options(self) -> JobOptions:
        """The validated request; values left at their defaults are those of the run it replays, if any.

        Raises:
            RecipeError: What the schema cannot say is wrong; see `options_from` and `with_replayed_values`.
            StorageError: The provenance to be replayed cannot be read.
        """
        return self._options or options_from(with_replayed_values(self.values_given()))


class CompareParams(create_model("_ComparisonFields", __base__=StoredForm, **_comparison_fields())):
    """A comparison of schemes and methods on one checkpoint."""

    model_config = ConfigDict(title="Comparison")

    @property
    def title(self) -> str:
        """What a run is called: the model's last path part and the entries."""
        values = self.model_dump()
        model = values["source"].rstrip("/").rpartition("/")[2]
        return f"{model} by {', '.join(values['schemes'])}"

    def to_request(self) -> ComparisonRequest:
        """The validated request.

        Raises:
            RecipeError: What the schema cannot say is wrong; see `comparison_request`.
        """
        return comparison_request(self.values_given())


class RecipeParams(create_model("_RecipeFields", __base__=Form, **_recipe_fields())):
    """What is to be made of every checkpoint that a pass finds."""

    model_config = ConfigDict(title="Recipe")


class NewCheckpointsParams(StoredForm):
    """A pass over a prefix below which checkpoints appear."""

    model_config = ConfigDict(title="New checkpoints")

    prefix: Annotated[str, Field(pattern=r"\S")] = Field(
        description="Address below which checkpoints appear: s3://, file:// or a path."
    )
    outputs: Annotated[str, Field(pattern=r"\S")] = Field(
        description="Address below which outputs go, as CHECKPOINT/RECIPE."
    )
    recipes: Annotated[list[RecipeParams], Field(min_length=1)] = Field(
        description="What is to be made of every checkpoint, from one reading."
    )
    depth: Annotated[int, Field(ge=1)] = Field(
        1, description="How many folders below the prefix a checkpoint may lie; 2 finds ORGANIZATION/MODEL."
    )
    settle_seconds: Annotated[int, Field(ge=0)] = Field(
        600, description="How long no file of a checkpoint may have changed before it is converted."
    )
    runs_at_a_time: Annotated[int, Field(ge=1)] = Field(
        1, description="How many runs may be begun and not have ended."
    )
    attempts: Annotated[int, Field(ge=1)] = Field(
        3, description="How often a checkpoint may fail before it is parked."
    )
    retry_parked: bool = Field(
        False, description="Forget what failed, of checkpoints that are parked; for a run by hand."
    )
    state: Annotated[str, Field(pattern=r"\S")] | None = Field(
        None, description="Where records of what was begun are kept; below outputs unless named."
    )
    deployment: Annotated[str, Field(pattern=r"^[^/]+/[^/]+$")] = Field(
        "quantize-recipes/quantize-recipes",
        description="Which deployment carries out the conversions: FLOW/DEPLOYMENT.",
    )

    @property
    def title(self) -> str:
        """What a run is called."""
        return f"new checkpoints of {self.prefix}"

    def to_incoming(self) -> Incoming:
        """What a pass looks for.

        Raises:
            RecipeError: Two recipes have one name.
        """
        values = [recipe.values_given() for recipe in self.recipes]
        recipes = {given.pop("name"): given for given in values}
        if len(recipes) < len(values):
            raise RecipeError(
                "two recipes have one name, and so would their outputs; rename one of them", option="recipes"
            )
        return Incoming(
            prefix=self.prefix,
            outputs=self.outputs,
            recipes=recipes,
            state=self.state,
            depth=self.depth,
            settle_s=self.settle_seconds,
            runs_at_a_time=self.runs_at_a_time,
            attempts=self.attempts,
            retry_parked=self.retry_parked,
        )


def params_from(options: JobOptions) -> QuantizeParams:
    """The form filled with a validated request, for a run that the command line starts.

    Only what differs from the defaults is filled in, so that a run shows what was asked for.
    """
    values = {
        name: getattr(options, name)
        for name in fields_of(JobOptions)
        if getattr(options, name) != default_of(options, name)
    }
    if not is_name(values.get("hook", "@")):
        # Given on a command line; a form has no place for it.
        del values["hook"]
    if "rules" in values:
        values["rules"] = list(values["rules"])
    params = QuantizeParams.model_validate(values)
    params._options = options  # pyright: ignore[reportPrivateUsage]
    return params


def common_credentials(conversions: Sequence[QuantizeParams]) -> str | None:
    """The block that all conversions of one run name.

    Raises:
        RecipeError: They name several.
    """
    names = sorted({str(params.credentials) for params in conversions})
    if len(names) > 1:
        error = RecipeError(
            "conversions of one run read one source with the same credentials, found"
            f" {', '.join(names)}; name one block in all of them",
            option="credentials",
        )
        error.before_work = True
        raise error
    return conversions[0].credentials if conversions else None


def validated(validate: Callable[[], T]) -> T:
    """What a form means; a refusal comes before any work."""
    try:
        return validate()
    except RecipeError as error:
        error.before_work = True
        raise


def read_new_checkpoints(path: str | Path) -> NewCheckpointsParams:
    """What a pass looks for, and makes, from a TOML file with the fields of its form.

    Raises:
        RecipeError: With ``before_work`` set: no such file, not TOML, or something in it that cannot be.
    """

    def read() -> NewCheckpointsParams:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            params = NewCheckpointsParams.model_validate(values)
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error.strerror}", file=str(path)) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not valid TOML: {error}", file=str(path)) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RecipeError(f"{path}: {where}: {first['msg']}", file=str(path)) from error
        params.to_incoming()
        return params

    return validated(read)
