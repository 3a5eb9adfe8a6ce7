"""Stages as Prefect tasks and the artifacts of a run, on a real server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.conftest import REPOSITORY, PrefectServer, wait_until

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("stages_program.py")


# Other tests leave runs and artifacts on the same server.
OF_THE_PROGRAM = {"flows": {"name": {"any_": ["stages-program"]}}}


@pytest.fixture(scope="module")
def outcomes(prefect_server: PrefectServer) -> dict:
    environment = prefect_server.environment | {"PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, timeout=180
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def read(server: PrefectServer, path: str, query: dict) -> list[dict]:
    with server.client() as client:
        answer = client.post(path, json=query)
        answer.raise_for_status()
        return answer.json()


def test_stage_gives_its_result(outcomes):
    assert outcomes["passes"] == {
        "result": {"word": "block 1/2: capture"},
        "is_same_error": False,
        "calls": 1,
    }


def test_error_that_may_pass_is_retried(outcomes):
    assert outcomes["may pass"] == {
        "result": {"word": "block 1/2: solve"},
        "is_same_error": False,
        "calls": 2,
    }


def test_wrong_request_is_not_retried_and_arrives_as_it_was_raised(outcomes):
    assert outcomes["wrong request"] == {
        "result": None,
        "is_same_error": True,
        "calls": 1,
        "before_work": True,
    }


def test_bug_is_not_retried(outcomes):
    assert outcomes["bug"] == {"result": None, "is_same_error": True, "calls": 1}


def test_task_runs_bear_the_names_of_the_stages(prefect_server, outcomes):
    wanted = {"block 1/2: capture", "block 1/2: solve", "plan", "head"}

    def names() -> set[str]:
        return {run["name"] for run in read(prefect_server, "/task_runs/filter", OF_THE_PROGRAM)}

    # Task runs reach the server as events, some seconds after the fact.
    wait_until(lambda: names() >= wanted, 60, "the arrival of the task runs")
    assert names() == wanted


def test_progress_ends_at_100_and_was_not_shown_at_every_step(prefect_server, outcomes):
    query = {"artifacts": {"key": {"any_": ["quantize-progress"]}}, **OF_THE_PROGRAM}
    (bar,) = read(prefect_server, "/artifacts/filter", query)
    assert bar["data"] == 100.0
    assert bar["description"] == "step 100"


def test_report_is_left_as_table_and_summary(prefect_server, outcomes):
    query = {"artifacts": {"key": {"any_": ["quantize-blocks", "quantize-summary"]}}, **OF_THE_PROGRAM}
    found = {
        artifact["key"]: artifact["data"] for artifact in read(prefect_server, "/artifacts/filter", query)
    }
    rows = json.loads(found["quantize-blocks"])
    assert [row["block"] for row in rows] == [0, 1]
    assert rows[0]["worst linear error"] == 0.05
    assert "quantmill_report.html" in found["quantize-summary"]
