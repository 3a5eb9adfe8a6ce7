"""Layouts of small floats, read and written by the compressed-tensors package itself."""

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import PackingError
from quantlib.grids.levels import levels_of
from quantlib.packing import FORMATS, compressed_tensors_format
from quantlib.packing.specs import packed_on_meta
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import CODEBOOK_NAMES, FLOAT_NAMES, scheme_from_name

NAME = "model.layers.0.mlp.down_proj"
POWERS = ["MXFP4A16", "MXFP8A16"]
# Of ragged blocks.
SHAPES = {"FP8A16_BLOCK": (300, 200)}


def random_floats(rows, columns, name, *, dtype=torch.float32, seed=0):
    """Codes of finite values without a negative zero; scales of a wide range where they are powers of two.

    Of blocks and whole weights rows share them; of quotients they are E4M3 numbers over 3.7.
    """
    generator = torch.Generator().manual_seed(seed)
    scheme = scheme_from_name(name)
    codes_RC = torch.randint(0, scheme.num_codes, (rows, columns), generator=generator).to(torch.uint8)
    magnitude_RC = codes_RC & (scheme.num_codes // 2 - 1)
    is_number = levels_of(scheme).decode(codes_RC, 0, out=torch.empty(rows, columns)).isfinite()
    codes_RC = torch.where(is_number & (magnitude_RC > 0), codes_RC, 0)
    shape = (rows, scheme.num_groups(columns))
    if name in POWERS:
        exponents = torch.randint(-30, 20, shape, generator=generator)
        scale_RG = (2.0**exponents).bfloat16()
    else:
        scale_RG = (torch.rand(shape, generator=generator) + 0.01).to(dtype)
    divisor_R1 = None
    if name == "FP8A16_TENSOR":
        scale_RG = scale_RG[:1].expand(shape).contiguous()
    elif name == "FP8A16_BLOCK":
        scale_RG = torch.cat([block[:1].expand_as(block) for block in scale_RG.split(128)])
    elif name == "NVFP4A16":
        divisor_R1 = torch.full((rows, 1), 3.7)
        scale_RG = (scale_RG.float() * 400).to(torch.float8_e4m3fn).float() / divisor_R1
    return QuantizedLinear(
        codes_RC=codes_RC, scale_RG=scale_RG, zero_RG=None, scheme=scheme, divisor_R1=divisor_R1
    )


def upstream(name):
    """Their compressor for our config block, and what it takes of the scheme."""
    block = compressed_tensors_format.quantization_config({NAME: scheme_from_name(name)})
    parsed = QuantizationConfig.model_validate(json.loads(json.dumps(block)))
    return BaseCompressor.get_value_from_registry(parsed.format), parsed.config_groups["group_0"]


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_upstream_decompresses_to_the_levels(name):
    quantized = random_floats(*SHAPES.get(name, (48, 96)), name)
    compressor, scheme = upstream(name)
    packed = compressed_tensors_format.pack(NAME, quantized)
    local = {key.removeprefix(f"{NAME}."): tensor for key, tensor in packed.items()}
    assert set(local) == set(compressor.compression_param_names(scheme))
    found = compressor.decompress(local, scheme)["weight"]
    if name == "NVFP4A16":
        # They take scales to bf16 before they divide; the formula is theirs, in fp32.
        codes_RC = unpack_fp4_from_uint8(local["weight_packed"], *quantized.codes_RC.shape, torch.float32)
        found = dequantize(
            codes_RC,
            local["weight_scale"].float(),
            args=scheme.weights,
            global_scale=local["weight_global_scale"],
        )
    # A power of two times a small float is exact in bf16, which they compute in.
    assert torch.equal(found.float(), quantized.dequantize())


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_upstream_compresses_the_levels_to_our_tensors(name):
    quantized = random_floats(*SHAPES.get(name, (48, 96)), name)
    compressor, scheme = upstream(name)
    ours = compressed_tensors_format.pack(NAME, quantized)
    state = {"weight": quantized.dequantize(), "weight_scale": quantized.scale_RG.float()}
    if name in ("FP8A16_TENSOR", "FP8A16_BLOCK"):
        state["weight_scale"] = ours[f"{NAME}.weight_scale"]
    elif name == "NVFP4A16":
        state["weight_scale"] = ours[f"{NAME}.weight_scale"].float()
        state["weight_global_scale"] = ours[f"{NAME}.weight_global_scale"]
    written = compressor.compress(state, scheme)
    assert {f"{NAME}.{key}" for key in written} == set(ours)
    for key, tensor in written.items():
        mine = ours[f"{NAME}.{key}"]
        assert mine.dtype == tensor.dtype
        assert torch.equal(mine.view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("name", [*POWERS, "NVFP4A16"])
def test_config_is_that_of_the_upstream_preset(name):
    ours, theirs = upstream(name)[1], preset_name_to_scheme(name, ["Linear"])
    for field in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "scale_dtype"):
        assert getattr(ours.weights, field) == getattr(theirs.weights, field), field


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(FLOAT_NAMES),
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 999),
)
def test_unpack_of_packed_linear_is_identical(name, rows, groups, dtype, seed):
    quantized = random_floats(rows, 32 * groups, name, dtype=dtype, seed=seed)
    packed = compressed_tensors_format.pack(NAME, quantized)
    found = compressed_tensors_format.unpack(NAME, packed, quantized.scheme)
    assert found.scheme == quantized.scheme and found.zero_RG is None
    assert torch.equal(found.codes_RC, quantized.codes_RC)
    assert found.scale_RG.dtype == quantized.scale_RG.dtype
    assert torch.equal(found.scale_RG, quantized.scale_RG)
    if quantized.divisor_R1 is not None:
        assert torch.equal(found.divisor_R1, quantized.divisor_R1)
    promised = packed_on_meta(
        compressed_tensors_format,
        NAME,
        rows=rows,
        columns=32 * groups,
        scheme=quantized.scheme,
        model_dtype=dtype,
    )
    assert list(promised) == list(packed)
    for key, tensor in packed.items():
        assert tensor.is_contiguous(), key
        assert (promised[key].dtype, promised[key].shape) == (tensor.dtype, tensor.shape), key
    assert set(packed) <= set(compressed_tensors_format.packed_names(NAME))


