"""Blocks of GGUF: levels as the gguf package reads them, exact minimums, and what no block holds."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import PackingError
from quantlib.grids.affine import nearest_codes, with_codes
from quantlib.grids.fit import fit_to_extremes
from quantlib.grids.formats import SHORT_SCALES
from quantlib.grids.stored_scale import round_to_stored
from quantlib.packing import gguf_format
from quantlib.schemes import WeightScheme, scheme_from_name
from tests.support.random_linears import random_quantized

NAME = "model.layers.0.mlp.up_proj"
BLOCKS = f"{NAME}.weight_blocks"
KINDS = {"W4A16": "Q4_0", "W4A16_ASYM": "Q4_1", "W8A16": "Q8_0"}


def held(name):
    return gguf_format.held_scheme(scheme_from_name(name, 32))


def read_by_upstream(blocks, name):
    return gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[KINDS[name]])


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 9), blocks=st.integers(1, 5), seed=st.integers(0, 999))
def test_levels_are_those_that_the_gguf_package_reads(name, rows, blocks, seed):
    quantized = random_quantized(rows, 32 * blocks, held(name), scale_dtype=torch.float16, seed=seed)
    packed = gguf_format.pack(NAME, quantized)[BLOCKS]
    assert np.array_equal(read_by_upstream(packed, name), quantized.dequantize().numpy())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_levels_of_a_fitted_grid_are_exact_at_any_size_of_weights(name, size):
    weight_RC = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * size
    grid = fit_to_extremes(weight_RC, held(name), scale_dtype=torch.float16)
    quantized = with_codes(grid, nearest_codes(weight_RC, grid)[0])
    packed = gguf_format.pack(NAME, quantized)[BLOCKS]
    assert np.array_equal(read_by_upstream(packed, name), quantized.dequantize().numpy())
    found = gguf_format.unpack(NAME, {BLOCKS: packed}, quantized.scheme)
    assert torch.equal(found.dequantize(), quantized.dequantize())


def test_every_short_scale_times_every_zero_point_is_a_number_of_fp16():
    mantissa, exponent = torch.meshgrid(torch.arange(64.0, 128), torch.arange(-20.0, 6), indexing="ij")
    scale = (mantissa * 2**exponent).flatten()
    assert torch.equal(round_to_stored(scale, torch.float16, SHORT_SCALES), scale)
    product = scale[:, None] * torch.arange(16.0)
    assert torch.equal(product.half().float(), product)


def test_short_scales_are_the_nearest_of_7_bits_ties_to_even():
    wanted = {
        1.0: 1.0,
        1 + 1 / 128: 1.0,
        1 + 3 / 128: 1 + 4 / 128,
        1 + 1 / 100: 1 + 1 / 64,
        127.9: 128.0,
        0.0: 2.0**-14,
    }
    found = round_to_stored(torch.tensor(list(wanted)), torch.float16, SHORT_SCALES)
    assert found.tolist() == list(wanted.values())


def test_a_minimum_that_fp16_does_not_hold_is_refused():
    quantized = random_quantized(4, 64, held("W4A16_ASYM"), scale_dtype=torch.float16)
    scale_RG = torch.full_like(quantized.scale_RG, 1 + 2**-10)
    broken = dataclasses.replace(quantized, scale_RG=scale_RG, zero_RG=torch.full_like(quantized.zero_RG, 13))
    with pytest.raises(PackingError, match="is no number of fp16"):
        gguf_format.pack(NAME, broken)


def test_free_minimums_of_other_tools_are_refused():
    weight = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
    with pytest.raises(PackingError, match="not the scale times a zero point"):
        gguf_format.unpack(NAME, {BLOCKS: torch.from_numpy(blocks)}, held("W4A16_ASYM"))


@pytest.mark.parametrize("name", ["W4A16", "W8A16"])
def test_symmetric_blocks_of_other_tools_are_read(name):
    weight = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    blocks = torch.from_numpy(gguf.quants.quantize(weight, gguf.GGMLQuantizationType[KINDS[name]]))
    found = gguf_format.unpack(NAME, {BLOCKS: blocks}, held(name))
    assert np.array_equal(found.dequantize().numpy(), read_by_upstream(blocks, name))


@pytest.mark.parametrize(
    ("scheme", "columns", "said"),
    [
        (scheme_from_name("W4A16", 128), 256, "use --group-size 32, or leave it out"),
        (scheme_from_name("W4A16", -1), 256, "use --group-size 32"),
        (scheme_from_name("W4A16", 32), 80, "blocks of 32 columns, found 80"),
        (scheme_from_name("W8A16_ASYM", 32), 64, r"W4A16 \(Q4_0\), W4A16_ASYM \(Q4_1\) or W8A16 \(Q8_0\)"),
        (scheme_from_name("MXFP4A16"), 64, "holds integers"),
    ],
    ids=str,
)
def test_what_no_block_holds_is_refused_with_what_would_do(scheme, columns, said):
    with pytest.raises(PackingError, match=said):
        gguf_format.check(NAME, 64, columns, scheme)


def test_config_names_the_types_and_what_is_kept():
    q4, q8 = held("W4A16"), held("W8A16")
    schemes: dict[str, WeightScheme | None] = {"a.q": q4, "a.k": q4, "a.v": q8, "a.o": None}
    block = gguf_format.quantization_config(schemes, ["lm_head"])
    assert block == {
        "quant_method": "gguf",
        "format": "Q4_0",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "exceptions": {"a.v": "Q8_0", "a.o": None, "lm_head": None},
    }
    assert {name: gguf_format.scheme_of(block, name) for name in schemes} == schemes
    with pytest.raises(PackingError, match="says 'Q6_K'"):
        gguf_format.scheme_of({**block, "format": "Q6_K"}, "a.q")
