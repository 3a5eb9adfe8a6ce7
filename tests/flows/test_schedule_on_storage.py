"""The schedule end to end: checkpoints appear on an S3 server, are converted, left, parked or kept back."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import REPOSITORY, PrefectServer, stop, wait_until
from tests.support.checkpoints import CONFIG, write_checkpoint
from tests.support.s3_server import S3Server
from tests.support.serving import running_serve
from tests.support.tiny_jobs import tiny_source, tiny_text

pytestmark = pytest.mark.slow
_LIMIT_S = 400
_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_RECIPE = {
    "name": "w4",
    "method": "rtn",
    "group_size": 32,
    "sequence_length": 32,
    "evaluation_sequences": 2,
    "workers": 1,
    "threads_per_worker": 1,
    "device": "cpu",
}
# Makes sure of what it is given, and refuses it.
_HOOK = """
import json, pathlib, sys
folder, report = map(pathlib.Path, sys.argv[1:])
assert (folder / "config.json").exists() and json.loads(report.read_text())["shards"]
sys.exit("the smoke test says no")
"""


@pytest.fixture(scope="module")
def serving(prefect_server: PrefectServer, s3_server: S3Server, tmp_path_factory) -> Iterator[Path]:
    """`quantmill serve` on that storage, with one hook; gives its log."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "hook.py").write_text(_HOOK)
    hooks = {
        "smoke": f"{sys.executable} {folder / 'hook.py'} {{model}} {{report}}",
        "elsewhere": "deployment:smoke-test/here",
    }
    (folder / "hooks.toml").write_text("".join(f'{name} = "{words}"\n' for name, words in hooks.items()))
    own = {k: v for k, v in prefect_server.environment.items() if not k.startswith("AWS_")}
    environment = own | s3_server.environment | {"QUANTMILL_HOOKS": os.fspath(folder / "hooks.toml")}
    with running_serve(prefect_server, folder, "--limit", "3", environment=environment) as log:
        yield log


@pytest.fixture
def deployment(prefect_server: PrefectServer, serving: Path) -> str:
    """Id of the served deployment of passes."""
    with prefect_server.client() as client:
        return client.get("/deployments/name/convert-new-checkpoints/convert-new-checkpoints").json()["id"]


