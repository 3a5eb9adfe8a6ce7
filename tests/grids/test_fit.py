"""Scale fitting: extremes, the weighted search against an exhaustive one, and scales no format may hold."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.grids.affine import nearest_codes, with_codes
from quantlib.grids.fit import fit_to_extremes, search_scales
from quantlib.grids.formats import DIVIDED_SCALES
from quantlib.schemes import INTEGER_NAMES, WHOLE_ROW, WeightScheme, scheme_from_name

DTYPES = [torch.bfloat16, torch.float16]
W4 = WeightScheme(bits=4, is_symmetric=True, group_size=64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weighted_error(weight_RC, grid, importance_C):
    levels_RC = with_codes(grid, nearest_codes(weight_RC, grid)[0]).dequantize()
    error_RC = (levels_RC - weight_RC).double() ** 2 * importance_C.double()
    return torch.stack(
        [g.sum(1) for g in error_RC.split(grid.scheme.columns_per_group(weight_RC.shape[1]), 1)], 1
    )


def exhaustive_error(weight_RC, bits, is_symmetric, importance_C):
    """Least weighted error of one group a row over 300 scales and all zero points, in float64."""
    w, num_codes = weight_RC.double(), 2**bits
    reach = 2 * w.abs().amax(1) if is_symmetric else w.amax(1).clamp_min(0) - w.amin(1).clamp_max(0)
    zeros = [num_codes // 2] if is_symmetric else range(num_codes)
    least = torch.full((len(w),), float("inf"), dtype=torch.float64)
    for multiple in torch.linspace(0.1, 1.12, 300).tolist():
        scale = (multiple * reach / (num_codes - 1))[:, None].bfloat16().double()
        for zero in zeros:
            levels = ((w / scale).round() + zero).clamp(0, num_codes - 1).sub(zero) * scale
            least = torch.minimum(least, ((levels - w) ** 2 * importance_C.double()).sum(1))
    return least


@pytest.mark.parametrize("spread", [0.0, 1.5])
@pytest.mark.parametrize(
    ("name", "worst_mean"),
    [
        ("W4A16", 1.01),
        ("W5A16", 1.03),
        ("W6A16", 1.04),
        ("W4A16_ASYM", 1.05),
        ("W5A16_ASYM", 1.05),
        ("W6A16_ASYM", 1.06),
    ],
)
def test_search_comes_close_to_an_exhaustive_one(name, worst_mean, spread):
    scheme = scheme_from_name(name, WHOLE_ROW)
    weight_RC, importance_C = normal(256, 64), torch.exp(spread * normal(64, seed=1))
    found = search_scales(weight_RC, scheme, scale_dtype=torch.bfloat16, importance_C=importance_C)
    least = exhaustive_error(weight_RC, scheme.bits, scheme.is_symmetric, importance_C)
    # Means over 256 groups of error / least error; the extremes' own scales reach 1.09 to 1.62 here.
    assert (weighted_error(weight_RC, found, importance_C)[:, 0] / least).mean() < worst_mean


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 70),
    group_size=st.sampled_from([8, 32, WHOLE_ROW]),
    name=st.sampled_from(INTEGER_NAMES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_search_any_weight_is_never_worse_than_extremes(rows, columns, group_size, name, dtype, seed, spread):
    scheme = scheme_from_name(name, group_size)
    weight_RC = normal(rows, columns, seed=seed) ** 3
    importance_C = torch.exp(spread * normal(columns, seed=seed + 1))
    plain = fit_to_extremes(weight_RC, scheme, scale_dtype=dtype)
    found = search_scales(weight_RC, scheme, scale_dtype=dtype, importance_C=importance_C)
    assert found.scale_RG.dtype == dtype and found.scale_RG.shape == (rows, scheme.num_groups(columns))
    before, after = (weighted_error(weight_RC, grid, importance_C) for grid in (plain, found))
    # 1e-5: the search compares sums taken in fp32.
    assert (after <= before * (1 + 1e-5) + 1e-30).all()


def test_search_importance_decides_what_is_kept():
    weight_RC = torch.full((1, 64), 0.1) + 0.01 * normal(1, 64)
    weight_RC[0, 0] = 5.0
    light, heavy = torch.ones(64), torch.ones(64)
    light[0], heavy[0] = 1e-8, 1e8
    light_scale = search_scales(weight_RC, W4, scale_dtype=torch.bfloat16, importance_C=light).scale_RG
    heavy_scale = search_scales(weight_RC, W4, scale_dtype=torch.bfloat16, importance_C=heavy).scale_RG
    assert light_scale.item() < 0.5 * heavy_scale.item()
    assert heavy_scale.item() * 7.5 == pytest.approx(5.0, rel=0.08)


@pytest.mark.parametrize("factor", [1.0, 2.0**-126, 2.0**126, 3e-7])
def test_search_equal_importance_of_any_size_equals_none(factor):
    weight_RC = normal(32, 128)
    plain = search_scales(weight_RC, W4, scale_dtype=torch.bfloat16)
    scaled = search_scales(weight_RC, W4, scale_dtype=torch.bfloat16, importance_C=torch.full((128,), factor))
    assert torch.equal(plain.scale_RG, scaled.scale_RG)


def test_search_group_no_token_reached_is_fitted_with_equal_importance():
    weight_RC, importance_C = normal(16, 128), torch.ones(128)
    importance_C[64:] = 0
    plain = search_scales(weight_RC, W4, scale_dtype=torch.bfloat16)
    partly = search_scales(weight_RC, W4, scale_dtype=torch.bfloat16, importance_C=importance_C)
    assert torch.equal(plain.scale_RG, partly.scale_RG)


@pytest.mark.parametrize("name", INTEGER_NAMES)
def test_search_ragged_last_group_equals_that_group_alone(name):
    weight_RC, importance_C = normal(20, 100), torch.rand(100, generator=torch.Generator().manual_seed(3))
    importance_C[0] = importance_C[70] = 2.0  # same largest in both, so both are divided by the same number
    scheme = scheme_from_name(name, 64)
    whole = search_scales(weight_RC, scheme, scale_dtype=torch.bfloat16, importance_C=importance_C)
    tail = search_scales(
        weight_RC[:, 64:], scheme, scale_dtype=torch.bfloat16, importance_C=importance_C[64:]
    )
    assert torch.equal(whole.scale_RG[:, 1:], tail.scale_RG)
    assert scheme.is_symmetric or torch.equal(whole.zero_RG[:, 1:], tail.zero_RG)


@pytest.mark.parametrize("groups_at_once", [2, 3, 100])
@pytest.mark.parametrize("name", [*INTEGER_NAMES, "FP8A16", "MXFP4A16", "NVFP4A16"])
def test_search_of_several_groups_at_once_finds_as_good_scales(name, groups_at_once):
    weight_RC, importance_C = normal(70, 372, seed=6) ** 3, torch.exp(normal(372, seed=7))
    importance_C[64:128] = 0  # a group, or several, that no token reached
    scheme = scheme_from_name(name, 64 if name in INTEGER_NAMES else None)
    divisor_R1 = 100.0 + 100.0 * torch.rand(70, 1, generator=torch.Generator().manual_seed(8))
    one, several = (
        search_scales(
            weight_RC,
            scheme,
            scale_dtype=torch.bfloat16,
            importance_C=importance_C,
            divisor_R1=divisor_R1 if scheme.scales == DIVIDED_SCALES else None,
            groups_at_once=most,
        )
        for most in (1, groups_at_once)
    )
    assert torch.equal(one.is_bounded_RG, several.is_bounded_RG)
    # Where two scales are equally good up to the last bit of a sum, either may be found.
    assert (one.scale_RG != several.scale_RG).float().mean() < 0.01
    assert scheme.is_symmetric or (one.zero_RG != several.zero_RG).float().mean() < 0.01
    importance_C[64:128] = 1
    errors = [weighted_error(weight_RC, grid, importance_C) for grid in (one, several)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", INTEGER_NAMES)
def test_search_rows_do_not_depend_on_their_neighbors(name):
    # Zero points one code apart are often equally good up to the last bit of a sum.
    weight_RC, importance_C = normal(1453, 64), torch.exp(normal(64, seed=5))
    scheme = scheme_from_name(name, 32)
    whole = search_scales(weight_RC, scheme, scale_dtype=torch.bfloat16, importance_C=importance_C)
    for part in (slice(0, 508), slice(508, 969), slice(969, 1453), slice(700, 701)):
        alone = search_scales(weight_RC[part], scheme, scale_dtype=torch.bfloat16, importance_C=importance_C)
        assert torch.equal(whole.scale_RG[part], alone.scale_RG)
        assert scheme.is_symmetric or torch.equal(whole.zero_RG[part], alone.zero_RG)


@pytest.mark.parametrize("name", INTEGER_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fit", [fit_to_extremes, search_scales])
def test_fit_group_of_zeros_gets_a_harmless_scale(fit, dtype, name):
    weight_RC = torch.zeros(3, 64)
    grid = fit(weight_RC, scheme_from_name(name, 64), scale_dtype=dtype)
    assert torch.isfinite(grid.scale_RG).all() and (grid.scale_RG > 0).all()
    assert not grid.is_bounded_RG.any()
    assert torch.equal(with_codes(grid, nearest_codes(weight_RC, grid)[0]).dequantize(), weight_RC)


@pytest.mark.parametrize("name", INTEGER_NAMES)
@pytest.mark.parametrize("fit", [fit_to_extremes, search_scales])
def test_fit_scale_below_fp16_is_raised_to_a_normal_number_and_counted(fit, name):
    weight_RC = normal(4, 128) * 1e-8
    weight_RC[:, 64:] = normal(4, 64)
    grid = fit(weight_RC, scheme_from_name(name, 64), scale_dtype=torch.float16)
    assert (grid.scale_RG >= torch.finfo(torch.float16).smallest_normal).all()
    assert grid.is_bounded_RG.tolist() == [[True, False]] * 4


@pytest.mark.parametrize("name", INTEGER_NAMES)
def test_fit_scale_above_fp16_is_lowered_to_a_finite_number_and_counted(name):
    grid = search_scales(normal(4, 64) * 1e9, scheme_from_name(name, 64), scale_dtype=torch.float16)
    assert torch.isfinite(grid.scale_RG).all() and grid.is_bounded_RG.all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_asymmetric_range_holds_zero_where_all_weights_have_one_sign(sign):
    weight_RC = sign * (torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) + 3)
    grid = fit_to_extremes(weight_RC, scheme_from_name("W4A16_ASYM", 64), scale_dtype=torch.float32)
    assert grid.zero_RG is not None and (grid.zero_RG == (0 if sign > 0 else 15)).all()
    torch.testing.assert_close(grid.scale_RG[:, 0], weight_RC.abs().amax(1) / 15)


def test_extremes_symmetric_scale_is_absmax_over_seven_and_a_half_in_stored_dtype():
    weight_RC = normal(64, 128)
    grid = fit_to_extremes(weight_RC, W4, scale_dtype=torch.bfloat16)
    wanted = (weight_RC.view(64, 2, 64).abs().amax(2).double() / 7.5).float().bfloat16()
    torch.testing.assert_close(grid.scale_RG, wanted, atol=0, rtol=2**-8)
    assert (grid.scale_RG == wanted).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_extremes_that_are_not_cut_are_levels_and_spare_the_lowest_code(bits, dtype):
    scheme, weight_RC = WeightScheme(bits=bits, is_symmetric=True, group_size=64), normal(64, 128).to(dtype)
    grid = fit_to_extremes(weight_RC, scheme, scale_dtype=torch.float32, cuts_half_step=False)
    codes_RC, num_clipped_R = nearest_codes(weight_RC, grid)
    assert num_clipped_R.sum() == 0
    magnitude_RG = (codes_RC.int() - 2 ** (bits - 1)).view(64, 2, 64).abs().amax(2)
    assert (magnitude_RG == 2 ** (bits - 1) - 1).all()
    absmax_RG = weight_RC.double().view(64, 2, 64).abs().amax(2)
    torch.testing.assert_close(grid.scale_RG.double() * magnitude_RG, absmax_RG, atol=0, rtol=2**-22)


def test_extremes_of_an_asymmetric_grid_have_one_fit():
    scheme, weight_RC = scheme_from_name("W4A16_ASYM", 64), normal(16, 128)
    cut, uncut = (
        fit_to_extremes(weight_RC, scheme, scale_dtype=torch.bfloat16, cuts_half_step=cuts)
        for cuts in (True, False)
    )
    assert torch.equal(cut.scale_RG, uncut.scale_RG) and torch.equal(cut.zero_RG, uncut.zero_RG)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_extremes_error_on_normal_weights_equals_the_published_one(bits):
    # Mean squared error of N(0, 1) in groups of 128 with absmax / ((2**b - 1) / 2), published to 3 digits.
    published = {2: 0.3026, 3: 0.0564, 4: 0.01231}
    scheme = WeightScheme(bits=bits, is_symmetric=True, group_size=128)
    weight_RC = normal(1024, 1024)
    grid = fit_to_extremes(weight_RC, scheme, scale_dtype=torch.float32)
    levels_RC = with_codes(grid, nearest_codes(weight_RC, grid)[0]).dequantize()
    found = (levels_RC - weight_RC).square().mean().item()
    if bits not in published:  # so many levels that errors are uniform within a step
        assert found == pytest.approx((grid.scale_RG.double().square().mean() / 12).item(), rel=0.02)
        return
    assert found == pytest.approx(published[bits], rel=0.01)


@pytest.mark.parametrize(
    ("bits", "multiple", "error"), [(2, 0.56, 0.1522), (3, 0.75, 0.0406), (4, 0.89, 0.01087)]
)
def test_best_common_multiple_of_extremes_on_normal_weights_is_the_published_one(bits, multiple, error):
    # One multiple for all groups, published to two digits, and the mean squared error it leaves.
    scheme = WeightScheme(bits=bits, is_symmetric=True, group_size=128)
    weight_RC = normal(256, 1024)
    extremes = fit_to_extremes(weight_RC, scheme, scale_dtype=torch.float32)

    def error_at(grid):
        levels_RC = with_codes(grid, nearest_codes(weight_RC, grid)[0]).dequantize()
        return (levels_RC - weight_RC).square().mean().item()

    tried = [multiple + step / 100 for step in range(-6, 7)]
    errors = [error_at(dataclasses.replace(extremes, scale_RG=extremes.scale_RG * m)) for m in tried]
    assert tried[errors.index(min(errors))] == pytest.approx(multiple, abs=0.011)
    assert min(errors) == pytest.approx(error, rel=0.01)
    # A search of its own for every group leaves less.
    assert error_at(search_scales(weight_RC, scheme, scale_dtype=torch.bfloat16)) < min(errors)
