"""Who does what next: a state that only events move, without clocks, threads or workers of its own.

A *piece* is the smallest part of a stage that one worker does: a cell through a block, an input group to
solve. Each is done once, nobody is idle while something is ready that fits and is worth beginning there, and
no worker's memory exceeded.
"""

import heapq
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from quantlib.errors import RecipeError

# Workers are numbered; a number is not given twice.
Worker = int


@dataclass(frozen=True, slots=True, order=True)
class PieceId:
    """What a piece is called.

    Attributes:
        block: Index of the block.
        stage: ``capture``, ``solve``, ...
        part: Number within the stage: of a cell, of an input group.
        output: Which of several outputs it is done for; 0 for what is done for all.
    """

    block: int
    stage: str
    part: int
    output: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What pieces have in common that a worker makes before the first of them, and keeps until another setup.

    Attributes:
        name: Which.
        cost: How much work it is, in the unit of the pieces.
    """

    name: Hashable
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Something one worker does in one go.

    Attributes:
        id: Its name.
        rank: Ready pieces of lower rank go first; among equals the dearer one.
        cost: How much work it is, in any unit that all pieces share.
        memory_bytes: What it needs on its worker while it runs.
        after: Pieces that must be finished before.
        home: The worker that has what the piece works on; another one takes it only when it has nothing
            else to do, and can with its setup be done before the home would be.
        setup: What comes before the piece on a worker that did not make it last.
    """

    id: PieceId
    rank: int = 0
    cost: float = 1.0
    memory_bytes: int = 0
    after: frozenset[PieceId] = frozenset()
    home: Worker | None = None
    setup: Setup | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    """A worker and the piece it is to begin now."""

    worker: Worker
    piece: Piece


@dataclass(slots=True)
class _Hand:
    """A worker as the schedule sees it."""

    memory_bytes: int
    doing: Piece | None = None
    made: Hashable = None
    # Cost of what it begins in the assignment that is being made: of earlier work nobody knows what is left.
    just_begun: float = 0.0

    def setup_cost(self, piece: Piece) -> float:
        """What it would have to make before a piece."""
        return piece.setup.cost if piece.setup is not None and piece.setup.name != self.made else 0.0

    def begin(self, piece: Piece) -> None:
        self.just_begun = self.setup_cost(piece) + piece.cost
        self.doing = piece
        if piece.setup is not None:
            self.made = piece.setup.name


