"""Runs as a server keeps them, in memory: one for each key, whose end a test decides."""

import threading
from collections.abc import Sequence

from quantlib.job.conversion_runs import SeenRun
from quantlib.job.options import JobOptions

RUNNING = SeenRun(state="Running", is_final=False, is_completed=False)
COMPLETED = SeenRun(state="Completed", is_final=True, is_completed=True)
CRASHED = SeenRun(state="Crashed", is_final=True, is_completed=False, message="exit 9")


class KeyedRuns:
    """What was begun, in order, and how it stands."""

    def __init__(self) -> None:
        self.requests: dict[str, list[JobOptions]] = {}
        self.states: dict[str, SeenRun | None] = {}
        self._ids: dict[str, str] = {}
        self._lock = threading.Lock()

    def begin(self, requests: Sequence[JobOptions], key: str) -> str:
        with self._lock:
            if key not in self._ids:
                run_id = f"run-{len(self._ids) + 1}"
                self._ids[key] = run_id
                self.requests[run_id], self.states[run_id] = list(requests), RUNNING
            return self._ids[key]

    def look(self, run_id: str) -> SeenRun | None:
        return self.states[run_id]
