"""Scales that owe something to the whole weight: quotients, blocks, whole weights, scales of scales."""

import math
from statistics import NormalDist

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
from compressed_tensors.quantization.utils import generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.grids.affine import nearest_codes, with_codes
from quantlib.grids.formats import CODEBOOKS, dynamic_values
from quantlib.grids.given_scales import given_scales
from quantlib.grids.nested_scales import nest, scales_of
from quantlib.schemes import CODEBOOK_NAMES, WHOLE_TENSOR, scheme_from_name
from tests.support.any_grid import any_grid

X = [1.6, -0.7, -3.4, 1.7, -2.9, 0.5, 2.3, 6.2]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight_RC, name, group_size=None, *, dtype=torch.bfloat16, search="minmax"):
    grid = any_grid(weight_RC, scheme_from_name(name, group_size), scale_dtype=dtype, search=search)
    codes_RC, _ = nearest_codes(weight_RC, grid)
    return with_codes(grid, codes_RC)


def test_nf4_values_are_quantiles_of_the_normal_distribution():
    """QLoRA's recipe: 8 quantiles above 0, 7 below, the outermost at 0.9677083, over the largest."""
    ends = 0.9677083

    def quantiles(count):
        return [NormalDist().inv_cdf(ends + (0.5 - ends) * i / count) for i in range(count)]

    wanted = [-x for x in quantiles(7)] + [0.0] + quantiles(8)[::-1]
    largest = max(wanted)
    assert CODEBOOKS["nf4"] == pytest.approx([x / largest for x in wanted], abs=2e-7)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_values_of_codes_are_those_of_bitsandbytes(name):
    theirs = bitsandbytes.get_4bit_type(name, device="cpu")
    assert torch.equal(torch.tensor(CODEBOOKS[name]), theirs)


def test_dynamic_values_are_those_of_bitsandbytes_but_for_the_last_bit():
    theirs = bitsandbytes.create_dynamic_map()
    assert dynamic_values() == pytest.approx(theirs.tolist(), rel=2e-7, abs=1e-12)
    assert min(x for x in dynamic_values() if x > 0) == pytest.approx(5.5e-7)
    assert min(dynamic_values()) == pytest.approx(-0.9929687)


def test_nf4_of_one_block():
    quantized = rounded(torch.tensor([X * 8]), "NF4")
    assert quantized.codes_RC[0, :8].tolist() == [10, 6, 2, 10, 2, 8, 11, 15]
    assert quantized.scale_RG.tolist() == [[pytest.approx(6.2)]]
    wanted = [1.5259, -0.56451, -3.25545, 1.5259, -3.25545, 0.4934, 2.09507, 6.2]
    assert quantized.dequantize()[0, :8].tolist() == pytest.approx(wanted, rel=1e-4)


def test_nvfp4_of_one_group():
    quantized = rounded(torch.tensor([X + [0.25 * x + 0.1 for x in X]]), "NVFP4A16")
    assert quantized.divisor_R1.item() == pytest.approx(433.5484, rel=1e-6)
    assert (quantized.scale_RG * quantized.divisor_R1).item() == pytest.approx(448)
    offsets = quantized.offsets(torch.empty(1, 16))[0].tolist()
    assert offsets == [1.5, -0.5, -3, 1.5, -3, 0.5, 2, 6, 0.5, 0, -0.5, 0.5, -0.5, 0, 0.5, 1.5]


@pytest.mark.parametrize(
    ("name", "mean", "relative"), [("NF4", 0.072798, 0.203339), ("FP4", 0.096543, 0.260125)]
)
def test_errors_of_normal_weights_are_those_published_for_bitsandbytes(name, mean, relative):
    """Mean magnitude of the error and of its ratio to the weight; bitsandbytes' own tests bound them so."""
    weight_RC = normal(1024, 1024)
    error_RC = (rounded(weight_RC, name).dequantize() - weight_RC).abs()
    assert error_RC.mean().item() == pytest.approx(mean, rel=2e-3)
    # Of a quotient by numbers near 0 the mean is rough.
    assert (error_RC / weight_RC.abs()).mean().item() == pytest.approx(relative, rel=2e-2)


