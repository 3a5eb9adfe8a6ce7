"""Scales of floats: rows that reach the largest value, and powers of two for groups of 32."""

import pytest
import torch

from quantlib.grids.affine import nearest_codes, with_codes
from quantlib.grids.fit import fit_to_extremes, search_scales
from quantlib.schemes import FLOAT_NAMES, scheme_from_name
from tests.support.any_grid import any_grid

_POWERS = ["MXFP4A16", "MXFP8A16"]
# Largest power of two among the values: the exponent that OCP Microscaling Formats 1.0, 6.3 takes away.
_EXPONENT = {"MXFP4A16": 2, "MXFP8A16": 8}
X = [1.6, -0.7, -3.4, 1.7, -2.9, 0.5, 2.3, 6.2]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def levels(weight_RC, grid):
    return with_codes(grid, nearest_codes(weight_RC, grid)[0]).dequantize()


def squared_error(weight_RC, grid, importance_C):
    error_RC = (levels(weight_RC, grid) - weight_RC).double().square() * importance_C.double()
    return torch.stack([g.sum(1) for g in error_RC.split(32, 1)], 1)


def test_mxfp4_of_a_small_vector_worked_out_by_hand():
    # absmax 6.2 lies in [4, 8): scale 2^(2 - 2); midpoints go to the even code: -0.75 to -1, 0.25 to 0.
    weight_RC = torch.tensor([X + [0.25 * x + 0.1 for x in X]])
    grid = fit_to_extremes(weight_RC, scheme_from_name("MXFP4A16"), scale_dtype=torch.bfloat16)
    assert grid.scale_RG.tolist() == [[1.0]]
    assert levels(weight_RC, grid).tolist() == [
        [1.5, -0.5, -3.0, 1.5, -3.0, 0.5, 2.0, 6.0, 0.5, 0.0, -1.0, 0.5, -0.5, 0.0, 0.5, 1.5]
    ]


def test_rows_of_8_bit_floats_reach_the_largest_value():
    weight_RC = normal(16, 96)
    grid = fit_to_extremes(weight_RC, scheme_from_name("FP8A16"), scale_dtype=torch.float32)
    assert grid.scale_RG.shape == (16, 1)
    torch.testing.assert_close(grid.scale_RG[:, 0] * 448, weight_RC.abs().amax(1))
    # Normal numbers have three bits after the leading one: half a step is a sixteenth of the power of two.
    relative = ((levels(weight_RC, grid) - weight_RC) / weight_RC).abs()
    assert relative[weight_RC.abs() > grid.scale_RG * 2**-6].max() <= 2**-4


@pytest.mark.parametrize("name", _POWERS)
def test_powers_follow_the_exponent_of_the_largest_weight(name):
    weight_RC = normal(64, 128) * torch.logspace(-6, 6, 64)[:, None]
    grid = fit_to_extremes(weight_RC, scheme_from_name(name), scale_dtype=torch.float16)
    largest = weight_RC.abs().view(64, 4, 32).amax(2)
    wanted = 2.0 ** (torch.floor(torch.log2(largest.double())) - _EXPONENT[name])
    assert torch.equal(grid.scale_RG.double(), wanted)
    # Whatever the dtype of plain scales is: a byte holds all of these.
    assert not grid.is_bounded_RG.any()


@pytest.mark.parametrize("name", _POWERS)
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_search_finds_the_best_power_of_two(name, spread):
    weight_RC, importance_C = normal(200, 96, seed=2) ** 3, torch.exp(spread * normal(96, seed=3))
    scheme = scheme_from_name(name)
    found = search_scales(weight_RC, scheme, scale_dtype=torch.bfloat16, importance_C=importance_C)
    plain = fit_to_extremes(weight_RC, scheme, scale_dtype=torch.bfloat16)
    tried = []
    for exponent in range(-4, 3):
        grid = type(plain)(
            scheme=scheme,
            scale_RG=plain.scale_RG * 2.0**exponent,
            zero_RG=None,
            is_bounded_RG=plain.is_bounded_RG,
        )
        tried.append(squared_error(weight_RC, grid, importance_C))
    best = torch.stack(tried).amin(0)
    mine = squared_error(weight_RC, found, importance_C)
    assert (mine <= squared_error(weight_RC, plain, importance_C) * (1 + 1e-5)).all()
    # Less than an eighth of the covering scale is not looked at; it is seldom the best.
    assert ((mine - best) / best).mean() < 0.01


@pytest.mark.parametrize("name", FLOAT_NAMES)
@pytest.mark.parametrize("fit", [fit_to_extremes, search_scales])
def test_group_of_zeros_gets_a_harmless_scale(fit, name):
    weight_RC = torch.zeros(3, 64)
    grid = fit(weight_RC, scheme_from_name(name), scale_dtype=torch.float16)
    assert (grid.scale_RG > 0).all() and torch.isfinite(grid.scale_RG.float()).all()
    assert not grid.is_bounded_RG.any()
    assert torch.equal(levels(weight_RC, grid), weight_RC)


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_levels_are_a_fixed_point_and_what_is_cut_is_counted(name):
    weight_RC = normal(16, 64)
    grid = any_grid(weight_RC, scheme_from_name(name), scale_dtype=torch.bfloat16)
    codes_RC, num_clipped_R = nearest_codes(weight_RC, grid)
    levels_RC = with_codes(grid, codes_RC).dequantize()
    again_RC, none_R = nearest_codes(levels_RC, grid)
    assert torch.equal(again_RC, codes_RC) and not none_R.any()
    scale_RC = grid.scale_RG.float().repeat_interleave(64 // grid.scale_RG.shape[1], 1)
    largest, half_step = {"e4m3": (448.0, 16.0), "e2m1": (6.0, 1.0)}[grid.scheme.number]
    outside = weight_RC.abs() / scale_RC > largest + half_step
    assert torch.equal(num_clipped_R, outside.sum(1))


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_rows_do_not_depend_on_their_neighbors(name):
    weight_RC, importance_C = normal(700, 64), torch.exp(normal(64, seed=5))
    scheme = scheme_from_name(name)
    whole = search_scales(weight_RC, scheme, scale_dtype=torch.bfloat16, importance_C=importance_C)
    for part in (slice(0, 333), slice(333, 700), slice(500, 501)):
        alone = search_scales(weight_RC[part], scheme, scale_dtype=torch.bfloat16, importance_C=importance_C)
        assert torch.equal(whole.scale_RG[part], alone.scale_RG)
