"""`quantmill serve` beside a Prefect server."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.flows.conftest import PrefectServer, stop, wait_until

QUANTMILL = Path(sys.executable).parent / "quantmill"
_REGISTRATION_S = 180


def _is_ready(server: PrefectServer) -> bool:
    with server.client() as client:
        found = client.get("/deployments/name/quantize-model/quantize-model")
    return found.status_code == 200 and found.json()["status"] == "READY"


@contextmanager
def running_serve(server: PrefectServer, folder: Path) -> Iterator[Path]:
    """The deployments, registered and executed while this lasts; gives the log."""
    log = folder / "serve.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [QUANTMILL, "serve"],
            env=server.environment,
            cwd=folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(
            lambda: process.poll() is not None or _is_ready(server), _REGISTRATION_S, "the registration"
        )
        assert process.poll() is None, log.read_text()
        yield log
    finally:
        stop(process)
