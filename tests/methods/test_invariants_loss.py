"""What a solve may cost: its bound and its expectation, against every other choice, and against rounding."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.grids.affine import AffineGrid, nearest_codes, offset_bounds, with_codes
from quantlib.grids.fit import fit_to_extremes
from quantlib.linalg import Factor, factor_hessian
from quantlib.methods import METHODS
from quantlib.methods.column_solver import solve_codes
from quantlib.methods.coordinate_descent import descend
from quantlib.methods.scale_refit import refit_scales
from quantlib.schemes import INTEGER_NAMES, WHOLE_ROW, WeightScheme, scheme_from_name
from quantlib.solver_settings import COLUMN_ORDERS, SolverSettings
from tests.support.reference_elimination import (
    damped_hessian,
    every_loss,
    quadratic,
    solve_by_elimination,
    solving_order,
)
from tests.support.reference_solver import correlated_inputs

MANY_TOKENS = 10**9
W2 = WeightScheme(bits=2, is_symmetric=True, group_size=WHOLE_ROW)

schemes = st.builds(
    WeightScheme,
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    is_symmetric=st.booleans(),
    group_size=st.sampled_from([8, 16, WHOLE_ROW]),
)
orders = st.sampled_from(COLUMN_ORDERS)
seeds = st.integers(0, 10**6)


def problem(rows, columns, seed):
    x = correlated_inputs(3 * columns + 8, columns, seed)
    weight = np.random.default_rng(seed + 1).normal(size=(rows, columns)) * 0.3
    return torch.from_numpy(weight), torch.from_numpy(x.T @ x)


def factor_of(hessian_CC, columns_in_order) -> Factor:
    """Damped at the floor; columns in the order in which they are solved."""
    order_C = torch.tensor(columns_in_order).flip(0)
    factor = factor_hessian(hessian_CC, num_tokens=MANY_TOKENS, order_C=order_C)
    assert factor is not None
    return factor


def losses(weight_RC, codes_RC, grid, matrix):
    """e M e^T of every row, by what the codes mean in a file."""
    error = weight_RC.numpy() - with_codes(grid, codes_RC).dequantize().double().numpy()
    return quadratic(error, matrix)


def squared_steps(grid, columns):
    width = grid.scheme.columns_per_group(columns)
    return grid.scale_RG.double().numpy().repeat(width, axis=1)[:, :columns] ** 2


H = [[4, 2, 0, 1], [2, 3, 1, 0], [0, 1, 2, 0.5], [1, 0, 0.5, 1]]
W = [[0.9, -0.4, 0.3, 0.6], [-0.35, 0.8, -0.9, 0.1]]


@pytest.mark.parametrize("order", COLUMN_ORDERS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_published_vector_targets_losses_and_optimum(bits, order):
    hessian, weight_RC = np.array(H), torch.tensor(W, dtype=torch.float64)
    scheme = WeightScheme(bits=bits, is_symmetric=True, group_size=WHOLE_ROW)
    grid = AffineGrid(
        scheme=scheme,
        scale_RG=torch.full((2, 1), 0.5),
        zero_RG=None,
        is_bounded_RG=torch.zeros(2, 1, dtype=torch.bool),
    )
    # The vector is undamped: what the factor will add is taken away before.
    added = 0.002 * hessian.diagonal().mean() / 1.002
    factor = factor_of(torch.from_numpy(hessian - added * np.eye(4)), solving_order(order, hessian, 4))
    codes_RC, num_clipped_R = solve_codes(weight_RC, grid, factor)
    offsets = codes_RC.double() - scheme.middle_code
    assert offsets.tolist() == [[2, -1, 1, 1], [-1, 2, -2, 1]]
    assert not num_clipped_R.any()
    # By position, the last of which is solved first.
    error_RC = weight_RC - 0.5 * offsets
    unit_CC = torch.eye(4, dtype=torch.float64)
    target_RC = (weight_RC.flip(1) + error_RC.flip(1) @ (factor.feedback_CC - unit_CC)).flip(1)
    wanted = [[0.9, -0.494118, 0.385714, 0.4], [-0.35, 0.941176, -1.057143, 0.3]]
    torch.testing.assert_close(target_RC, torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)
    paid_R = ((target_RC - 0.5 * offsets) * factor.pivots_C.flip(0)).square().sum(1)
    torch.testing.assert_close(paid_R, torch.tensor([0.04, 0.07], dtype=torch.float64), atol=1e-12, rtol=0)

    nearest_RC, _ = nearest_codes(weight_RC, grid)
    assert (nearest_RC.int() - scheme.middle_code).tolist() == [[2, -1, 1, 1], [-1, 2, -2, 0]]
    np.testing.assert_allclose(losses(weight_RC, nearest_RC, grid, hessian), [0.04, 0.12], atol=1e-12)
    levels = np.repeat(0.5 * np.arange(-4, 4)[:, None], 4, axis=1)
    for row, cheapest in enumerate(([0.04], [0.07, 0.12])):
        choices, cost = every_loss(weight_RC[row].numpy(), hessian, levels)
        first = np.argsort(cost)[: len(cheapest)]
        np.testing.assert_allclose(cost[first], cheapest, atol=1e-12)
        assert (choices[first[0]] - 4).tolist() == offsets[row].tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), schemes, orders, st.sampled_from([1.0, 2.0, 4.0]), seeds)
def test_rows_without_clipping_meet_the_bound(columns, scheme, order, room, seed):
    weight_RC, hessian_CC = problem(8, columns, seed)
    hessian, width = hessian_CC.numpy(), scheme.columns_per_group(columns)
    grid = fit_to_extremes((weight_RC * room).float(), scheme, scale_dtype=torch.bfloat16)
    solved = solving_order(order, hessian, width)
    codes_RC, num_clipped_R = solve_codes(weight_RC, grid, factor_of(hessian_CC, solved))
    damped = damped_hessian(hessian, MANY_TOKENS)
    zero = (-offset_bounds(grid, torch.float64)[0]).numpy().astype(int)
    reference = solve_by_elimination(
        weight_RC.numpy(),
        damped,
        grid.scale_RG.double().numpy(),
        zero,
        width=width,
        bits=scheme.bits,
        order=solved,
    )
    assert num_clipped_R.tolist() == reference.clipped.tolist()
    bound = squared_steps(grid, columns) @ reference.pivots / 4
    kept = reference.clipped == 0
    assert (losses(weight_RC, codes_RC, grid, damped)[kept] <= bound[kept] * (1 + 1e-9)).all()


@pytest.mark.parametrize("order", COLUMN_ORDERS)
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_mean_loss_is_a_twelfth_of_the_squared_steps(is_symmetric, order):
    weight_RC, hessian_CC = problem(128, 256, seed=21)
    hessian = hessian_CC.numpy()
    scheme = WeightScheme(bits=8, is_symmetric=is_symmetric, group_size=64)
    grid = fit_to_extremes((weight_RC * 1.5).float(), scheme, scale_dtype=torch.bfloat16)
    solved = solving_order(order, hessian, 64)
    codes_RC, num_clipped_R = solve_codes(weight_RC, grid, factor_of(hessian_CC, solved))
    assert not num_clipped_R.any()
    damped, steps = damped_hessian(hessian, MANY_TOKENS), squared_steps(grid, 256)
    # The pivots are variances given the columns that are solved later: numpy's factor of the reversed matrix.
    backward = np.array(solved)[::-1]
    pivots = np.empty(256)
    pivots[backward] = np.linalg.cholesky(damped[np.ix_(backward, backward)]).diagonal() ** 2
    expected = (steps @ pivots).sum() / 12
    assert losses(weight_RC, codes_RC, grid, damped).sum() == pytest.approx(expected, rel=0.05)
    # Of rounding to nearest it is the same with the whole diagonal: what the feedback is for.
    nearest = losses(weight_RC, nearest_codes(weight_RC, grid)[0], grid, hessian).sum()
    assert nearest == pytest.approx((steps @ hessian.diagonal()).sum() / 12, rel=0.05)
    assert expected < 0.6 * nearest


def small_layers():
    """40 problems of 24 rows and 4 columns, few enough to try all codes of 2 bits, and each row's least cost.

    The inputs behind the published ratios are not recorded. These were chosen to give them: features of
    uneven size that hang together, and scales on which no weight is clipped.
    """
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(64, 4)) @ (np.eye(4) + 0.35 * rng.normal(size=(4, 4)))
        x *= np.exp(1.5 * rng.normal(size=4))
        weight_RC = torch.from_numpy(np.random.default_rng(1000 + seed).normal(size=(24, 4)))
        # Scales of absmax: the levels are -2, -1, 0 and 1 times the largest weight.
        grid = fit_to_extremes((weight_RC * 1.5).float(), W2, scale_dtype=torch.float32)
        damped = damped_hessian(x.T @ x, MANY_TOKENS)
        scale = grid.scale_RG.double().numpy()
        levels = [np.repeat(step * np.arange(-2, 2)[:, None], 4, axis=1) for step in scale]
        rows = zip(weight_RC.numpy(), levels, strict=True)
        least = np.array([every_loss(row, damped, chosen)[1].min() for row, chosen in rows])
        yield weight_RC, torch.from_numpy(x.T @ x), grid, damped, least


def test_small_problems_cost_the_published_multiples_of_the_best_codes():
    ratios = []
    for weight_RC, hessian_CC, grid, damped, least in small_layers():
        found = [nearest_codes(weight_RC, grid)[0]]
        for order in ("natural", "activation"):
            factor = factor_of(hessian_CC, solving_order(order, hessian_CC.numpy(), 4))
            found.append(solve_codes(weight_RC, grid, factor)[0])
        cost = [losses(weight_RC, codes_RC, grid, damped) for codes_RC in found]
        assert all((each >= least * (1 - 1e-9)).all() for each in cost)
        ratios.append([(each / least).mean() for each in cost])
    nearest, natural, activation = np.mean(ratios, axis=0)
    assert nearest == pytest.approx(1.45, abs=0.03)
    assert natural == pytest.approx(1.27, abs=0.03)
    assert activation == pytest.approx(1.01, abs=0.015)


def test_small_problems_best_order_finds_the_best_codes():
    ratios = []
    for weight_RC, hessian_CC, grid, damped, least in itertools.islice(small_layers(), 10):
        cost = []
        for order in itertools.permutations(range(4)):
            codes_RC, _ = solve_codes(weight_RC, grid, factor_of(hessian_CC, order))
            cost.append(losses(weight_RC, codes_RC, grid, damped))
        ratios.append((np.min(cost, axis=0) / least).mean())
    # Published as 1.00 of ten single rows.
    assert np.mean(ratios) < 1.01


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), schemes, orders, st.booleans(), seeds)
def test_neither_descent_nor_refit_raises_the_loss_from_any_codes(columns, scheme, order, is_random, seed):
    weight_RC, hessian_CC = problem(8, columns, seed)
    hessian = hessian_CC.numpy()
    grid = fit_to_extremes(weight_RC.float(), scheme, scale_dtype=torch.bfloat16)
    factor = factor_of(hessian_CC, solving_order(order, hessian, scheme.columns_per_group(columns)))
    codes_RC, _ = solve_codes(weight_RC, grid, factor)
    if is_random:
        drawn = np.random.default_rng(seed).integers(0, scheme.num_codes, size=codes_RC.shape)
        codes_RC = torch.from_numpy(drawn.astype(np.uint8))
    damped = damped_hessian(hessian, MANY_TOKENS)
    before = losses(weight_RC, codes_RC, grid, damped)
    for is_refit in (False, True, False):
        if is_refit:
            grid = refit_scales(weight_RC, codes_RC, grid, hessian_CC, damping=factor.damping)
        else:
            codes_RC, _ = descend(
                weight_RC, codes_RC, grid, hessian_CC, damping=factor.damping, order_C=factor.order_C
            )
        after = losses(weight_RC, codes_RC, grid, damped)
        assert (after <= before * (1 + 1e-9) + 1e-15).all()
        before = after


@pytest.mark.parametrize("search", ["minmax", "absmax", "mse"])
@pytest.mark.parametrize("order", COLUMN_ORDERS)
@pytest.mark.parametrize("name", INTEGER_NAMES)
def test_method_costs_less_than_rounding_on_the_same_scales(name, order, search):
    scheme, solver = scheme_from_name(name, 32), SolverSettings(scale_search=search, column_order=order)
    ratios = []
    for seed in range(2):
        weight_RC, hessian_CC = problem(24, 96, seed)
        cost = []
        for method in ("gptq", "rtn"):
            found = METHODS[method](
                {"w": weight_RC.float()},
                {"w": scheme},
                hessian_CC=hessian_CC.float(),
                num_tokens=3 * 96 + 8,
                scale_dtype=torch.bfloat16,
                solver=solver,
            )["w"].quantized
            error = weight_RC.numpy() - found.dequantize().double().numpy()
            cost.append((found.scale_RG, quadratic(error, hessian_CC.numpy()).sum()))
        assert torch.equal(cost[0][0], cost[1][0])
        ratios.append(cost[0][1] / cost[1][1])
    # Clipping breaks every guarantee, so a layer may cost a little more. Measured: 0.37 to 0.75.
    assert max(ratios) <= 1.02
    assert np.mean(ratios) < 0.8
