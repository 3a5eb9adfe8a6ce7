"""The process of the flow, killed and stopped: the same command finishes the job, to the same bytes."""

import json
import os
import random
import signal
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient

from quantlib.inprocess import quantize
from tests.flows.conftest import PrefectServer, clean_environment, stop, wait_until
from tests.support.ray_nodes import RayNodes
from tests.support.serving import QUANTMILL, running_serve
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source

pytestmark = pytest.mark.slow

SEED = 20261122
KILLS = 5
_STEPS_S = 300


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    tiny_source(folder / "deep", num_hidden_layers=32)
    tiny_options(folder)
    return folder


@pytest.fixture(scope="module")
def expected(root) -> dict[str, str]:
    options = tiny_options(root, source=str(root / "deep"), output=str(root / "alone"))
    quantize(options)
    return shard_digests(root / "alone")


def _values(root: Path, output: Path, **more: Any) -> dict[str, Any]:
    """A request, as parameters of the flow."""
    return {
        "source": str(root / "deep"),
        "output": str(output),
        "calibration": str(root / "calibration.jsonl"),
        "evaluation": str(root / "evaluation.jsonl"),
        "group_size": 32,
        "sequences": 10,
        "sequence_length": 32,
        "evaluation_sequences": 5,
        "threads_per_worker": 1,
        "device": "cpu",
        **more,
    }


def _command(root: Path, output: Path, **more: Any) -> list[str]:
    given = _values(root, output, **more)
    addresses = [given.pop(name) for name in ("source", "output")]
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [str(QUANTMILL), "quantize", *addresses, *flags]


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )


