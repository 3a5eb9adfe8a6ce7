"""Starts of a job, each in a process of its own that can be killed at any moment.

A fork server loads the libraries once, so that a start costs tens of milliseconds instead of seconds. Time
limits are shortened within the process of the start, by setting the constants that hold them.
"""

import dataclasses
import functools
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from quantlib.errors import QuantError

# Whoever waits longer than this waits for ever.
START_LIMIT_S = 120.0
KILLED = -9
DEFECT = 70
_PRELOADED = (
    "quantlib.__main__",
    "quantlib.storage.obstore_engine",
    "quantlib.storage.s3fs_engine",
    "transformers.models.llama.modeling_llama",
    "pytest",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a process ended.

    Attributes:
        status: Exit status; `KILLED` for SIGKILL, `DEFECT` when what was raised is no error of ours.
        value: What was returned.
        error: Class name of the error.
        message: Its message; of a defect the traceback.
    """

    status: int
    value: Any = None
    error: str = ""
    message: str = ""


class Running:
    """A process at work."""

    def __init__(self, process: Any, answers: Connection) -> None:
        self._process, self._answers = process, answers

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self._process.exitcode is None:
            self._process.kill()

    def ended(self) -> Ended:
        """Wait for the end, at most `START_LIMIT_S` seconds.

        Raises:
            TimeoutError: It did not end, and was killed.
        """
        answer = None
        if not self._answers.poll(START_LIMIT_S):
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"a process did not end within {START_LIMIT_S:.0f} s")
        with suppress(EOFError):
            answer = self._answers.recv()
        self._process.join(START_LIMIT_S)
        status = self._process.exitcode
        if answer is None:
            return Ended(status=status)
        return dataclasses.replace(answer, status=status)


class Starter:
    """Starts processes from one that has everything loaded."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOADED))

    def begin(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        patience_s: float = 20.0,
    ) -> Running:
        """Start a module's function in a process of its own; see `_run`."""
        answers, answer = self._context.Pipe(duplex=False)
        settings = (dict(environment or {}), patience_s)
        process = self._context.Process(target=_run, args=(answer, settings, function, arguments))
        process.start()
        answer.close()
        return Running(process, answers)

    def call(self, function: Callable[..., Any], *arguments: Any, **more: Any) -> Ended:
        """Start and wait."""
        return self.begin(function, *arguments, **more).ended()


def quantized(options: Mapping[str, Any]) -> dict[str, Any]:
    """Do the job here; tells the history of the run and whether it found nothing to do."""
    from quantlib.inprocess import quantize
    from quantlib.job.options import options_from

    labels: list[str] = []
    report = quantize(options_from(options), lambda progress: labels.append(progress.label))
    return {"history": report["history"], "did_nothing": labels[-1].startswith("finished before")}


def completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Do or finish the job, read its output through, and clean up where the start found nothing to do.

    A start that finds a finished output changes nothing: what the one before could not put in order, because
    it was killed or its storage failed at the very end, is left to ``clean``.
    """
    from quantlib.checkpoint.verify import verify_checkpoint
    from quantlib.job.clean import clean_work
    from quantlib.storage import open_store

    told, output, engine = quantized(options), options["output"], options["storage_engine"]
    told["findings"] = verify_checkpoint(open_store(output, engine), output).findings
    if told["did_nothing"]:
        told["state"] = clean_work(output, storage_engine=engine).state
    return told


def _run(
    answer: Connection, settings: tuple[dict[str, str], float], function: Callable[..., Any], arguments: Any
) -> None:
    """The life of a process: answers once, and exits with the status the command would exit with."""
    environment, patience_s = settings
    os.environ.update(environment)
    _shorten(patience_s)
    _load_models_once()
    try:
        ended = Ended(status=0, value=function(*arguments))
    except QuantError as error:
        status = 2 if error.before_work else 1
        ended = Ended(status=status, error=type(error).__name__, message=error.message)
    except BaseException:  # noqa: BLE001 - whatever it is, the test is to hear of it.
        ended = Ended(status=DEFECT, error="defect", message=traceback.format_exc())
    answer.send(ended)
    answer.close()
    sys.exit(ended.status)


def _shorten(patience_s: float) -> None:
    """Set every time limit so that a permanent fault is told within seconds."""
    from quantlib.job import failures, lease
    from quantlib.storage import obstore_engine, s3_settings, s3fs_writer

    limits = {
        "CONNECT_TIMEOUT_S": 2,
        "READ_TIMEOUT_S": 10,
        "REQUEST_TIMEOUT_S": 20,
        "MAX_RETRIES": 3,
        "RETRY_TIMEOUT_S": patience_s,
        "FIRST_BACKOFF_S": 0.02,
        "MAX_BACKOFF_S": 0.5,
        "CONTACT_TIMEOUT_S": 2,
        "CONTACT_LIMIT_S": 5,
        "REQUEST_LIMIT_S": 30 + patience_s,
    }
    for name, value in limits.items():
        assert hasattr(s3_settings, name), name
        setattr(s3_settings, name, value)
    # The least that S3 takes as a part which is not the last.
    obstore_engine.PART_BYTES = s3fs_writer.PART_BYTES = 5 << 20
    failures.POLICIES = tuple(
        (kind, dataclasses.replace(policy, first_delay_s=patience_s / 40, max_delay_s=patience_s / 5))
        for kind, policy in failures.POLICIES
    )
    lease.HEARTBEAT_S = 0.2
    # A predecessor that was killed on this machine is known to be dead; who waits instead is found out.
    lease.SILENCE_S = 10 * START_LIMIT_S


def _load_models_once() -> None:
    """Parse botocore's descriptions of S3 once a process: every client takes a third of a second for it."""
    from botocore.loaders import JSONFileLoader

    load = functools.cache(functools.partial(JSONFileLoader.load_file, JSONFileLoader()))
    JSONFileLoader.load_file = lambda self, file_path: load(file_path)
