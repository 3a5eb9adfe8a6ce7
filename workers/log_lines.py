"""What actors log, brought to the driver's log: an actor keeps its last lines, the driver fetches them.

Actors have no access to whatever shows the log of a run. Lines are fetched every few seconds by a small call
in a lane of its own, so that they cost no piece of work anything, and what a lost worker logged until
then remains. Lines are never worth a failure: what cannot be fetched is not there.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import ray
from ray import exceptions

LOGGERS = ("quantlib", "workers")
MAX_LINES, MAX_CHARACTERS = 1000, 2000
FETCH_EVERY_S = 5.0
# An actor answers at once unless it is loading libraries; then its lines come with the next call.
_ANSWER_S = 1.0


class LogLine(NamedTuple):
    """A record of an actor's log.

    Attributes:
        created: Seconds since 1970.
        level: As `logging` counts.
        logger: Name of the logger.
        message: The text, with the traceback where there is one.
    """

    created: float
    level: int
    logger: str
    message: str


class LogBuffer(logging.Handler):
    """Keeps the last `MAX_LINES` records of this process from INFO up, until they are fetched."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: deque[LogLine] = deque(maxlen=MAX_LINES)
        self._num_lost = 0

    def listen(self) -> None:
        """Hear the loggers of this project from now on."""
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, in place of the oldest where there are too many."""
        try:
            message = self.format(record)[:MAX_CHARACTERS]
        except Exception:  # noqa: BLE001 - whoever logs what cannot be formatted goes on, as with any handler
            self.handleError(record)
            return
        self._num_lost += len(self._lines) == MAX_LINES
        self._lines.append(LogLine(record.created, record.levelno, record.name, message))

    def drain(self) -> list[LogLine]:
        """All that was kept since the last call, the oldest first."""
        self.acquire()
        try:
            lines, num_lost = list(self._lines), self._num_lost
            self._lines.clear()
            self._num_lost = 0
        finally:
            self.release()
        if num_lost:
            words = f"{num_lost} lines before these were too many to be kept"
            lines.insert(0, LogLine(lines[0].created, logging.WARNING, __name__, words))
        return lines


@contextmanager
def actors_logged(actors: Callable[[], Mapping[int, Any]]) -> Iterator[None]:
    """Have what actors log appear in this process's log, under the same loggers, for as long as this is open.

    Args:
        actors: Tells the handles of the workers there are now, by number.
    """
    fetcher, ended = _Fetcher(actors), threading.Event()

    def follow() -> None:
        while not ended.wait(FETCH_EVERY_S):
            fetcher.fetch()

    thread = threading.Thread(target=follow, name="worker-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        fetcher.fetch()


class _Fetcher:
    def __init__(self, actors: Callable[[], Mapping[int, Any]]) -> None:
        self._actors = actors
        self._asked: dict[int, ray.ObjectRef] = {}

    def fetch(self) -> None:
        """Ask whoever is not being asked, and log what has come."""
        with suppress(exceptions.RayError):
            for number, actor in dict(self._actors()).items():
                if number not in self._asked:
                    self._asked[number] = actor.log_lines.remote()
            if self._asked:
                asked = list(self._asked.values())
                ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_S)
        for number, reference in list(self._asked.items()):
            self._log_if_there(number, reference)

    def _log_if_there(self, number: int, reference: ray.ObjectRef) -> None:
        if not ray.wait([reference], timeout=0)[0]:
            return
        del self._asked[number]
        with suppress(exceptions.RayError):
            for line in ray.get(reference):
                log_line(number, line)


def log_line(worker: int, line: LogLine) -> None:
    """Have an actor's record appear in this process's log, with the time at which it was made."""
    logger = logging.getLogger(line.logger)
    if not logger.isEnabledFor(line.level):
        return
    values = {
        "name": line.logger,
        "levelno": line.level,
        "levelname": logging.getLevelName(line.level),
        "created": line.created,
        "msecs": 1000 * (line.created % 1),
        "msg": f"worker {worker}: {line.message}",
    }
    logger.handle(logging.makeLogRecord(values))
