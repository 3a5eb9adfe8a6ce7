"""Factors in place, in both ways: against numpy in float64, and what is said of matrices without one."""

from functools import partial

import numpy as np
import pytest
import torch

from quantlib.cholesky import CHOLESKYS, blocked_cholesky_, library_cholesky_
from quantlib.errors import NumericsError
from quantlib.linalg import factor_hessian
from quantlib.methods.target_correction import target_change
from tests.support.reference_solver import correlated_inputs

WAYS = {"library": library_cholesky_} | {
    f"panels of {width}": partial(blocked_cholesky_, panel_columns=width) for width in (1, 7, 64, 4096)
}


def symmetric(columns, seed=0):
    x = correlated_inputs(3 * columns + 1, columns, seed)
    return x.T @ x / len(x) + 0.01 * np.eye(columns)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
def test_factor_takes_the_place_of_the_matrix(way, columns, dtype, tolerance):
    wanted = symmetric(columns)
    matrix_CC = torch.tensor(wanted, dtype=dtype)
    place = matrix_CC.data_ptr()
    status = WAYS[way](matrix_CC.mT)
    assert (matrix_CC.data_ptr(), status.item(), status.dtype) == (place, 0, torch.int32)
    factor = matrix_CC.mT.double().numpy()
    assert not np.triu(factor, 1).any()
    np.testing.assert_allclose(factor, np.linalg.cholesky(wanted), atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("way", WAYS)
def test_factor_reads_the_lower_triangle_alone(way):
    wanted = symmetric(100)
    matrix_CC = torch.from_numpy(np.tril(wanted)).mT.contiguous()
    assert WAYS[way](matrix_CC.mT).item() == 0
    np.testing.assert_allclose(matrix_CC.mT.numpy(), np.linalg.cholesky(wanted), atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", [0, 30, 99])
def test_matrix_that_is_not_positive_definite_has_a_status(way, place):
    matrix_CC = torch.tensor(symmetric(100))
    matrix_CC[place, place] = -1.0
    assert WAYS[way](matrix_CC.mT).item() != 0


@pytest.mark.parametrize("way", WAYS)
def test_ladder_of_a_hessian_ends_alike_in_every_way(way):
    off_CC = symmetric(90, seed=2)
    np.fill_diagonal(off_CC, 0.0)
    # The lowest eigenvalue is -0.02.
    hessian_CC = torch.from_numpy(np.eye(90) - 1.02 / np.linalg.eigvalsh(off_CC)[0] * off_CC)
    wanted = factor_hessian(hessian_CC, num_tokens=10**9)
    found = factor_hessian(hessian_CC, num_tokens=10**9, cholesky_=WAYS[way])
    assert (wanted.rung, wanted.num_attempts) == ("more_damping", 3)
    assert (found.rung, found.num_attempts, found.damping) == (
        wanted.rung,
        wanted.num_attempts,
        wanted.damping,
    )
    torch.testing.assert_close(found.feedback_CC, wanted.feedback_CC, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.pivots_C, wanted.pivots_C, rtol=1e-10, atol=0)


def test_targets_are_corrected_alike_in_every_way():
    hessian_CC, cross_CC = (torch.from_numpy(symmetric(90, seed=seed)) for seed in (3, 4))
    wanted = target_change(hessian_CC, cross_CC)
    found = target_change(hessian_CC, cross_CC, WAYS["panels of 7"])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_targets_are_not_corrected_without_a_factor():
    moments_CC = torch.from_numpy(symmetric(20))
    with pytest.raises(NumericsError, match="positive definite"):
        target_change(moments_CC, moments_CC, lambda matrix_CC: torch.tensor(3, dtype=torch.int32))


def test_library_is_preferred():
    assert list(CHOLESKYS) == ["library", "blocked"]
