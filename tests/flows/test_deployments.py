"""What `quantmill serve` offers, before any server is asked."""

from datetime import timedelta

import yaml

from flows.deployments import SERVED, Passes, deployments
from flows.params import NewCheckpointsParams
from tests.flows.conftest import REPOSITORY

PARAMS = NewCheckpointsParams.model_validate(
    {"prefix": "incoming", "outputs": "made", "recipes": [{"name": "w4", "method": "rtn"}]}
)


def test_pools_offer_the_same_flows_by_the_same_names():
    listed = yaml.safe_load((REPOSITORY / "infra/prefect/prefect.yaml").read_text())["deployments"]
    on_pools = {entry["name"]: entry["entrypoint"] for entry in listed}
    here = {found.name: found.entrypoint for found in deployments() if found.name == found.flow_name}
    assert here == on_pools


def test_nothing_runs_by_itself_unless_passes_are_asked_for():
    assert not [schedule for found in deployments() for schedule in found.schedules or () if schedule.active]
    by_itself = [found for found in deployments(Passes(params=PARAMS, every_s=900)) if found.parameters]
    passes = next(found for found in by_itself if found.name == "convert-new-checkpoints")
    (schedule,) = passes.schedules or ()
    assert schedule.active
    assert schedule.schedule.interval == timedelta(minutes=15)
    assert NewCheckpointsParams.model_validate(passes.parameters["params"]) == PARAMS


def test_every_deployment_says_what_it_does():
    assert all(served.description.endswith(".") for served in SERVED)
