"""A real Prefect server for the tests of flows, started once per run on a free port."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
_START_TIMEOUT_S = 180
_STOP_TIMEOUT_S = 30
_BUSY_S = 60


class _Patient(httpx.HTTPTransport):
    """Asks again while the server is too busy with its database, as Prefect's own client does."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        deadline = time.monotonic() + _BUSY_S
        while True:
            response = super().handle_request(request)
            if response.status_code != 503 or time.monotonic() > deadline:
                return response
            response.close()
            time.sleep(0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefectServer:
    """Address of a running server, and the environment with which its clients start."""

    api_url: str
    environment: dict[str, str]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.api_url, timeout=60, transport=_Patient())

    def deployment(self, name: str) -> dict:
        with self.client() as client:
            response = client.get(f"/deployments/name/quantize-model/{name}")
            response.raise_for_status()
            return response.json()


def clean_environment(home: Path) -> dict[str, str]:
    """This process's environment without any Prefect or Ray setting of the machine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_"))}
    return kept | {
        "PREFECT_HOME": str(home),
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }


def wait_until(is_done: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < deadline, f"{what} took more than {timeout_s} s"
        time.sleep(0.2)


def stop(process: subprocess.Popen) -> None:
    """End a process that leads its own group, and its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_healthy(api_url: str) -> bool:
    try:
        return httpx.get(f"{api_url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def running_prefect_server(home: Path) -> Iterator[tuple[PrefectServer, subprocess.Popen]]:
    """A server with its own home on a free port, and its process."""
    port = _free_port()
    api_url = f"http://127.0.0.1:{port}/api"
    settings = {
        "PREFECT_SERVER_UI_API_URL": api_url,
        # How often it looks at schedules; by default once a minute.
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
    }
    environment = clean_environment(home) | settings
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until(
            lambda: process.poll() is not None or _is_healthy(api_url), _START_TIMEOUT_S, "Prefect's start"
        )
        assert process.poll() is None, (home / "server.log").read_text()
        yield PrefectServer(api_url=api_url, environment=environment | {"PREFECT_API_URL": api_url}), process
    finally:
        stop(process)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with running_prefect_server(tmp_path_factory.mktemp("prefect")) as (server, _):
        yield server
