"""What is gone with a worker: its cells, the sums they are in, its parts of blocks; and nothing else."""

import pytest

from quantlib.job.activations import cell_key
from quantlib.job.holdings import Held, Holdings

GROUPS = (0, 1)
A, B, C = (cell_key("calibration", number) for number in range(3))


@pytest.fixture
def held() -> Holdings:
    """Workers 0 and 1 in block 3: cells a and b observed where they are, c by 0 but now at home with 1."""
    held = Holdings(homes={A: 0, B: 1, C: 1})
    held.place(held.homes, 4)
    held.observed[3] = {GROUPS: {A: Held(0, None), B: Held(1, None), C: Held(0, None)}}
    held.sources[3] = [Held(0, "first"), Held(1, "second")]
    return held


def test_a_cell_is_lost_with_its_home_and_stays_in_the_sum_of_whoever_observed_it(held):
    held.lose({1})
    assert set(held.homes) == set(held.follows) == set(held.outputs[0].quantized) == {A}
    # To observe c again would count it twice.
    assert set(held.observed[3][GROUPS]) == {A, C}
    assert held.sources[3] == [Held(0, "first"), None]


def test_a_cell_whose_sum_is_lost_is_brought_up_again_wherever_its_streams_are(held):
    held.lose({0})
    assert set(held.homes) == {B}
    assert set(held.observed[3][GROUPS]) == {B}


def test_a_cell_on_its_way_is_nowhere(held):
    held.moving.add(A)
    held.lose({1})
    assert not held.homes


def test_codes_of_a_lost_worker_are_gone_and_those_of_others_stay(held):
    held.outputs[0].packed[3] = {0: Held(0, "q"), 1: Held(1, "down")}
    held.lose({1})
    assert held.outputs[0].packed[3] == {0: Held(0, "q")}


def test_row_tiles_of_a_lost_worker_are_gone_and_need_no_cell(held):
    # Cells have passed the block; the sums of a group that is not packed are where they were observed.
    held.captured[3] = {}
    held.observed[3] = {GROUPS: {A: Held(0, None), C: Held(0, None)}}
    held.homes = {A: 0, C: 0}
    held.outputs[0].solved[3] = {0: Held(0, "first rows"), 1: Held(1, "last rows")}
    held.lose({1})
    assert held.outputs[0].solved[3] == {0: Held(0, "first rows")}
    assert set(held.homes) == {A, C}


def test_cells_that_passed_a_block_unobserved_come_back_when_its_codes_are_lost(held):
    # An earlier loss took a cell out of the sums; as all codes were there, it was only moved on.
    del held.observed[3][GROUPS][A]
    held.captured[3] = {}
    held.outputs[0].packed[3] = {0: Held(0, "q"), 1: Held(1, "down")}
    held.lose({1})
    assert A not in held.homes


@pytest.mark.parametrize(("position", "homes"), [(4, set()), (3, {A})])
def test_cells_that_passed_a_block_whose_sums_are_not_kept_come_back_when_its_codes_are_lost(
    held, position, homes
):
    held.place(held.homes, position)
    held.observed[3] = {(1,): {}}
    held.captured[3] = {}
    held.outputs[0].packed[3] = {0: Held(1, "q")}
    held.lose({1})
    assert set(held.homes) == homes


def test_release_keeps_nothing_of_a_block(held):
    (output,) = held.outputs
    output.packed[3], output.compared[3], output.solved[3] = {}, {}, {}
    held.captured[3], held.exponents[3] = {}, {}
    held.release(3)
    kinds = (held.observed, held.sources, held.captured, held.exponents)
    for kept in (*kinds, output.packed, output.solved, output.compared):
        assert not kept
