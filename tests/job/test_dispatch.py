"""The dispatcher over threads: results in order, errors, stages side by side, workers that fall silent."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from quantlib.errors import NumericsError, WorkerError, WorkerLostError
from quantlib.job import dispatch
from quantlib.job.dispatch import Dispatcher
from quantlib.job.schedule import Piece, PieceId

WORKERS = 2


class Threads:
    """Workers that are threads; a handle is a future."""

    def __init__(self) -> None:
        self.workers = [ThreadPoolExecutor(1) for _ in range(WORKERS)]
        self.silent: WorkerLostError | None = None

    def when_done(self, handle: Future[Any], call: Callable[[], None]) -> None:
        handle.add_done_callback(lambda _: call())

    def result(self, handle: Future[Any]) -> Any:
        return handle.result()

    def feel_pulses(self) -> None:
        if self.silent is not None:
            raise self.silent


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    yield threads
    for worker in threads.workers:
        worker.shutdown()


@pytest.fixture
def dispatcher(threads, monkeypatch) -> Iterator[Dispatcher]:
    monkeypatch.setattr(dispatch, "PULSE_S", 0.05)
    dispatcher = Dispatcher(threads)
    for worker in range(WORKERS):
        dispatcher.join(worker, memory_bytes=0)
    yield dispatcher
    dispatcher.close()


def _pieces(count: int, *, block: int = 0) -> list[Piece]:
    return [Piece(id=PieceId(block, "capture", part), rank=block, cost=count - part) for part in range(count)]


def test_results_come_in_the_order_of_the_pieces_from_all_workers(threads, dispatcher):
    together = threading.Barrier(WORKERS)
    order: list[int] = []

    def work(piece: Piece, worker: int) -> tuple[int, int]:
        if piece.id.part < WORKERS:
            together.wait(timeout=10)  # only workers that work at the same time get past it
        return piece.id.part, worker

    def begin(worker: int, piece: Piece) -> Future[Any]:
        return threads.workers[worker].submit(work, piece, worker)

    results = dispatcher.run(_pieces(10), begin, heard=lambda _, piece, __: order.append(piece.id.part))
    assert [part for part, _ in results] == list(range(10))
    assert sorted(order) == list(range(10))
    assert {worker for _, worker in results} == set(range(WORKERS))


def test_an_error_drops_what_was_not_begun_and_comes_as_it_was_raised(threads, dispatcher):
    begun: list[int] = []

    def work(piece: Piece) -> int:
        if piece.id.part == 0:
            raise NumericsError("broken", linear="x")
        time.sleep(0.1)
        return piece.id.part

    def begin(worker: int, piece: Piece) -> Future[Any]:
        begun.append(piece.id.part)
        return threads.workers[worker].submit(work, piece)

    # The dearest goes first, and while the second runs the error is known.
    with pytest.raises(NumericsError, match="broken"):
        dispatcher.run(_pieces(20), begin)
    assert len(begun) < 20
    again = dispatcher.run(_pieces(20)[1:], begin)
    assert again == list(range(1, 20)), "the dispatcher goes on after a failed stage"


def test_what_begin_raises_is_the_stage_s_error(dispatcher):
    def begin(worker: int, piece: Piece) -> Future[Any]:
        raise WorkerLostError(f"worker {worker} is gone")

    with pytest.raises(WorkerLostError):
        dispatcher.run(_pieces(3), begin)


def test_a_stage_fills_the_workers_that_another_leaves_idle(threads, dispatcher):
    second_done = threading.Event()

    def wait_for_the_other() -> bool:
        return second_done.wait(timeout=10)

    def begin_first(worker: int, _: Piece) -> Future[Any]:
        return threads.workers[worker].submit(wait_for_the_other)

    def begin_second(worker: int, piece: Piece) -> Future[Any]:
        return threads.workers[worker].submit(lambda: piece.id.part)

    with ThreadPoolExecutor(1) as stages:
        first = stages.submit(dispatcher.run, _pieces(1), begin_first)
        assert dispatcher.run(_pieces(3, block=1), begin_second) == [0, 1, 2]
        second_done.set()
        assert first.result(timeout=10) == [True]


def test_a_piece_waits_for_one_of_another_stage(threads, dispatcher):
    order: list[str] = []

    def begin(worker: int, piece: Piece) -> Future[Any]:
        return threads.workers[worker].submit(order.append, piece.id.stage)

    first = PieceId(0, "evaluate", 0)
    later = Piece(id=PieceId(1, "forward", 0), after=frozenset({first}))
    with ThreadPoolExecutor(1) as stages:
        waiting = stages.submit(dispatcher.run, [later], begin)
        time.sleep(0.05)
        dispatcher.run([Piece(id=first)], begin)
        waiting.result(timeout=10)
    assert order == ["evaluate", "forward"]


def test_a_silent_worker_ends_every_stage(threads, dispatcher):
    never = threading.Event()

    def begin(worker: int, _: Piece) -> Future[Any]:
        return threads.workers[worker].submit(never.wait, 20)

    threads.silent = WorkerLostError("worker 1 has not answered")
    with pytest.raises(WorkerLostError, match="has not answered"):
        dispatcher.run(_pieces(5), begin)
    never.set()


def test_close_tells_whoever_waits(threads, dispatcher):
    never = threading.Event()

    def begin(worker: int, _: Piece) -> Future[Any]:
        return threads.workers[worker].submit(never.wait, 20)

    with ThreadPoolExecutor(1) as stages:
        waiting = stages.submit(dispatcher.run, _pieces(5), begin)
        time.sleep(0.05)
        dispatcher.close()
        with pytest.raises(WorkerError, match="stopped"):
            waiting.result(timeout=10)
    never.set()


def test_drop_waiting_ends_a_stage_whose_pieces_wait_for_another(threads, dispatcher):
    def begin(worker: int, piece: Piece) -> Future[Any]:
        return threads.workers[worker].submit(lambda: piece.id.part)

    never_done = PieceId(0, "evaluate", 0)
    pieces = [Piece(id=PieceId(1, "forward", part), after=frozenset({never_done})) for part in range(3)]
    with ThreadPoolExecutor(1) as stages:
        waiting = stages.submit(dispatcher.run, pieces, begin)
        time.sleep(0.05)
        dispatcher.drop_waiting()
        with pytest.raises(WorkerError, match="stopped"):
            waiting.result(timeout=10)
    # A stage that slept before it was tried again, say, would otherwise wait for ever.
    with pytest.raises(WorkerError, match="stopped"):
        dispatcher.run(_pieces(2), begin)


def test_a_defect_in_the_transport_ends_every_stage(threads, dispatcher):
    def begin(worker: int, piece: Piece) -> Future[Any]:
        return threads.workers[worker].submit(lambda: piece.id.part)

    threads.when_done = None
    with pytest.raises(TypeError):
        dispatcher.run(_pieces(3), begin)
    with pytest.raises(TypeError):
        dispatcher.run(_pieces(3), begin)
