"""The time that is left, at the pace since the first finished work."""

import pytest

from flows.pace import Pace
from quantlib.job.stages import Progress


def at(done: float) -> Progress:
    return Progress(done=done, total=10, label="unit")


def test_pace_is_that_since_work_was_first_seen_done():
    pace = Pace()
    assert pace.left_s(at(0), 0.0) is None
    # A resumed run finds four units at once.
    assert pace.left_s(at(4), 100.0) is None
    assert pace.left_s(at(4), 130.0) is None
    assert pace.left_s(at(6), 160.0) == pytest.approx(4 * 30)
    assert pace.left_s(at(10), 300.0) is None