class _Queue:
    """Ready pieces in the order in which they should go: by rank, then the dearest, then by name."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, PieceId]] = []
        self.pieces: dict[PieceId, Piece] = {}
        self.load = 0.0

    def put(self, piece: Piece) -> None:
        self.pieces[piece.id] = piece
        self.load += piece.cost
        heapq.heappush(self._heap, (piece.rank, -piece.cost, piece.id))

    def discard(self, name: PieceId) -> Piece | None:
        piece = self.pieces.pop(name, None)
        if piece is not None:
            self.load -= piece.cost
        return piece

    def first(self, memory_bytes: int) -> Piece | None:
        """The first that fits; it stays."""
        while self._heap and self._heap[0][2] not in self.pieces:
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        first = self.pieces[self._heap[0][2]]
        if first.memory_bytes <= memory_bytes:
            return first
        fitting = [piece for piece in self.pieces.values() if piece.memory_bytes <= memory_bytes]
        return min(fitting, key=_order, default=None)


def _order(piece: Piece) -> tuple[int, float, PieceId]:
    return piece.rank, -piece.cost, piece.id


class Schedule:
    """Pieces that wait, pieces that run, pieces that are finished.

    A worker does one piece at a time: a piece takes long beside the call that begins it.
    """

    def __init__(self) -> None:
        self._hands: dict[Worker, _Hand] = {}
        self._blocked: dict[PieceId, tuple[Piece, set[PieceId]]] = {}
        self._dependents: dict[PieceId, set[PieceId]] = {}
        self._ready: dict[Worker | None, _Queue] = {None: _Queue()}
        self._finished: set[PieceId] = set()

    @property
    def workers(self) -> list[Worker]:
        """Those that are there."""
        return list(self._hands)

    @property
    def running(self) -> dict[Worker, Piece]:
        """Worker -> what it does."""
        return {worker: hand.doing for worker, hand in self._hands.items() if hand.doing is not None}

    @property
    def is_over(self) -> bool:
        """Whether nothing waits and nothing runs."""
        is_waiting = self._blocked or any(queue.pieces for queue in self._ready.values())
        return not is_waiting and not self.running

    def join(self, worker: Worker, *, memory_bytes: int) -> None:
        """A worker is there, with so much memory for what it works on."""
        assert worker not in self._hands, f"{worker} is here already"
        self._hands[worker] = _Hand(memory_bytes)

    def leave(self, worker: Worker) -> Piece | None:
        """A worker is gone; gives what it was doing, which waits again."""
        piece = self._hands.pop(worker).doing
        if piece is not None:
            self._wait(piece)
        return piece

    def add(self, pieces: Iterable[Piece]) -> None:
        """More to do; a piece that was finished is to be done again.

        Raises:
            RecipeError: A piece needs more memory than any worker has; it says how much.
        """
        added = list(pieces)
        needed = max((piece.memory_bytes for piece in added), default=0)
        largest = max((hand.memory_bytes for hand in self._hands.values()), default=needed)
        if needed > largest:
            raise RecipeError(
                f"a piece of the work needs {needed:,} bytes of a worker's memory, the largest worker has"
                f" {largest:,}; give the workers that much",
                option="worker_memory",
            )
        self._finished.difference_update(piece.id for piece in added)
        for piece in added:
            self._wait(piece)

    def drop(self, pieces: Iterable[PieceId]) -> None:
        """What waits of these is not wanted any more."""
        for name in pieces:
            self._blocked.pop(name, None)
            for queue in self._ready.values():
                queue.discard(name)

    def finish(self, worker: Worker) -> Piece:
        """A worker is done with its piece."""
        piece = self._end(worker)
        self._finished.add(piece.id)
        for name in self._dependents.pop(piece.id, ()):
            if name in self._blocked:
                waiting, unmet = self._blocked[name]
                unmet.discard(piece.id)
                if not unmet:
                    del self._blocked[name]
                    self._queue_of(waiting).put(waiting)
        return piece

    def fail(self, worker: Worker) -> Piece:
        """A worker gave its piece up; whether it is to be done again is for whoever added it to say."""
        return self._end(worker)

    def assign(self) -> list[Assignment]:
        """What is to begin now, on workers that have nothing to do.

        First everybody takes what is at home with it or nowhere, then whoever is left without takes what is
        at home elsewhere, from whoever has most of it, unless that one is done with all it has sooner.
        """
        begun = []
        for hand in self._hands.values():
            hand.just_begun = 0.0
        for takes_from_others in (False, True):
            if not any(queue.pieces for queue in self._ready.values()):
                break
            for worker, hand in self._hands.items():
                if hand.doing is None:
                    piece = self._taken(worker, hand, takes_from_others=takes_from_others)
                    if piece is not None:
                        hand.begin(piece)
                        begun.append(Assignment(worker, piece))
        return begun

    def _wait(self, piece: Piece) -> None:
        unmet = set(piece.after - self._finished)
        if not unmet:
            self._queue_of(piece).put(piece)
            return
        self._blocked[piece.id] = (piece, unmet)
        for name in unmet:
            self._dependents.setdefault(name, set()).add(piece.id)

    def _queue_of(self, piece: Piece) -> _Queue:
        home = piece.home if piece.home in self._hands else None
        return self._ready.setdefault(home, _Queue())

    def _end(self, worker: Worker) -> Piece:
        hand = self._hands[worker]
        assert hand.doing is not None, f"{worker} does nothing"
        piece, hand.doing = hand.doing, None
        return piece

    def _taken(self, worker: Worker, hand: _Hand, *, takes_from_others: bool) -> Piece | None:
        if takes_from_others:
            homes = [
                home for home, queue in self._ready.items() if queue.pieces and home not in (worker, None)
            ]
            homes.sort(key=lambda home: -self._ready[home].load)
        else:
            homes = [worker, None]
        found = []
        for home in homes:
            queue = self._ready.get(home)
            piece = queue.first(hand.memory_bytes) if queue is not None else None
            if piece is not None and not (takes_from_others and self._is_sooner_done(home, piece, hand)):
                found.append((_order(piece), queue))
                if takes_from_others:
                    break
        if not found:
            return None
        (_, _, name), queue = min(found, key=lambda candidate: candidate[0])
        return queue.discard(name)

    def _is_sooner_done(self, home: Worker | None, piece: Piece, other: _Hand) -> bool:
        """Whether a home ends all that it has before another worker would have ended one piece of it."""
        hand = None if home is None else self._hands.get(home)
        if piece.setup is None or hand is None or hand.memory_bytes < piece.memory_bytes:
            return False
        left = hand.just_begun + hand.setup_cost(piece) + self._ready[home].load
        return left < other.setup_cost(piece) + piece.cost
