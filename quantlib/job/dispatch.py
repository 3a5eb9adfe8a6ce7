"""Carries a schedule out: begins pieces on workers, hears of their ends, and gives every stage its results.

Stages call `Dispatcher.run` from threads of their own, several at a time. One thread of the dispatcher moves
the schedule, so that an idle worker gets the next piece of whatever stage has one.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from quantlib.errors import WorkerError
from quantlib.job.schedule import Piece, PieceId, Schedule
from quantlib.job.transport import Handle, Transport

# So often the workers are asked whether they live.
PULSE_S = 20.0
_END = object()
_STOPPED = "the job was stopped; the same command continues it"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """One call of `Dispatcher.run`."""

    begin: Callable[[int, Piece], Handle]
    heard: Callable[[int, Piece, Any], None]
    futures: Mapping[PieceId, Future[Any]]


class Dispatcher:
    """Workers by number, and the pieces of all stages that are under way.

    Args:
        transport: How ends of pieces are heard.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._schedule = Schedule()
        self._stages: dict[PieceId, _Stage] = {}
        self._handles: dict[int, Handle] = {}
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopped: BaseException | None = None
        threading.Thread(target=self._listen, name="dispatch", daemon=True).start()

    def join(self, worker: int, *, memory_bytes: int) -> None:
        """A worker is there."""
        with self._lock:
            self._schedule.join(worker, memory_bytes=memory_bytes)
        self._events.put(None)

    def run(
        self,
        pieces: Sequence[Piece],
        begin: Callable[[int, Piece], Handle],
        heard: Callable[[int, Piece, Any], None] = lambda *_: None,
    ) -> list[Any]:
        """Have pieces done, each by whoever is free for it; gives their results in the order of the pieces.

        Args:
            begin: Starts a piece on a worker; gives a handle at once.
            heard: Told of every result, and of who has it, before any other piece is begun.

        Raises:
            QuantError: What a piece raised, after those under way have ended; the rest was dropped. Or the
                dispatcher was stopped.
        """
        futures: dict[PieceId, Future[Any]] = {piece.id: Future() for piece in pieces}
        with self._lock:
            if self._stopped is not None:
                raise self._stopped
            self._schedule.add(pieces)
            self._stages |= dict.fromkeys(futures, _Stage(begin=begin, heard=heard, futures=futures))
        self._events.put(None)
        try:
            wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:
            begun = self._withdraw(futures)
        wait(begun)
        return [future.result() for future in futures.values()]

    def drop_waiting(self) -> None:
        """Begin nothing any more; stages end in an error once what is under way has ended."""
        with self._lock:
            self._stopped = self._stopped or WorkerError(_STOPPED)
            running = {piece.id for piece in self._schedule.running.values()}
            for name in self._stages.keys() - running:
                self._drop(name, WorkerError(_STOPPED))

    def close(self) -> None:
        """Begin nothing any more; whoever still waits is told at once that the job was stopped."""
        self._abandon(WorkerError(_STOPPED))
        self._events.put(_END)

    def _withdraw(self, futures: Mapping[PieceId, Future[Any]]) -> list[Future[Any]]:
        """Drop what was not begun; gives the futures of what was. A dropped one carries the first error."""
        with self._lock:
            running = {piece.id for piece in self._schedule.running.values()}
            error = next((f.exception() for f in futures.values() if f.done() and f.exception()), None)
            for name, future in futures.items():
                if not future.done() and name not in running:
                    self._drop(name, error or WorkerError(_STOPPED))
            return [future for name, future in futures.items() if name in running]

    def _listen(self) -> None:
        asked = time.monotonic()
        try:
            while True:
                with suppress(queue.Empty):
                    event = self._events.get(timeout=PULSE_S)
                    if event is _END:
                        return
                    with self._lock:
                        if event is not None:
                            self._end(*event)
                        self._begin()
                if time.monotonic() - asked >= PULSE_S:
                    self._transport.feel_pulses()
                    asked = time.monotonic()
        except Exception as error:  # noqa: BLE001 - a silent worker or a defect: every stage raises it
            self._abandon(error)

    def _begin(self) -> None:
        for assignment in self._schedule.assign():
            worker, piece = assignment.worker, assignment.piece
            try:
                handle = self._stages[piece.id].begin(worker, piece)
            except Exception as error:  # noqa: BLE001 - whatever it is, the stage raises it
                self._fail(worker, error)
                continue
            self._handles[worker] = handle
            self._transport.when_done(handle, lambda end=(worker, handle): self._events.put(end))

    def _end(self, worker: int, handle: Handle) -> None:
        if self._handles.get(worker) is not handle:
            return  # it was abandoned
        piece = self._schedule.running[worker]
        try:
            value = self._transport.result(handle)
            self._stages[piece.id].heard(worker, piece, value)
        except Exception as error:  # noqa: BLE001 - whatever it is, the stage raises it
            self._fail(worker, error)
            return
        self._schedule.finish(worker)
        self._stages.pop(piece.id).futures[piece.id].set_result(value)

    def _fail(self, worker: int, error: BaseException) -> None:
        self._handles.pop(worker, None)
        piece = self._schedule.fail(worker)
        self._stages.pop(piece.id).futures[piece.id].set_exception(error)

    def _drop(self, name: PieceId, error: BaseException) -> None:
        self._schedule.drop([name])
        self._stages.pop(name).futures[name].set_exception(error)

    def _abandon(self, error: BaseException) -> None:
        """Tell every stage, also those to come; what is under way is not waited for."""
        with self._lock:
            self._stopped = self._stopped or error
            for worker in list(self._schedule.running):
                self._fail(worker, error)
            for name in list(self._stages):
                self._drop(name, error)
