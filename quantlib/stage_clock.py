"""What every stage of a worker took, in wall and CPU seconds, for the report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageClock:
    """Adds up time by stage, for a lane that computes and one that moves bytes beside it.

    Attributes:
        stages: Stage -> ``seconds``, ``cpu_seconds``, ``calls``.
    """

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self._storage_cpu_seconds = 0.0

    @contextmanager
    def computing(self, stage: str) -> Iterator[None]:
        """Time of the computing lane: CPU of the whole process, less that of the storage thread."""
        wall, cpu, storage = time.monotonic(), time.process_time(), self._storage_cpu_seconds
        try:
            yield
        finally:
            used = time.process_time() - cpu - (self._storage_cpu_seconds - storage)
            self._spend(stage, time.monotonic() - wall, max(0.0, used))

    @contextmanager
    def storage(self, stage: str) -> Iterator[None]:
        """Time of the storage lane: CPU of its own thread."""
        wall, cpu = time.monotonic(), time.thread_time()
        try:
            yield
        finally:
            used = time.thread_time() - cpu
            self._storage_cpu_seconds += used
            self._spend(stage, time.monotonic() - wall, used)

    def _spend(self, stage: str, seconds: float, cpu_seconds: float) -> None:
        spent = self.stages.setdefault(stage, {"seconds": 0.0, "cpu_seconds": 0.0, "calls": 0})
        spent["seconds"] += seconds
        spent["cpu_seconds"] += cpu_seconds
        spent["calls"] += 1
