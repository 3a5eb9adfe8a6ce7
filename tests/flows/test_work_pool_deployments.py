"""`infra/prefect/prefect.yaml`: what it deploys to a work pool, and that a worker executes it."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.params import QuantizeParams
from tests.benchmarks.cpu_seconds import descendants
from tests.flows.conftest import REPOSITORY, PrefectServer, stop, wait_until
from tests.support.tiny_jobs import tiny_source

FILE = REPOSITORY / "infra/prefect/prefect.yaml"
POOL = "pool-of-the-test"
# The shortest that Prefect allows.
_HEARTBEAT_S = 30
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load(FILE.read_text())["deployments"]
NAMES = [deployment["name"] for deployment in DEPLOYMENTS]
CONVERSIONS = {"quantize-model", "quantize-recipes", "compare-schemes"}


def module_of(deployment: dict[str, Any]) -> str:
    return deployment["entrypoint"].rpartition(".")[0]


def file_of(deployment: dict[str, Any]) -> Path:
    return REPOSITORY / f"{module_of(deployment).replace('.', '/')}.py"


PRESENT = [found for found in DEPLOYMENTS if file_of(found).exists()]


@pytest.mark.parametrize("deployment", PRESENT, ids=lambda found: found["name"])
def test_entrypoint_is_the_flow_of_that_name(deployment):
    module = importlib.import_module(module_of(deployment))
    flow = getattr(module, deployment["entrypoint"].rpartition(".")[2])
    assert flow.name == deployment["name"]


def test_conversions_are_among_the_deployments():
    assert {found["name"] for found in PRESENT} >= CONVERSIONS
    assert len(NAMES) == len(set(NAMES))


def test_parameters_of_the_schedule_are_a_valid_request():
    (deployment,) = (found for found in DEPLOYMENTS if found["name"] == "quantize-model")
    (schedule,) = deployment["schedules"]
    assert QuantizeParams.model_validate(schedule["parameters"]["params"]).to_options().group_size == 128


def prefect(server: PrefectServer, folder: Path, *words: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *words],
        env=server.environment | {"QUANTMILL_WORK_POOL": POOL},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def deployed(prefect_server: PrefectServer, tmp_path_factory) -> Iterator[PrefectServer]:
    """A server with the deployments of the file, made from a folder that is not the project's.

    They go afterwards: other tests have `quantmill serve` register the same names.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    prefect(prefect_server, folder, "work-pool", "create", POOL, "--type", "process")
    chosen = [word for found in PRESENT for word in ("--name", found["name"])]
    prefect(prefect_server, folder, "deploy", *chosen, "--prefect-file", str(FILE))
    yield prefect_server
    with prefect_server.client() as client:
        for found in PRESENT:
            client.delete(f"/deployments/{stored(prefect_server, found['name'])['id']}").raise_for_status()
        client.delete(f"/work_pools/{POOL}").raise_for_status()


def stored(server: PrefectServer, name: str) -> dict[str, Any]:
    with server.client() as client:
        response = client.get(f"/deployments/name/{name}/{name}")
    response.raise_for_status()
    return response.json()


@pytest.mark.slow
@pytest.mark.parametrize("deployment", PRESENT, ids=lambda found: found["name"])
def test_deployment_is_on_the_pool_with_its_form_and_pulls_nothing(deployed, deployment):
    found = stored(deployed, deployment["name"])
    assert found["work_pool_name"] == POOL
    assert found["entrypoint"] == deployment["entrypoint"]
    assert found["pull_steps"] in (None, [])
    assert found["enforce_parameter_schema"] is True
    assert found["parameter_openapi_schema"]["properties"]
    assert not any(schedule["active"] for schedule in found["schedules"])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONVERSIONS))
def test_conversions_run_one_at_a_time(deployed, name):
    found = stored(deployed, name)
    assert found["global_concurrency_limit"]["limit"] == 1
    assert found["concurrency_options"]["collision_strategy"] == "ENQUEUE"


@pytest.mark.slow
def test_nightly_schedule_bears_its_own_parameters_and_leaves_the_form_empty(deployed):
    found = stored(deployed, "quantize-model")
    (schedule,) = found["schedules"]
    assert schedule["schedule"]["cron"] == "0 2 * * *"
    assert set(schedule["parameters"]["params"]) >= {"source", "output", "calibration"}
    assert found["parameters"] == {}


@pytest.mark.slow
def test_event_of_an_upload_starts_a_pass(deployed, tmp_path):
    params = {"prefix": "s3://in", "outputs": "s3://out", "recipes": [{"name": "w4", "method": "rtn"}]}
    found = stored(deployed, "convert-new-checkpoints")
    query = {"deployments": {"id": {"any_": [found["id"]]}}}
    with deployed.client() as client:
        changed = client.patch(f"/deployments/{found['id']}", json={"parameters": {"params": params}})
        changed.raise_for_status()

        def runs() -> list[dict[str, Any]]:
            return client.post("/flow_runs/filter", json=query).json()

        # Events are looked at in their order: a run for the first would be there before that for the second.
        for event in ("quantmill.checkpoint.deleted", "quantmill.checkpoint.uploaded"):
            prefect(deployed, tmp_path, "event", "emit", event, "--resource-id", "s3://in/model")
        wait_until(lambda: runs() != [], 60, "the run")
        (run,) = runs()
    assert run["parameters"]["params"] == params
    assert run["state"]["type"] == "SCHEDULED"


