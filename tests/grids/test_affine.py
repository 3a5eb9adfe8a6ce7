"""Rounding to integer grids: the published vectors, ties, and what must hold of every grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.grids.affine import nearest_codes, nearest_offsets, with_codes
from quantlib.grids.fit import fit_to_extremes
from quantlib.grids.levels import IntegerLevels
from quantlib.schemes import INTEGER_NAMES, WHOLE_ROW, WeightScheme, scheme_from_name

EXAMPLE = torch.tensor([[1.6, -0.7, -3.4, 1.7, -2.9, 0.5, 2.3, 6.2]])

# Scale, zero and codes (minus the middle for symmetric ones) of EXAMPLE as one group, by hand: symmetric
# scales are 6.2 / 7.5 or, with nothing cut, 6.2 / 7 and 6.2 / 127; asymmetric ones are 9.6 / 15 and 9.6 / 255
# with zeros 3.4 / 0.64 = 5.3 and 3.4 / 0.0376 = 90.3.
VECTORS = [
    ("W4A16", True, 0.826667, 8, [2, -1, -4, 2, -4, 1, 3, 7]),
    ("W4A16", False, 0.885714, 8, [2, -1, -4, 2, -3, 1, 3, 7]),
    ("W8A16", False, 0.0488189, 128, [33, -14, -70, 35, -59, 10, 47, 127]),
    ("W4A16_ASYM", True, 0.64, 5, [7, 4, 0, 8, 0, 6, 9, 15]),
    ("W8A16_ASYM", True, 0.0376471, 90, [132, 71, 0, 135, 13, 103, 151, 255]),
]


@pytest.mark.parametrize(("scheme", "cuts_half_step", "scale", "zero", "codes"), VECTORS)
def test_extremes_published_vector_gives_published_codes(scheme, cuts_half_step, scale, zero, codes):
    named = scheme_from_name(scheme, WHOLE_ROW)
    grid = fit_to_extremes(EXAMPLE, named, scale_dtype=torch.float32, cuts_half_step=cuts_half_step)
    found, _ = nearest_codes(EXAMPLE, grid)
    assert grid.scale_RG.item() == pytest.approx(scale, abs=5e-7)
    if named.is_symmetric:
        assert grid.zero_RG is None
        assert (found[0].int() - zero).tolist() == codes
        return
    assert grid.zero_RG is not None and grid.zero_RG.item() == zero
    assert found[0].tolist() == codes


# Codes above times their scale; absmax int8 is exact at the extreme, affine uint8 off by its rounded zero.
@pytest.mark.parametrize(
    ("scheme", "wanted"),
    [
        ("W8A16_ASYM", [1.5812, -0.7153, -3.3882, 1.6941, -2.8988, 0.4894, 2.2965, 6.2118]),
        ("W8A16", [1.6110, -0.6835, -3.4173, 1.7087, -2.8803, 0.4882, 2.2945, 6.2]),
    ],
    ids=["affine_uint8", "absmax_int8"],
)
def test_eight_bit_vector_means_published_levels(scheme, wanted):
    named = scheme_from_name(scheme, WHOLE_ROW)
    grid = fit_to_extremes(EXAMPLE, named, scale_dtype=torch.float32, cuts_half_step=False)
    levels = with_codes(grid, nearest_codes(EXAMPLE, grid)[0]).dequantize()
    torch.testing.assert_close(levels, torch.tensor([wanted]), atol=6e-5, rtol=0)


def test_offsets_ties_go_to_even():
    values = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]) * 0.25
    found = nearest_offsets(values, 0.25, -8, 7, IntegerLevels(4), out=torch.empty_like(values))
    assert found.tolist() == [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 4.0]


def test_offsets_ties_are_seen_with_every_scale():
    # (k + 1/2) * scale is exact in fp32 for a bf16 scale, so a true division finds the tie; a product with
    # 1 / scale misses many.
    generator = torch.Generator().manual_seed(0)
    scale = (torch.rand(2000, 1, generator=generator) + 0.01).bfloat16().float()
    halves = torch.arange(-128, 128) + 0.5
    found = nearest_offsets(halves * scale, scale, -1000, 1000, IntegerLevels(4), out=torch.empty(2000, 256))
    assert torch.equal(found, (2 * (halves / 2).round()).expand(2000, 256))


def test_offsets_keep_the_quotient_and_the_input():
    values = torch.tensor([1.0, 2.0])
    quotient, out = torch.empty(2), torch.empty(2)
    nearest_offsets(values, 0.4, -8, 4, IntegerLevels(4), out=out, quotient=quotient)
    assert (values.tolist(), quotient.tolist(), out.tolist()) == ([1.0, 2.0], [2.5, 5.0], [2.0, 4.0])


@pytest.mark.parametrize("scheme", INTEGER_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_level_of_a_grid_comes_back_as_its_own_code(scheme, dtype):
    grid = fit_to_extremes(
        torch.randn(5, 300, generator=torch.Generator().manual_seed(1)),
        scheme_from_name(scheme, 128),
        scale_dtype=dtype,
    )
    zero_RG = torch.full((5, 3), grid.scheme.middle_code) if grid.zero_RG is None else grid.zero_RG.int()
    for code in range(grid.scheme.num_codes):
        level_RG = (code - zero_RG) * grid.scale_RG.float()
        level_RC = level_RG.repeat_interleave(128, dim=1)[:, :300]
        codes_RC, num_clipped_R = nearest_codes(level_RC, grid)
        assert torch.equal(codes_RC, torch.full_like(codes_RC, code))
        assert num_clipped_R.sum() == 0


shapes = st.tuples(st.integers(1, 20), st.integers(1, 70))
group_sizes = st.sampled_from([8, 32, WHOLE_ROW])


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    group_size=group_sizes,
    name=st.sampled_from(INTEGER_NAMES),
    seed=st.integers(0, 10**6),
    magnitude=st.floats(1e-4, 1e4),
)
def test_nearest_codes_any_weight_half_step_monotone_idempotent(shape, group_size, name, seed, magnitude):
    weight_RC = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * magnitude
    named = scheme_from_name(name, group_size)
    grid = fit_to_extremes(weight_RC, named, scale_dtype=torch.bfloat16)
    codes_RC, num_clipped_R = nearest_codes(weight_RC, grid)
    levels_RC = with_codes(grid, codes_RC).dequantize()
    width = named.columns_per_group(shape[1])
    step_RC = grid.scale_RG.float().repeat_interleave(width, dim=1)[:, : shape[1]]
    distance_RC = (levels_RC - weight_RC).abs() / step_RC
    # 1e-4: the quotient of up to 255 is rounded in fp32.
    assert (
        torch.equal((distance_RC > 0.5 + 1e-4).sum(1), num_clipped_R)
        or (distance_RC - 0.5).abs().min() < 1e-4
    )
    inside_RC = (codes_RC > 0) & (codes_RC < named.num_codes - 1)
    assert (distance_RC[inside_RC] <= 0.5 + 1e-4).all()

    assert torch.equal(nearest_codes(levels_RC, grid)[0], codes_RC)

    for start in range(0, shape[1], width):
        group = slice(start, start + width)
        by_weight = weight_RC[:, group].argsort(dim=1)
        sorted_codes = codes_RC[:, group].int().gather(1, by_weight)
        assert (sorted_codes.diff(dim=1) >= 0).all()


def test_nearest_codes_counts_what_lies_outside():
    named = WeightScheme(bits=4, is_symmetric=True, group_size=8)
    grid = fit_to_extremes(torch.full((2, 8), 7.5), named, scale_dtype=torch.float32)
    weight_RC = torch.zeros(2, 8)
    weight_RC[1, :5] = torch.tensor([7.4, 7.6, 100.0, -8.4, -8.6])
    assert nearest_codes(weight_RC, grid)[1].tolist() == [0, 3]
