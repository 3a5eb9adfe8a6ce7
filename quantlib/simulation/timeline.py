"""What every worker did when, and where the time of a run went.

Kinds: ``capture``, ``solve`` and ``evaluate`` are computation; ``copy`` is between GPU and host; ``read``,
``write`` and ``network`` are waits for storage and for other nodes.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

COMPUTATION = ("capture", "solve", "evaluate")
# The time in which fewer than half of the GPUs have anything to do, and those that have compute.
IDLE = "idle GPUs"


@dataclass(slots=True)
class Timeline:
    """Spans of the workers, and of writes that run beside them.

    Attributes:
        num_workers: GPUs.
        seconds: Kind -> seconds of all workers together.
    """

    num_workers: int
    seconds: dict[str, float] = field(default_factory=dict)
    _changes: list[tuple[float, int, str]] = field(default_factory=list)
    _writes: list[tuple[float, int]] = field(default_factory=list)

    def add(self, kind: str, start: float, end: float) -> None:
        """A worker did, or waited for, something."""
        if end > start:
            self.seconds[kind] = self.seconds.get(kind, 0.0) + end - start
            self._changes += [(start, 1, kind), (end, -1, kind)]

    def add_write(self, start: float, end: float) -> None:
        """A shard was on its way to storage while its worker did something else."""
        self._writes += [(start, 1), (end, -1)]

    @property
    def busy_s(self) -> float:
        """Seconds of computation of all workers."""
        return sum(self.seconds.get(kind, 0.0) for kind in COMPUTATION)

    def causes(self) -> Mapping[str, float]:
        """Where the time of the whole run went: seconds by kind, and `IDLE`; they add up to the run's.

        Every moment counts for what the workers that are not idle are at, in equal parts; with nobody at
        anything for the write that is waited for.
        """
        found: defaultdict[str, float] = defaultdict(float)
        active: Counter[str] = Counter()
        writing, now = 0, 0.0
        changes = [(time_s, change, kind) for time_s, change, kind in self._changes]
        changes += [(time_s, change, "") for time_s, change in self._writes]
        for time_s, change, kind in sorted(changes):
            if time_s > now:
                self._attribute(found, active, time_s - now, is_writing=writing > 0)
                now = time_s
            if kind:
                active[kind] += change
            else:
                writing += change
        return found

    def _attribute(
        self, found: defaultdict[str, float], active: Counter[str], seconds: float, *, is_writing: bool
    ) -> None:
        total = active.total()
        if not total:
            found["write" if is_writing else IDLE] += seconds
            return
        few = 2 * total < self.num_workers
        for kind, workers in active.items():
            cause = IDLE if few and kind in COMPUTATION else kind
            found[cause] += seconds * workers / total


@dataclass(slots=True)
class Turn:
    """A worker's way through one piece, or through a call beside the pieces.

    Attributes:
        at: How far it has come.
    """

    timeline: Timeline
    at: float

    def wait(self, until: float, kind: str) -> None:
        """For something that is there at a time."""
        self.timeline.add(kind, self.at, until)
        self.at = max(self.at, until)

    def spend(self, seconds: float, kind: str) -> None:
        """On something."""
        self.wait(self.at + seconds, kind)