@pytest.mark.parametrize("name", CODEBOOK_NAMES)
def test_codes_are_the_nearest_values(name):
    weight_RC = normal(40, 192, seed=1)
    quantized = rounded(weight_RC, name)
    scale_RC = quantized.scale_RG.repeat_interleave(64, 1).double()
    values = torch.tensor(CODEBOOKS[quantized.scheme.number], dtype=torch.float64)
    distances = (weight_RC.double() / scale_RC)[..., None].sub(values).abs()
    chosen = distances.gather(2, quantized.codes_RC.long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, distances.amin(2), atol=1e-6, rtol=0)


def test_middle_between_two_values_goes_to_the_smaller():
    values = torch.tensor(CODEBOOKS["nf4"])
    middles = (values[1:] + values[:-1]) / 2
    weight_RC = torch.cat([torch.ones(1), middles, torch.zeros(48)])[None]
    assert rounded(weight_RC, "NF4").codes_RC[0, 1:16].tolist() == list(range(15))


@pytest.mark.parametrize("name", ["NF4", "FP4"])
def test_codes_are_those_of_bitsandbytes(name):
    """But for quotients next to a middle, which it finds by multiplying with a reciprocal."""
    weight_RC = normal(64, 256, seed=2)
    packed, state = bitsandbytes.quantize_4bit(weight_RC, blocksize=64, quant_type=name.lower())
    theirs = torch.stack((packed.flatten() >> 4, packed.flatten() & 0xF), 1).reshape(64, 256)
    quantized = rounded(weight_RC, name)
    values = torch.tensor(CODEBOOKS[name.lower()])
    # A zero may have a sign with them.
    differs = values[quantized.codes_RC.long()] != values[theirs.long()]
    assert differs.sum() <= 2
    assert torch.equal(state.absmax.reshape(64, 4), quantized.scale_RG)