@pytest.fixture
def smoke_test(prefect_server: PrefectServer, s3_server: S3Server, tmp_path: Path) -> Iterator[None]:
    """A deployment that is asked as a hook, and whoever executes its runs."""
    own = {k: v for k, v in prefect_server.environment.items() if not k.startswith("AWS_")}
    environment = own | s3_server.environment | {"PYTHONPATH": os.fspath(REPOSITORY)}
    program = REPOSITORY / "tests/flows/smoke_program.py"
    with (tmp_path / "smoke.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, program],
            env=environment,
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def is_ready() -> bool:
        with prefect_server.client() as client:
            found = client.get("/deployments/name/smoke-test/here")
        return found.status_code == 200 and found.json()["status"] == "READY"

    try:
        wait_until(is_ready, 180, "the registration of the smoke test")
        yield
    finally:
        stop(process)


def runs_below(server: PrefectServer, address: str) -> list[dict[str, Any]]:
    """Conversions of sources below an address."""
    with server.client() as client:
        query = {"flows": {"name": {"any_": ["quantize-recipes"]}}}
        runs = client.post("/flow_runs/filter", json=query).json()
    return [run for run in runs if run["parameters"]["conversions"][0]["source"].startswith(address)]


def wait_for(server: PrefectServer, address: str, count: int, log: Path) -> list[dict[str, Any]]:
    """That many conversions below an address, all of them ended."""

    def is_done() -> bool:
        runs = runs_below(server, address)
        return len(runs) >= count and all(run["state"]["type"] in _FINAL for run in runs)

    wait_until(is_done, _LIMIT_S, f"{count} conversions of {address} ({log})")
    return runs_below(server, address)


def one_pass(server: PrefectServer, deployment: str, params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A pass that somebody starts by hand: checkpoint -> row of its table."""
    with server.client() as client:
        created = client.post(
            f"/deployments/{deployment}/create_flow_run", json={"parameters": {"params": params}}
        )
        assert created.status_code == 201, created.text
        run_id = created.json()["id"]

        def is_over() -> bool:
            return client.get(f"/flow_runs/{run_id}").json()["state"]["type"] in _FINAL

        wait_until(is_over, _LIMIT_S, "the pass")
        query = {"artifacts": {"flow_run_id": {"any_": [run_id]}}}
        (artifact,) = client.post("/artifacts/filter", json=query).json()
    return {row["checkpoint"]: row for row in json.loads(artifact["data"])}


def put_tiny(server: S3Server, folder: Path, prefix: str) -> str:
    return server.put_folder(tiny_source(folder, num_hidden_layers=1), prefix)


def test_schedule_converts_what_is_whole_and_parks_what_is_broken(
    prefect_server, serving, s3_server, deployment, tmp_path
):
    put_tiny(s3_server, tmp_path / "good", "incoming/good")
    put_tiny(s3_server, tmp_path / "late", "incoming/late")
    shard = next(key for key in s3_server.keys("incoming/late/") if "model-00002-" in key)
    held_back = s3_server.get(shard)
    s3_server.client.delete_object(Bucket=s3_server.bucket, Key=shard)
    write_checkpoint(tmp_path / "strange", config={**CONFIG, "model_type": "of-nobody"})
    s3_server.put_folder(tmp_path / "strange", "incoming/strange")
    prefix = s3_server.uri("incoming")
    params = {
        "prefix": prefix,
        "outputs": s3_server.uri("made"),
        "recipes": [_RECIPE, {**_RECIPE, "name": "w8", "scheme": "W8A16"}],
        "settle_seconds": 0,
        "runs_at_a_time": 2,
        "attempts": 1,
    }
    every = {"schedule": {"interval": 10}, "active": True, "parameters": {"params": params}}
    with prefect_server.client() as client:
        made = client.post(f"/deployments/{deployment}/schedules", json=[every])
        assert made.status_code == 201, made.text
        schedule = made.json()[0]["id"]
        try:
            wait_for(prefect_server, prefix, 2, serving)
            s3_server.put(shard, held_back)
            runs = wait_for(prefect_server, prefix, 3, serving)
        finally:
            client.delete(f"/deployments/{deployment}/schedules/{schedule}").raise_for_status()
    states = {run["parameters"]["conversions"][0]["source"]: run["state"]["type"] for run in runs}
    assert states == {
        f"{prefix}/good": "COMPLETED",
        f"{prefix}/late": "COMPLETED",
        f"{prefix}/strange": "FAILED",
    }
    for name in ("good", "late"):
        assert f"made/{name}/w4/config.json" in s3_server.keys(f"made/{name}/")
        assert f"made/{name}/w8/config.json" in s3_server.keys(f"made/{name}/")
    found = one_pass(prefect_server, deployment, params)
    assert {name: row["state"] for name, row in found.items()} == {
        "good": "made",
        "late": "made",
        "strange": "parked",
    }
    assert "of-nobody" in found["strange"]["reason"]
    assert len(runs_below(prefect_server, prefix)) == 3


@pytest.mark.parametrize(
    ("name", "keeps_back", "reason"),
    [
        ("gate", {"max_block_error": 1e-9}, "max_block_error"),
        ("hook", {"hook": "@smoke"}, "the smoke test says no"),
    ],
)
def test_gate_and_hook_keep_an_output_back(
    prefect_server, serving, s3_server, deployment, tmp_path, name, keeps_back, reason
):
    tiny_text(tmp_path / "evaluation.jsonl", seed=2)
    text = s3_server.put(f"{name}/evaluation.jsonl", (tmp_path / "evaluation.jsonl").read_bytes())
    put_tiny(s3_server, tmp_path / "model", f"{name}/in/model")
    params = {
        "prefix": s3_server.uri(f"{name}/in"),
        "outputs": s3_server.uri(f"{name}/out"),
        "recipes": [{**_RECIPE, "evaluation": text, **keeps_back}],
        "settle_seconds": 0,
        "attempts": 1,
    }
    assert one_pass(prefect_server, deployment, params)["model"]["state"] == "started"
    (run,) = wait_for(prefect_server, params["prefix"], 1, serving)
    assert run["state"]["type"] == "FAILED"
    assert reason in run["state"]["message"]
    keys = s3_server.keys(f"{name}/out/model/w4/")
    assert any(key.endswith(".safetensors") for key in keys)
    assert not [key for key in keys if key.endswith(("config.json", "index.json"))]
    found = one_pass(prefect_server, deployment, params)["model"]
    assert found["state"] == "parked"
    assert reason in found["reason"]


@pytest.mark.parametrize("name", ["agreed", "refused"])
def test_deployment_decides_as_a_hook(
    prefect_server, serving, smoke_test, s3_server, deployment, tmp_path, name
):
    put_tiny(s3_server, tmp_path / "model", f"{name}/in/model")
    params = {
        "prefix": s3_server.uri(f"{name}/in"),
        "outputs": s3_server.uri(f"{name}/out"),
        "recipes": [{**_RECIPE, "hook": "@elsewhere"}],
        "settle_seconds": 0,
        "attempts": 1,
    }
    assert one_pass(prefect_server, deployment, params)["model"]["state"] == "started"
    (run,) = wait_for(prefect_server, params["prefix"], 1, serving)
    is_published = f"{name}/out/model/w4/config.json" in s3_server.keys(f"{name}/out/model/w4/")
    if name == "agreed":
        assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
        assert is_published
    else:
        assert run["state"]["type"] == "FAILED"
        assert "the smoke test on another machine says no" in run["state"]["message"]
        assert not is_published
