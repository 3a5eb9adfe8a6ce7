"""Virtual time: events in order, processes that wait for them, links that carry one transfer after another.

A process is a generator: it yields a `Future` and goes on, at whatever time that is, once it is done.
"""

import heapq
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import count

Process = Generator["Future", None, None]


@dataclass(slots=True)
class Future:
    """Something that will be done."""

    is_done: bool = False
    _calls: list[Callable[[], None]] = field(default_factory=list)

    def when_done(self, call: Callable[[], None]) -> None:
        """Call then; it is not done yet."""
        self._calls.append(call)

    def finish(self) -> None:
        """It is done."""
        self.is_done = True
        calls, self._calls = self._calls, []
        for call in calls:
            call()


class Clock:
    """The time, in seconds, and what will happen.

    Attributes:
        now: The time.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call at a time, after what was to be called then already."""
        heapq.heappush(self._events, (max(time_s, self.now), next(self._numbers), call))

    def until(self, time_s: float) -> Future:
        """Done at a time."""
        future = Future()
        self.at(time_s, future.finish)
        return future

    def start(self, process: Process) -> Future:
        """Let a process run; done when it is."""
        ended = Future()

        def go_on() -> None:
            awaited = next(process, None)
            while awaited is not None and awaited.is_done:
                awaited = next(process, None)
            if awaited is None:
                ended.finish()
            else:
                awaited.when_done(go_on)

        go_on()
        return ended

    def run(self) -> None:
        """Until nothing will happen any more."""
        while self._events:
            self.now, _, call = heapq.heappop(self._events)
            call()


@dataclass(slots=True)
class Link:
    """Carries bytes, one transfer after another.

    Attributes:
        bytes_per_s: How fast.
        free_at: When what was given to it so far has gone.
        carried_bytes: How many were given to it.
    """

    bytes_per_s: float
    free_at: float = 0.0
    carried_bytes: float = 0.0

    def carry(self, now: float, size_bytes: float) -> float:
        """Give it a transfer; gives the time at which that has gone."""
        if size_bytes <= 0:
            return now
        self.carried_bytes += size_bytes
        self.free_at = max(now, self.free_at) + size_bytes / self.bytes_per_s
        return self.free_at
