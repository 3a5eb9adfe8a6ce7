"""Moments from exact totals: centered ones against float64, where the mean is far larger than the spread."""

import numpy as np
import pytest
import torch

from quantlib.calibration.moments import Moments, about_zero, centered_moments, moments_from
from quantlib.calibration.totals import Total, exponent_for
from tests.support.partials import partial_of

CELLS, TOKENS, COLUMNS = 3, 50, 9


def _inputs(seed: int, offset: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    means_C = offset * torch.randn(COLUMNS, generator=generator)
    return [torch.randn(TOKENS, COLUMNS, generator=generator) + means_C for _ in range(CELLS)]


def _totals(left: list[torch.Tensor], right: list[torch.Tensor], *, is_whole: bool) -> list[Total]:
    """Of two workers: one has the first cell, the other the rest."""
    totals: list[Total] = []
    for number, (left_NC, right_NC) in enumerate(zip(left, right, strict=True)):
        partial = partial_of(right_NC, left_NC if is_whole else None, has_sums=True)
        if not totals:
            exponent = exponent_for(partial.peak, CELLS)
            totals = [Total.zeros(COLUMNS + 1, exponent, is_whole=is_whole) for _ in range(2)]
        totals[min(number, 1)].add_(partial.panels)
    return totals


def _centered(totals: list[Total], crosses: list[Total]) -> Moments:
    return centered_moments(totals, crosses, device=torch.device("cpu"))


def _about_zero(totals: list[Total], crosses: list[Total]) -> Moments:
    return moments_from(totals, crosses, is_extended=True, device=torch.device("cpu"))


def _float64(parts: list[torch.Tensor]) -> np.ndarray:
    return torch.cat(parts).double().numpy()


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0])
def test_centered_moments_equal_the_float64_covariance(offset):
    x, reference = _inputs(0, offset), _inputs(1, offset)
    found = _centered(_totals(x, x, is_whole=False), _totals(reference, x, is_whole=True))
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
    total = Total.zeros(COLUMNS + 1, 20)
    for x_NC in x:
        total.add_(partial_of(x_NC, has_sums=True).panels)
    found = _centered([total], [])
    x_NC = _float64(x)
    np.testing.assert_allclose(found.hessian_CC, (x_NC - x_NC.mean(0)).T @ (x_NC - x_NC.mean(0)), rtol=1e-5)


def test_centered_moments_of_columns_that_hardly_vary_are_dead():
    x = _inputs(0, 1.0)
    for part_NC in x:
        part_NC[:, 2] = 1.7
        part_NC[:, 5] = 300.0 + 1e-4 * part_NC[:, 5]
    found = _centered(_totals(x, x, is_whole=False), _totals(x, x, is_whole=True))
    diagonal_C = found.hessian_CC.diagonal()
    assert (diagonal_C == 0).nonzero().flatten().tolist() == [2, 5]
    assert (diagonal_C >= 0).all()
    assert not found.hessian_CC[2].any() and not found.hessian_CC[:, 5].any()
    assert found.cross_CC is not None and not found.cross_CC[:, [2, 5]].any()


def test_moments_about_zero_are_those_the_means_were_taken_off():
    x, reference = _inputs(0, 1.0), _inputs(1, 1.0)
    total, cross = _totals(x, x, is_whole=False), _totals(reference, x, is_whole=True)
    found = about_zero(_centered(total, cross), CELLS * TOKENS)
    wanted = _about_zero(total, cross)
    np.testing.assert_allclose(found.hessian_CC, wanted.hessian_CC, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(
        torch.as_tensor(found.cross_CC), torch.as_tensor(wanted.cross_CC), rtol=1e-5, atol=1e-3
    )


def test_centered_moments_without_a_reference_take_the_inputs_mean_for_its():
    x = _inputs(0, 1.0)
    found = _centered(_totals(x, x, is_whole=False), [])
    assert found.cross_CC is None and found.mean_C is not None
    assert torch.equal(found.mean_C, torch.as_tensor(found.reference_mean_C))


def test_centered_moments_of_no_token_are_zero():
    found = _centered([Total.zeros(4, 10)], [Total.zeros(4, 10, is_whole=True)])
    assert not found.hessian_CC.any()
    assert found.mean_C is not None and not found.mean_C.any()


def test_moments_of_an_extended_total_without_its_sums_are_those_of_a_plain_one():
    x, reference = _inputs(0, 1.0), _inputs(1, 1.0)
    total, cross = _totals(x, x, is_whole=False), _totals(reference, x, is_whole=True)
    found: Moments = _about_zero(total, cross)
    x_NC, reference_NC = _float64(x), _float64(reference)
    np.testing.assert_allclose(found.hessian_CC, x_NC.T @ x_NC, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(torch.as_tensor(found.cross_CC), reference_NC.T @ x_NC, rtol=1e-5, atol=1e-3)
    assert found.mean_C is None