@pytest.mark.parametrize("shape", [(64, 256), (3, 64), (100, 192)])
def test_nested_scales_decode_as_bitsandbytes_decodes_them(shape):
    weight_RC, scheme = normal(*shape, seed=3), scheme_from_name("NF4_DQ")
    found = given_scales({"w": weight_RC}, [["w"]], scheme, scale_dtype=torch.bfloat16)["w"]
    nested = found.nested
    state = bitsandbytes.QuantState(
        absmax=nested.absmax_N, code=torch.tensor(dynamic_values()), blocksize=256, dtype=torch.float32
    )
    decoded = bitsandbytes.dequantize_blockwise(nested.code_RG.flatten(), state) + nested.offset
    assert torch.equal(decoded.reshape(nested.code_RG.shape), found.grid.scale_RG)
    wanted_RG = weight_RC.abs().unflatten(1, (-1, 64)).amax(2)
    assert nested.offset.item() == pytest.approx(wanted_RG.mean().item(), rel=1e-6)
    _, theirs = bitsandbytes.quantize_4bit(
        weight_RC, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    assert (nested.code_RG.flatten() != theirs.absmax).sum() <= 1
    torch.testing.assert_close(nested.absmax_N, theirs.state2.absmax, rtol=1e-5, atol=1e-7)


@settings(max_examples=60)
@given(
    scales=st.lists(st.floats(0, 2**20, width=32), min_size=1, max_size=700),
    groups=st.sampled_from([1, 2, 7]),
)
def test_nested_scales_are_positive_and_near(scales, groups):
    rows = max(1, len(scales) // groups)
    wanted_RG = torch.tensor((scales * groups)[: rows * groups]).reshape(rows, groups)
    nested, is_moved_RG = nest(wanted_RG)
    found_RG = scales_of(nested)
    assert bool((found_RG > 0).all()) and bool(found_RG.isfinite().all())
    # The widest step of the map is 0.0141 of the largest difference of a block.
    reach = (wanted_RG - nested.offset).abs().max()
    near = (found_RG - wanted_RG).abs() <= 0.00708 * reach + 1e-6 * wanted_RG.max()
    assert bool((near | is_moved_RG | (wanted_RG == 0)).all())


def test_fused_weights_share_the_divisor_of_the_largest():
    weights = {"a.q": normal(24, 64), "a.k": normal(8, 64) * 5, "b.q": normal(8, 64) * 9}
    scheme = scheme_from_name("NVFP4A16")
    found = given_scales(weights, [["a.q", "a.k"], ["b.q"]], scheme, scale_dtype=torch.bfloat16)
    joined = torch.cat([weights["a.q"], weights["a.k"]])
    for name, extremes in (("a.q", joined), ("a.k", joined), ("b.q", weights["b.q"])):
        theirs = generate_gparam(extremes.min(), extremes.max())
        assert found[name].divisor_R1.unique().tolist() == theirs.tolist()
        assert found[name].divisor_R1.shape == (len(weights[name]), 1)


def test_whole_weights_of_floats_share_a_scale_in_a_fused_set_and_those_of_integers_do_not():
    weights = {"a.q": normal(24, 64), "a.k": normal(8, 64) * 5}
    largest = [weight_RC.abs().max().item() for weight_RC in weights.values()]
    for name, group_size, wanted in (
        ("FP8A16_TENSOR", None, [largest[1] / 448] * 2),
        ("W8A16", WHOLE_TENSOR, [x / 127.5 for x in largest]),
    ):
        scheme = scheme_from_name(name, group_size)
        found = given_scales(weights, [list(weights)], scheme, scale_dtype=torch.float32)
        scales = [found[key].grid.scale_RG.unique().tolist() for key in weights]
        assert scales == [[pytest.approx(x)] for x in wanted]


def test_absmax_int8_and_zero_point_of_a_whole_weight():
    weight_RC = torch.tensor([X[:4], X[4:]])
    scheme = scheme_from_name("W8A16", WHOLE_TENSOR)
    found = given_scales({"w": weight_RC}, [["w"]], scheme, scale_dtype=torch.float32, cuts_half_step=False)[
        "w"
    ].grid
    codes_RC, _ = nearest_codes(weight_RC, found)
    assert (codes_RC.int() - 128).flatten().tolist() == [33, -14, -70, 35, -59, 10, 47, 127]
    affine = rounded(weight_RC, "W8A16_ASYM", WHOLE_TENSOR, dtype=torch.float32)
    assert affine.zero_RG.unique().tolist() == [90]
    assert affine.codes_RC.flatten().tolist() == [132, 71, 0, 135, 13, 103, 151, 255]


@settings(max_examples=30)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_block_scales_are_those_of_their_largest_weights(rows, columns, seed):
    weight_RC = normal(rows, columns, seed=seed)
    grid = any_grid(weight_RC, scheme_from_name("FP8A16_BLOCK"), scale_dtype=torch.float32)
    for row in range(0, rows, 128):
        for column in range(0, columns, 128):
            largest = weight_RC[row : row + 128, column : column + 128].abs().max().item()
            scales = grid.scale_RG[row : row + 128, column // 128].unique().tolist()
            assert scales == [pytest.approx(largest / 448, rel=1e-6)]


@pytest.mark.parametrize("name", ["NVFP4A16", "FP8A16_TENSOR", "FP8A16_BLOCK", *CODEBOOK_NAMES])
def test_zeros_stay_zeros(name):
    quantized = rounded(torch.zeros(3, 64), name)
    assert bool((quantized.scale_RG > 0).all())
    assert torch.equal(quantized.dequantize(), torch.zeros(3, 64))


def test_group_far_below_the_largest_weight_is_marked_where_no_quotient_can_hold_its_scale():
    weight_RC = torch.full((1, 32), 1e-9)
    weight_RC[0, 0] = 100.0
    grid = any_grid(weight_RC, scheme_from_name("NVFP4A16"), scale_dtype=torch.bfloat16, search="minmax")
    assert grid.is_bounded_RG.tolist() == [[False, True]]


def test_search_of_quotients_costs_less_than_the_extremes_and_stays_on_e4m3():
    weight_RC = normal(64, 128, seed=5) ** 3
    plain, found = (rounded(weight_RC, "NVFP4A16", search=search) for search in ("minmax", "mse"))
    errors = [(x.dequantize() - weight_RC).square().sum().item() for x in (plain, found)]
    assert errors[1] < 0.9 * errors[0]
    dividend_RG = found.scale_RG * found.divisor_R1
    assert bool((dividend_RG.to(torch.float8_e4m3fn).float() / found.divisor_R1 == found.scale_RG).all())
    assert math.isclose(dividend_RG.max().item(), 448, rel_tol=0.6)
