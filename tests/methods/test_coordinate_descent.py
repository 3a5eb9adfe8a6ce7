"""Passes of coordinate descent against a slow float64 loop, and what every pass promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.column_order import activation_order, natural_order
from quantlib.grids.affine import nearest_codes, with_codes
from quantlib.grids.fit import fit_to_extremes
from quantlib.linalg import factor_hessian
from quantlib.methods import column_tile
from quantlib.methods.column_solver import solve_codes
from quantlib.methods.coordinate_descent import descend
from quantlib.schemes import WHOLE_ROW, WeightScheme
from tests.support.reference_solver import correlated_inputs


def problem(rows, columns, seed, dtype=torch.float64):
    x = correlated_inputs(3 * columns + 8, columns, seed)
    weight = np.random.default_rng(seed + 1).normal(size=(rows, columns)) * 0.3
    return torch.from_numpy(weight).to(dtype), torch.from_numpy(x.T @ x).to(dtype)


def slow_pass(weight, codes, scale, zero, hessian, damping, order, num_codes):
    """Each column in turn to its best code, everything in plain float64; scale and zero a column."""
    codes = codes.astype(np.float64)
    damped = hessian + damping * np.eye(len(hessian))
    for column in order:
        error = weight - scale * (codes - zero)
        error[:, column] = 0.0
        target = weight[:, column] + error @ damped[:, column] / damped[column, column]
        code = np.rint(target / scale[:, column]) + zero[:, column]
        codes[:, column] = np.clip(code, 0, num_codes - 1)
    return codes


def loss(weight_RC, codes_RC, grid, hessian_CC, damping):
    error = weight_RC - with_codes(grid, codes_RC).dequantize().to(weight_RC.dtype)
    damped = hessian_CC + damping * torch.eye(len(hessian_CC), dtype=hessian_CC.dtype)
    return ((error @ damped) * error).sum(1)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 60),
    group_size=st.sampled_from([8, 16, WHOLE_ROW]),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    is_symmetric=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_descent_equals_the_slow_loop(rows, columns, group_size, bits, is_symmetric, seed):
    weight_RC, hessian_CC = problem(rows, columns, seed)
    scheme = WeightScheme(bits=bits, is_symmetric=is_symmetric, group_size=group_size)
    grid = fit_to_extremes(weight_RC.float(), scheme, scale_dtype=torch.bfloat16)
    start_RC, _ = nearest_codes(weight_RC, grid)
    damping = 0.01 * hessian_CC.diagonal().mean().item()
    order_C = activation_order(hessian_CC.diagonal())
    codes_RC, _ = descend(weight_RC, start_RC, grid, hessian_CC, damping=damping, order_C=order_C)
    width = scheme.columns_per_group(columns)
    zero_RG = grid.zero_RG if grid.zero_RG is not None else torch.full_like(grid.scale_RG, scheme.middle_code)
    spread = [p.double().repeat_interleave(width, 1)[:, :columns].numpy() for p in (grid.scale_RG, zero_RG)]
    wanted = slow_pass(
        weight_RC.numpy(),
        start_RC.numpy(),
        *spread,
        hessian_CC.numpy(),
        damping,
        order_C.flip(0).tolist(),
        scheme.num_codes,
    )
    assert np.array_equal(codes_RC.numpy(), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_descent_never_raises_the_damped_loss_and_helps_after_the_solve(bits):
    weight_RC, hessian_CC = problem(48, 300, seed=3, dtype=torch.float32)
    scheme = WeightScheme(bits=bits, is_symmetric=True, group_size=64)
    grid = fit_to_extremes(weight_RC, scheme, scale_dtype=torch.bfloat16)
    factor = factor_hessian(hessian_CC, num_tokens=1000)
    codes_RC, _ = solve_codes(weight_RC, grid, factor)
    before_R = loss(weight_RC.double(), codes_RC, grid, hessian_CC.double(), factor.damping)
    first_R = before_R
    for _ in range(3):
        codes_RC, _ = descend(
            weight_RC, codes_RC, grid, hessian_CC, damping=factor.damping, order_C=factor.order_C
        )
        after_R = loss(weight_RC.double(), codes_RC, grid, hessian_CC.double(), factor.damping)
        assert (after_R <= before_R * (1 + 1e-5)).all()
        before_R = after_R
    assert before_R.sum() < 0.998 * first_R.sum()


def test_descent_stays_where_nothing_is_better():
    weight_RC, hessian_CC = problem(8, 40, seed=5)
    scheme = WeightScheme(bits=4, is_symmetric=False, group_size=8)
    grid = fit_to_extremes(weight_RC.float(), scheme, scale_dtype=torch.bfloat16)
    order_C = natural_order(40)
    codes_RC, _ = nearest_codes(weight_RC, grid)
    for _ in range(50):
        codes_RC, _ = descend(weight_RC, codes_RC, grid, hessian_CC, damping=1.0, order_C=order_C)
    again_RC, _ = descend(weight_RC, codes_RC, grid, hessian_CC, damping=1.0, order_C=order_C)
    assert torch.equal(again_RC, codes_RC)


def test_descent_rows_do_not_depend_on_their_neighbors(monkeypatch):
    weight_RC, hessian_CC = problem(77, 192, seed=11, dtype=torch.float32)
    scheme = WeightScheme(bits=3, is_symmetric=True, group_size=64)
    grid = fit_to_extremes(weight_RC, scheme, scale_dtype=torch.bfloat16)
    start_RC, _ = nearest_codes(weight_RC, grid)
    given = {"damping": 5.0, "order_C": activation_order(hessian_CC.diagonal())}
    whole_RC, clipped_R = descend(weight_RC, start_RC, grid, hessian_CC, **given)
    for part in (slice(0, 1), slice(5, 38)):
        codes_RC, num_clipped_R = descend(
            weight_RC[part], start_RC[part], grid.rows(part), hessian_CC, **given
        )
        assert torch.equal(codes_RC, whole_RC[part])
        assert torch.equal(num_clipped_R, clipped_R[part])
    for name, width in (("BATCH_COLUMNS", 48), ("LEAF_COLUMNS", 7)):
        monkeypatch.setattr(column_tile, name, width)
    other_RC, _ = descend(weight_RC, start_RC, grid, hessian_CC, **given)
    assert (other_RC == whole_RC).float().mean() > 0.99