def begin(server: PrefectServer, folder: Path, **more: Any) -> str:
    """A run of quantize-model on a deep tiny model; gives its id."""
    source = tiny_source(folder / "tiny", num_hidden_layers=24)
    params = {
        "source": str(source),
        "output": str(folder / "out"),
        "method": "rtn",
        "group_size": 32,
        "workers": 1,
        "threads_per_worker": 1,
        "device": "cpu",
        **more,
    }
    with server.client() as client:
        path = f"/deployments/{stored(server, 'quantize-model')['id']}/create_flow_run"
        created = client.post(path, json={"parameters": {"params": params}})
    assert created.status_code == 201, created.text
    return created.json()["id"]


def state_of(server: PrefectServer, run_id: str) -> dict[str, Any]:
    with server.client() as client:
        return client.get(f"/flow_runs/{run_id}").json()["state"]


def ended(server: PrefectServer, run_id: str, log: Path) -> dict[str, Any]:
    """The last state of a run that somebody executes."""
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    wait_until(lambda: state_of(server, run_id)["type"] in final, 300, f"the run of the worker ({log})")
    return state_of(server, run_id)


def pool_worker(server: PrefectServer, folder: Path) -> subprocess.Popen:
    """A worker of the pool, and what it starts, in a group of its own; heartbeats come as often as can be."""
    settings = {"PYTHONPATH": str(REPOSITORY), "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(_HEARTBEAT_S)}
    words = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--name", folder.name]
    with (folder / "worker.log").open("ab") as log:
        return subprocess.Popen(
            words,
            env=server.environment | settings,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_units(folder: Path, count: int) -> None:
    records = folder / "out.quantmill" / "done"
    wait_until(lambda: len(list(records.glob("*.json"))) >= count, 300, f"{count} units")


@pytest.mark.slow
def test_worker_of_a_process_pool_executes_a_conversion(deployed, tmp_path):
    run_id, worker = begin(deployed, tmp_path), pool_worker(deployed, tmp_path)
    try:
        state = ended(deployed, run_id, tmp_path / "worker.log")
    finally:
        stop(worker)
    assert state["type"] == "COMPLETED", state
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_run_whose_pool_worker_is_killed_is_crashed_and_goes_on_when_it_is_retried(deployed, tmp_path):
    # The run's own log lines end with it: its terminal was the worker.
    run_id, worker = begin(deployed, tmp_path), pool_worker(deployed, tmp_path)
    try:
        wait_for_units(tmp_path, 2)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        assert ended(deployed, run_id, tmp_path / "worker.log")["type"] == "CRASHED"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
    retry_and_finish(deployed, run_id, tmp_path, finished=2)


@pytest.mark.slow
def test_run_whose_machine_dies_is_crashed_and_goes_on_when_it_is_retried(deployed, tmp_path):
    wanted = yaml.safe_load((FILE.parent / "automations.yaml").read_text())["automations"][:1]
    wanted[0]["trigger"]["within"] = 2 * _HEARTBEAT_S
    (tmp_path / "automations.json").write_text(json.dumps({"automations": wanted}))
    prefect(deployed, tmp_path, "automation", "create", "--from-file", str(tmp_path / "automations.json"))
    run_id, worker = begin(deployed, tmp_path), pool_worker(deployed, tmp_path)
    try:
        wait_for_units(tmp_path, 3)
    finally:
        kill_all(worker.pid)
        worker.wait()
    assert state_of(deployed, run_id)["type"] == "RUNNING"
    wait_until(lambda: state_of(deployed, run_id)["type"] == "CRASHED", 8 * _HEARTBEAT_S, "the automation")
    remove_automations(deployed)
    retry_and_finish(deployed, run_id, tmp_path, finished=3)


def retry_and_finish(server: PrefectServer, run_id: str, folder: Path, *, finished: int) -> None:
    """Retry a run, as the button of the UI does, and have another worker execute it."""
    worker = pool_worker(server, folder)
    try:
        prefect(server, folder, "flow-run", "retry", run_id)
        wait_until(lambda: state_of(server, run_id)["type"] != "CRASHED", 60, "the retry")
        state = ended(server, run_id, folder / "worker.log")
    finally:
        stop(worker)
    assert state["type"] == "COMPLETED", state
    history = json.loads((folder / "out" / "quantmill_report.json").read_text())["history"]
    assert len(history["reused_units"]) >= finished


def kill_all(pid: int) -> None:
    """Kill a process and all that it started, as a power cut would."""
    for one in (*descendants(pid), pid):
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def remove_automations(server: PrefectServer) -> None:
    with server.client() as client:
        for found in client.post("/automations/filter", json={}).json():
            if found["name"].startswith("quantmill-"):
                client.delete(f"/automations/{found['id']}").raise_for_status()


@pytest.mark.slow
def test_kubernetes_pool_refuses_a_run_without_an_image(prefect_server):
    template = json.loads((FILE.parent / "kubernetes-pool.json").read_text())
    name = "kubernetes-of-the-test"
    with prefect_server.client() as client:
        pool = {"name": name, "type": "kubernetes", "base_job_template": template}
        client.post("/work_pools/", json=pool).raise_for_status()
        flow = client.post("/flows/", json={"name": name}).json()
        made = {"name": name, "flow_id": flow["id"], "work_pool_name": name, "entrypoint": "a.b"}
        path = f"/deployments/{client.post('/deployments/', json=made).json()['id']}/create_flow_run"
        refused = client.post(path, json={"job_variables": {}})
        accepted = client.post(path, json={"job_variables": {"image": "registry.example/quantmill:1"}})
        client.delete(f"/flows/{flow['id']}").raise_for_status()
        client.delete(f"/work_pools/{name}").raise_for_status()
    assert (refused.status_code, accepted.status_code) == (422, 201)
    assert "'image' is a required property" in refused.json()["detail"]
