"""The real thing on a tiny model: through the command line and through the Prefect API."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantlib.job.report_verdict import verdict
from tests.flows.conftest import PrefectServer, clean_environment, stop, wait_until
from tests.support.serving import running_serve
from tests.support.tiny_jobs import shard_digests, tiny_source, tiny_text

pytestmark = pytest.mark.slow
QUANTMILL = Path(sys.executable).parent / "quantmill"
_RUN_TIMEOUT_S = 400
_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_source(folder / "tiny")
    tiny_text(folder / "calibration.jsonl", seed=1)
    tiny_text(folder / "evaluation.jsonl", seed=2)
    return folder


def request(inputs: Path, output: Path) -> dict[str, Any]:
    return {
        "source": str(inputs / "tiny"),
        "output": str(output),
        "calibration": str(inputs / "calibration.jsonl"),
        "evaluation": str(inputs / "evaluation.jsonl"),
        "group_size": 32,
        "sequences": 6,
        "sequence_length": 32,
        "evaluation_sequences": 2,
        "workers": 1,
        "threads_per_worker": 1,
        "device": "cpu",
    }


def command(values: dict[str, Any], *more: str) -> list[str]:
    flags = [
        word
        for name, value in values.items()
        if name not in ("source", "output")
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    return [str(QUANTMILL), "quantize", values["source"], values["output"], *flags, *more]


def run(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=_RUN_TIMEOUT_S)


@pytest.fixture(scope="module")
def converted(prefect_server: PrefectServer, inputs: Path, tmp_path_factory) -> dict[str, Any]:
    """The report of a conversion that the command line did against the server."""
    output = tmp_path_factory.mktemp("command") / "out"
    ended = run(command(request(inputs, output), "--json"), prefect_server.environment)
    assert ended.returncode == 0, ended.stderr
    assert "done" in ended.stderr.splitlines()[-1]
    return json.loads(ended.stdout)


def flow_run(server: PrefectServer, flow_run_id: str) -> dict[str, Any]:
    with server.client() as client:
        response = client.get(f"/flow_runs/{flow_run_id}")
    response.raise_for_status()
    return response.json()


def flow_run_that_wrote(server: PrefectServer, output: str) -> dict[str, Any]:
    """The only flow run with that output; other tests have runs of their own on the server."""
    with server.client() as client:
        query = {"flows": {"name": {"any_": ["quantize-model"]}}}
        runs = client.post("/flow_runs/filter", json=query).json()
    (found,) = (run for run in runs if run["parameters"]["params"]["output"] == output)
    return found


def artifacts_of(server: PrefectServer, flow_run_id: str) -> dict[str, Any]:
    with server.client() as client:
        query = {"artifacts": {"flow_run_id": {"any_": [flow_run_id]}}}
        return {found["key"]: found["data"] for found in client.post("/artifacts/filter", json=query).json()}


def log_of(server: PrefectServer, flow_run_id: str) -> list[str]:
    with server.client() as client:
        query = {"logs": {"flow_run_id": {"any_": [flow_run_id]}}, "sort": "TIMESTAMP_ASC"}
        return [found["message"] for found in client.post("/logs/filter", json=query).json()]


def stage_names(server: PrefectServer, flow_run_id: str) -> set[str]:
    with server.client() as client:
        query = {"flow_runs": {"id": {"any_": [flow_run_id]}}}
        return {found["name"] for found in client.post("/task_runs/filter", json=query).json()}


def test_command_line_converts_and_the_run_is_on_the_server(prefect_server, converted, inputs):
    assert converted["runner"] == "ray"
    assert len(converted["blocks"]) == 3
    found = flow_run_that_wrote(prefect_server, converted["output"].removeprefix("file://"))
    assert found["state"]["type"] == "COMPLETED"
    assert found["name"] == "tiny to W4A16 g32 compressed-tensors"
    assert found["parameters"]["params"]["source"] == str(inputs / "tiny")
    wanted = {"plan", "head", "publish", *(f"block {k}/3: solve" for k in (1, 2, 3))}
    wait_until(lambda: stage_names(prefect_server, found["id"]) >= wanted, 60, "the arrival of the task runs")
    shown = artifacts_of(prefect_server, found["id"])
    assert shown["quantize-progress"] == 100.0
    rows = json.loads(shown["quantize-blocks"])
    assert [row["block"] for row in rows] == [1, 2, 3]
    errors = [block["relative_error"] for block in converted["blocks"]]
    assert [row["relative error"] for row in rows] == pytest.approx(errors, rel=1e-3)
    assert shown["quantize-summary"].startswith(f"**{verdict(converted)}**")
    assert shown["quantize-errors"].startswith("data:image/svg+xml;base64,")


def test_log_of_the_run_has_lines_of_the_job_and_of_its_workers(prefect_server, converted):
    found = flow_run_that_wrote(prefect_server, converted["output"].removeprefix("file://"))

    def lines() -> list[str]:
        return log_of(prefect_server, found["id"])

    wait_until(lambda: any("block 3/3: finished" in line for line in lines()), 60, "the arrival of the log")
    said = lines()
    for block in (1, 2, 3):
        assert sum(line.startswith(f"worker 0: block {block}: written") for line in said) == 1
        assert sum(line.startswith(f"block {block}/3: finished") for line in said) == 1


def test_one_process_gives_the_same_bytes_as_the_flow(converted, inputs, tmp_path):
    ended = run(
        command(request(inputs, tmp_path / "out"), "--runner", "inprocess"), clean_environment(tmp_path)
    )
    assert ended.returncode == 0, ended.stderr
    digests = shard_digests(tmp_path / "out")
    assert digests == {shard["name"]: shard["sha256"] for shard in converted["shards"]}


def _is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_gates_and_hooks_decide_on_a_run_of_the_flow(prefect_server, inputs, tmp_path):
    values = request(inputs, tmp_path / "out")
    ended = run(command({**values, "max_kl": 0.0}), prefect_server.environment)
    assert ended.returncode == 1, ended.stderr
    assert "staged, not published: max_kl allows 0.0, found" in ended.stderr
    found = flow_run_that_wrote(prefect_server, str(tmp_path / "out"))
    assert found["state"]["type"] == "FAILED"
    assert "max_kl allows 0.0" in found["state"]["message"]
    file = tmp_path / "pid"
    waits = {**values, "max_kl": 9.0, "hook": f"sh -c 'sleep 300 & echo $! > {file}; wait'"}
    process = subprocess.Popen(command(waits), env=prefect_server.environment, start_new_session=True)
    try:
        wait_until(lambda: file.exists() and file.read_text().strip() != "", _RUN_TIMEOUT_S, "the hook")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        stop(process)
    assert not _is_running(int(file.read_text()))
    assert not (tmp_path / "out" / "config.json").exists()
    asked = {**values, "max_kl": 9.0, "hook": f"touch {tmp_path}/asked"}
    ended = run(command(asked, "--json"), prefect_server.environment)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["publication"]["state"] == "published"
    assert (tmp_path / "asked").exists() and (tmp_path / "out" / "config.json").exists()


def test_wrong_source_exits_2_with_one_line_and_writes_nothing(prefect_server, tmp_path):
    values = {"source": str(tmp_path / "none"), "output": str(tmp_path / "out"), "method": "rtn"}
    ended = run(command(values), prefect_server.environment)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("quantmill: error: ")
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files with a short name: Ray puts sockets there, whose paths have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="qm", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def test_without_a_server_a_temporary_one_is_used_and_leaves_nothing(inputs, tmp_path, scratch):
    environment = clean_environment(tmp_path) | {"TMPDIR": str(scratch), "HOME": str(tmp_path / "home")}
    del environment["PREFECT_HOME"]
    values = {"source": str(inputs / "tiny"), "output": str(tmp_path / "out"), "method": "rtn"}
    settings = {"group_size": 32, "workers": 1, "threads_per_worker": 1, "device": "cpu"}
    ended = run(command({**values, **settings}), environment)
    assert ended.returncode == 0, ended.stderr
    assert f"{tmp_path / 'out'}/quantmill_report.html" in ended.stdout
    assert not list(scratch.glob("quantmill-prefect-*"))


@pytest.fixture
def serving(prefect_server: PrefectServer, tmp_path: Path) -> Iterator[Path]:
    """`quantmill serve`, executing runs; gives its log."""
    with running_serve(prefect_server, tmp_path) as log:
        yield log


def test_run_created_through_the_api_is_executed_by_serve(
    prefect_server, serving, inputs, converted, tmp_path
):
    deployment = prefect_server.deployment("quantize-model")
    with prefect_server.client() as client:
        body = {"parameters": {"params": request(inputs, tmp_path / "out")}}
        created = client.post(f"/deployments/{deployment['id']}/create_flow_run", json=body)
    assert created.status_code == 201, created.text
    run_id = created.json()["id"]
    wait_until(
        lambda: flow_run(prefect_server, run_id)["state"]["type"] in _FINAL, _RUN_TIMEOUT_S, "the served run"
    )
    assert flow_run(prefect_server, run_id)["state"]["type"] == "COMPLETED", serving.read_text()
    assert set(artifacts_of(prefect_server, run_id)) == {
        "quantize-progress",
        "quantize-blocks",
        "quantize-errors",
        "quantize-summary",
    }
    wanted = {shard["name"]: shard["sha256"] for shard in converted["shards"]}
    assert shard_digests(tmp_path / "out") == wanted


def test_two_recipes_are_one_flow_run_and_two_outputs(prefect_server, converted, inputs, tmp_path):
    for name, text in {"four": "", "eight": 'scheme = "W8A16"\nmethod = "rtn"\n'}.items():
        (tmp_path / f"{name}.toml").write_text(text)
    words = command(request(inputs, tmp_path / "out"), "--json")
    recipes = [f"--recipe={tmp_path / name}.toml" for name in ("four", "eight")]
    ended = run([*words, *recipes], prefect_server.environment)
    assert ended.returncode == 0, ended.stderr
    four, eight = json.loads(ended.stdout)
    assert four["shards"] == converted["shards"], "as by itself"
    assert [uri.rpartition("/")[2] for uri in eight["made_with"]] == ["four"]
    with prefect_server.client() as client:
        query = {"flows": {"name": {"any_": ["quantize-recipes"]}}}
        (found,) = client.post("/flow_runs/filter", json=query).json()
    assert found["state"]["type"] == "COMPLETED"
    assert found["name"] == "tiny to W4A16 g32 compressed-tensors, tiny to W8A16 g32 compressed-tensors"


def test_form_that_names_several_formats_makes_an_output_of_each(prefect_server, converted, inputs, tmp_path):
    values = {**request(inputs, tmp_path / "out"), "format": "gptq, compressed-tensors"}
    program = (
        "import json\n"
        "from flows.params import QuantizeParams\n"
        "from flows.quantize_model import quantize_model\n"
        f"print(json.dumps(quantize_model(QuantizeParams.model_validate({values!r}))))"
    )
    ended = run([sys.executable, "-c", program], prefect_server.environment)
    assert ended.returncode == 0, ended.stderr
    gptq, compressed = json.loads(ended.stdout.splitlines()[-1])
    assert [Path(uri).name for uri in gptq["packed_with"]] == ["compressed-tensors"]
    # Portable scales of a bf16 model are its own.
    assert compressed["shards"] == converted["shards"]
    assert (tmp_path / "out" / "gptq" / "config.json").exists()


def test_comparison_is_one_flow_run_with_a_table(prefect_server, converted, inputs, tmp_path):
    words = command(request(inputs, tmp_path / "out"), "--json", "--output", str(tmp_path / "out"))
    words[1:4] = ["compare", str(inputs / "tiny"), "--schemes", "W4A16", "rtn:W8A16"]
    ended = run(words, prefect_server.environment)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout)["rows"]
    assert [row["entry"] for row in rows] == ["gptq:W4A16@32", "rtn:W8A16@32"]
    assert rows[0]["ratio"] == converted["evaluation"]["ratio"], "as by itself"
    wanted = {shard["name"]: shard["sha256"] for shard in converted["shards"]}
    assert shard_digests(tmp_path / "out" / "gptq-W4A16-g32") == wanted
    with prefect_server.client() as client:
        query = {"flows": {"name": {"any_": ["compare-schemes"]}}}
        (found,) = client.post("/flow_runs/filter", json=query).json()
    assert found["state"]["type"] == "COMPLETED"
    assert found["name"] == "tiny by W4A16, rtn:W8A16"
    assert "| gptq:W4A16@32 |" in artifacts_of(prefect_server, found["id"])["compare-schemes"]
