"""Homes of temporary Prefect servers: gone with their process, or with the next one."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flows.temporary_home import make_temporary_home, remove_abandoned_homes
from tests.flows.conftest import wait_until

# A process with a home, and a "server" that was started with it.
_OWNER = """
import os, subprocess, sys
from flows.temporary_home import make_temporary_home
home = str(make_temporary_home())
server = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
started = subprocess.Popen(server, env=os.environ | {"PREFECT_HOME": home}, stdout=subprocess.PIPE)
started.stdout.readline()
print(home, started.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def _owner(folder: Path) -> tuple[subprocess.Popen, Path, Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER],
        env={"TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    home, server = process.stdout.readline().split()
    return process, Path(home), Path("/proc") / server


def test_home_and_server_of_a_killed_process_are_removed_by_the_next(folder):
    process, home, server = _owner(folder)
    remove_abandoned_homes()
    assert home.is_dir()
    assert server.exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert home.is_dir()
    other = make_temporary_home()
    assert not home.exists()
    assert other.is_dir()
    wait_until(lambda: not server.exists(), 10, "the end of the server")


def test_home_goes_with_its_process(folder):
    process, home, server = _owner(folder)
    process.communicate("")
    assert not home.exists()
    subprocess.run(["kill", server.name], check=True)
