"""The time that a job still takes, against paces known beforehand."""

import pytest

from quantlib.job.stages import Progress
from quantlib.job.time_left import TimeLeft, with_time_left


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def progress(done: float, total: float = 10.0) -> Progress:
    return Progress(done=done, total=total, label="block 1/10: solve")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def told(clock: Clock, left: TimeLeft, steps) -> list[float | None]:
    """Estimates after steps of (seconds later, done, total)."""
    found = []
    for seconds, done, total in steps:
        clock.now += seconds
        found.append(left.seconds(progress(done, total)))
    return found


def test_even_pace_is_foretold_and_what_came_before_the_work_does_not_count(clock):
    steps = [(0, 0, 1), (500, 0, 1), (40, 0, 10), (20, 1, 10), (0, 1, 10), (60, 4, 10), (120, 10, 10)]
    found = told(clock, TimeLeft(clock), steps)
    assert found == [None, None, None, pytest.approx(180), pytest.approx(180), pytest.approx(120), 0.0]


def test_work_begun_anew_is_judged_anew(clock):
    steps = [(0, 0, 10), (10, 5, 10), (1000, 0, 6), (30, 2, 6), (0, 1, 6), (5, 2, 6)]
    found = told(clock, TimeLeft(clock), steps)
    assert found[:4] == [None, pytest.approx(10), None, pytest.approx(60)]
    assert found[4:] == [None, pytest.approx(20)]


def test_end_has_no_time_left():
    assert with_time_left(progress(10), 0.0) == "block 1/10: solve"
