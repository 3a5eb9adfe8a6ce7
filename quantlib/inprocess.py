"""The whole job in this process: the same loop and steps as on a cluster, with one worker and no server."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from quantlib.block_runner import BlockRunner
from quantlib.errors import WorkerError
from quantlib.job.conversion import convert
from quantlib.job.crew import Crew
from quantlib.job.failures import retrying
from quantlib.job.memory import Room
from quantlib.job.options import JobOptions
from quantlib.job.publishing import Hooks
from quantlib.job.stages import Progress
from quantlib.job.transport import STORAGE_METHODS
from quantlib.machine import default_threads
from quantlib.memory_watch import machine_memory_bytes

T = TypeVar("T")

# Stages only wait for the worker; at most the next block, a write and a few units are under way at a time.
_MOST_STAGES = 16


class LocalTransport:
    """One worker in this process: a thread for computation, one for storage."""

    def __init__(self) -> None:
        self._runner = BlockRunner()
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._io = ThreadPoolExecutor(1, thread_name_prefix="storage")

    @property
    def workers(self) -> list[int]:
        """This process."""
        return [0]

    @property
    def room(self) -> Room:
        """What this machine, or the container, has."""
        return Room(worker_bytes=machine_memory_bytes())

    def node_of(self, worker: int) -> str:  # noqa: ARG002
        """This machine."""
        return "here"

    def submit(self, worker: int, method: str, *arguments: Any) -> Future[Any]:
        """Start a method; futures among the arguments become their values."""
        assert worker == 0
        executor = self._io if method in STORAGE_METHODS else self._compute
        return executor.submit(self._call, method, arguments)

    def result(self, handle: Future[Any]) -> Any:
        """Wait for a method."""
        return handle.result()

    def when_done(self, handle: Future[Any], call: Callable[[], None]) -> None:
        """Call once a method has ended."""
        handle.add_done_callback(lambda _: call())

    def feel_pulses(self) -> None:
        """This process lives."""

    def drop_lost(self) -> list[int]:
        """This process lives."""
        return []

    @property
    def has_newcomers(self) -> bool:
        """Nobody comes."""
        return False

    def newcomers(self) -> list[int]:
        """Nobody comes."""
        return []

    def take_in(self, newcomers: Sequence[int]) -> None:
        """Nobody comes."""

    def send_away(self, newcomers: Sequence[int], *, for_good: bool) -> None:
        """Nobody comes."""

    def renew(self) -> None:
        """There is one worker and it is this process: nothing can be started in its place."""
        raise WorkerError("the only worker is this process; start the same command again")

    def stop(self) -> None:
        """Have the worker leave off at the next cell or input group."""
        self._runner.stop()

    def _call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._runner, method)(*(_resolved(argument) for argument in arguments))

    def close(self, *, waits: bool = True) -> None:
        """Drop what was not begun, and wait for what was."""
        for executor in (self._compute, self._io):
            executor.shutdown(wait=waits, cancel_futures=True)


class DirectStages:
    """Runs stages in threads of this process, tried again as `quantlib.job.failures` says."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MOST_STAGES, thread_name_prefix="stage")
        self._stopped = threading.Event()

    def submit(self, name: str, function: Callable[..., T], *arguments: Any) -> Future[T]:  # noqa: ARG002
        """Start a stage; the future carries its result or its error."""
        return self._threads.submit(retrying, self._stopped.wait, function, *arguments)

    def close(self, *, waits: bool = True) -> None:
        """Try nothing again, and wait for stages still running."""
        self._stopped.set()
        self._threads.shutdown(wait=waits, cancel_futures=True)


def _resolved(argument: Any) -> Any:
    if isinstance(argument, Future):
        return argument.result()
    if isinstance(argument, list):
        return [_resolved(item) for item in argument]
    return argument


def quantize(options: JobOptions, on_progress: Callable[[Progress], None] = lambda _: None) -> dict[str, Any]:
    """Convert a checkpoint here and now; gives the report.

    Raises:
        QuantError: With ``before_work`` set when the request was refused before anything was written.
    """
    (report,) = quantize_all([options], on_progress)
    return report


def quantize_all(
    requests: Sequence[JobOptions],
    on_progress: Callable[[Progress], None] = lambda _: None,
    hooks: Hooks | None = None,
) -> list[dict[str, Any]]:
    """Make several outputs of one checkpoint here and now, from one reading; gives the report of each.

    Args:
        hooks: Carries out hooks; by default commands, and none by a name.

    Raises:
        QuantError: With ``before_work`` set when a request was refused before anything was written.
    """
    here = [dataclasses.replace(options, runner="inprocess") for options in requests]
    transport, stages, waits = LocalTransport(), DirectStages(), True
    try:
        crew = Crew(transport, default_threads(1))
        return convert(here, crew, stages, on_progress, hooks)
    except BaseException as error:
        transport.stop()
        # Whoever interrupts does not wait: what is stored can be resumed as it is.
        waits = not isinstance(error, KeyboardInterrupt)
        raise
    finally:
        stages.close(waits=waits)
        transport.close(waits=waits)
