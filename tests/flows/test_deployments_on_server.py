"""Deployments on a real server: `quantmill serve`, and what the server refuses."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from quantlib.schemes import CODEBOOK_NAMES, FLOAT_NAMES, ROUNDED_INPUTS_NAMES
from tests.flows.conftest import PrefectServer
from tests.support.serving import running_serve

pytestmark = pytest.mark.slow
REQUEST = {"source": "s3://models/tiny", "output": "s3://models/out", "method": "rtn"}


@pytest.fixture(scope="module")
def served(prefect_server: PrefectServer, tmp_path_factory) -> Iterator[PrefectServer]:
    """A server with which `quantmill serve` has registered, stopped again so that no run is executed."""
    folder = tmp_path_factory.mktemp("serve")
    with running_serve(prefect_server, folder):
        pass
    yield prefect_server


def submit(server: PrefectServer, params: dict) -> httpx.Response:
    deployment = server.deployment("quantize-model")
    with server.client() as client:
        body = {"parameters": {"params": params}}
        return client.post(f"/deployments/{deployment['id']}/create_flow_run", json=body)


def test_serve_registers_a_form_with_constraints_texts_and_defaults(served):
    schema = served.deployment("quantize-model")["parameter_openapi_schema"]
    form = schema["definitions"]["QuantizeParams"]
    assert schema["required"] == ["params"]
    assert form["required"] == ["source", "output"]
    assert form["additionalProperties"] is False
    names = [f"W{bits}A16{kind}" for kind in ("", "_ASYM") for bits in (2, 3, 4, 5, 6, 8)]
    assert form["properties"]["scheme"]["enum"] == [
        *names,
        *FLOAT_NAMES,
        *ROUNDED_INPUTS_NAMES,
        *CODEBOOK_NAMES,
    ]
    assert form["properties"]["sequences"]["minimum"] == 1
    assert form["properties"]["sequence_length"]["default"] == 2048
    assert form["properties"]["evaluation"]["description"].startswith("Held-out text")


def test_serve_registers_a_schedule_that_is_off(served):
    deployment = served.deployment("nightly-example")
    (schedule,) = deployment["schedules"]
    assert schedule["active"] is False
    assert schedule["schedule"]["cron"] == "0 2 * * *"
    assert set(deployment["parameters"]["params"]) >= {"source", "output", "calibration"}


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"group_size": 5}, "params.group_size"),
        ({"scheme": "W7A16"}, "params.scheme"),
        ({"sequences": 0}, "params.sequences"),
        ({"sequences": "64"}, "params.sequences"),
        ({"source": " "}, "params.source"),
        ({"runner": "inprocess"}, "params.runner"),
        ({"rules": [{"match": "*", "bits": 4}]}, "params.rules[0]"),
        ({"bogus": 1}, "'bogus' was unexpected"),
    ],
)
def test_wrong_run_is_refused_before_it_exists(served, wrong, field):
    answer = submit(served, {**REQUEST, **wrong})
    assert answer.status_code == 409
    assert field in answer.json()["detail"]


def passes(server: PrefectServer, name: str) -> dict[str, Any]:
    with server.client() as client:
        return client.get(f"/deployments/name/convert-new-checkpoints/{name}").json()


def test_schedules_and_parameters_that_people_set_outlive_who_serves(served, tmp_path: Path):
    file = 'prefix = "in"\noutputs = "out"\n[[recipes]]\nname = "w4"\nmethod = "rtn"\n'
    (tmp_path / "incoming.toml").write_text(file)
    given = {"params": {**tomllib.loads(file), "prefix": "elsewhere"}}
    weekly = {"schedule": {"cron": "0 3 * * 1"}, "active": True, "parameters": given}
    with served.client() as client:
        path = f"/deployments/{passes(served, 'convert-new-checkpoints')['id']}"
        client.post(f"{path}/schedules", json=[weekly]).raise_for_status()
        path = f"/deployments/{served.deployment('nightly-example')['id']}"
        client.patch(path, json={"parameters": {"params": REQUEST}}).raise_for_status()
    with running_serve(served, tmp_path, "--new-checkpoints", "incoming.toml", "--every", "600"):
        found = passes(served, "convert-new-checkpoints")
        assert not found["paused"]
        by_file = passes(served, "scheduled")
        assert by_file["parameters"]["params"]["prefix"] == "in"
        assert [schedule["active"] for schedule in by_file["schedules"]] == [True]
    assert passes(served, "scheduled")["paused"]
    kept = {schedule["schedule"]["cron"]: schedule for schedule in found["schedules"]}
    assert (kept["0 3 * * 1"]["active"], kept["0 3 * * 1"]["parameters"]) == (True, given)
    assert not kept["*/15 * * * *"]["active"]
    assert served.deployment("nightly-example")["parameters"] == {"params": REQUEST}


def test_right_run_is_accepted(served):
    answer = submit(served, {**REQUEST, "group_size": -1, "workers": None, "rules": [{"match": "*"}]})
    assert answer.status_code == 201
    with served.client() as client:
        client.delete(f"/flow_runs/{answer.json()['id']}").raise_for_status()
