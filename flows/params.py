"""The forms of a conversion and of a comparison: the table of job options as pydantic models.

Prefect stores a model's JSON schema with a deployment. Its server checks every submitted run against it
(a wrong value is refused before a run exists) and its UI draws the form from it. So all that can be said in
the schema is said there; what is left (a regular expression that does not compile, gptq without calibration
text) is found by `options_from` when the run starts.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, create_model

from quantlib.job.comparison_request import (
    NOT_COMPARED,
    OUTPUT_HELP,
    SCHEMES_HELP,
    ComparisonRequest,
    comparison_request,
)
from quantlib.job.option_table import REQUIRED, Option, fields_of, is_optional, kind_of
from quantlib.job.options import JobOptions, default_of, options_from
from quantlib.job.provenance import with_replayed_values
from quantlib.job.rules import Rule
from quantlib.job.targets import default_format
from quantlib.schemes import DEFAULT_GROUP_SIZE, group_tag, has_own_groups

# Literal with choices known only at run time; a type checker sees no type in it.
_LITERAL: Any = Literal
# In a flow the work is always spread over Ray workers; one process is the command line's business.
_FLOW_RUNNERS = ("ray",)


class _Form(BaseModel):
    """What all generated forms share: unknown keys are refused, text is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def values_given(self) -> dict[str, Any]:
        """The values that are not the defaults, with which a form fills in what was left alone."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        values = self.model_dump(exclude_unset=True)
        return {name: value for name, value in values.items() if value != defaults[name]}


def _field(found: dataclasses.Field[Any], option: Option, position: int) -> tuple[Any, Any]:
    schema: dict[str, Any] = {"position": position}
    kind: Any = kind_of(found)
    if option.choices is not None and option.several:
        one = rf"\s*({'|'.join(option.choices)})\s*"
        kind = Annotated[str, Field(pattern=f"^{one}(,{one})*$")]
        schema["examples"] = list(option.choices)
    elif option.choices is not None:
        kind = _LITERAL[option.choices]
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
    title = found.name.replace("_", " ").capitalize()
    return annotation, Field(_default(found), title=title, description=option.help, json_schema_extra=schema)


def _default(found: dataclasses.Field[Any]) -> Any:
    if found.default is REQUIRED:
        return ...
    # The schema's default must be what JSON can hold.
    return list(found.default) if isinstance(found.default, tuple) else found.default


def _fields(table: type) -> dict[str, Any]:
    return {
        name: _field(found, option, position)
        for position, (name, (found, option)) in enumerate(fields_of(table).items())
    }


def _job_fields() -> dict[str, Any]:
    fields = _fields(JobOptions)
    found, option = fields_of(JobOptions)["runner"]
    position = list(fields).index("runner")
    fields["runner"] = _field(found, dataclasses.replace(option, choices=_FLOW_RUNNERS), position)
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


class RuleParams(create_model("_RuleFields", __base__=_Form, **_fields(Rule))):
    """An exception for some linears; the first rule that matches a linear decides."""

    model_config = ConfigDict(title="Rule")


class QuantizeParams(create_model("_JobFields", __base__=_Form, **_job_fields())):
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


class CompareParams(create_model("_ComparisonFields", __base__=_Form, **_comparison_fields())):
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


def params_from(options: JobOptions) -> QuantizeParams:
    """The form filled with a validated request, for a run that the command line starts.

    Only what differs from the defaults is filled in, so that a run shows what was asked for.
    """
    values = {
        name: getattr(options, name)
        for name in fields_of(JobOptions)
        if getattr(options, name) != default_of(options, name)
    }
    if "rules" in values:
        values["rules"] = list(values["rules"])
    params = QuantizeParams.model_validate(values)
    params._options = options  # pyright: ignore[reportPrivateUsage]
    return params
