"""Methods on grids of small floats: the same solver, other levels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.column_order import activation_order
from quantlib.grids.affine import nearest_codes, with_codes
from quantlib.grids.fit import search_scales
from quantlib.grids.formats import CODEBOOKS, FLOAT_FORMATS
from quantlib.linalg import factor_hessian
from quantlib.methods import METHODS
from quantlib.methods.column_solver import solve_codes
from quantlib.methods.coordinate_descent import descend
from quantlib.methods.scale_refit import refit_scales
from quantlib.schemes import CODEBOOK_NAMES, FLOAT_NAMES, scheme_from_name
from quantlib.solver_settings import COLUMN_ORDERS, SCALE_SEARCHES, SolverSettings
from tests.support.any_grid import any_grid
from tests.support.reference_elimination import quadratic
from tests.support.reference_solver import correlated_inputs, solve_reference

MANY_TOKENS = 10**9
FLOOR = 0.002
_NAMES = (*FLOAT_NAMES, *CODEBOOK_NAMES)


def problem(rows, columns, seed):
    x = correlated_inputs(3 * columns + 8, columns, seed)
    weight = np.random.default_rng(seed + 1).normal(size=(rows, columns)) * 0.3
    return torch.from_numpy(weight), torch.from_numpy(x.T @ x)


def values_of(scheme):
    if scheme.number in CODEBOOKS:
        return np.float32(CODEBOOKS[scheme.number]).astype(np.float64)
    magnitudes = np.array(FLOAT_FORMATS[scheme.number].magnitudes)
    return np.concatenate([-magnitudes[:0:-1], magnitudes])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 60),
    name=st.sampled_from(_NAMES),
    seed=st.integers(0, 10**6),
)
def test_levels_of_any_problem_equal_those_of_the_reference(rows, columns, name, seed):
    weight_RC, hessian_CC = problem(rows, columns, seed)
    scheme = scheme_from_name(name)
    grid = any_grid(weight_RC.float(), scheme, scale_dtype=torch.bfloat16)
    codes_RC, _ = solve_codes(weight_RC, grid, factor_hessian(hessian_CC, num_tokens=MANY_TOKENS))
    scale = grid.scale_RG.double().numpy()
    reference = solve_reference(
        weight_RC.numpy(),
        hessian_CC.numpy(),
        scale,
        np.zeros_like(scale),
        group_width=scheme.columns_per_group(columns),
        num_codes=scheme.num_codes,
        damping=FLOOR * hessian_CC.diagonal().mean().item(),
        values=values_of(scheme),
    )
    # Scales of 24 bits times values of more than one are rounded.
    np.testing.assert_allclose(
        with_codes(grid, codes_RC).dequantize().numpy(), reference.levels, rtol=2**-23, atol=0
    )


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_diagonal_hessian_equals_round_to_nearest(name):
    weight_RC = torch.randn(40, 192, generator=torch.Generator().manual_seed(0))
    diagonal_C = torch.rand(192, generator=torch.Generator().manual_seed(1)) + 0.01
    grid = search_scales(weight_RC, scheme_from_name(name), scale_dtype=torch.float16)
    factor = factor_hessian(torch.diag(diagonal_C), num_tokens=200)
    codes_RC, num_clipped_R = solve_codes(weight_RC, grid, factor)
    nearest_RC, nearest_clipped_R = nearest_codes(weight_RC, grid)
    assert torch.equal(codes_RC, nearest_RC)
    assert torch.equal(num_clipped_R, nearest_clipped_R)


@pytest.mark.parametrize("search", SCALE_SEARCHES)
@pytest.mark.parametrize("order", COLUMN_ORDERS)
@pytest.mark.parametrize("name", _NAMES)
def test_gptq_costs_less_than_rounding(name, order, search):
    solver = SolverSettings(scale_search=search, column_order=order)
    ratios = []
    for seed in range(2):
        weight_RC, hessian_CC = problem(24, 96, seed)
        cost = []
        for method in ("gptq", "rtn"):
            found = METHODS[method](
                {"w": weight_RC.float()},
                {"w": scheme_from_name(name)},
                hessian_CC=hessian_CC.float(),
                num_tokens=3 * 96 + 8,
                scale_dtype=torch.bfloat16,
                solver=solver,
            )["w"]
            error = weight_RC.numpy() - found.quantized.dequantize().double().numpy()
            cost.append(quadratic(error, hessian_CC.numpy()).sum())
            whole = quadratic(weight_RC.numpy(), hessian_CC.numpy()).sum()
            assert found.report.relative_error == pytest.approx(cost[-1] / whole, rel=1e-4)
            # Steps are not alike, so that nothing is known before codes are chosen.
            assert found.report.predicted_error is None
        ratios.append(cost[0] / cost[1])
    assert max(ratios) < 1.0
    assert np.mean(ratios) < 0.8


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(2, 60),
    name=st.sampled_from(_NAMES),
    seed=st.integers(0, 10**6),
)
def test_descent_and_refit_never_cost_more(rows, columns, name, seed):
    weight_RC, hessian_CC = problem(rows, columns, seed)
    scheme = scheme_from_name(name)
    grid = any_grid(weight_RC.float(), scheme, scale_dtype=torch.bfloat16, search="minmax")
    codes_RC, _ = nearest_codes(weight_RC, grid)
    damping = 0.01 * hessian_CC.diagonal().mean().item()
    damped = hessian_CC.numpy() + damping * np.eye(columns)
    order_C = activation_order(hessian_CC.diagonal())

    def cost(grid, codes_RC):
        error = weight_RC.numpy() - with_codes(grid, codes_RC).dequantize().double().numpy()
        return quadratic(error, damped)

    before = cost(grid, codes_RC)
    codes_RC, _ = descend(weight_RC, codes_RC, grid, hessian_CC, damping=damping, order_C=order_C)
    passed = cost(grid, codes_RC)
    assert (passed <= before * (1 + 1e-9) + 1e-15).all()
    refitted = refit_scales(weight_RC, codes_RC, grid, hessian_CC, damping=damping)
    assert (cost(refitted, codes_RC) <= passed * (1 + 1e-6) + 1e-15).all()
    if grid.scheme.scales == "e8m0":
        assert (torch.frexp(refitted.scale_RG.float())[0] == 0.5).all()
    if refitted.divisor_R1 is not None:
        dividend_RG = refitted.scale_RG * refitted.divisor_R1
        stored_RG = dividend_RG.to(torch.float8_e4m3fn).float() / refitted.divisor_R1
        assert torch.equal(stored_RG, refitted.scale_RG)


@pytest.mark.parametrize("name", FLOAT_NAMES)
@pytest.mark.parametrize("parts", [(1, 39), (16, 24), (33, 7)])
def test_rows_do_not_depend_on_their_tile(name, parts):
    weight_RC, hessian_CC = problem(40, 96, seed=4)
    weight_RC, hessian_CC = weight_RC.float(), hessian_CC.float()
    factor = factor_hessian(hessian_CC, num_tokens=MANY_TOKENS)
    grid = search_scales(weight_RC, scheme_from_name(name), scale_dtype=torch.bfloat16)
    whole_RC, _ = solve_codes(weight_RC, grid, factor)
    start = 0
    for size in parts:
        part = slice(start, start + size)
        found_RC, _ = solve_codes(weight_RC[part], grid.rows(part), factor)
        assert torch.equal(found_RC, whole_RC[part])
        start += size
