"""The demo's S3 server keeps its data between starts, on other ports and with other credentials."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "infra/s3_server.py"


def call(environment: dict[str, str], *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """The server's environment while it runs."""
    written = folder / "environment"
    written.unlink(missing_ok=True)
    folder.mkdir(exist_ok=True)
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen([sys.executable, str(SCRIPT), "serve", str(folder)], stdout=log, stderr=log)
    try:
        while not written.exists():
            assert server.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.05)
        lines = written.read_text().splitlines()
        yield dict(line.removeprefix("export ").split("=", 1) for line in lines)
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.mark.slow
def test_uploaded_files_are_there_after_a_restart(tmp_path):
    folder, source = tmp_path / "s3", tmp_path / "source"
    source.mkdir()
    (source / "weights").write_bytes(b"w" * 5_000_000)
    (source / "config.json").write_bytes(b"{}")
    with running(folder) as environment:
        first = call(environment, "upload", folder, source)
        address = environment["AWS_ENDPOINT_URL"]
    with running(folder) as environment:
        assert environment["AWS_ENDPOINT_URL"] != address
        second = call(environment, "upload", folder, source)
        call(environment, "download", "source/weights", tmp_path / "back")
        call(environment, "remove", "source/")
        third = call(environment, "upload", folder, source)
    assert (
        sorted(first.split())
        == sorted(third.split())
        == sorted(["uploading", "uploading", "source/config.json", "source/weights"])
    )
    assert second == ""
    assert (tmp_path / "back").read_bytes() == b"w" * 5_000_000
