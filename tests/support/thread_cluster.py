"""Workers that are threads of this process and can be killed at any call: a fault in its exact place.

Each worker is a real `BlockRunner` behind the interface of `quantlib.job.transport.Transport`. What a killed
worker was doing, and every value it shared, is lost, as with a Ray actor.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from quantlib.block_runner import BlockRunner
from quantlib.errors import RecipeError, WorkerLostError
from quantlib.inprocess import DirectStages
from quantlib.job.conversion import convert
from quantlib.job.crew import Crew
from quantlib.job.memory import Room
from quantlib.job.options import JobOptions
from quantlib.job.stages import Progress
from quantlib.job.transport import EXCHANGE_METHODS, STORAGE_METHODS

_LANES = ("compute", "storage", "exchange")


@dataclass(frozen=True, slots=True)
class _Handle:
    worker: int
    future: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class _Shared:
    worker: int
    value: Any


class ThreadCluster:
    """A transport to workers in threads.

    Args:
        num_workers: At the start, and after a renewal.
        num_nodes: Over which they are dealt.
        host: Address by which they are to find each other.

    Attributes:
        before: Called in the worker's thread with (worker, method, arguments) before every call; what it
            raises, the call raises.
        dead: Workers that were killed.
        room: The memory that they have.
    """

    def __init__(self, num_workers: int, num_nodes: int = 1, host: str = "127.0.0.1") -> None:
        self.before: Callable[[int, str, tuple[Any, ...]], None] = lambda *_: None
        self.dead: set[int] = set()
        self.room = Room()
        self._num_workers, self._num_nodes, self._host = num_workers, num_nodes, host
        self._runners: dict[int, BlockRunner] = {}
        self._lanes: dict[tuple[int, str], ThreadPoolExecutor] = {}
        self._handles: list[_Handle] = []
        self._lock = threading.Lock()
        self._waiting: list[int] = []
        self.workers = [self._start() for _ in range(num_workers)]

    def kill(self, worker: int) -> None:
        """End a worker as a power cut would."""
        with self._lock:
            self.dead.add(worker)
            pending = [handle for handle in self._handles if handle.worker == worker]
        for handle in pending:
            with suppress(InvalidStateError):
                handle.future.set_exception(_lost(worker))

    def kill_at(self, method: str, count: int) -> None:
        """End whoever is asked for the so many-th call of a method, before it begins."""
        calls = 0

        def note(worker: int, called: str, _: tuple[Any, ...]) -> None:
            nonlocal calls
            with self._lock:
                calls += called == method
                is_due = called == method and calls == count
            if is_due:
                self.kill(worker)

        self.before = note

    def come(self) -> int:
        """A worker more, which waits to be taken in."""
        self._waiting.append(self._start())
        return self._waiting[-1]

    def close(self) -> None:
        """End all threads."""
        for lane in self._lanes.values():
            lane.shutdown(wait=False, cancel_futures=True)

    def node_of(self, worker: int) -> str:
        """One after the other."""
        return f"node {worker % self._num_nodes}"

    def submit(self, worker: int, method: str, *arguments: Any) -> _Handle:
        """Start a method."""
        handle = _Handle(worker)
        with self._lock:
            if worker in self.dead:
                handle.future.set_exception(_lost(worker))
                return handle
            self._handles.append(handle)
        self._lanes[worker, _lane_of(method)].submit(self._call, handle, method, arguments)
        return handle

    def result(self, handle: _Handle) -> Any:
        """Wait for a method."""
        return handle.future.result()

    def when_done(self, handle: _Handle, call: Callable[[], None]) -> None:
        """Call once a method has ended."""
        handle.future.add_done_callback(lambda _: call())

    def feel_pulses(self) -> None:
        """A killed worker's calls fail by themselves."""

    def drop_lost(self) -> list[int]:
        """Do without the killed ones."""
        gone = [worker for worker in self.workers if worker in self.dead]
        self.workers = [worker for worker in self.workers if worker not in self.dead]
        return gone

    @property
    def has_newcomers(self) -> bool:
        """Whether some wait."""
        return bool(self._waiting)

    def newcomers(self) -> list[int]:
        """Their numbers."""
        came, self._waiting = self._waiting, []
        return came

    def take_in(self, newcomers: Sequence[int]) -> None:
        """They are workers now."""
        self.workers = [*self.workers, *newcomers]

    def send_away(self, newcomers: Sequence[int], *, for_good: bool) -> None:
        """They are not; others come unless it is for good."""
        self.dead.update(newcomers)
        for _ in [] if for_good else newcomers:
            self.come()

    def renew(self) -> None:
        """Kill all and start as many as there were first."""
        for worker in self.workers:
            self.kill(worker)
        self.workers = [self._start() for _ in range(self._num_workers)]

    def _start(self) -> int:
        worker = len(self._runners)
        # What libraries take is this process's, a hundred thousand times what a tiny model does.
        memory = {"memory_in_use": lambda: 0}
        self._runners[worker] = BlockRunner(lambda value: _Shared(worker, value), self._host, **memory)
        for lane in _LANES:
            self._lanes[worker, lane] = ThreadPoolExecutor(1, thread_name_prefix=f"{lane}-{worker}")
        return worker

    def _call(self, handle: _Handle, method: str, arguments: tuple[Any, ...]) -> None:
        if handle.worker in self.dead:
            return
        try:
            self.before(handle.worker, method, arguments)
            values = [self._resolved(argument) for argument in arguments]
            value, error = getattr(self._runners[handle.worker], method)(*values), None
        except Exception as raised:  # noqa: BLE001 - it is the caller's
            value, error = None, raised
        with suppress(InvalidStateError):
            if error is None:
                handle.future.set_result(value)
            else:
                handle.future.set_exception(error)

    def _resolved(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return [self._resolved(item) for item in argument]
        if isinstance(argument, _Handle | _Shared) and argument.worker in self.dead:
            raise _lost(argument.worker)
        if isinstance(argument, _Handle):
            return self._resolved(argument.future.result())
        return argument.value if isinstance(argument, _Shared) else argument


def convert_on(
    cluster: ThreadCluster,
    options: JobOptions,
    on_progress: Callable[[Progress], None] = lambda _: None,
    *,
    crew: type[Crew] = Crew,
) -> dict[str, Any]:
    """A job that may not hang; gives its report or raises its error, and closes the cluster."""
    (report,) = convert_all_on(cluster, [options], on_progress, crew=crew)
    return report


def convert_all_on(
    cluster: ThreadCluster,
    requests: Sequence[JobOptions],
    on_progress: Callable[[Progress], None] = lambda _: None,
    *,
    crew: type[Crew] = Crew,
) -> list[dict[str, Any]]:
    """The same of several outputs from one reading."""
    stages, found = DirectStages(), {}

    def run() -> None:
        try:
            found["reports"] = convert(requests, crew(cluster, 1), stages, on_progress)
        except Exception as error:  # noqa: BLE001 - raised again below
            found["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=120)
    stages.close(waits=False)
    cluster.close()
    assert not thread.is_alive(), "the job hangs"
    if "error" in found:
        raise found["error"]
    return found["reports"]


def convert_in_least_store(requests: Sequence[JobOptions], num_workers: int = 2) -> list[dict[str, Any]]:
    """The same with as little shared memory as a refusal names: the sums of a block are cut into slices."""

    def cluster(store_bytes: int) -> ThreadCluster:
        made = ThreadCluster(num_workers)
        made.room = Room(store_bytes=store_bytes, store_workers=num_workers)
        return made

    with pytest.raises(RecipeError, match="must be at least") as refused:
        convert_all_on(cluster(1), requests)
    return convert_all_on(cluster(refused.value.facts["needed_bytes"]), requests)


def _lane_of(method: str) -> str:
    if method in STORAGE_METHODS:
        return "storage"
    return "exchange" if method in EXCHANGE_METHODS else "compute"


def _lost(worker: int) -> WorkerLostError:
    return WorkerLostError(f"a worker was lost: {worker}")
