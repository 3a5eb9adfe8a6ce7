"""Input groups that may be solved as one batch: alike, small, of one tile; batches of even sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.job.alike_groups import even_batches, likenesses
from quantlib.job.group_tiles import group_tiles
from quantlib.job.plan import BlockPlan
from quantlib.schemes import scheme_from_name
from tests.support.linear_plans import linear_plan

W4, W8 = scheme_from_name("W4A16", 32), scheme_from_name("W8A16", 32)


def _linear(name, rows, columns, scheme=W4, method="gptq", *, corrects_bias=False):
    return linear_plan(name, rows, columns, scheme, method=method, corrects_bias=corrects_bias)


def _alike(*groups):
    """Numbers of groups that may be in one batch, each time."""
    linears = tuple(linear for group in groups for linear in group)
    names = tuple(tuple(linear.name for linear in group) for group in groups)
    block = BlockPlan(index=0, prefix="b", tensors=(), linears=linears, input_groups=names)
    found = {}
    for group, likeness in likenesses(block, group_tiles(block, "cpu"), "cpu").items():
        found.setdefault(likeness, []).append(group)
    return list(found.values())


def _gate_and_up(expert, rows=64, columns=128, **changes):
    return [_linear(f"{expert}.{name}", rows, columns, **changes) for name in ("gate", "up")]


def test_experts_of_one_shape_scheme_and_method_are_alike():
    experts = [_gate_and_up(expert) for expert in range(3)]
    downs = [[_linear(f"{expert}.down", 128, 64)] for expert in range(3)]
    pairs = [group for pair in zip(experts, downs, strict=True) for group in pair]
    assert _alike(*pairs) == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
    "changes", [{"rows": 80}, {"columns": 96}, {"scheme": W8}, {"method": "rtn"}], ids=lambda x: next(iter(x))
)
def test_expert_of_another_kind_is_not_alike(changes):
    assert _alike(_gate_and_up(0), _gate_and_up(1, **changes), _gate_and_up(2)) == [[0, 2], [1]]


def test_group_of_several_tiles_or_with_a_corrected_bias_is_alone():
    mixed = [_linear("2.gate", 64, 128), _linear("2.up", 64, 128, W8)]
    biased = [_linear("3.gate", 64, 128, corrects_bias=True), _linear("3.up", 64, 128)]
    assert _alike(_gate_and_up(0), _gate_and_up(1), mixed, biased) == [[0, 1]]


def test_large_groups_are_alone():
    assert _alike(_gate_and_up(0, rows=1100), _gate_and_up(1, rows=1100)) == []
    assert _alike(_gate_and_up(0, columns=4096), _gate_and_up(1, columns=4096)) == []


@given(st.lists(st.integers(), min_size=1, unique=True), st.integers(1, 9))
def test_batches_hold_every_group_once_are_few_and_even(groups, most):
    batches = even_batches(groups, most)
    assert [group for batch in batches for group in batch] == groups
    assert len(batches) == -(-len(groups) // most)
    sizes = {len(batch) for batch in batches}
    assert not sizes or (max(sizes) <= most and max(sizes) - min(sizes) <= 1)
