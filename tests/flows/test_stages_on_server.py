"""Stages as Prefect tasks and the artifacts of a run, on a real server."""

import base64
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

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


def test_running_flow_shows_percent_what_is_done_time_left_and_the_blocks_so_far(outcomes):
    shown = outcomes["shown meanwhile"]
    percent, description = shown["quantize-progress"]
    assert percent == 50.0
    assert description.startswith("step 50, about 0 s left")
    rows = json.loads(shown["quantize-blocks"][0])
    assert [(row["block"], row["its error"]) for row in rows] == [(1, 0.05)]


def test_ended_flow_has_one_bar_at_100_and_one_table_of_all_blocks(prefect_server, outcomes):
    query = {"artifacts": {"key": {"any_": ["quantize-progress"]}}, **OF_THE_PROGRAM}
    (bar,) = read(prefect_server, "/artifacts/filter", query)
    assert (bar["data"], bar["description"]) == (100.0, "step 100")
    query = {"artifacts": {"key": {"any_": ["quantize-blocks"]}}, **OF_THE_PROGRAM}
    (table,) = read(prefect_server, "/artifacts/filter", query)
    assert [row["block"] for row in json.loads(table["data"])] == [1, 2]


def test_report_is_left_as_summary_and_picture(prefect_server, outcomes):
    query = {"artifacts": {"key": {"any_": ["quantize-errors", "quantize-summary"]}}, **OF_THE_PROGRAM}
    found = {
        artifact["key"]: artifact["data"] for artifact in read(prefect_server, "/artifacts/filter", query)
    }
    assert found["quantize-summary"].startswith("**Look at it")
    kind, _, picture = found["quantize-errors"].partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert ElementTree.fromstring(base64.b64decode(picture)).tag.endswith("svg")


def test_log_of_the_run_holds_what_threads_logged_while_it_was_open(prefect_server, outcomes):
    (run,) = read(prefect_server, "/flow_runs/filter", OF_THE_PROGRAM)
    query = {"logs": {"flow_run_id": {"any_": [run["id"]]}}}

    def ours() -> list[tuple[str, str]]:
        names = ("quantlib", "workers", "other")
        found = read(prefect_server, "/logs/filter", query)
        return [(log["name"], log["message"]) for log in found if log["name"].startswith(names)]

    wait_until(ours, 60, "the arrival of the log")
    assert ours() == [("quantlib.job", "block 17/80: from a thread")]
