"""`quantmill serve` beside a Prefect server."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.flows.conftest import PrefectServer, stop, wait_until

QUANTMILL = Path(sys.executable).parent / "quantmill"
_REGISTRATION_S = 180


@contextmanager
def running_serve(
    server: PrefectServer, folder: Path, *words: str, environment: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """The deployments, registered and executed while this lasts; gives the log.

    Args:
        folder: Where runs begin, and where the log is written.
        words: Further arguments of the command.
        environment: In place of the server's.
    """
    log = folder / "serve.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [QUANTMILL, "serve", *words],
            env=dict(environment or server.environment),
            cwd=folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        # The server calls deployments ready for a minute after whoever served them before has gone.
        wait_until(
            lambda: process.poll() is not None or "serving " in log.read_text(),
            _REGISTRATION_S,
            "the registration",
        )
        assert process.poll() is None, log.read_text()
        yield log
    finally:
        stop(process)
