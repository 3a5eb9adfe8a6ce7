"""When the activations are kept: every so many blocks, or as often as that is cheap."""

import time
from collections.abc import Callable

# A checkpoint may cost this share of the time that would be lost without it.
_MAX_SHARE = 0.05
# Work of less than this is repeated sooner than kept.
_MIN_INTERVAL_S = 60.0
# What one worker writes a second, until the first checkpoint has told.
_ASSUMED_BYTES_PER_SECOND = 100e6


class Cadence:
    """Decides after each block whether to keep the activations now.

    Args:
        every: Blocks between two checkpoints; 0 for none; None to go by cost.
        bytes_per_worker: Activations of the worker that holds most.
        clock: Seconds, rising.
    """

    def __init__(
        self, every: int | None, bytes_per_worker: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every = every
        self._cost_s = bytes_per_worker / _ASSUMED_BYTES_PER_SECOND
        self._clock = clock
        self._last = clock()

    def is_due(self, block: int) -> bool:
        """Whether to keep the streams that stand before this block."""
        if self._every is not None:
            return self._every > 0 and block % self._every == 0
        return self._clock() - self._last >= max(_MIN_INTERVAL_S, self._cost_s / _MAX_SHARE)

    def kept(self, seconds: float) -> None:
        """A checkpoint was written and took this long."""
        self._cost_s = seconds
        self._last = self._clock()
