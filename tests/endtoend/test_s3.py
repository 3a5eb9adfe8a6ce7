"""Whole jobs against a real S3 server: the bytes of a local run, and one clear error for what goes wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from quantlib.inprocess import quantize
from tests.support.s3_server import S3Server
from tests.support.tiny_jobs import shard_digests, tiny_options

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Options of a finished local job."""
    options = tiny_options(tmp_path_factory.mktemp("local"))
    quantize(options)
    return options


@pytest.fixture(scope="module")
def uploaded(s3_server: S3Server, local) -> str:
    """Prefix with source and texts on the server."""
    s3_server.put_folder(Path(local.source), "endtoend/source")
    for name in ("calibration", "evaluation"):
        s3_server.put(f"endtoend/{name}.jsonl", Path(getattr(local, name)).read_bytes())
    return s3_server.uri("endtoend")


def _quantlib(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "quantlib", *arguments], capture_output=True, text=True, timeout=300
    )


def _job(uploaded: str, output: str, *more: str) -> list[str]:
    settings = {
        "--calibration": f"{uploaded}/calibration.jsonl",
        "--evaluation": f"{uploaded}/evaluation.jsonl",
        "--group-size": "32",
        "--sequences": "10",
        "--sequence-length": "32",
        "--evaluation-sequences": "5",
        "--threads-per-worker": "1",
        "--device": "cpu",
    }
    return [f"{uploaded}/source", output, *(part for pair in settings.items() for part in pair), *more]


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_s3_to_s3_writes_the_bytes_of_a_local_run(uploaded, s3_environment, local, tmp_path, engine):
    output = f"{uploaded}/output-{engine}"
    done = _quantlib("quantize", *_job(uploaded, output, "--storage-engine", engine))
    assert done.returncode == 0, done.stderr
    assert "Perplexity" in done.stdout
    for name in shard_digests(Path(local.output)):
        (tmp_path / name).write_bytes(s3_environment.get(f"endtoend/output-{engine}/{name}"))
    assert shard_digests(tmp_path) == shard_digests(Path(local.output))
    verified = _quantlib("verify", output, "--source", f"{uploaded}/source", "--storage-engine", engine)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert s3_environment.open_uploads("endtoend/") == []


def _assert_one_clear_error(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("quantmill: error: ")
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_s3_with_a_wrong_key_is_refused(uploaded, s3_environment, monkeypatch, engine, variable):
    monkeypatch.setenv(variable, "not-the-key")
    done = _quantlib("quantize", *_job(uploaded, f"{uploaded}/refused", "--storage-engine", engine))
    _assert_one_clear_error(done, "AWS_")
    assert "not-the-key" not in done.stderr
    assert s3_environment.keys("endtoend/refused") == []


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_s3_missing_bucket_and_missing_objects_are_refused_by_name(uploaded, s3_environment, engine):
    arguments = _job(uploaded, f"{uploaded}/refused", "--storage-engine", engine)
    no_bucket = _quantlib("quantize", "s3://no-such-bucket/source", *arguments[1:])
    _assert_one_clear_error(no_bucket, "no-such-bucket")
    no_source = _quantlib("quantize", f"{uploaded}/nothing-here", *arguments[1:])
    _assert_one_clear_error(no_source, "nothing-here")
    no_text = _quantlib("quantize", *arguments, "--calibration", f"{uploaded}/no-text.jsonl")
    _assert_one_clear_error(no_text, "no-text.jsonl")
    assert s3_environment.keys("endtoend/refused") == []
