"""When activations are kept: by number of blocks, or by what it costs."""

import pytest

from quantlib.job.cadence import Cadence


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (5, [5])])
def test_cadence_every_so_many_blocks(every, due):
    cadence = Cadence(every, 1e12)
    assert [block for block in range(1, 7) if cadence.is_due(block)] == due


def test_cadence_by_cost_spends_at_most_a_twentieth_of_the_time():
    now = 0.0
    cadence = Cadence(None, 10e9, clock=lambda: now)  # 10 GB: 100 s at the rate assumed at first
    kept = []
    for block in range(1, 201):
        now += 50.0
        if cadence.is_due(block):
            kept.append(block)
            now += 20.0  # it turns out cheaper than assumed
            cadence.kept(20.0)
    assert kept[0] == 40, "2000 s for an expected cost of 100 s"
    assert kept[1] - kept[0] == 8, "400 s for a cost of 20 s"
    assert len(kept) * 20.0 / now <= 0.05


def test_cadence_short_work_is_repeated_rather_than_kept():
    now = 0.0
    cadence = Cadence(None, 1.0, clock=lambda: now)
    now = 59.0
    assert not cadence.is_due(1)
    now = 61.0
    assert cadence.is_due(2)
