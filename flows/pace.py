"""How long a run still takes, at the pace it has had so far."""

from quantlib.job.stages import Progress


class Pace:
    """The pace since work was first seen done: what a resumed run found finished says nothing of it."""

    def __init__(self) -> None:
        self._first: Progress | None = None
        self._first_at_s = 0.0

    def left_s(self, progress: Progress, now_s: float) -> float | None:
        """Seconds that are left.

        Args:
            progress: Not behind that of the call before.
            now_s: Of a clock that does not go back.

        Returns:
            None before there is a pace, and when nothing is left.
        """
        if self._first is None:
            if progress.done > 0:
                self._first, self._first_at_s = progress, now_s
            return None
        done = progress.done - self._first.done
        if done <= 0 or progress.done >= progress.total:
            return None
        return (now_s - self._first_at_s) / done * (progress.total - progress.done)
