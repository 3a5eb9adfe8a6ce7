"""Deployments on a real server: `quantmill serve`, and what the server refuses."""

from collections.abc import Iterator

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


def test_right_run_is_accepted(served):
    answer = submit(served, {**REQUEST, "group_size": -1, "workers": None, "rules": [{"match": "*"}]})
    assert answer.status_code == 201
    with served.client() as client:
        client.delete(f"/flow_runs/{answer.json()['id']}").raise_for_status()
