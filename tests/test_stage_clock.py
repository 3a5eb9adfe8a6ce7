"""When lanes were busy: close neighbours are one interval, long jobs keep few, and no busy moment is lost."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.stage_clock import MAX_INTERVALS, Interval, Lane, StageClock, reduced

STAGES = ("load", "capture", "solve")


@st.composite
def calls(draw, max_size=30):
    """Calls of a lane one after the other, as (stage, start, end) in whole seconds, which add up exactly."""
    drawn = draw(
        st.lists(
            st.tuples(st.sampled_from(STAGES), st.integers(0, 20), st.integers(0, 20)),
            min_size=1,
            max_size=max_size,
        )
    )
    now, found = 0, []
    for stage, wait, length in drawn:
        found.append((stage, now + wait, now + wait + length))
        now += wait + length
    return found


def lane_of(entries, **settings_of_lane):
    lane = Lane(**settings_of_lane)
    for entry in entries:
        lane.add(*entry)
    return lane.intervals


def covered(intervals) -> set[int]:
    """The seconds in which there is anything."""
    return {second for _, start, end, *_ in intervals for second in range(start, end)}


def seconds_by_stage(intervals):
    return {s: sum(end - start for stage, start, end, *_ in intervals if stage == s) for s in STAGES}


def gaps_of(found, entries) -> int:
    """Seconds within the intervals in which none of the calls ran."""
    return len(covered(found) - covered(entries))


@settings(deadline=None)
@given(entries=calls(), gap=st.integers(0, 8))
def test_joining_close_neighbours_keeps_the_seconds_of_every_stage_up_to_their_gaps(entries, gap):
    found = lane_of(entries, small_gap_s=gap)
    before, after = seconds_by_stage(entries), seconds_by_stage(found)
    assert all(after[stage] >= before[stage] for stage in STAGES)
    assert sum(after.values()) - sum(before.values()) == gaps_of(found, entries)
    for earlier, later in zip(found, found[1:], strict=False):
        assert earlier.end <= later.start
        assert earlier.stage != later.stage or later.start - earlier.end > gap
    for interval in found:
        assert gaps_of([interval], entries) == interval.wrong_s
        assert {stage for stage, start, end in entries if interval.start <= start < end <= interval.end} <= {
            interval.stage
        }


@settings(deadline=None)
@given(entries=calls(), limit=st.integers(1, 12))
def test_limited_lane_loses_no_busy_moment_and_tells_how_much_is_wrong(entries, limit):
    found = lane_of(entries, limit=limit, small_gap_s=0)
    assert len(found) <= limit
    assert covered(entries) <= covered(found)
    assert found[0].start == entries[0][1] and found[-1].end == entries[-1][2]
    assert all(earlier.end <= later.start for earlier, later in zip(found, found[1:], strict=False))
    wrong_s = sum(interval.wrong_s for interval in found)
    assert gaps_of(found, entries) <= wrong_s
    before, after = seconds_by_stage(entries), seconds_by_stage(found)
    assert all(abs(after[stage] - before[stage]) <= wrong_s for stage in STAGES)
    assert found == lane_of(entries, limit=limit, small_gap_s=0)


@settings(deadline=None)
@given(entries=calls(), order=st.randoms(use_true_random=False), limit=st.integers(1, 40))
def test_calls_of_two_threads_may_end_in_any_order(entries, order, limit):
    stretched = [(stage, start, end + order.choice((0, 3, 40))) for stage, start, end in entries]
    order.shuffle(stretched)
    found = lane_of(stretched, limit=limit)
    assert len(found) <= limit
    assert [interval.start for interval in found] == sorted(interval.start for interval in found)
    assert covered(stretched) <= covered(found)


def test_shortest_wait_is_lost_first():
    entries = [("solve", 0, 10), ("solve", 13, 20), ("solve", 21, 30), ("solve", 35, 40)]
    assert lane_of(entries, limit=3) == [
        Interval("solve", 0, 10),
        Interval("solve", 13, 30, 1),
        Interval("solve", 35, 40),
    ]


def test_short_stage_takes_the_name_of_the_long_one_beside_it():
    day = [Interval("capture", 0, 10), Interval("load", 12, 13), Interval("solve", 13, 20)]
    assert reduced(day, 2) == [Interval("capture", 0, 10), Interval("solve", 12, 20, 1)]


def test_wait_beside_a_lost_one_is_kept_before_a_longer_one_elsewhere():
    spans = [(0, 10), (12, 13), (14, 15), (19, 20), (40, 41), (43.5, 45)]
    found = reduced([Interval("read", *span) for span in spans], 4)
    # 13-14 is lost first; with 10-12 three seconds would be wrong in one place, with 41-43.5 less.
    assert [(start, end) for _, start, end, _ in found] == [(0, 10), (12, 15), (19, 20), (40, 45)]


def test_equal_waits_are_lost_everywhere_alike():
    entries = [("read", 2 * i, 2 * i + 1) for i in range(64)]
    assert {interval.length_s for interval in lane_of(entries, limit=32)} == {3}
    # Also when there was too much again and again: no part of a long job is much coarser than another.
    entries = [("read", 2 * i, 2 * i + 1) for i in range(1600)]
    assert max(interval.length_s for interval in lane_of(entries, limit=32)) < 3 * 2 * 1600 / 32


def test_long_job_keeps_the_default_limit():
    entries = [(STAGES[i % 3], float(i), i + 0.5) for i in range(5 * MAX_INTERVALS)]
    assert len(lane_of(entries)) == MAX_INTERVALS
    assert lane_of(entries[:MAX_INTERVALS]) == [Interval(*entry) for entry in entries[:MAX_INTERVALS]]


def test_clock_dates_the_calls_of_both_lanes_in_seconds_since_1970():
    before = time.time()
    clock = StageClock()
    with clock.computing("solve"), clock.storage("read"):
        pass
    with pytest.raises(KeyError), clock.computing("load"):
        raise KeyError
    after = time.time()
    timeline = clock.timeline()
    ((stage, read_from, read_to),) = timeline["storage"]
    (solve, solve_from, solve_to), (load, load_from, load_to) = timeline["compute"]
    assert (stage, solve, load) == ("read", "solve", "load")
    moments = [timeline["began"], solve_from, read_from, read_to, solve_to, load_from, load_to]
    assert moments == sorted(moments)
    # The wall clock may be adjusted meanwhile, by less than the years another clock would be off.
    assert before - 60 <= moments[0] and moments[-1] <= after + 60


def test_intervals_add_up_to_the_seconds_of_the_stages():
    clock = StageClock()
    for stage in STAGES:
        with clock.computing(stage):
            sum(range(10_000))
    found = clock.timeline()["compute"]
    assert seconds_by_stage(found) == pytest.approx(
        {stage: clock.stages[stage]["seconds"] for stage in STAGES}, abs=1e-5
    )


def test_threads_share_a_lane():
    clock, rounds = StageClock(), 200

    def work(stage):
        for _ in range(rounds):
            with clock.storage(stage):
                pass

    threads = [threading.Thread(target=work, args=(stage,)) for stage in ("read", "write")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {stage: spent["calls"] for stage, spent in clock.stages.items()} == {
        "read": rounds,
        "write": rounds,
    }
    assert {stage for stage, _, _ in clock.timeline()["storage"]} == {"read", "write"}


def test_what_is_done_for_one_output_is_told_apart_and_counts_in_all():
    clock = StageClock()
    for output, calls_of_output in ((0, 1), (None, 2), (1, 3)):
        for _ in range(calls_of_output):
            with clock.computing("solve", output):
                pass
    with clock.computing("evaluate", 1):
        pass
    assert {n: {s: x["calls"] for s, x in own.items()} for n, own in clock.own_stages.items()} == {
        0: {"solve": 1},
        1: {"solve": 3, "evaluate": 1},
    }
    assert clock.stages["solve"]["calls"] == 6
    assert (
        sum(own["solve"]["seconds"] for own in clock.own_stages.values()) <= clock.stages["solve"]["seconds"]
    )
