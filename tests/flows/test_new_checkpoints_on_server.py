"""Passes over a prefix against a real server that carries out their runs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import REPOSITORY, PrefectServer, stop, wait_until
from tests.support.checkpoints import CONFIG, write_checkpoint
from tests.support.tiny_jobs import tiny_source

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("new_checkpoints_program.py")
_PASS_TIMEOUT_S = 180
_RUNS_TIMEOUT_S = 400
_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_RECIPE = {
    "method": "rtn",
    "group_size": 32,
    "workers": 1,
    "threads_per_worker": 1,
    "device": "cpu",
    "rules": [{"match": "*.down_proj", "keep": True}],
}


def begin(server: PrefectServer, *words: str, **more: Any) -> subprocess.Popen:
    environment = server.environment | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, str(PROGRAM), *words], env=environment, **more)


def begin_pass(server: PrefectServer, params: dict[str, Any]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return begin(server, "pass", json.dumps(params), **pipes)


def end_pass(process: subprocess.Popen) -> dict[str, dict[str, Any]]:
    out, err = process.communicate(timeout=_PASS_TIMEOUT_S)
    assert process.returncode == 0, err
    return {row["checkpoint"]: row for row in json.loads(out.splitlines()[-1])["checkpoints"]}


def one_pass(server: PrefectServer, params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return end_pass(begin_pass(server, params))


def states(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: row["state"] for name, row in found.items()}


def runs_for(server: PrefectServer, prefix: Path) -> list[dict[str, Any]]:
    """Runs for checkpoints below a prefix; other tests have runs of their own on the server."""
    with server.client() as client:
        query = {"flows": {"name": {"any_": ["quantize-recipes"]}}, "sort": "START_TIME_ASC"}
        runs = client.post("/flow_runs/filter", json=query).json()
    return [run for run in runs if str(prefix) in run["parameters"]["conversions"][0]["source"]]


def wait_for_runs(server: PrefectServer, prefix: Path) -> None:
    def is_done() -> bool:
        return all(run["state"]["type"] in _FINAL for run in runs_for(server, prefix))

    wait_until(is_done, _RUNS_TIMEOUT_S, "the served runs")


@pytest.fixture
def serving(prefect_server: PrefectServer, tmp_path: Path) -> Iterator[Path]:
    """Executes the runs that passes begin; gives its log."""
    log_path = tmp_path / "serve.log"
    with log_path.open("wb") as log:
        process = begin(
            prefect_server,
            "serve",
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def is_registered() -> bool:
        with prefect_server.client() as client:
            found = client.get("/deployments/name/quantize-recipes/quantize-recipes")
            return found.status_code == 200 and found.json()["status"] == "READY"

    try:
        wait_until(lambda: process.poll() is not None or is_registered(), 120, "the registration")
        assert process.poll() is None, log_path.read_text()
        yield log_path
    finally:
        stop(process)


def test_pass_needs_a_deployment_that_carries_out_conversions(prefect_server, tmp_path):
    recipe = {"name": "w4", "method": "rtn"}
    params = {"prefix": str(tmp_path), "outputs": str(tmp_path / "out"), "recipes": [recipe]}
    process = begin_pass(prefect_server, {**params, "deployment": "quantize-recipes/of-nobody"})
    _, err = process.communicate(timeout=_PASS_TIMEOUT_S)
    assert process.returncode != 0
    assert "has no deployment quantize-recipes/of-nobody" in err


def test_key_gives_one_run_and_what_the_server_forgets_or_refuses_is_told(prefect_server):
    out, err = begin(prefect_server, "keys", stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate()
    assert out, err.decode()
    found = json.loads(out)
    first, second = found["ids"][0], found["ids"][-1]
    assert found["ids"] == [first] * 4 + [second] * 2
    assert first != second
    assert found["before"]["state"] == "Scheduled"
    assert not found["before"]["is_final"]
    assert found["gone"] is None
    assert "refuses the run" in found["refusal"]


def test_checkpoints_are_converted_as_they_become_whole(prefect_server, serving, tmp_path):
    prefix, outputs = tmp_path / "in", tmp_path / "out"
    tiny_source(prefix / "good", num_hidden_layers=1)
    tiny_source(prefix / "late", num_hidden_layers=1)
    shard = next((prefix / "late").glob("model-00002-*.safetensors"))
    shard.rename(tmp_path / "away")
    write_checkpoint(prefix / "strange", config={**CONFIG, "model_type": "of-nobody"})
    params = {
        "prefix": str(prefix),
        "outputs": str(outputs),
        "recipes": [{**_RECIPE, "name": "w4"}, {**_RECIPE, "name": "w8", "scheme": "W8A16"}],
        "settle_seconds": 0,
        "runs_at_a_time": 4,
        "attempts": 2,
    }

    # Two passes at once, then a third while the runs are under way.
    passes = [begin_pass(prefect_server, params) for _ in range(2)]
    for found in map(end_pass, passes):
        assert {states(found)[name] for name in ("good", "strange")} <= {"started", "running"}
        assert states(found)["late"] == "incomplete"
        assert shard.name in found["late"]["reason"]
    assert len(runs_for(prefect_server, prefix)) == 2
    one_pass(prefect_server, params)
    wait_for_runs(prefect_server, prefix)
    assert len(runs_for(prefect_server, prefix)) == 2, serving.read_text()

    (tmp_path / "away").rename(shard)
    found = one_pass(prefect_server, params)
    assert states(found) == {"good": "made", "late": "started", "strange": "started"}
    for name in ("w4", "w8"):
        report = json.loads((outputs / "good" / name / "quantmill_report.json").read_text())
        assert [Path(other).name for other in report["made_with"]] == [{"w4": "w8", "w8": "w4"}[name]]
        assert (outputs / "good" / name / "config.json").exists()
    wait_for_runs(prefect_server, prefix)

    # The server forgets a run: that is no failure of the checkpoint.
    with prefect_server.client() as client:
        client.delete(f"/flow_runs/{found['strange']['run_id']}").raise_for_status()
    assert states(one_pass(prefect_server, params)) == {"good": "made", "late": "made", "strange": "started"}
    wait_for_runs(prefect_server, prefix)
    num_runs = len(runs_for(prefect_server, prefix))
    for _ in range(2):
        found = one_pass(prefect_server, params)
        assert states(found) == {"good": "made", "late": "made", "strange": "parked"}
        assert "2 attempt(s) failed, the last one: Failed" in found["strange"]["reason"]
        assert "of-nobody" in found["strange"]["reason"]
    assert len(runs_for(prefect_server, prefix)) == num_runs == 4

    with prefect_server.client() as client:
        query = {"artifacts": {"key": {"any_": ["new-checkpoints"]}}, "sort": "CREATED_DESC"}
        artifact = client.post("/artifacts/filter", json=query).json()[0]
    assert [row["state"] for row in json.loads(artifact["data"])] == ["made", "made", "parked"]
    assert artifact["description"] == f"3 checkpoint(s) below {prefix}: 2 made, 1 parked"
