"""What `quantmill serve` offers, before any server is asked."""

from datetime import timedelta

import yaml

from flows.deployments import SERVED, Passes, served_here
from flows.params import NewCheckpointsParams
from tests.flows.conftest import REPOSITORY

PARAMS = NewCheckpointsParams.model_validate(
    {"prefix": "incoming", "outputs": "made", "recipes": [{"name": "w4", "method": "rtn"}]}
)


def test_pools_offer_the_same_flows_by_the_same_names():
    listed = yaml.safe_load((REPOSITORY / "infra/prefect/prefect.yaml").read_text())["deployments"]
    on_pools = {entry["name"]: entry["entrypoint"] for entry in listed}
    offered = [served.deployment() for served in served_here()]
    here = {found.name: found.entrypoint for found in offered if found.name == found.flow_name}
    assert here == on_pools


def test_nothing_runs_by_itself_unless_passes_are_asked_for():
    offered = [served.deployment() for served in served_here()]
    assert not [schedule for found in offered for schedule in found.schedules or () if schedule.active]
    *others, added = served_here(Passes(params=PARAMS, every_s=900))
    assert tuple(others) == SERVED
    passes = added.deployment()
    assert (passes.flow_name, passes.name) == ("convert-new-checkpoints", "scheduled")
    (schedule,) = passes.schedules or ()
    assert schedule.active
    assert schedule.schedule.interval == timedelta(minutes=15)
    assert NewCheckpointsParams.model_validate(passes.parameters["params"]) == PARAMS


def test_every_deployment_says_what_it_does():
    assert all(served.description.endswith(".") for served in SERVED)
