"""Tiles of a block: numbered over its groups, of one method and scheme, none in a group with corrected
biases."""

from quantlib.job.group_tiles import group_tiles
from quantlib.job.plan import BlockPlan
from quantlib.schemes import scheme_from_name
from tests.support.linear_plans import linear_plan

W4, W8 = scheme_from_name("W4A16", 32), scheme_from_name("W8A16", 32)


def _linear(name, rows, method="gptq", scheme=W4, *, corrects_bias=False):
    return linear_plan(name, rows, 64, scheme, method=method, corrects_bias=corrects_bias)


def _tiles(*groups, height=16):
    linears = tuple(linear for group in groups for linear in group)
    names = tuple(tuple(linear.name for linear in group) for group in groups)
    block = BlockPlan(index=0, prefix="b", tensors=(), linears=linears, input_groups=names)
    found = group_tiles(block, "cpu", height)
    return {
        group: [(tile.number, [(run.name, run.start, run.end) for run in tile.runs]) for tile in tiles]
        for group, tiles in found.items()
    }


def test_tiles_are_numbered_over_the_groups_of_a_block():
    found = _tiles([_linear("q", 20), _linear("k", 4)], [_linear("o", 17)])
    assert found == {
        0: [(0, [("q", 0, 16)]), (1, [("q", 16, 20)]), (2, [("k", 0, 4)])],
        1: [(3, [("o", 0, 16)]), (4, [("o", 16, 17)])],
    }


def test_linears_of_other_methods_and_schemes_are_in_other_tiles():
    linears = [_linear("q", 4), _linear("k", 4, scheme=W8), _linear("v", 4), _linear("g", 4, "rtn")]
    runs = [tile for _, tile in _tiles(linears)[0]]
    assert [[name for name, *_ in tile] for tile in runs] == [["q", "v"], ["k"], ["g"]]


def test_group_with_a_corrected_bias_is_one_tile():
    found = _tiles([_linear("q", 40, corrects_bias=True), _linear("k", 4, scheme=W8)], [_linear("o", 4)])
    assert found[0] == [(0, [("q", 0, 40), ("k", 0, 4)])]
    assert found[1][0][0] == 1


def test_heights_come_from_the_columns_unless_given():
    assert len(_tiles([_linear("q", 4096)], height=None)[0]) == 1
    assert len(_tiles([_linear("q", 4097)], height=None)[0]) == 2
