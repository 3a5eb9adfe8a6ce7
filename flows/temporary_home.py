"""The home of a temporary Prefect server: made for one run, and removed with it.

A process that is killed can end neither its server nor its home; the next run on the machine does. Whose home
is still in use is told by a lock on a file in it, which the kernel releases with the process.
"""

import atexit
import fcntl
import os
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "quantmill-prefect-"
_LOCK_NAME = "in-use"


def make_temporary_home() -> Path:
    """A new home, which is removed when this process ends; homes of processes that were killed go at once."""
    remove_abandoned_homes()
    home = Path(tempfile.mkdtemp(prefix=_PREFIX))
    # Under its name only once it is locked: another run must not take the home for an abandoned one.
    lock = os.open(home / f"{_LOCK_NAME}.new", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (home / f"{_LOCK_NAME}.new").rename(home / _LOCK_NAME)
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


def remove_abandoned_homes() -> None:
    """End the servers of homes whose process is gone, and remove these homes."""
    for home in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            lock = os.open(home / _LOCK_NAME, os.O_RDWR)
        except OSError:
            continue
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _end_processes(home)
            shutil.rmtree(home, ignore_errors=True)
        os.close(lock)


def _end_processes(home: Path) -> None:
    """End what inherited this home as PREFECT_HOME: the server, and what may be left of the run's own Ray."""
    wanted = f"PREFECT_HOME={home}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGTERM)
