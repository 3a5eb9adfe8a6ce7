"""How long a job still takes, judged by how far it has come; for every view of its progress."""

import time
from collections.abc import Callable

from quantlib.job.stages import Progress


class TimeLeft:
    """Judges by the pace since the work began, or began anew: planning, and what a loss undid, say nothing.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: Progress | None = None
        self._last: Progress | None = None
        self._began_at = 0.0

    def seconds(self, now: Progress) -> float | None:
        """Seconds to the end; None while nothing was done yet.

        Args:
            now: How far the job is; to be told in the order in which it went on.
        """
        if self._last is None or now.done < self._last.done or now.total != self._last.total or not now.done:
            self._began, self._began_at = now, self._clock()
        self._last = now
        if self._began is None or now.done <= self._began.done:
            return None
        pace = (self._clock() - self._began_at) / (now.done - self._began.done)
        return pace * max(0.0, now.total - now.done)


def words_for(seconds: float | None) -> str:
    """An estimate as a person says it; empty where there is none.

    >>> words_for(41.8), words_for(252), words_for(7500), words_for(None)
    ('about 42 s left', 'about 4 min left', 'about 2 h 05 min left', '')
    """
    if seconds is None:
        return ""
    if seconds < 60:
        return f"about {seconds:.0f} s left"
    minutes = round(seconds / 60)
    hours = f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
    return f"about {hours} left"


def with_time_left(now: Progress, seconds: float | None) -> str:
    """What is being done and how long the rest takes.

    >>> with_time_left(Progress(done=4, total=20, label="block 17/80: solve"), 7500)
    'block 17/80: solve, about 2 h 05 min left'
    """
    return now.label if seconds is None or now.done >= now.total else f"{now.label}, {words_for(seconds)}"