def test_config_of_several_layouts_names_each_and_reads_back():
    schemes = {
        "a": scheme_from_name("FP8A16"),
        "b": scheme_from_name("MXFP4A16"),
        "c": scheme_from_name("W4A16", 32),
        "d": None,
    }
    block = compressed_tensors_format.quantization_config(schemes, ["lm_head"])
    assert block["format"] == "mixed-precision"
    QuantizationConfig.model_validate(json.loads(json.dumps(block)))
    for name, scheme in schemes.items():
        assert compressed_tensors_format.scheme_of(block, name) == scheme


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("MXFP4A16", {"weight_scale": lambda t: torch.full_like(t, 255)}, "no number"),
        ("MXFP4A16", {"weight_scale": lambda t: t.float()}, "must be torch.uint8"),
        ("MXFP4A16", {"weight_scale": lambda t: t[:, :1]}, r"weight_scale must be \(8, 2\)"),
        ("MXFP4A16", {"weight_packed": lambda t: t.to(torch.int8)}, "must be torch.uint8"),
        ("MXFP4A16", {"weight_packed": lambda t: t[:, :20]}, "whole groups"),
        ("FP8A16", {"weight": lambda t: t.view(torch.uint8).fill_(0x7F).view(t.dtype)}, "no numbers"),
        ("FP8A16", {"weight": lambda t: t.to(torch.float8_e5m2)}, "must be torch.float8_e4m3fn"),
        ("FP8A16", {"weight_scale": lambda t: t[0]}, r"weight_scale must be \(8, 1\)"),
        ("MXFP8A16", {"weight_scale": None}, "weight_scale is missing"),
        ("FP8A16_TENSOR", {"weight_scale": lambda t: t.expand(8, 1)}, r"weight_scale must be \(1,\)"),
        ("FP8A16_BLOCK", {"weight_scale": lambda t: t.expand(8, 1)}, r"weight_scale must be \(1, 1\)"),
        ("NVFP4A16", {"weight_scale": lambda t: t.float()}, "must be torch.float8_e4m3fn"),
        ("NVFP4A16", {"weight_global_scale": None}, "weight_global_scale is missing"),
        ("NVFP4A16", {"weight_global_scale": lambda t: t.expand(2)}, r"must be \(1,\)"),
    ],
)
def test_malformed_tensors_are_refused(name, change, words):
    packed = compressed_tensors_format.pack(NAME, random_floats(8, 64, name))
    for key, damage in change.items():
        tensor = packed.pop(f"{NAME}.{key}")
        if damage is not None:
            packed[f"{NAME}.{key}"] = damage(tensor)
    with pytest.raises(PackingError, match=words):
        compressed_tensors_format.unpack(NAME, packed, scheme_from_name(name))


def test_scale_that_is_no_power_of_two_is_refused():
    quantized = random_floats(8, 64, "MXFP8A16")
    broken = QuantizedLinear(
        codes_RC=quantized.codes_RC,
        scale_RG=quantized.scale_RG * 1.5,
        zero_RG=None,
        scheme=quantized.scheme,
    )
    with pytest.raises(PackingError, match="no power of two"):
        compressed_tensors_format.pack(NAME, broken)


def test_scales_that_rows_should_share_are_refused_if_they_differ():
    for name in ("FP8A16_TENSOR", "FP8A16_BLOCK"):
        quantized = random_floats(8, 64, name)
        quantized.scale_RG[5] *= 2
        with pytest.raises(PackingError, match="rows that share"):
            compressed_tensors_format.pack(NAME, quantized)


def test_quotients_without_their_divisor_are_refused():
    broken = replace(random_floats(8, 64, "NVFP4A16"), divisor_R1=None)
    with pytest.raises(PackingError, match="need their divisor"):
        compressed_tensors_format.pack(NAME, broken)


@pytest.mark.parametrize("name", CODEBOOK_NAMES)
def test_codebooks_have_no_layout(name):
    with pytest.raises(PackingError, match="use --format bitsandbytes"):
        compressed_tensors_format.check(NAME, 64, 64, scheme_from_name(name))


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_layouts_of_integers_refuse_floats(name):
    for format_name in FORMATS:
        if format_name != "compressed-tensors":
            with pytest.raises(
                PackingError, match=f"{format_name} output holds .*, not {scheme_from_name(name)}"
            ):
                FORMATS[format_name].check(NAME, 64, 64, scheme_from_name(name))


def test_columns_that_are_no_whole_groups_are_refused():
    with pytest.raises(PackingError, match="whole groups, found 80 columns"):
        compressed_tensors_format.check(NAME, 8, 80, scheme_from_name("MXFP4A16"))


@pytest.mark.parametrize(
    "change", [{"group_size": 16}, {"num_bits": 6}, {"strategy": "tensor"}, {"symmetric": False}]
)
def test_config_that_means_another_float_scheme_is_refused(change):
    block = compressed_tensors_format.quantization_config({NAME: scheme_from_name("MXFP4A16")})
    block["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(PackingError, match="of floats these are read"):
        compressed_tensors_format.scheme_of(block, NAME)
