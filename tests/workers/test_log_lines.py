"""What actors log, in the driver's log."""

import logging
import time
from collections.abc import Iterator

import pytest
import ray

from quantlib.inprocess import DirectStages
from quantlib.job.conversion import convert
from quantlib.job.crew import Crew
from quantlib.job.stages import Progress
from tests.support.tiny_jobs import tiny_options, tiny_source
from workers import log_lines
from workers.log_lines import MAX_CHARACTERS, MAX_LINES, LogBuffer, LogLine, actors_logged, log_line
from workers.pool import WorkerPool
from workers.transport import RayTransport


class Records(logging.Handler):
    """Keeps all records."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)

    def of(self, worker: int) -> list[str]:
        start = f"worker {worker}: "
        said = [record.getMessage() for record in self.kept]
        return [message.removeprefix(start) for message in said if message.startswith(start)]


@pytest.fixture
def heard() -> Iterator[Records]:
    """What the loggers of the project tell in this process."""
    logger, records = logging.getLogger("quantlib"), Records()
    before = logger.level
    logger.addHandler(records)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(records)
    logger.setLevel(before)


def _record(message: str, **values) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "quantlib.x", "levelno": logging.INFO, "msg": message, **values})


def test_buffer_gives_each_line_once_in_order():
    buffer = LogBuffer()
    buffer.handle(_record("a %d", args=(7,), created=12.5))
    buffer.handle(_record("b", levelno=logging.WARNING))
    assert buffer.drain()[0] == LogLine(12.5, logging.INFO, "quantlib.x", "a 7")
    assert buffer.drain() == []


def test_buffer_is_bounded_and_says_what_it_lost():
    buffer = LogBuffer()
    for number in range(MAX_LINES + 5):
        buffer.handle(_record(f"{number} {'x' * 2 * MAX_CHARACTERS}"))
    first, *lines = buffer.drain()
    assert (first.level, first.message.split()[0]) == (logging.WARNING, "5")
    assert [line.message.split()[0] for line in lines] == [str(5 + n) for n in range(MAX_LINES)]
    assert max(len(line.message) for line in lines) == MAX_CHARACTERS
    buffer.handle(_record("after"))
    assert [line.message for line in buffer.drain()] == ["after"]


def test_record_that_cannot_be_formatted_is_no_failure_of_whoever_logs():
    buffer = LogBuffer()
    buffer.handle(_record("%d", args=("seven",)))
    assert buffer.drain() == []


def test_line_appears_under_its_logger_with_its_own_time_and_level(heard):
    log_line(3, LogLine(1234.25, logging.WARNING, "quantlib.job.run", "100 % done"))
    log_line(3, LogLine(1234.25, logging.DEBUG, "quantlib.job.run", "too small"))
    (record,) = heard.kept
    assert (record.name, record.levelno, record.created) == ("quantlib.job.run", logging.WARNING, 1234.25)
    assert record.msecs == 250.0
    assert heard.of(3) == ["100 % done"]


@pytest.mark.slow
def test_lines_of_all_workers_arrive_and_those_of_a_lost_one_stay(tmp_path, ray_cluster, heard, monkeypatch):
    monkeypatch.setattr(log_lines, "FETCH_EVERY_S", 0.2)
    source = tiny_source(tmp_path / "deep", num_hidden_layers=5)
    options = tiny_options(tmp_path, source=str(source), workers=3, sequences=60)
    lost = []

    def kill_one(progress: Progress) -> None:
        if progress.label == "block 4/5: solve" and not lost:
            lost.append(_one_that_has_written(heard))
            ray.kill(pool.actors[lost[0]])

    with WorkerPool(options) as pool, actors_logged(lambda: pool.actors):
        report = convert([options], Crew(RayTransport(pool), pool.threads), DirectStages(), kill_one)[0]
    assert len(report["history"]["renewals"]) == 1
    written = [message for worker in range(5) for message in heard.of(worker) if ": written" in message]
    blocks = {message.partition(":")[0] for message in written}
    assert blocks >= {"block 1", "block 2", "block 5"}
    assert any(": written" in message for message in heard.of(lost[0]))
    assert any(record.levelno == logging.WARNING for record in heard.kept)


def _one_that_has_written(heard: Records) -> int:
    deadline = time.monotonic() + 60
    while True:
        found = [worker for worker in range(3) if any(": written" in message for message in heard.of(worker))]
        if found:
            return found[0]
        assert time.monotonic() < deadline, "no line came"
        time.sleep(0.1)


@pytest.mark.slow
def test_actors_that_are_gone_cost_nothing(tmp_path, ray_cluster, heard, monkeypatch):
    monkeypatch.setattr(log_lines, "FETCH_EVERY_S", 0.05)
    options = tiny_options(tmp_path, workers=1, sequences=4)
    with WorkerPool(options) as pool, actors_logged(lambda: pool.actors):
        ray.kill(pool.actors[0])
        time.sleep(0.5)
        assert heard.of(0) == []
