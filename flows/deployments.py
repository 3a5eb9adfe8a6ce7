"""Deployments that `quantmill serve` registers and runs on one host.

For work pools (Kubernetes, several hosts) there is `infra/prefect/prefect.yaml`.
"""

from prefect import serve
from prefect.deployments.runner import RunnerDeployment
from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType

from flows.quantize_model import quantize_model

ON_DEMAND, NIGHTLY = "on-demand", "nightly-example"

# Shown with a schedule that is off: whoever turns it on puts in addresses of their own.
_NIGHTLY_PARAMETERS = {
    "source": "s3://models/incoming/latest",
    "output": "s3://models/quantized/latest-w4a16",
    "calibration": "s3://models/texts/calibration.parquet",
    "evaluation": "s3://models/texts/evaluation.parquet",
}


def deployments() -> tuple[RunnerDeployment, ...]:
    """What `quantmill serve` registers: a form to fill in, and an example of a nightly schedule (off)."""
    on_demand = quantize_model.to_deployment(
        name=ON_DEMAND,
        description="Convert one checkpoint; fill in the form.",
        tags=["quantmill"],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    nightly = quantize_model.to_deployment(
        name=NIGHTLY,
        description="Example of a schedule, switched off: set the parameters, then switch it on.",
        tags=["quantmill", "example"],
        parameters={"params": _NIGHTLY_PARAMETERS},
        schedules=[Cron("0 2 * * *", timezone="UTC", active=False)],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return tuple(_resolved(deployment) for deployment in (on_demand, nightly))


def _resolved(deployment: object) -> RunnerDeployment:
    # to_deployment gives a coroutine when called inside an event loop; here it never is.
    assert isinstance(deployment, RunnerDeployment)
    return deployment


def serve_deployments(limit: int) -> None:
    """Register the deployments and execute their runs until interrupted.

    Args:
        limit: Runs at a time; one already uses the whole machine.
    """
    serve(*deployments(), limit=limit, print_starting_message=False)
