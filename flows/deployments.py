"""Deployments that `quantmill serve` registers and runs on one host.

For work pools (Kubernetes, several hosts) there is `infra/prefect/prefect.yaml`, with the same names.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.runner import Runner
from prefect.schedules import Cron, Interval
from prefect.types.entrypoint import EntrypointType

from flows.clean_work import clean_work
from flows.convert_new_checkpoints import convert_new_checkpoints
from flows.evaluate_model import evaluate_model
from flows.params import NewCheckpointsParams
from flows.quantize_model import compare_schemes, quantize_model, quantize_recipes
from flows.served_runs import crashed_when_served_no_more
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

    def served(self) -> "Served":
        """Their deployment: what it does is decided by whoever serves it, at each start."""
        values = self.params.model_dump(mode="json", exclude_unset=True)
        return Served(
            flow=convert_new_checkpoints,
            name="scheduled",
            description="Passes as the file says that `quantmill serve` was started with.",
            further={"parameters": {"params": values}, "schedules": [Interval(self.every_s)]},
            is_edited=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A flow as it is offered.

    Attributes:
        flow: The flow, after which the deployment is named unless it has a name.
        description: Shown above its form.
        name: Of the deployment, where the flow has several.
        further: What else Prefect is told: parameters, schedules, tags.
        is_edited: Whether people set its schedules and parameters; those given here are a start then.
    """

    flow: Flow[..., Any]
    description: str
    name: str | None = None
    further: dict[str, Any] = field(default_factory=dict)
    is_edited: bool = True

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


def served_here(passes: Passes | None = None) -> tuple[Served, ...]:
    """All that one host offers.

    Args:
        passes: What passes over a prefix look for; without it none is made by itself.
    """
    return SERVED if passes is None else (*SERVED, passes.served())


def serve_deployments(limit: int, passes: Passes | None, registered: Callable[[int], None]) -> None:
    """Register the deployments and execute their runs until interrupted.

    Schedules are paused while nobody serves them, so that no runs pile up, and go on with the next start.
    Runs that are under way at the end crash.

    Args:
        limit: Runs at a time; one already uses the whole machine.
        passes: As of `served_here`.
        registered: Told how many deployments there are once the server knows them all.
    """
    runner = Runner(limit=limit, pause_on_shutdown=False)
    with get_client(sync_client=True) as client:
        offered = [_registered(served, runner, client) for served in served_here(passes)]
        registered(len(offered))
        try:
            with crashed_when_served_no_more(), suppress(KeyboardInterrupt, TerminationSignal):
                asyncio.run(runner.start())
        finally:
            # The runner would do so itself, but not when it is ended while it executes runs.
            for deployment in offered:
                client.pause_deployment(deployment)


def _registered(served: Served, runner: Runner, client: SyncPrefectClient) -> UUID:
    deployment = served.deployment()
    if served.is_edited:
        _keep_edits(deployment, client)
    found = runner.add_deployment(deployment)
    # A coroutine inside an event loop, as to_deployment.
    assert isinstance(found, UUID)
    return found


def _keep_edits(deployment: RunnerDeployment, client: SyncPrefectClient) -> None:
    """Give a deployment that the server knows already the schedules and parameters it has there.

    Prefect replaces both whenever a deployment is registered.
    """
    try:
        known = client.read_deployment_by_name(f"{deployment.flow_name}/{deployment.name}")
    except ObjectNotFound:
        return
    deployment.parameters = known.parameters
    deployment.schedules = [
        DeploymentScheduleCreate(
            schedule=found.schedule, active=found.active, parameters=found.parameters, slug=found.slug
        )
        for found in known.schedules
    ]
