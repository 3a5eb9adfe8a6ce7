"""The layouts of bitsandbytes against the package itself, and how readers find kept linears."""

import dataclasses

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from quantlib.errors import PackingError
from quantlib.packing import bitsandbytes_format
from quantlib.schemes import scheme_from_name
from tests.support.random_linears import random_quantized

NAME = "model.layers.3.mlp.up_proj"
ROWS = scheme_from_name("W8A16", -1)
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def int8_linear(rows, columns, seed=0):
    return random_quantized(rows, columns, ROWS, scale_dtype=torch.bfloat16, seed=seed)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 96)])
def test_rows_dequantize_to_our_levels_in_bitsandbytes(shape):
    quantized = int8_linear(*shape)
    packed = bitsandbytes_format.pack(NAME, quantized)
    codes_RC, scb_R = packed[f"{NAME}.weight"], packed[f"{NAME}.SCB"]
    levels_RC = quantized.dequantize()
    assert torch.equal(codes_RC.float() * (scb_R / 127)[:, None], levels_RC)
    # bitsandbytes multiplies by a rounded 1 / 127: two roundings of fp32.
    torch.testing.assert_close(bnb.int8_vectorwise_dequant(codes_RC, scb_R), levels_RC, rtol=3e-7, atol=0)


def test_every_bf16_scale_comes_back_from_its_scb():
    bits = torch.arange(0x0080, 0x7C00, dtype=torch.int16)
    scale_R1 = bits.view(torch.bfloat16)[:, None]
    quantized = dataclasses.replace(int8_linear(len(bits), 1), scale_RG=scale_R1)
    packed = bitsandbytes_format.pack(NAME, quantized)
    assert torch.equal(bitsandbytes_format.unpack(NAME, packed, ROWS).scale_RG, scale_R1)


def test_config_block_is_what_transformers_writes():
    block = bitsandbytes_format.quantization_config({NAME: ROWS}, ["lm_head"])
    wanted = BitsAndBytesConfig(
        load_in_8bit=True,
        llm_int8_skip_modules=["lm_head"],
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_type="nf4",
    ).to_dict()
    assert block == wanted
    assert block["quant_method"] == "bitsandbytes"


def transformers_keeps(entries, name):
    return not should_convert_module(name, entries)


def vllm_keeps(entries, name):
    """An entry is a part of the name between dots or its beginning; of a fused projection all parts agree."""
    module, _, last = name.rpartition(".")
    answers = set()
    for part in PARTS.get(last, (last,)):
        words = f"{module}.{part}".strip(".").split(".")
        beginnings = {".".join(words[: i + 1]) for i in range(len(words))}
        answers.add(bool(beginnings.union(words).intersection(entries)))
    assert len(answers) == 1
    return answers.pop()


@settings(max_examples=80)
@given(
    st.dictionaries(st.integers(0, 25), st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1)
)
def test_every_reader_keeps_what_is_kept_and_nothing_else(kept_by_layer):
    schemes = {"model.layers.26.mlp.down_proj": ROWS}
    for layer, kept in kept_by_layer.items():
        sets = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
        for names, is_kept in zip((*sets, ("mlp.up_proj", "mlp.down_proj")), kept, strict=True):
            schemes |= {f"model.layers.{layer}.{name}": None if is_kept else ROWS for name in names}
    outside = ["language_model.lm_head", "model.visual.blocks.1.attn.qkv"]
    block = bitsandbytes_format.quantization_config(schemes, outside)
    entries = block["llm_int8_skip_modules"]
    for name in (*schemes, *outside, "lm_head"):
        is_kept = schemes.get(name) is None
        assert transformers_keeps(entries, name) == is_kept, name
        assert vllm_keeps(entries, name) == is_kept, name
        assert (bitsandbytes_format.scheme_of(block, name) is None) == is_kept, name


def test_linear_that_cannot_be_kept_by_name_alone_is_refused():
    with pytest.raises(PackingError, match=r"bitsandbytes checkpoints name .* gate cannot be kept while"):
        bitsandbytes_format.quantization_config({"gate": None, "mlp.gate_proj": ROWS})


def test_several_schemes_are_refused():
    other = dataclasses.replace(ROWS, group_size=32)
    with pytest.raises(PackingError, match="has one scheme, and this one would have 8 bits"):
        bitsandbytes_format.quantization_config({"a": ROWS, "b": other})


@pytest.mark.parametrize("scheme", [scheme_from_name("W4A16", -1), scheme_from_name("W8A16_ASYM", -1)])
def test_other_schemes_are_refused_with_those_that_fit(scheme):
    with pytest.raises(PackingError, match="with group_size -1 and NF4, NF4_DQ, FP4, FP4_DQ, not"):
        bitsandbytes_format.check(NAME, 8, 64, scheme)


def test_blocks_of_other_tools_keep_what_transformers_keeps():
    block = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": None}
    assert bitsandbytes_format.scheme_of(block, "lm_head") is None
    assert bitsandbytes_format.scheme_of(block, NAME) == ROWS
    entries = {**block, "llm_int8_skip_modules": [r"model\.layers\.(3|4)"]}
    assert bitsandbytes_format.scheme_of(entries, NAME) is None
    assert bitsandbytes_format.scheme_of(entries, NAME.replace("3", "33")) == ROWS


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llm_int8_skip_modules": "lm_head"}, "must be a list of names"),
        ({"llm_int8_skip_modules": ["mlp.("]}, "broken regex"),
        ({"load_in_8bit": False}, "are read; got load_in_4bit False, bnb_4bit_quant_type 'nf4'"),
        ({"load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "are read; got"),
    ],
)
def test_blocks_that_are_not_understood_are_refused(changes, said):
    block = bitsandbytes_format.quantization_config({NAME: ROWS}) | changes
    with pytest.raises(PackingError, match=said):
        bitsandbytes_format.scheme_of(block, NAME)


@pytest.mark.parametrize(
    ("part", "tensor", "said"),
    [
        ("SCB", torch.full((4,), 1 / 3), "must be 127 times bf16 numbers"),
        ("SCB", torch.full((4,), torch.nan), "must be 127 times bf16 numbers"),
        ("weight_format", torch.tensor(1, dtype=torch.uint8), r"must be 0 \(row by row\), got 1"),
        ("weight", torch.zeros(4, dtype=torch.int8), "must be a matrix"),
        ("weight", torch.zeros(4, 8), "must be torch.int8"),
    ],
)
def test_tensors_of_another_layout_are_refused(part, tensor, said):
    packed = bitsandbytes_format.pack(NAME, int8_linear(4, 8)) | {f"{NAME}.{part}": tensor}
    with pytest.raises(PackingError, match=said):
        bitsandbytes_format.unpack(NAME, packed, ROWS)


def test_scale_whose_scb_is_infinite_is_refused():
    linear = int8_linear(2, 4)
    huge = dataclasses.replace(linear, scale_RG=torch.full_like(linear.scale_RG, 3e37))
    with pytest.raises(PackingError, match="127 times a scale is infinite"):
        bitsandbytes_format.pack(NAME, huge)
