"""`infra/prefect/automations.yaml` on a real server: a run whose process is killed becomes Crashed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.flows.conftest import REPOSITORY, PrefectServer, wait_until

pytestmark = pytest.mark.slow
FILE = REPOSITORY / "infra/prefect/automations.yaml"
# Instead of the file's, which three heartbeats must fit in; the shortest that Prefect allows.
_WITHIN_S = 10
_SLEEPS = """
import time
from prefect import flow
from prefect.runtime import flow_run

@flow(name="quantize-model")
def run():
    print(flow_run.id, flush=True)
    time.sleep(600)

run()
"""


@pytest.fixture(scope="module")
def created(prefect_server: PrefectServer, tmp_path_factory) -> Iterator[dict[str, Any]]:
    """The automations of the file by name, but for the time without heartbeat; they go afterwards."""
    folder = tmp_path_factory.mktemp("automations")
    wanted = yaml.safe_load(FILE.read_text())
    wanted["automations"][0]["trigger"]["within"] = _WITHIN_S
    (folder / "automations.json").write_text(json.dumps(wanted))
    words = ("automation", "create", "--from-file", str(folder / "automations.json"))
    ended = subprocess.run(
        [sys.executable, "-m", "prefect", *words],
        env=prefect_server.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    with prefect_server.client() as client:
        found = client.post("/automations/filter", json={}).json()
        mine = {one["name"]: one for one in found if one["name"].startswith("quantmill-")}
        yield mine
        for one in mine.values():
            client.delete(f"/automations/{one['id']}").raise_for_status()


def state_of(server: PrefectServer, run_id: str) -> dict[str, Any]:
    with server.client() as client:
        return client.get(f"/flow_runs/{run_id}").json()["state"]


def test_only_the_heartbeat_is_watched_unasked(created):
    assert {name: one["enabled"] for name, one in created.items()} == {
        "quantmill-run-without-heartbeat-has-crashed": True,
        "quantmill-retry-crashed-runs": False,
    }


def test_run_whose_process_is_killed_becomes_crashed(prefect_server: PrefectServer, created):
    process = subprocess.Popen(
        [sys.executable, "-c", _SLEEPS],
        env=prefect_server.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def events(run_id: str) -> set[str]:
        wanted = {"resource": {"id": [f"prefect.flow-run.{run_id}"]}}
        with prefect_server.client() as client:
            found = client.post("/events/filter", json={"filter": wanted, "limit": 50}).json()
        return {event["event"] for event in found["events"]}

    try:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        wait_until(lambda: "prefect.flow-run.heartbeat" in events(run_id), 60, "the first heartbeat")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert state_of(prefect_server, run_id)["type"] == "RUNNING"
    wait_until(lambda: state_of(prefect_server, run_id)["type"] == "CRASHED", 90, "the automation")
    assert state_of(prefect_server, run_id)["message"].startswith("no heartbeat")


def test_crashed_run_of_a_deployment_is_retried_where_that_is_switched_on(prefect_server, created):
    automation = created["quantmill-retry-crashed-runs"]["id"]
    with prefect_server.client() as client:
        flow = client.post("/flows/", json={"name": "compare-schemes"}).json()["id"]
        deployment = client.post("/deployments/", json={"name": "of-the-test", "flow_id": flow}).json()["id"]
        client.patch(f"/automations/{automation}", json={"enabled": True}).raise_for_status()
        run_id = client.post(f"/deployments/{deployment}/create_flow_run", json={}).json()["id"]
        for kind in ("PENDING", "RUNNING", "CRASHED"):
            answer = client.post(f"/flow_runs/{run_id}/set_state", json={"state": {"type": kind}})
            assert answer.json()["status"] == "ACCEPT", answer.text
    wait_until(lambda: state_of(prefect_server, run_id)["name"] == "AwaitingRetry", 60, "the retry")
    with prefect_server.client() as client:
        client.delete(f"/deployments/{deployment}").raise_for_status()
        client.delete(f"/flow_runs/{run_id}").raise_for_status()
