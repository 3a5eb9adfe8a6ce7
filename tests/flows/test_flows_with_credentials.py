"""Flows that reach object storage with the keys of a Prefect block, and leave these keys nowhere."""

import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import PrefectServer, wait_until
from tests.support.s3_server import S3Server
from tests.support.serving import running_serve
from tests.support.tiny_jobs import tiny_source, tiny_text

pytestmark = pytest.mark.slow
BLOCK = "object-storage"
_RUN_TIMEOUT_S = 400
_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_SAVE_BLOCK = """
import sys
from prefect_aws.client_parameters import AwsClientParameters
from prefect_aws.credentials import AwsCredentials
name, endpoint, access, secret = sys.argv[1:]
AwsCredentials(
    aws_access_key_id=access,
    aws_secret_access_key=secret,
    region_name="us-east-1",
    aws_client_parameters=AwsClientParameters(endpoint_url=endpoint),
).save(name)
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """For everything that the runs write on this machine; short, as Ray puts sockets there."""
    with tempfile.TemporaryDirectory(prefix="qm", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def serving(prefect_server: PrefectServer, s3_server: S3Server, folder: Path) -> Iterator[Path]:
    """`quantmill serve` without any AWS setting of its own; gives its log."""
    without = {k: v for k, v in prefect_server.environment.items() if not k.startswith("AWS_")}
    keys = [BLOCK, s3_server.endpoint, s3_server.access_key, s3_server.secret_key]
    subprocess.run([sys.executable, "-c", _SAVE_BLOCK, *keys], env=without, check=True, timeout=180)
    environment = without | {
        "TMPDIR": str(folder),
        "RAY_TMPDIR": str(folder),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "PREFECT_LOGGING_LEVEL": "DEBUG",
    }
    with running_serve(prefect_server, folder, environment=environment) as log:
        yield log


@pytest.fixture(scope="module")
def uploaded(s3_server: S3Server, folder: Path) -> str:
    """Prefix with source and texts on the server."""
    s3_server.put_folder(tiny_source(folder / "tiny"), "credentials/tiny")
    for seed, name in enumerate(("calibration", "evaluation")):
        text = folder / f"{name}.jsonl"
        tiny_text(text, seed=seed)
        s3_server.put(f"credentials/{name}.jsonl", text.read_bytes())
    return s3_server.uri("credentials")


@pytest.fixture(scope="module")
def runs(prefect_server: PrefectServer, serving: Path, uploaded: str) -> dict[str, dict[str, Any]]:
    """Flow -> its run on one output: converted, verified, evaluated, cleaned."""
    place = {"credentials": BLOCK}
    requests = {
        "quantize-model": {
            "source": f"{uploaded}/tiny",
            "output": f"{uploaded}/out",
            "calibration": f"{uploaded}/calibration.jsonl",
            "evaluation": f"{uploaded}/evaluation.jsonl",
            "group_size": 32,
            "sequences": 6,
            "sequence_length": 32,
            "evaluation_sequences": 2,
            "workers": 1,
            "threads_per_worker": 1,
            "device": "cpu",
        },
        "verify-output": {"output": f"{uploaded}/out", "source": f"{uploaded}/tiny"},
        "evaluate-model": {
            "model": f"{uploaded}/out",
            "text": f"{uploaded}/evaluation.jsonl",
            "evaluation_sequences": 2,
            "sequence_length": 32,
            "threads_per_worker": 1,
            "device": "cpu",
        },
        "clean-work": {"output": f"{uploaded}/out"},
    }
    return {name: executed(prefect_server, name, values | place) for name, values in requests.items()}


def executed(server: PrefectServer, flow: str, params: dict[str, Any]) -> dict[str, Any]:
    """A run of a served flow, when it has ended."""

    with server.client() as client:
        deployment = client.get(f"/deployments/name/{flow}/{flow}").json()
        created = client.post(
            f"/deployments/{deployment['id']}/create_flow_run", json={"parameters": {"params": params}}
        )
        assert created.status_code == 201, created.text
        run_id = created.json()["id"]

        def is_over() -> bool:
            return client.get(f"/flow_runs/{run_id}").json()["state"]["type"] in _FINAL

        wait_until(is_over, _RUN_TIMEOUT_S, f"the run of {flow}")
        return client.get(f"/flow_runs/{run_id}").json()


def artifacts(server: PrefectServer, run: dict[str, Any]) -> dict[str, Any]:
    query = {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}}
    with server.client() as client:
        return {found["key"]: found["data"] for found in client.post("/artifacts/filter", json=query).json()}


def test_flows_reach_storage_with_the_keys_of_the_block(prefect_server, runs, serving, s3_server):
    states = {name: (run["state"]["type"], run["state"]["message"]) for name, run in runs.items()}
    assert {state for state, _ in states.values()} == {"COMPLETED"}, (states, serving.read_text()[-4000:])
    assert runs["quantize-model"]["name"] == "tiny to W4A16 g32 compressed-tensors"
    assert runs["evaluate-model"]["name"] == "Evaluation of out"
    assert "credentials/out/config.json" in s3_server.keys("credentials/out/")
    assert not s3_server.keys("credentials/out.quantmill/")


def test_each_flow_shows_what_it_found(prefect_server, runs):
    shown = {name: artifacts(prefect_server, run) for name, run in runs.items()}
    assert "verified" in shown["verify-output"]["verify-output"]
    assert "perplexity" in shown["evaluate-model"]["evaluate-model"]
    assert "the output is finished" in shown["clean-work"]["clean-work"]


def test_keys_are_in_no_log_artifact_report_record_or_database(
    prefect_server, runs, serving, s3_server, folder
):
    secret, key_id = s3_server.secret_key.encode(), s3_server.access_key.encode()
    home = Path(prefect_server.environment["PREFECT_HOME"])
    assert (home / "prefect.db").is_file() and list(folder.glob("ray/session_*/logs/*"))
    local = [path for root in (home, folder) for path in root.rglob("*") if path.is_file()]
    found = {str(path): path.read_bytes() for path in local}
    found |= {key: s3_server.get(key) for key in s3_server.keys("credentials/")}
    with prefect_server.client() as client:
        for kind in ("logs", "artifacts", "flow_runs", "task_runs", "events"):
            found[kind] = client.post(f"/{kind}/filter", json={}).content
    assert not [name for name, content in found.items() if secret in content]
    # Prefect tells who saved which block in an event, and counts the id of a key among what is no secret.
    with_id = {name for name, content in found.items() if key_id in content}
    assert with_id <= {str(home / "prefect.db"), str(home / "prefect.db-wal"), "events"}
    assert fields_with(home / "prefect.db", s3_server.access_key) <= {
        ("events", "prefect.block-document.created")
    }


def fields_with(database: Path, text: str) -> set[tuple[str, str]]:
    """Tables of a database that hold a text, with the kind of row where it is an event."""
    found = set()
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        for table in tables:
            columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
            kind = "event" if table == "events" else "'row'"
            holds = " OR ".join(f'instr(CAST("{column}" AS TEXT), ?) > 0' for column in columns)
            query = f'SELECT DISTINCT {kind} FROM "{table}" WHERE {holds}'
            found |= {(table, row[0]) for row in connection.execute(query, [text] * len(columns))}
    return found


def test_a_block_that_does_not_exist_is_refused_before_work(prefect_server, serving, uploaded, s3_server):
    params = {"output": f"{uploaded}/out", "credentials": "nobody"}
    ended = executed(prefect_server, "verify-output", params)
    assert ended["state"]["type"] == "FAILED"
    assert "aws-credentials/nobody" in ended["state"]["message"]


def test_findings_make_a_verification_fail(prefect_server, serving, uploaded, s3_server, runs):
    shard = next(key for key in s3_server.keys("credentials/out/") if key.endswith(".safetensors"))
    whole = s3_server.get(shard)
    s3_server.put(shard.replace("/out/", "/damaged/"), whole[:-1] + bytes([whole[-1] ^ 1]))
    for key in s3_server.keys("credentials/out/"):
        if key != shard:
            s3_server.put(key.replace("/out/", "/damaged/"), s3_server.get(key))
    params = {"output": f"{uploaded}/damaged", "credentials": BLOCK}
    ended = executed(prefect_server, "verify-output", params)
    assert ended["state"]["type"] == "FAILED"
    assert "1 finding(s)" in ended["state"]["message"]
    assert "sha256" in artifacts(prefect_server, ended)["verify-output"]
