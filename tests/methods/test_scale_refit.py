"""Least-squares scales against numpy's solver, and what is kept when they do not help."""

import numpy as np
import pytest
import torch

from quantlib.grids.affine import AffineGrid, nearest_codes, with_codes
from quantlib.grids.fit import fit_to_extremes
from quantlib.methods.scale_refit import refit_scales
from quantlib.schemes import WHOLE_ROW, WeightScheme
from tests.support.reference_solver import correlated_inputs


def problem(rows, columns, seed):
    x = correlated_inputs(3 * columns + 8, columns, seed)
    weight = np.random.default_rng(seed + 1).normal(size=(rows, columns)) * 0.3
    return torch.from_numpy(weight).float(), torch.from_numpy(x.T @ x).float()


def losses(weight_RC, codes_RC, grid, hessian_CC, damping):
    error = weight_RC.double() - with_codes(grid, codes_RC).dequantize().double()
    damped = hessian_CC.double() + damping * torch.eye(len(hessian_CC), dtype=torch.float64)
    return ((error @ damped) * error).sum(1)


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(96, 32), (100, 32), (64, WHOLE_ROW)])
def test_refit_solves_the_least_squares_problem(columns, group_size, is_symmetric):
    # Inputs that hardly hang together: the answer lies near the scales of the codes, as after a solve.
    x = np.random.default_rng(1).normal(size=(4 * columns, columns))
    weight_RC = torch.from_numpy(np.random.default_rng(2).normal(size=(7, columns)) * 0.3).float()
    hessian_CC = torch.from_numpy(x.T @ x).float()
    scheme = WeightScheme(bits=3, is_symmetric=is_symmetric, group_size=group_size)
    grid = fit_to_extremes(weight_RC, scheme, scale_dtype=torch.float32)
    codes_RC, _ = nearest_codes(weight_RC, grid)
    damping = 0.01 * hessian_CC.diagonal().mean().item()
    found = refit_scales(weight_RC, codes_RC, grid, hessian_CC, damping=damping)
    # |L^T (W - sum_g s_g O_g)|**2 with H = L L^T, by numpy's least squares on the unsquared problem.
    root = np.linalg.cholesky(hessian_CC.double().numpy() + damping * np.eye(columns))
    width = scheme.columns_per_group(columns)
    zero = np.full(grid.scale_RG.shape, 4.0) if grid.zero_RG is None else grid.zero_RG.double().numpy()
    for row in range(7):
        offsets = codes_RC[row].numpy() - np.repeat(zero[row], width)[:columns]
        basis = np.zeros((columns, scheme.num_groups(columns)))
        for column in range(columns):
            basis[column, column // width] = offsets[column]
        wanted, *_ = np.linalg.lstsq(root.T @ basis, root.T @ weight_RC[row].double().numpy(), rcond=None)
        np.testing.assert_allclose(found.scale_RG[row].numpy(), wanted, rtol=1e-4)


def test_refit_never_raises_the_stored_loss_of_a_row():
    weight_RC, hessian_CC = problem(60, 256, seed=2)
    scheme = WeightScheme(bits=4, is_symmetric=True, group_size=32)
    grid = fit_to_extremes(weight_RC, scheme, scale_dtype=torch.bfloat16)
    codes_RC, _ = nearest_codes(weight_RC, grid)
    before_R = losses(weight_RC, codes_RC, grid, hessian_CC, 1.0)
    found = refit_scales(weight_RC, codes_RC, grid, hessian_CC, damping=1.0)
    after_R = losses(weight_RC, codes_RC, found, hessian_CC, 1.0)
    assert found.scale_RG.dtype == torch.bfloat16
    assert (after_R <= before_R * (1 + 1e-5)).all()
    assert after_R.sum() < 0.99 * before_R.sum()
    # Fitted again to the same codes there is nothing left to gain.
    again = refit_scales(weight_RC, codes_RC, found, hessian_CC, damping=1.0)
    assert losses(weight_RC, codes_RC, again, hessian_CC, 1.0).sum() > 0.999 * after_R.sum()


def test_refit_leaves_groups_of_zeros_and_hopeless_scales_alone():
    weight_RC, hessian_CC = problem(16, 64, seed=3)
    weight_RC[:, :32] = 0.0
    scheme = WeightScheme(bits=4, is_symmetric=True, group_size=32)
    grid = fit_to_extremes(weight_RC, scheme, scale_dtype=torch.bfloat16)
    codes_RC, _ = nearest_codes(weight_RC, grid)
    found = refit_scales(weight_RC, codes_RC, grid, hessian_CC, damping=1.0)
    assert torch.equal(found.scale_RG[:, 0], grid.scale_RG[:, 0])
    # The best scale of codes that all point the wrong way is negative, which no format stores.
    wrong_RC = (16 - codes_RC.int()).clamp(0, 15).to(torch.uint8)
    kept = refit_scales(weight_RC, wrong_RC, grid, hessian_CC, damping=1.0)
    assert torch.equal(kept.scale_RG, grid.scale_RG)


def test_refit_rows_do_not_depend_on_their_neighbors():
    weight_RC, hessian_CC = problem(50, 128, seed=4)
    scheme = WeightScheme(bits=2, is_symmetric=False, group_size=32)
    grid = fit_to_extremes(weight_RC, scheme, scale_dtype=torch.float16)
    codes_RC, _ = nearest_codes(weight_RC, grid)
    whole: AffineGrid = refit_scales(weight_RC, codes_RC, grid, hessian_CC, damping=1.0)
    part = slice(3, 24)
    alone = refit_scales(weight_RC[part], codes_RC[part], grid.rows(part), hessian_CC, damping=1.0)
    assert torch.equal(alone.scale_RG, whole.scale_RG[part])
