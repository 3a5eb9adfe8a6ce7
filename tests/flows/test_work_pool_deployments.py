"""`infra/prefect/prefect.yaml`: what it deploys to a work pool, and that a worker executes it."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.params import QuantizeParams
from tests.flows.conftest import REPOSITORY, PrefectServer, stop, wait_until
from tests.support.tiny_jobs import tiny_source

FILE = REPOSITORY / "infra/prefect/prefect.yaml"
POOL = "pool-of-the-test"
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
def test_worker_of_a_process_pool_executes_a_conversion(deployed, tmp_path):
    tiny_source(tmp_path / "tiny")
    params = {
        "source": str(tmp_path / "tiny"),
        "output": str(tmp_path / "out"),
        "method": "rtn",
        "group_size": 32,
        "workers": 1,
        "threads_per_worker": 1,
        "device": "cpu",
    }
    with deployed.client() as client:
        path = f"/deployments/{stored(deployed, 'quantize-model')['id']}/create_flow_run"
        created = client.post(path, json={"parameters": {"params": params}})
    assert created.status_code == 201, created.text
    run_id = created.json()["id"]

    def state() -> dict[str, Any]:
        with deployed.client() as client:
            return client.get(f"/flow_runs/{run_id}").json()["state"]

    environment = deployed.environment | {"PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--name", "test"]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            words, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        wait_until(lambda: state()["type"] in final, 300, "the run of the worker")
    finally:
        stop(worker)
    assert state()["type"] == "COMPLETED", (tmp_path / "worker.log").read_text()[-3000:]
    assert (tmp_path / "out" / "config.json").exists()


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
