"""Moments from exact totals: centered ones against float64, where the mean is far larger than the spread."""

import numpy as np
import pytest
import torch

from quantlib.calibration.hessian import add_partial_, cross_product, exponent_for, gram_lower
from quantlib.calibration.moments import (
    Moments,
    Total,
    about_zero,
    centered_moments,
    moments_from,
    with_sums,
    without_sums,
)

CELLS, TOKENS, COLUMNS = 3, 50, 9


def _inputs(seed: int, offset: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    means_C = offset * torch.randn(COLUMNS, generator=generator)
    return [torch.randn(TOKENS, COLUMNS, generator=generator) + means_C for _ in range(CELLS)]


def _total(left: list[torch.Tensor], right: list[torch.Tensor], *, is_whole: bool) -> Total:
    sum_EE, exponent = torch.zeros(COLUMNS + 1, COLUMNS + 1, dtype=torch.int64), None
    for left_NC, right_NC in zip(left, right, strict=True):
        product_CC = cross_product(left_NC, right_NC) if is_whole else gram_lower(right_NC)
        partial_EE = with_sums(product_CC, left_NC, right_NC)
        if exponent is None:
            exponent = exponent_for(float(partial_EE.abs().max()), CELLS)
        add_partial_(sum_EE, partial_EE, exponent, is_whole=is_whole)
    assert exponent is not None
    return Total(sum_CC=sum_EE, exponent=exponent)


def _float64(parts: list[torch.Tensor]) -> np.ndarray:
    return torch.cat(parts).double().numpy()


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0])
def test_centered_moments_equal_the_float64_covariance(offset):
    x, reference = _inputs(0, offset), _inputs(1, offset)
    found = centered_moments(_total(x, x, is_whole=False), _total(reference, x, is_whole=True))
    x_NC, reference_NC = _float64(x), _float64(reference)
    about_NC, its_NC = x_NC - x_NC.mean(0), reference_NC - reference_NC.mean(0)
    # Partial sums are fp32: what is left of their rounding, however small the centered entries are.
    tolerance = 2.0**-22 * np.square(x_NC).sum(0).max()
    np.testing.assert_allclose(found.hessian_CC, about_NC.T @ about_NC, atol=tolerance)
    assert found.cross_CC is not None and found.mean_C is not None and found.reference_mean_C is not None
    np.testing.assert_allclose(found.cross_CC, its_NC.T @ about_NC, atol=tolerance)
    np.testing.assert_allclose(found.mean_C, x_NC.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.reference_mean_C, reference_NC.mean(0), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.hessian_CC, found.hessian_CC.T)


def test_centered_moments_take_means_off_before_anything_is_rounded():
    """Multiples of 1/8 about 64: partial sums are exact in fp32, but not the total of all cells."""
    generator = torch.Generator().manual_seed(4)
    x = [64.0 + torch.randint(-2, 3, (16, COLUMNS), generator=generator) / 8 for _ in range(32)]
    sum_EE, exponent = torch.zeros(COLUMNS + 1, COLUMNS + 1, dtype=torch.int64), 20
    for x_NC in x:
        add_partial_(sum_EE, with_sums(gram_lower(x_NC), x_NC, x_NC), exponent)
    found = centered_moments(Total(sum_CC=sum_EE, exponent=exponent), None)
    x_NC = _float64(x)
    np.testing.assert_allclose(found.hessian_CC, (x_NC - x_NC.mean(0)).T @ (x_NC - x_NC.mean(0)), rtol=1e-5)


def test_centered_moments_of_columns_that_hardly_vary_are_dead():
    x = _inputs(0, 1.0)
    for part_NC in x:
        part_NC[:, 2] = 1.7
        part_NC[:, 5] = 300.0 + 1e-4 * part_NC[:, 5]
    found = centered_moments(_total(x, x, is_whole=False), _total(x, x, is_whole=True))
    diagonal_C = found.hessian_CC.diagonal()
    assert (diagonal_C == 0).nonzero().flatten().tolist() == [2, 5]
    assert (diagonal_C >= 0).all()
    assert not found.hessian_CC[2].any() and not found.hessian_CC[:, 5].any()
    assert found.cross_CC is not None and not found.cross_CC[:, [2, 5]].any()


def test_moments_about_zero_are_those_the_means_were_taken_off():
    x, reference = _inputs(0, 1.0), _inputs(1, 1.0)
    total, cross = _total(x, x, is_whole=False), _total(reference, x, is_whole=True)
    found = about_zero(centered_moments(total, cross), CELLS * TOKENS)
    wanted = moments_from(without_sums(total), without_sums(cross))
    np.testing.assert_allclose(found.hessian_CC, wanted.hessian_CC, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(
        torch.as_tensor(found.cross_CC), torch.as_tensor(wanted.cross_CC), rtol=1e-5, atol=1e-3
    )


def test_centered_moments_without_a_reference_take_the_inputs_mean_for_its():
    x = _inputs(0, 1.0)
    found = centered_moments(_total(x, x, is_whole=False), None)
    assert found.cross_CC is None and found.mean_C is not None
    assert torch.equal(found.mean_C, torch.as_tensor(found.reference_mean_C))


def test_centered_moments_of_no_token_are_zero():
    total = Total(sum_CC=torch.zeros(4, 4, dtype=torch.int64), exponent=10)
    found = centered_moments(total, total)
    assert not found.hessian_CC.any()
    assert found.mean_C is not None and not found.mean_C.any()


def test_moments_of_an_extended_total_without_its_sums_are_those_of_a_plain_one():
    x, reference = _inputs(0, 1.0), _inputs(1, 1.0)
    total, cross = _total(x, x, is_whole=False), _total(reference, x, is_whole=True)
    found: Moments = moments_from(without_sums(total), without_sums(cross))
    x_NC, reference_NC = _float64(x), _float64(reference)
    np.testing.assert_allclose(found.hessian_CC, x_NC.T @ x_NC, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(torch.as_tensor(found.cross_CC), reference_NC.T @ x_NC, rtol=1e-5, atol=1e-3)
    assert found.mean_C is None
