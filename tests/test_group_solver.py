"""Biases in whole input groups: what they cost where they are coarse, and what they leave alone."""

import pytest
import torch

from quantlib.calibration.totals import Total, exponent_for
from quantlib.group_solver import GroupSolver
from quantlib.job.expert_groups import GroupTokens
from quantlib.job.plan import BlockPlan
from quantlib.packing import FORMATS
from quantlib.schemes import scheme_from_name
from quantlib.solver_settings import DEFAULT_SOLVER
from tests.support.linear_plans import linear_plan
from tests.support.partials import partial_of

ROWS, COLUMNS, TOKENS = 32, 64, 600
SCHEME = scheme_from_name("W4A16", 32)


def _block(*, corrects: dict[str, bool]) -> BlockPlan:
    linears = tuple(
        linear_plan(name, ROWS, COLUMNS, SCHEME, corrects_bias=corrected)
        for name, corrected in corrects.items()
    )
    return BlockPlan(index=0, prefix="b", tensors=(), linears=linears, input_groups=(tuple(corrects),))


def _inputs(mean: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_NC = torch.randn(TOKENS, COLUMNS, generator=generator)
    return x_NC @ torch.randn(COLUMNS, COLUMNS, generator=generator) / 8 + mean * torch.randn(
        COLUMNS, generator=generator
    )


def _statistics(x_NC: torch.Tensor, *, is_extended: bool) -> list[list[Total]]:
    partial = partial_of(x_NC, has_sums=is_extended)
    total = Total.zeros(COLUMNS + is_extended, exponent_for(partial.peak, 1))
    total.add_(partial.panels)
    return [[total], [], []]


def _solve(corrects: dict[str, bool], x_NC: torch.Tensor, tensors: dict[str, torch.Tensor]):
    solver = GroupSolver(FORMATS["compressed-tensors"], DEFAULT_SOLVER, torch.device("cpu"))
    block = _block(corrects=corrects)
    given = _statistics(x_NC, is_extended=any(corrects.values()))
    packed, rows = solver.solve(block, 0, tensors, given, GroupTokens(own=TOKENS))
    return packed, {row["name"]: row for row in rows}


def _weights(bias: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in ("q", "k"):
        tensors[f"{name}.weight"] = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.05).bfloat16()
        tensors[f"{name}.bias"] = (bias * torch.randn(ROWS, generator=generator)).bfloat16()
    return tensors


def _error(name: str, x_NC: torch.Tensor, tensors: dict, packed: dict) -> float:
    """Mean square of the error of the outputs, bias included, in float64."""
    levels = FORMATS["compressed-tensors"].unpack(name, packed, SCHEME).dequantize().double()
    bias = packed.get(f"{name}.bias", tensors[f"{name}.bias"]).double()
    wanted = x_NC.double() @ tensors[f"{name}.weight"].double().T + tensors[f"{name}.bias"].double()
    return (wanted - (x_NC.double() @ levels.T + bias)).square().mean().item()


@pytest.mark.parametrize("bias", [0.0, 0.1, 3.0, 30.0, 300.0])
def test_group_corrected_biases_never_cost_more_than_they_gain(bias):
    x_NC, tensors = _inputs(), _weights(bias)
    plain, _ = _solve({"q": False, "k": False}, x_NC, tensors)
    corrected, rows = _solve({"q": True, "k": True}, x_NC, tensors)
    for name in ("q", "k"):
        before, after = (_error(name, x_NC, tensors, packed) for packed in (plain, corrected))
        assert after <= before * (1.0 if bias > 3 else 0.99), (bias, name)
        assert rows[name]["bias_change"] >= 0
        assert (rows[name]["fallback"] == "coarse_bias") == (bias > 10), (bias, name)


def test_group_linear_without_a_bias_is_solved_as_if_no_other_had_one():
    x_NC, tensors = _inputs(), _weights(0.1)
    alone, rows = _solve({"q": False}, x_NC, tensors)
    beside, its_rows = _solve({"q": False, "k": True}, x_NC, tensors)
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    assert rows["q"] == its_rows["q"]
    assert "q.bias" not in beside and "k.bias" in beside


def test_group_of_constant_inputs_is_rounded_and_its_bias_right():
    x_NC, tensors = torch.ones(TOKENS, COLUMNS) * 0.7, _weights(0.0)
    packed, rows = _solve({"q": True}, x_NC, tensors)
    assert rows["q"]["fallback"] == "rtn_constant_inputs"
    uncorrected = {key: value for key, value in packed.items() if key != "q.bias"}
    assert _error("q", x_NC, tensors, packed) < 1e-3 * _error("q", x_NC, tensors, uncorrected)
