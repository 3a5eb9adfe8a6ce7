"""`quantmill status` against a real server with runs in several states."""

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.status import format_conversions
from tests.flows.conftest import REPOSITORY, PrefectServer, clean_environment, stop

QUANTMILL = Path(sys.executable).parent / "quantmill"
_NAME = "of-the-status-test"

ROW: dict[str, Any] = {
    "id": "1c0f",
    "name": "tiny to W4A16",
    "flow": "quantize-model",
    "state": "Running",
    "progress_percent": 62.4,
    "step": "unit 5, about 4 min 12 s left",
    "started": "2026-11-23T15:02:10+00:00",
    "seconds": 252.0,
    "why": None,
}


def test_running_conversion_shows_how_far_it_is_and_what_is_left():
    first, second, third = format_conversions([ROW]).splitlines()
    assert first.split() == ["Running", "62", "%", "tiny", "to", "W4A16"]
    assert second.strip() == "started 2026-11-23 15:02 UTC, 4 min 12 s; unit 5, about 4 min 12 s left"
    assert third.split() == ["quantize-model", "1c0f"]


def test_failed_conversion_shows_why_and_no_time_left():
    text = format_conversions([{**ROW, "state": "Failed", "why": "RecipeError: no text\nname one"}])
    assert "left" not in text
    assert [line.strip() for line in text.splitlines()[2:4]] == ["RecipeError: no text", "name one"]


def test_no_conversions_are_told():
    assert format_conversions([]) == "no conversions"


def test_limit_below_one_is_refused(capsys):
    assert main(["status", "--limit", "0"]) == 2
    assert "limit must be at least 1" in capsys.readouterr().err


def status(server: PrefectServer, *words: str) -> str:
    ended = subprocess.run(
        [QUANTMILL, "status", *words], env=server.environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def runs(prefect_server: PrefectServer) -> Iterator[dict[str, str]]:
    """Ids of a run of each kind; ``planned`` is what a schedule made for tomorrow."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.flows.runs_program"],
        env=prefect_server.environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline())
        with prefect_server.client() as client:
            flow = client.post("/flows/", json={"name": "quantize-model"}).json()["id"]
            tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
            state = {"type": "SCHEDULED", "state_details": {"scheduled_time": tomorrow}}
            body = {"flow_id": flow, "name": f"{_NAME} planned", "state": state}
            made = client.post("/flow_runs/", json=body)
            made.raise_for_status()
            yield found | {"planned": made.json()["id"]}
            for run in (*found.values(), made.json()["id"]):
                client.delete(f"/flow_runs/{run}")
    finally:
        stop(process)


@pytest.mark.slow
def test_runs_are_listed_with_their_states_newest_first(prefect_server, runs):
    rows = json.loads(status(prefect_server, "--json", "--limit", "200"))
    mine = {row["id"]: row for row in rows if row["id"] in runs.values()}
    assert list(mine) == [runs[end] for end in ("running", "cancelled", "failed", "completed")]
    shown = {end: mine[run] for end, run in runs.items() if end != "planned"}
    assert {end: row["state"] for end, row in shown.items()} == {
        "completed": "Completed",
        "failed": "Failed",
        "cancelled": "Cancelled",
        "running": "Running",
    }
    assert {end: row["progress_percent"] for end, row in shown.items()} == {
        "completed": 100.0,
        "failed": 25.0,
        "cancelled": 25.0,
        "running": 25.0,
    }
    assert "the text is too short" in shown["failed"]["why"]
    assert shown["cancelled"]["why"] == "nobody needs it"
    assert shown["completed"]["why"] is None and shown["running"]["why"] is None
    assert shown["completed"]["step"] == "done"
    assert all(row["flow"] == "quantize-model" and row["seconds"] > 0 for row in shown.values())


@pytest.mark.slow
def test_limit_keeps_the_newest(prefect_server, runs):
    (row,) = json.loads(status(prefect_server, "--json", "--limit", "1"))
    assert row["id"] == runs["running"]
    text = status(prefect_server, "--limit", "1")
    assert text.splitlines()[0].split() == ["Running", "25", "%", _NAME, "running"]


@pytest.mark.slow
def test_without_a_server_it_tells_how_to_start_one(tmp_path):
    ended = subprocess.run(
        [QUANTMILL, "status"], env=clean_environment(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert "prefect server start" in ended.stderr
