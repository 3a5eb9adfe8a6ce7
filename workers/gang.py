"""Places for the first workers of a job, reserved together: all of them or none.

A placement group of Ray with one bundle a worker. It outlives the workers in it: who comes in place of a lost
one takes its bundle, which Ray moves to another node when its own is gone. Workers beyond its size do
without it.
"""

import time
from collections.abc import Iterable
from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from workers.placement import Need

# An interrupt is heard between two of these, not while Ray waits.
_WAIT_S = 1.0


class Gang:
    """The reserved places; ask for them once, and give them back with `remove`.

    Args:
        need: What each worker takes, and where.
        count: How many.
        strategy: One of `quantlib.job.options.PLACEMENTS`.
    """

    def __init__(self, need: Need, count: int, strategy: str) -> None:
        self._count = count
        self._members: set[int] = set()
        self._group = placement_group(
            [need.amounts] * count,
            strategy=strategy.replace("-", "_").upper(),
            bundle_label_selector=[dict(need.labels)] * count,
        )

    def is_ready(self, timeout_s: float) -> bool:
        """Whether all places were had within the time."""
        deadline = time.monotonic() + timeout_s
        while not self._group.wait(min(_WAIT_S, timeout_s)):
            if time.monotonic() >= deadline:
                return False
        return True

    def place(self, number: int, others: Iterable[int]) -> dict[str, Any]:
        """Options for the actor of a new worker; none when all places are taken.

        Args:
            number: The worker's.
            others: Numbers of the workers there are.
        """
        self._members.intersection_update(others)
        if len(self._members) == self._count:
            return {}
        self._members.add(number)
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=self._group)}

    def remove(self) -> None:
        """Give the places back; what still stands there ends."""
        remove_placement_group(self._group)
