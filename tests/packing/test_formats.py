"""What holds for every output format: nothing is lost, the plan is kept to, contradictions are refused."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib import packing
from quantlib.errors import PackingError
from quantlib.packing import FORMATS, format_of
from quantlib.schemes import WHOLE_ROW, WeightScheme
from tests.support.format_limits import (
    FORMATS_AND_BITS,
    FORMATS_AND_SCHEMES,
    GROUP_SIZES,
    HELD_BITS,
    ROWS_ONLY,
    SIDES,
    held_group_size,
    held_scheme,
    scheme_for,
    symmetries,
)
from tests.support.random_linears import on_meta, random_quantized

NAME = "model.layers.3.mlp.up_proj"


@st.composite
def quantized_linears(draw, format_name):
    """Ragged shapes where the format allows them, whole rows and groups of any size that divides a row."""
    row_step, column_step = SIDES[format_name]
    rows = draw(st.integers(1, max(3, 45 // row_step))) * row_step
    columns = draw(st.integers(1, max(4, 75 // column_step))) * column_step
    divisors = [size for size in range(1, columns + 1) if columns % size == 0]
    group_size = held_group_size(format_name, draw(st.sampled_from([WHOLE_ROW, *divisors])))
    bits = draw(st.sampled_from(HELD_BITS[format_name]))
    is_symmetric = draw(st.sampled_from(symmetries(format_name, bits)))
    scheme = packing.held_scheme(
        format_name, WeightScheme(bits=bits, is_symmetric=is_symmetric, group_size=group_size)
    )
    model_dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    scale_dtype = FORMATS[format_name].scale_dtype(model_dtype)
    return random_quantized(rows, columns, scheme, scale_dtype=scale_dtype, seed=draw(st.integers(0, 999)))


@pytest.mark.parametrize("format_name", FORMATS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_unpack_of_packed_linear_is_identical(format_name, data):
    packer = FORMATS[format_name]
    quantized = data.draw(quantized_linears(format_name))
    packed = packer.pack(NAME, quantized)
    found = packer.unpack(NAME, packed, quantized.scheme)
    assert found.scheme == quantized.scheme
    assert found.scale_RG.dtype == quantized.scale_RG.dtype
    assert torch.equal(found.scale_RG, quantized.scale_RG)
    assert torch.equal(found.codes_RC, quantized.codes_RC)
    assert found.codes_RC.dtype == torch.uint8
    if quantized.zero_RG is None:
        assert found.zero_RG is None
    else:
        assert torch.equal(found.zero_RG, quantized.zero_RG)
    assert torch.equal(found.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("format_name", FORMATS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_pack_on_meta_promises_what_pack_makes(format_name, data):
    packer = FORMATS[format_name]
    quantized = data.draw(quantized_linears(format_name))
    packed, promised = packer.pack(NAME, quantized), packer.pack(NAME, on_meta(quantized))
    assert list(packed) == list(promised)
    assert set(packed) <= set(packer.packed_names(NAME))
    for name, tensor in packed.items():
        assert tensor.is_contiguous(), name
        assert promised[name].is_meta, name
        assert (promised[name].dtype, promised[name].shape) == (tensor.dtype, tensor.shape), name


@pytest.mark.parametrize(("format_name", "name"), FORMATS_AND_SCHEMES)
@pytest.mark.parametrize("group_size", [32, 64, 128, WHOLE_ROW])
def test_every_scheme_at_every_usual_group_size_comes_back(format_name, name, group_size):
    packer, scheme = FORMATS[format_name], scheme_for(format_name, name, group_size)
    quantized = random_quantized(64, 384, scheme, scale_dtype=packer.scale_dtype(torch.float16))
    found = packer.unpack(NAME, packer.pack(NAME, quantized), scheme)
    assert torch.equal(found.dequantize(), quantized.dequantize())
    assert packer.scheme_of(packer.quantization_config({NAME: scheme}), NAME) == scheme


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("bits", range(1, 17))
def test_check_bits_that_the_format_does_not_hold_are_refused(format_name, bits):
    scheme = WeightScheme(bits=bits, is_symmetric=True, group_size=held_group_size(format_name, 32))
    if bits in HELD_BITS[format_name]:
        FORMATS[format_name].check(NAME, 64, 64, scheme)
        return
    with pytest.raises(PackingError, match=rf"not {bits}\b.*another"):
        FORMATS[format_name].check(NAME, 64, 64, scheme)


@pytest.mark.parametrize("format_name", [name for name in FORMATS if name not in GROUP_SIZES])
@pytest.mark.parametrize("group_size", [128, -2, 1000])
def test_check_group_size_that_leaves_a_rest_names_those_that_fit(format_name, group_size):
    scheme = dataclasses.replace(held_scheme(format_name), group_size=group_size)
    with pytest.raises(PackingError, match=r"576 columns, got .*use 64, 32, 16, -1") as caught:
        FORMATS[format_name].check(NAME, 576, 576, scheme)
    assert caught.value.facts["linear"] == NAME


def sound(format_name, is_symmetric=True, **others):
    scheme = dataclasses.replace(held_scheme(format_name, is_symmetric=is_symmetric), **others)
    return random_quantized(32, 64, scheme, scale_dtype=FORMATS[format_name].scale_dtype(torch.float16))


CONTRADICTIONS = {
    "scale_shape": lambda q: dataclasses.replace(q, scale_RG=q.scale_RG[:-1]),
    "scale_dtype": lambda q: dataclasses.replace(q, scale_RG=q.scale_RG.double()),
    "zero_missing": lambda q: dataclasses.replace(q, zero_RG=None),
    "zero_shape": lambda q: dataclasses.replace(q, zero_RG=q.zero_RG[:1]),
    "zero_out_of_range": lambda q: dataclasses.replace(q, zero_RG=q.zero_RG + 16),
    "code_out_of_range": lambda q: dataclasses.replace(q, codes_RC=q.codes_RC + 16),
    "scale_zero": lambda q: dataclasses.replace(q, scale_RG=q.scale_RG * 0),
    "scale_negative": lambda q: dataclasses.replace(q, scale_RG=-q.scale_RG),
    "scale_infinite": lambda q: dataclasses.replace(q, scale_RG=q.scale_RG / 0),
    "scale_nan": lambda q: dataclasses.replace(q, scale_RG=q.scale_RG * float("nan")),
}


@pytest.mark.parametrize(
    ("format_name", "contradiction"),
    [
        (name, contradiction)
        for name in FORMATS
        for contradiction in CONTRADICTIONS
        # Every byte is a code of theirs.
        if name not in ROWS_ONLY or contradiction.startswith("scale")
    ],
)
def test_pack_linear_that_contradicts_itself_is_refused(format_name, contradiction):
    linear = sound(format_name, is_symmetric=False)
    FORMATS[format_name].pack(NAME, linear)
    broken = CONTRADICTIONS[contradiction](linear)
    with pytest.raises(PackingError):
        FORMATS[format_name].pack(NAME, broken)


@pytest.mark.parametrize("format_name", FORMATS)
def test_pack_symmetric_linear_with_zero_points_is_refused(format_name):
    quantized = sound(format_name)
    zero_RG = torch.full_like(quantized.scale_RG, quantized.scheme.middle_code, dtype=torch.uint8)
    broken = dataclasses.replace(quantized, zero_RG=zero_RG)
    with pytest.raises(PackingError, match="asymmetric schemes only"):
        FORMATS[format_name].pack(NAME, broken)


def cut(tensor, format_name):
    """Without its last row; a scalar without its only value."""
    if format_name == "gguf":
        # Rows of blocks stand by themselves: without the last they are another linear.
        return tensor[:, :-1]
    return tensor[:-1] if tensor.dim() else tensor.reshape(1)[:0]


@pytest.mark.parametrize(("format_name", "bits"), FORMATS_AND_BITS)
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_unpack_with_a_missing_or_cut_tensor_names_it(format_name, is_symmetric, bits):
    if is_symmetric not in symmetries(format_name, bits):
        return
    packer, quantized = FORMATS[format_name], sound(format_name, is_symmetric, bits=bits)
    packed = packer.pack(NAME, quantized)
    for name in packed:
        without = {n: t for n, t in packed.items() if n != name}
        with pytest.raises(PackingError, match=name):
            packer.unpack(NAME, without, quantized.scheme)
        with pytest.raises(PackingError):
            packer.unpack(NAME, packed | {name: cut(packed[name], format_name)}, quantized.scheme)


@pytest.mark.parametrize("format_name", FORMATS)
def test_quantization_config_without_a_quantized_linear_is_refused(format_name):
    with pytest.raises(PackingError, match="no linear"):
        FORMATS[format_name].quantization_config({"model.layers.0.mlp.up_proj": None}, ["lm_head"])


@pytest.mark.parametrize("format_name", FORMATS)
def test_format_of_reads_what_quantization_config_wrote(format_name):
    scheme = held_scheme(format_name)
    block = FORMATS[format_name].quantization_config({NAME: scheme})
    assert format_of({"model_type": "llama", "quantization_config": block}) is FORMATS[format_name]


def test_format_of_unquantized_and_unknown_checkpoints():
    assert format_of({"model_type": "llama"}) is None
    assert format_of({"quantization_config": {"quant_method": "hqq"}}) is None
    assert format_of({"quantization_config": {}}) is None
    assert format_of({"quantization_config": None}) is None
