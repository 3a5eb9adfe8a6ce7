"""What every stage of a worker took, in wall and CPU seconds, and when: for the report and its timeline."""

import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

# A picture a thousand points wide shows no more than this, and the report stays small however long the job.
MAX_INTERVALS = 500
# Calls of one stage that follow each other this closely did not wait for anybody: it is what a call takes.
SMALL_GAP_S = 0.02


class Interval(NamedTuple):
    """Time in which a lane was busy with a stage, in seconds of one clock.

    Attributes:
        stage: What was done, or most of it where intervals of two stages were joined.
        start: When it began.
        end: When it ended.
        wrong_s: Seconds of it, at most, that were spent otherwise: waiting, or with another stage.
    """

    stage: str
    start: float
    end: float
    wrong_s: float = 0.0

    @property
    def length_s(self) -> float:
        """From start to end."""
        return self.end - self.start


class Lane:
    """When a lane was busy, as intervals in the order of their starts, of which it keeps a limited number.

    Neighbours of one stage that follow each other closely become one interval; beyond the limit any two
    neighbours do, as `reduced` says. Intervals may overlap: a lane may be entered from two threads.

    Args:
        limit: How many intervals are given at most, at least 1; twice as many are kept.
        small_gap_s: Neighbours of one stage are joined when no more than this is between them.
    """

    def __init__(self, limit: int = MAX_INTERVALS, small_gap_s: float = SMALL_GAP_S) -> None:
        self._kept: list[Interval] = []
        self._limit = limit
        self._small_gap_s = small_gap_s

    @property
    def intervals(self) -> list[Interval]:
        """What was put in, in no more intervals than the limit."""
        return reduced(self._kept, self._limit)

    def add(self, stage: str, start: float, end: float) -> None:
        """Put in an interval that has ended."""
        place = bisect_right(self._kept, start, key=attrgetter("start"))
        self._kept.insert(place, Interval(stage, start, end))
        while place + 1 < len(self._kept) and self._is_close(place):
            self._join(place)
        while place > 0 and self._is_close(place - 1):
            place -= 1
            self._join(place)
        # Not at once: what comes next tells whether a short interval belongs to the one before or behind it.
        if len(self._kept) > 2 * self._limit:
            self._kept = reduced(self._kept, self._limit)

    def _is_close(self, place: int) -> bool:
        earlier, later = self._kept[place : place + 2]
        return earlier.stage == later.stage and later.start - earlier.end <= self._small_gap_s

    def _join(self, place: int) -> None:
        self._kept[place : place + 2] = [_joined(*self._kept[place : place + 2])]


def reduced(intervals: Sequence[Interval], limit: int) -> list[Interval]:
    """No more intervals than a limit, by joining neighbours.

    Those two are joined that become the interval with the fewest wrong seconds: the gap between them counts
    as busy from then on, and where they are of two stages the shorter takes the name of the longer. So every
    busy moment stays one, and short waits and short stages are lost first, everywhere alike.

    Args:
        intervals: In the order of their starts.
        limit: At least 1.

    >>> day = [Interval("read", 0, 4), Interval("check", 4, 5), Interval("read", 8, 9)]
    >>> reduced(day, 2)
    [Interval(stage='read', start=0, end=5, wrong_s=1.0), Interval(stage='read', start=8, end=9, wrong_s=0.0)]
    """
    left = list(intervals)
    wrong = [_joined(*pair).wrong_s for pair in pairwise(left)]
    while len(left) > limit:
        place = wrong.index(min(wrong))
        left[place : place + 2] = [_joined(*left[place : place + 2])]
        del wrong[place]
        for near in range(max(0, place - 1), min(place + 1, len(wrong))):
            wrong[near] = _joined(*left[near : near + 2]).wrong_s
    return left


def _joined(earlier: Interval, later: Interval) -> Interval:
    longer = max(earlier, later, key=attrgetter("length_s"))
    wrong_s = earlier.wrong_s + later.wrong_s + max(0.0, later.start - earlier.end)
    if earlier.stage != later.stage:
        wrong_s += min(earlier.length_s, later.length_s)
    return Interval(longer.stage, earlier.start, max(earlier.end, later.end), wrong_s)


class StageClock:
    """Adds up time by stage, for a lane that computes and one that moves bytes beside it.

    The times of its lanes are seconds since 1970: the wall clock is read once, when the clock is made, and
    monotonic differences are added to it. Times of one worker are therefore right among each other even when
    its wall clock is set anew, and those of workers on several machines are as far apart as the wall clocks
    of the machines were then: milliseconds where a time service runs.

    Attributes:
        stages: Stage -> ``seconds``, ``cpu_seconds``, ``calls``.
        own_stages: Output -> the same, of what was done for it alone.
    """

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self.own_stages: dict[int, dict[str, dict[str, float]]] = {}
        self._storage_cpu_seconds = 0.0
        self._began = time.monotonic()
        self._monotonic_to_wall = time.time() - self._began
        self._lanes = {"compute": Lane(), "storage": Lane()}
        self._lock = threading.Lock()

    @contextmanager
    def computing(self, stage: str, output: int | None = None) -> Iterator[None]:
        """Time of the computing lane: CPU of the whole process, less that of the storage thread.

        Args:
            output: The only one for which it is done, if there is one.
        """
        wall, cpu, storage = time.monotonic(), time.process_time(), self._storage_cpu_seconds
        try:
            yield
        finally:
            used = time.process_time() - cpu - (self._storage_cpu_seconds - storage)
            self._spend("compute", stage, wall, max(0.0, used), output)

    @contextmanager
    def storage(self, stage: str) -> Iterator[None]:
        """Time of the storage lane: CPU of its own thread."""
        wall, cpu = time.monotonic(), time.thread_time()
        try:
            yield
        finally:
            used = time.thread_time() - cpu
            with self._lock:
                self._storage_cpu_seconds += used
            self._spend("storage", stage, wall, used)

    def timeline(self) -> dict[str, Any]:
        """When the clock was made, ``began``, and the (stage, start, end) of ``compute`` and ``storage``.

        All in seconds since 1970; a stage that has not ended is not among them.
        """
        with self._lock:
            lanes = {name: [self._dated(i) for i in lane.intervals] for name, lane in self._lanes.items()}
        return {"began": self._began + self._monotonic_to_wall, **lanes}

    def _dated(self, interval: Interval) -> tuple[str, float, float]:
        shift = self._monotonic_to_wall
        return interval.stage, interval.start + shift, interval.end + shift

    def _spend(
        self, lane: str, stage: str, start: float, cpu_seconds: float, output: int | None = None
    ) -> None:
        end = time.monotonic()
        with self._lock:
            tables = [self.stages]
            if output is not None:
                tables.append(self.own_stages.setdefault(output, {}))
            for table in tables:
                spent = table.setdefault(stage, {"seconds": 0.0, "cpu_seconds": 0.0, "calls": 0})
                spent["seconds"] += end - start
                spent["cpu_seconds"] += cpu_seconds
                spent["calls"] += 1
            self._lanes[lane].add(stage, start, end)