def _last_lines(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def _records(output: Path) -> int:
    return len(list(Path(f"{output}.quantmill").glob("done/*.json")))


def test_flow_killed_five_times_is_finished_elsewhere_to_the_same_bytes(
    root, expected, prefect_server: PrefectServer, running_nodes: RayNodes, tmp_path
):
    chosen, output, log = random.Random(SEED), root / "killed", tmp_path / "log"
    for number in range(KILLS):
        given = {"ray_address": running_nodes.address, "workers": 1 + number % 2, "checkpoint_every": 3}
        process = _start(_command(root, output, **given), prefect_server.environment, log)
        # Each start finishes a few units, so that five do not come to the end of 34.
        goal = _records(output) + chosen.randint(1, 2)
        try:
            wait_until(
                lambda goal=goal, process=process: _records(output) >= goal or process.poll() is not None,
                _STEPS_S,
                "a unit",
            )
            assert process.poll() is None, _last_lines(log)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert not (output / "config.json").exists()
    # Another machine: its own Ray, Prefect, home and temporary folder.
    environment = clean_environment(tmp_path / "prefect") | {"HOME": str(tmp_path), "TMPDIR": "/dev/shm"}
    ended = subprocess.run(
        _command(root, output, workers=2), env=environment, capture_output=True, text=True, timeout=_STEPS_S
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert shard_digests(output) == expected


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_flow_that_is_cancelled_frees_its_workers_and_can_be_resumed(
    root, expected, prefect_server: PrefectServer, running_nodes: RayNodes, sent, tmp_path
):
    output, log = root / f"cancelled-{sent.name}", tmp_path / "log"
    given = {"ray_address": running_nodes.address, "workers": 2}
    others = _worker_pids()
    process = _start(_command(root, output, **given), prefect_server.environment, log)
    try:
        wait_until(lambda: _records(output) >= 2 or process.poll() is not None, _STEPS_S, "two units")
        workers = _worker_pids() - others
        assert len(workers) >= 2
        os.kill(process.pid, sent)
        wait_until(lambda: not (_worker_pids() & workers), 10, f"freeing {workers}, {_last_lines(log)}")
        assert process.wait(60) != 0
    finally:
        stop(process)
    options = tiny_options(root, source=str(root / "deep"), output=str(output))
    report = quantize(options)
    assert shard_digests(output) == expected
    assert len(report["history"]["reused_units"]) >= 2


def test_run_cancelled_in_prefect_frees_its_workers_and_can_be_resumed(
    root, expected, prefect_server: PrefectServer, running_nodes: RayNodes, tmp_path
):
    output = root / "cancelled-in-prefect"
    given = {"ray_address": running_nodes.address, "workers": 2}
    others = _worker_pids()
    with running_serve(prefect_server, tmp_path) as log, prefect_server.client() as client:
        run = _submit(prefect_server, _values(root, output, **given))
        wait_until(lambda: _records(output) >= 2, _STEPS_S, f"two units, {log}")
        workers = _worker_pids() - others
        assert len(workers) >= 2
        wanted = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        client.post(f"/flow_runs/{run}/set_state", json=wanted).raise_for_status()
        # Prefect's runner asks the server for runs to cancel every ten seconds.
        wait_until(lambda: not (_worker_pids() & workers), 20, f"freeing {workers}, {_last_lines(log)}")
    report = quantize(tiny_options(root, source=str(root / "deep"), output=str(output)))
    assert shard_digests(output) == expected
    assert len(report["history"]["reused_units"]) >= 2


def _submit(server: PrefectServer, values: dict[str, Any]) -> str:
    """Id of a run of the served deployment."""
    with server.client() as client:
        path = f"/deployments/{server.deployment('quantize-model')['id']}/create_flow_run"
        created = client.post(path, json={"parameters": {"params": values}})
    assert created.status_code == 201, created.text
    return created.json()["id"]


def _worker_pids() -> set[int]:
    """Processes of Ray actors that are ours, by the title that Ray gives them."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::BlockWorker"):
                found.add(int(entry.name))
    return found


def test_suspended_run_frees_its_workers_and_goes_on_when_resumed(
    root, expected, prefect_server: PrefectServer, running_nodes: RayNodes, tmp_path
):
    output = root / "suspended"
    given = {"ray_address": running_nodes.address, "workers": 2}
    others = _worker_pids()
    with running_serve(prefect_server, tmp_path) as log, prefect_server.client() as client:
        run = _submit(prefect_server, _values(root, output, **given))

        def state() -> dict[str, Any]:
            return client.get(f"/flow_runs/{run}").json()["state"]

        wait_until(lambda: _records(output) >= 2, _STEPS_S, f"two units, {log}")
        workers = _worker_pids() - others
        assert len(workers) >= 2
        _suspend(client, run)
        wait_until(lambda: not (_worker_pids() & workers), 60, f"freeing {workers}, {_last_lines(log)}")
        done = _records(output)
        assert not (output / "config.json").exists()
        assert state()["name"] == "Suspended", _last_lines(log)
        # Prefect's client asks again where SQLite was busy with the end of the run's tasks.
        with SyncPrefectClient(prefect_server.api_url) as patient:
            assert patient.resume_flow_run(run).status == "ACCEPT"
        wait_until(lambda: state()["type"] in ("COMPLETED", "FAILED", "CRASHED"), _STEPS_S, "the end")
        assert state()["type"] == "COMPLETED", _last_lines(log)
    assert shard_digests(output) == expected
    report = json.loads((output / "quantmill_report.json").read_text())
    assert len(report["history"]["reused_units"]) >= done


def test_run_whose_serve_is_stopped_is_crashed_and_goes_on_when_it_is_retried(
    root, expected, prefect_server: PrefectServer, tmp_path
):
    output = root / "serve-stopped"
    with prefect_server.client() as client:

        def state() -> dict[str, Any]:
            return client.get(f"/flow_runs/{run}").json()["state"]

        with running_serve(prefect_server, tmp_path):
            run = _submit(prefect_server, _values(root, output, workers=2))
            wait_until(lambda: _records(output) >= 2, _STEPS_S, "two units")
        assert (state()["type"], state()["message"]) == (
            "CRASHED",
            "quantmill serve was stopped; a retry goes on from what is finished",
        )
        assert prefect_server.deployment("quantize-model")["paused"]
        done = _records(output)
        with running_serve(prefect_server, tmp_path) as log:
            again = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}}
            client.post(f"/flow_runs/{run}/set_state", json=again).raise_for_status()
            wait_until(lambda: state()["type"] in ("COMPLETED", "FAILED"), _STEPS_S, f"the end, {log}")
        assert state()["type"] == "COMPLETED", _last_lines(log)
    assert shard_digests(output) == expected
    report = json.loads((output / "quantmill_report.json").read_text())
    assert len(report["history"]["reused_units"]) >= done


def _suspend(client: httpx.Client, run_id: str) -> None:
    """What the Prefect UI sends for its Pause button."""
    in_an_hour = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    details = {"pause_reschedule": True, "pause_timeout": in_an_hour}
    wanted = {"type": "PAUSED", "name": "Suspended", "state_details": details}
    answer = client.post(f"/flow_runs/{run_id}/set_state", json={"state": wanted, "force": True}).json()
    assert answer["status"] == "ACCEPT", answer


def test_command_whose_run_is_suspended_ends_and_can_be_started_again(
    root, expected, prefect_server: PrefectServer, running_nodes: RayNodes, tmp_path
):
    output, log = root / "suspended-command", tmp_path / "log"
    given = {"ray_address": running_nodes.address, "workers": 2}
    others = _worker_pids()
    process = _start(_command(root, output, **given), prefect_server.environment, log)
    try:
        with prefect_server.client() as client:

            def running() -> list[str]:
                query = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
                runs = client.post("/flow_runs/filter", json=query).json()
                found = ((run["id"], run["parameters"].get("params", {}).get("output")) for run in runs)
                return [run_id for run_id, wanted in found if wanted == str(output)]

            # The workers are being placed; no stage has begun.
            wait_until(lambda: running() != [] or process.poll() is not None, 120, "the run")
            (run_id,) = running()
            _suspend(client, run_id)
            assert process.wait(120) == 130, _last_lines(log)
            assert client.get(f"/flow_runs/{run_id}").json()["state"]["name"] == "Suspended"
    finally:
        stop(process)
    assert "quantmill: interrupted" in log.read_text()
    assert not (output / "config.json").exists()
    wait_until(lambda: _worker_pids() <= others, 30, "freeing the workers")
    quantize(tiny_options(root, source=str(root / "deep"), output=str(output)))
    assert shard_digests(output) == expected
