"""Deployments that `quantmill serve` registers and runs on one host.

For work pools (Kubernetes, several hosts) there is `infra/prefect/prefect.yaml`, with the same names.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from prefect import Flow, serve
from prefect.deployments.runner import RunnerDeployment
from prefect.schedules import Cron, Interval
from prefect.types.entrypoint import EntrypointType

from flows.clean_work import clean_work
from flows.convert_new_checkpoints import convert_new_checkpoints
from flows.evaluate_model import evaluate_model
from flows.params import NewCheckpointsParams
from flows.quantize_model import compare_schemes, quantize_model, quantize_recipes
from flows.verify_output import verify_output

# Shown with a schedule that is off: whoever turns it on puts in addresses of their own.
_NIGHTLY_PARAMETERS = {
    "source": "s3://models/incoming/latest",
    "output": "s3://models/quantized/latest-w4a16",
    "calibration": "s3://models/texts/calibration.parquet",
    "evaluation": "s3://models/texts/evaluation.parquet",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Passes over a prefix that are made by themselves.

    Attributes:
        params: What each looks for and makes.
        every_s: Seconds between two.
    """

    params: NewCheckpointsParams
    every_s: int

    @property
    def further(self) -> dict[str, Any]:
        """What Prefect is told of their deployment."""
        values = self.params.model_dump(mode="json", exclude_unset=True)
        return {"parameters": {"params": values}, "schedules": [Interval(self.every_s)]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A flow as it is offered.

    Attributes:
        flow: The flow, after which the deployment is named unless it has a name.
        description: Shown above its form.
        name: Of the deployment, where the flow has several.
        further: What else Prefect is told: parameters, schedules, tags.
    """

    flow: Flow[..., Any]
    description: str
    name: str | None = None
    further: dict[str, Any] = field(default_factory=dict)

    def deployment(self) -> RunnerDeployment:
        """As Prefect takes it."""
        tags = ["quantmill", *self.further.get("tags", ())]
        found = self.flow.to_deployment(
            **{**self.further, "tags": tags},
            name=self.name or self.flow.name,
            description=self.description,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        # to_deployment gives a coroutine when called inside an event loop; here it never is.
        assert isinstance(found, RunnerDeployment)
        return found


SERVED = (
    Served(flow=quantize_model, description="Convert one checkpoint; fill in the form."),
    Served(
        flow=quantize_model,
        name="nightly-example",
        description="Example of a schedule, switched off: set the parameters, then switch it on.",
        further={
            "tags": ["example"],
            "parameters": {"params": _NIGHTLY_PARAMETERS},
            "schedules": [Cron("0 2 * * *", timezone="UTC", active=False)],
        },
    ),
    Served(flow=quantize_recipes, description="Convert one checkpoint by several recipes from one reading."),
    Served(
        flow=convert_new_checkpoints,
        description="Begin a run for every checkpoint that is new below a prefix. The schedule is off: set"
        " what is to be made of them, then switch it on.",
        further={"schedules": [Cron("*/15 * * * *", timezone="UTC", active=False)]},
    ),
    Served(flow=compare_schemes, description="Convert one checkpoint by several schemes, and compare them."),
    Served(flow=evaluate_model, description="Measure the perplexity of a checkpoint, original or quantized."),
    Served(flow=verify_output, description="Compare every shard of an output with its record."),
    Served(flow=clean_work, description="Remove what a finished or abandoned job left in its work prefix."),
)


def deployments(passes: Passes | None = None) -> list[RunnerDeployment]:
    """All of them, as Prefect takes them; that of passes with what they look for, if that is known."""
    known = {} if passes is None else {convert_new_checkpoints.name: passes.further}
    given = [replace(served, further=known.get(served.flow.name, served.further)) for served in SERVED]
    return [served.deployment() for served in given]


def serve_deployments(limit: int, passes: Passes | None = None) -> None:
    """Register the deployments and execute their runs until interrupted.

    Args:
        limit: Runs at a time; one already uses the whole machine.
        passes: What passes over a prefix look for; without it none is made by itself.
    """
    serve(*deployments(passes), limit=limit, print_starting_message=False)
