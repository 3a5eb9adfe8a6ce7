"""Experts solved as one batch: the packed bytes and report rows of each alone, whoever is in the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.calibration.totals import Total, exponent_for
from quantlib.group_solver import GroupSolver
from quantlib.job.expert_groups import GroupTokens
from quantlib.job.plan import BlockPlan
from quantlib.packing import FORMATS
from quantlib.schemes import has_own_groups, scheme_from_name
from quantlib.solver_settings import SolverSettings
from tests.support.linear_plans import linear_plan
from tests.support.partials import gram_lower, panels_from

COLUMNS, EXPERTS, SHARED = 96, 5, 48.0


pytestmark = pytest.mark.usefixtures("one_thread")


def _block(scheme: str, method: str = "gptq") -> BlockPlan:
    """Gate and up of every expert."""
    named = scheme_from_name(scheme, None if has_own_groups(scheme) else 32)
    groups = tuple((f"{expert}.gate", f"{expert}.up") for expert in range(EXPERTS))
    linears = tuple(
        linear_plan(name, rows, COLUMNS, named, method=method)
        for group in groups
        for name, rows in zip(group, (24, 17), strict=True)
    )
    return BlockPlan(index=0, prefix="b", tensors=(), linears=linears, input_groups=groups)


def _tensors(block: BlockPlan) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{linear.name}.weight": (torch.randn(linear.rows, COLUMNS, generator=generator) * 0.05).bfloat16()
        for linear in block.linears
    }


def _total(x_NC: torch.Tensor) -> Total:
    product_CC = gram_lower(x_NC)
    total = Total.zeros(COLUMNS, exponent_for(float(product_CC.abs().max()) or 1.0, 1), is_whole=False)
    total.add_(panels_from(product_CC, is_whole=False))
    return total


def _seen(*, is_shrunk: bool):
    """Sums and tokens of every expert; the last one is given no token."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(count, COLUMNS, generator=generator) for count in (300, 40, 5, 1, 0)]
    inputs = [x_NC @ torch.randn(COLUMNS, COLUMNS, generator=generator) / 8 for x_NC in inputs]
    pool = torch.cat(inputs)
    pools = [_total(pool)] if is_shrunk else []
    statistics = [[[_total(x_NC)], [], pools] for x_NC in inputs]
    shared = {"shared": SHARED, "pool": len(pool)} if is_shrunk else {}
    return statistics, [GroupTokens(own=len(x_NC), **shared) for x_NC in inputs]


@settings(max_examples=20, deadline=None)
@given(
    scheme=st.sampled_from(["W4A16", "W4A16_ASYM", "W3A16", "W8A16", "NVFP4A16", "FP8A16_TENSOR"]),
    method=st.sampled_from(["gptq", "gptq", "rtn"]),
    passes=st.integers(0, 1),
    is_shrunk=st.booleans(),
    order=st.permutations(range(EXPERTS)),
    cut=st.integers(1, EXPERTS),
)
def test_experts_of_a_batch_are_packed_and_told_of_as_alone(scheme, method, passes, is_shrunk, order, cut):
    block, (statistics, tokens) = _block(scheme, method), _seen(is_shrunk=is_shrunk)
    tensors = _tensors(block)
    options = SolverSettings(descent_passes=passes, refits_scales=bool(passes))
    solver = GroupSolver(FORMATS["compressed-tensors"], options, torch.device("cpu"))
    for batch in (order[:cut], order[cut:]):
        if not batch:
            continue
        given_ = ([statistics[group] for group in batch], [tokens[group] for group in batch])
        found = solver.solve_batch(block, batch, tensors, *given_)
        for group, (packed, rows) in zip(batch, found, strict=True):
            wanted, wanted_rows = solver.solve(block, group, tensors, statistics[group], tokens[group])
            assert rows == wanted_rows
            assert packed.keys() == wanted.keys()
            assert all(torch.equal(packed[name], wanted[name]) for name in wanted)
            if method == "gptq" and group == EXPERTS - 1:
                fallback = "no_routed_tokens" if is_shrunk else "rtn_no_tokens"
                assert {row["fallback"] for row in rows} == {fallback}
