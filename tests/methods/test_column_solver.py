"""The solver against the published algorithm in float64, its vector and its invariants."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.grids.affine import AffineGrid, nearest_codes, with_codes
from quantlib.grids.fit import fit_to_extremes, search_scales
from quantlib.linalg import factor_hessian
from quantlib.methods import column_tile
from quantlib.methods.column_solver import solve_codes
from quantlib.schemes import INTEGER_NAMES, WHOLE_ROW, WeightScheme, scheme_from_name
from tests.support.reference_solver import correlated_inputs, solve_reference

MANY_TOKENS = 10**9
FLOOR = 0.002


def problem(rows, columns, seed, *, dtype=torch.float64, num_tokens=None):
    x = correlated_inputs(num_tokens or 3 * columns + 8, columns, seed)
    weight = np.random.default_rng(seed + 1).normal(size=(rows, columns)) * 0.3
    return torch.from_numpy(weight).to(dtype), torch.from_numpy(x.T @ x).to(dtype)


def reference_for(weight_RC, hessian_CC, grid, damping_fraction=FLOOR):
    scheme, columns = grid.scheme, weight_RC.shape[1]
    zero = torch.full(grid.scale_RG.shape, scheme.middle_code) if grid.zero_RG is None else grid.zero_RG
    return solve_reference(
        weight_RC.double().numpy(),
        hessian_CC.double().numpy(),
        grid.scale_RG.double().numpy(),
        zero.numpy(),
        group_width=scheme.columns_per_group(columns),
        num_codes=scheme.num_codes,
        damping=damping_fraction * hessian_CC.double().diagonal().mean().item(),
    )


def step_grid(rows, columns, step, bits=8):
    scheme = WeightScheme(bits=bits, is_symmetric=True, group_size=WHOLE_ROW)
    return AffineGrid(
        scheme=scheme,
        scale_RG=torch.full((rows, 1), step),
        zero_RG=None,
        is_bounded_RG=torch.zeros(rows, 1, dtype=torch.bool),
    )


def test_solver_published_vector():
    h = torch.tensor([[4, 2, 0, 1], [2, 3, 1, 0], [0, 1, 2, 0.5], [1, 0, 0.5, 1]], dtype=torch.float64)
    w = torch.tensor([[0.9, -0.4, 0.3, 0.6], [-0.35, 0.8, -0.9, 0.1]], dtype=torch.float64)
    added = FLOOR * h.diagonal().mean() / (1 + FLOOR)
    factor = factor_hessian(h - added * torch.eye(4), num_tokens=MANY_TOKENS)
    codes_RC, num_clipped_R = solve_codes(w, step_grid(2, 4, 0.5), factor)
    offsets = codes_RC.double() - 128
    assert offsets.tolist() == [[2, -1, 1, 1], [-1, 2, -2, 1]]
    assert num_clipped_R.tolist() == [0, 0]
    error = w - 0.5 * offsets
    torch.testing.assert_close(
        ((error @ h) * error).sum(1), torch.tensor([0.04, 0.07], dtype=torch.float64), atol=1e-12, rtol=0
    )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 60),
    group_size=st.sampled_from([8, 16, WHOLE_ROW]),
    name=st.sampled_from(INTEGER_NAMES),
    seed=st.integers(0, 10**6),
)
def test_solver_any_problem_float64_codes_equal_the_reference(rows, columns, group_size, name, seed):
    weight_RC, hessian_CC = problem(rows, columns, seed)
    scheme = scheme_from_name(name, group_size)
    grid = search_scales(weight_RC.float(), scheme, scale_dtype=torch.bfloat16)
    factor = factor_hessian(hessian_CC, num_tokens=MANY_TOKENS)
    codes_RC, _ = solve_codes(weight_RC, grid, factor)
    reference = reference_for(weight_RC, hessian_CC, grid)
    assert np.array_equal(codes_RC.numpy(), reference.codes)
    # The levels that were fed back are the levels the file means.
    assert np.array_equal(with_codes(grid, codes_RC).dequantize().numpy(), reference.levels)


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM"])
def test_solver_several_batches_equal_the_reference_and_its_loss(name):
    weight_RC, hessian_CC = problem(24, 300, seed=5)
    grid = search_scales(weight_RC.float(), scheme_from_name(name, 64), scale_dtype=torch.bfloat16)
    factor = factor_hessian(hessian_CC, num_tokens=MANY_TOKENS)
    codes_RC, _ = solve_codes(weight_RC, grid, factor)
    reference = reference_for(weight_RC, hessian_CC, grid)
    assert np.array_equal(codes_RC.numpy(), reference.codes)
    error = weight_RC - with_codes(grid, codes_RC).dequantize().double()
    damped = hessian_CC + FLOOR * hessian_CC.diagonal().mean() * torch.eye(300, dtype=torch.float64)
    np.testing.assert_allclose(((error @ damped) * error).sum(1).numpy(), reference.loss, rtol=1e-10)


def test_solver_fp32_agrees_with_float64():
    weight_RC, hessian_CC = problem(48, 400, seed=7)
    grid = search_scales(weight_RC.float(), scheme_from_name("W4A16", 64), scale_dtype=torch.bfloat16)
    single = factor_hessian(hessian_CC.float(), num_tokens=MANY_TOKENS)
    codes_RC, _ = solve_codes(weight_RC.float(), grid, single)
    reference = reference_for(weight_RC.float(), hessian_CC.float(), grid)
    # A rounding that falls the other way at a near-tie moves later codes of its row; most rows meet none.
    assert (codes_RC.numpy() == reference.codes).mean() > 0.98
    error = weight_RC - with_codes(grid, codes_RC).dequantize().double()
    loss = ((error @ hessian_CC) * error).sum().item()
    wanted = weight_RC.numpy() - reference.levels
    assert loss == pytest.approx(np.sum((wanted @ hessian_CC.numpy()) * wanted), rel=3e-3)


@pytest.mark.parametrize("name", INTEGER_NAMES)
@pytest.mark.parametrize("kind", ["identity", "any diagonal"])
def test_solver_diagonal_hessian_equals_round_to_nearest(name, kind):
    weight_RC = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    diagonal_C = torch.rand(200, generator=torch.Generator().manual_seed(1)) + 0.01
    hessian_CC = torch.eye(200) * 3.7 if kind == "identity" else torch.diag(diagonal_C)
    grid = search_scales(weight_RC, scheme_from_name(name, 64), scale_dtype=torch.float16)
    codes_RC, num_clipped_R = solve_codes(weight_RC, grid, factor_hessian(hessian_CC, num_tokens=200))
    nearest_RC, nearest_clipped_R = nearest_codes(weight_RC, grid)
    assert torch.equal(codes_RC, nearest_RC)
    assert torch.equal(num_clipped_R, nearest_clipped_R)


@pytest.mark.parametrize(("batch", "leaf"), [(1, 1), (8, 4), (16, 16), (64, 7), (512, 32)])
def test_solver_column_batch_width_changes_no_code_in_float64(batch, leaf, monkeypatch):
    weight_RC, hessian_CC = problem(16, 200, seed=9)
    grid = search_scales(weight_RC.float(), scheme_from_name("W4A16", 32), scale_dtype=torch.bfloat16)
    factor = factor_hessian(hessian_CC, num_tokens=MANY_TOKENS)
    usual_RC, _ = solve_codes(weight_RC, grid, factor)
    monkeypatch.setattr(column_tile, "BATCH_COLUMNS", batch)
    monkeypatch.setattr(column_tile, "LEAF_COLUMNS", leaf)
    assert torch.equal(solve_codes(weight_RC, grid, factor)[0], usual_RC)


def test_solver_rows_do_not_depend_on_their_neighbors():
    weight_RC, hessian_CC = problem(333, 192, seed=11, dtype=torch.float32)
    grid = search_scales(weight_RC, scheme_from_name("W4A16_ASYM", 64), scale_dtype=torch.bfloat16)
    factor = factor_hessian(hessian_CC, num_tokens=1000)
    whole_RC, whole_clipped_R = solve_codes(weight_RC, grid, factor)
    for part in (slice(0, 1), slice(5, 38), slice(100, 333)):
        codes_RC, num_clipped_R = solve_codes(weight_RC[part], grid.rows(part), factor)
        assert torch.equal(codes_RC, whole_RC[part])
        assert torch.equal(num_clipped_R, whole_clipped_R[part])
    shuffled = torch.randperm(333, generator=torch.Generator().manual_seed(0))
    assert torch.equal(solve_codes(weight_RC[shuffled], grid.rows(shuffled), factor)[0], whole_RC[shuffled])


def test_solver_leaves_weights_alone():
    weight_RC, hessian_CC = problem(16, 64, seed=0, dtype=torch.float32)
    before = weight_RC.clone()
    grid = search_scales(weight_RC, scheme_from_name("W4A16", 32), scale_dtype=torch.bfloat16)
    solve_codes(weight_RC, grid, factor_hessian(hessian_CC, num_tokens=100))
    assert torch.equal(weight_RC, before)


def test_solver_permuted_columns_give_permuted_codes():
    weight_RC, hessian_CC = problem(8, 90, seed=13)
    grid = step_grid(8, 90, 0.02)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(2))
    plain_RC, _ = solve_codes(weight_RC, grid, factor_hessian(hessian_CC, num_tokens=MANY_TOKENS))
    moved = factor_hessian(hessian_CC[order][:, order], num_tokens=MANY_TOKENS)
    assert torch.equal(solve_codes(weight_RC[:, order], grid, moved)[0], plain_RC[:, order])


def test_solver_dead_columns_are_rounded_to_nearest():
    weight_RC, hessian_CC = problem(32, 130, seed=15, dtype=torch.float32)
    dead = [0, 64, 65, 129]
    hessian_CC[dead], hessian_CC[:, dead] = 0, 0
    grid = search_scales(weight_RC, scheme_from_name("W4A16", 64), scale_dtype=torch.bfloat16)
    codes_RC, _ = solve_codes(weight_RC, grid, factor_hessian(hessian_CC, num_tokens=500))
    assert torch.equal(codes_RC[:, dead], nearest_codes(weight_RC, grid)[0][:, dead])
    assert not torch.equal(codes_RC, nearest_codes(weight_RC, grid)[0])


def test_solver_without_clipping_meets_bound_and_expectation():
    weight_RC, hessian_CC = problem(128, 256, seed=17)
    step = 0.015
    factor = factor_hessian(hessian_CC, num_tokens=MANY_TOKENS)
    grid = step_grid(128, 256, step)
    codes_RC, num_clipped_R = solve_codes(weight_RC, grid, factor)
    assert num_clipped_R.sum() == 0
    error = weight_RC - with_codes(grid, codes_RC).dequantize().double()
    damped = hessian_CC + FLOOR * hessian_CC.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    loss_R = ((error @ damped) * error).sum(1)
    pivots = factor.pivots_C.square().sum()
    stored_step = grid.scale_RG[0, 0].double()
    assert (loss_R <= stored_step**2 * pivots / 4).all()
    # Babai: residuals are uniform in a step, so the mean loss is step**2 / 12 times the squared pivots.
    assert loss_R.mean().item() == pytest.approx((stored_step**2 * pivots / 12).item(), rel=0.05)


def test_solver_counts_clipped_targets():
    weight_RC = torch.full((2, 64), 0.1, dtype=torch.float32)
    weight_RC[1, 3] = 50.0
    codes_RC, num_clipped_R = solve_codes(
        weight_RC, step_grid(2, 64, 0.1, bits=4), factor_hessian(torch.eye(64), num_tokens=64)
    )
    assert num_clipped_R.tolist() == [0, 1]
    assert codes_RC[1, 3] == 15


def test_solver_requantizing_its_levels_is_a_fixed_point():
    weight_RC, hessian_CC = problem(16, 96, seed=19, dtype=torch.float32)
    grid = search_scales(weight_RC, scheme_from_name("W4A16_ASYM", 32), scale_dtype=torch.float16)
    factor = factor_hessian(hessian_CC, num_tokens=500)
    codes_RC, _ = solve_codes(weight_RC, grid, factor)
    levels_RC = with_codes(grid, codes_RC).dequantize()
    assert torch.equal(solve_codes(levels_RC, grid, factor)[0], codes_RC)


def test_solver_small_problems_stay_close_to_brute_force():
    ratios, nearest_ratios = [], []
    for seed in range(30):
        weight_RC, hessian_CC = problem(1, 4, seed=100 + seed, num_tokens=12)
        grid = fit_to_extremes(
            weight_RC.float(),
            WeightScheme(bits=2, is_symmetric=True, group_size=-1),
            scale_dtype=torch.float32,
        )
        damped = hessian_CC + FLOOR * hessian_CC.diagonal().mean() * torch.eye(4)

        def loss(codes_RC, weight_RC=weight_RC, grid=grid, damped=damped):
            error = weight_RC - with_codes(grid, codes_RC).dequantize().double()
            return ((error @ damped) * error).sum().item()

        least = min(loss(torch.tensor([codes])) for codes in itertools.product(range(4), repeat=4))
        codes_RC, _ = solve_codes(weight_RC, grid, factor_hessian(hessian_CC, num_tokens=MANY_TOKENS))
        ratios.append(loss(codes_RC) / least)
        nearest_ratios.append(loss(nearest_codes(weight_RC, grid)[0]) / least)
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(ratios) < 0.75 * np.mean(nearest_ratios)
