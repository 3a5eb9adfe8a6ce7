"""The AWQ layout against a slow decoder of its own, its words by hand, and the keys that readers look for."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import PackingError
from quantlib.packing import awq_format
from quantlib.packing.awq_words import in_plain_order, interleaved
from quantlib.schemes import WHOLE_ROW, WeightScheme
from tests.support.awq_decoder import codes_of_awq, decoded_levels
from tests.support.random_linears import random_quantized

NAME = "model.layers.0.mlp.down_proj"
W4 = WeightScheme(bits=4, is_symmetric=True, group_size=32)
W4_ASYM = WeightScheme(bits=4, is_symmetric=False, group_size=32)
W4_G128 = WeightScheme(bits=4, is_symmetric=True, group_size=128)
W4_ASYM_G128 = WeightScheme(bits=4, is_symmetric=False, group_size=128)


def unsigned(words):
    return [word & 0xFFFFFFFF for word in words.flatten().tolist()]


def packed(rows=16, columns=64, scheme=W4, seed=0):
    return awq_format.pack(
        NAME, random_quantized(rows, columns, scheme, scale_dtype=torch.float16, seed=seed)
    )


@settings(deadline=None)
@given(word=st.integers(0, 2**32 - 1))
def test_words_hold_the_columns_that_the_layout_says(word):
    plain = torch.tensor([word]).to(torch.uint32).view(torch.int32)
    stored = interleaved(plain)
    assert codes_of_awq(unsigned(stored)) == [word >> 4 * column & 15 for column in range(8)]
    assert torch.equal(in_plain_order(stored), plain)


@settings(deadline=None, max_examples=60)
@given(
    words=st.integers(1, 5),
    columns=st.integers(1, 24),
    whole=st.booleans(),
    is_symmetric=st.booleans(),
    seed=st.integers(0, 999),
)
def test_pack_slow_decoder_finds_the_levels(words, columns, whole, is_symmetric, seed):
    size = WHOLE_ROW if whole else 4
    scheme = WeightScheme(bits=4, is_symmetric=is_symmetric, group_size=size)
    quantized = random_quantized(8 * words, 4 * columns, scheme, scale_dtype=torch.float16, seed=seed)
    found = decoded_levels(awq_format.pack(NAME, quantized), NAME)
    assert torch.equal(torch.tensor(found), quantized.dequantize())


def test_pack_symmetric_zero_words_are_eights():
    assert set(unsigned(packed()[f"{NAME}.qzeros"])) == {0x88888888}


def test_pack_zero_point_is_stored_as_it_is():
    quantized = random_quantized(8, 32, W4_ASYM, scale_dtype=torch.float16)
    quantized.zero_RG.copy_(torch.tensor([0, 1, 2, 3, 4, 5, 6, 15], dtype=torch.uint8)[:, None])
    assert unsigned(awq_format.pack(NAME, quantized)[f"{NAME}.qzeros"]) == [0xF5316420]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_check_other_widths_are_refused(bits):
    scheme = WeightScheme(bits=bits, is_symmetric=True, group_size=32)
    with pytest.raises(PackingError, match=f"holds codes of 4 bits, not {bits}"):
        awq_format.check(NAME, 64, 64, scheme)


def test_check_out_features_that_fill_no_words_are_refused_and_in_features_are_free():
    with pytest.raises(PackingError, match="out features in multiples of 8, got 12"):
        awq_format.check(NAME, 12, 64, W4)
    awq_format.check(NAME, 8, 37, WeightScheme(bits=4, is_symmetric=True, group_size=WHOLE_ROW))


def test_scale_dtype_is_fp16_and_others_are_refused():
    assert awq_format.scale_dtype(torch.bfloat16) == torch.float16
    with pytest.raises(PackingError, match="float16, got torch.bfloat16"):
        awq_format.pack(NAME, random_quantized(32, 32, W4, scale_dtype=torch.bfloat16))


@pytest.mark.parametrize("scheme", [W4, W4_ASYM])
def test_quantization_config_states_the_scheme_in_the_keys_all_readers_need(scheme):
    block = awq_format.quantization_config({NAME: scheme}, ["lm_head"])
    meta = block.pop("meta")
    assert block == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert meta["symmetric"] is scheme.is_symmetric
    again = json.loads(json.dumps({**block, "meta": meta}))
    assert awq_format.scheme_of(again, NAME) == scheme
    assert awq_format.scheme_of(again, "lm_head") is None


@pytest.mark.parametrize("other", [W4_ASYM, W4_G128])
def test_quantization_config_of_several_schemes_is_refused(other):
    with pytest.raises(PackingError, match="has one scheme, and this one would have 4 bits, symmetric"):
        awq_format.quantization_config({NAME: W4, "model.layers.0.mlp.up_proj": other})


FOREIGN = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
OF_AUTOAWQ = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}


@pytest.mark.parametrize(
    ("block", "name", "expected"),
    [
        (FOREIGN, NAME, W4_ASYM_G128),
        (OF_AUTOAWQ, NAME, W4_ASYM_G128),
        (FOREIGN, "lm_head", None),
        ({**FOREIGN, "lm_head": True}, "lm_head", W4_ASYM_G128),
        ({**FOREIGN, "zero_point": False}, NAME, W4_G128),
        ({**FOREIGN, "modules_to_not_convert": None}, NAME, W4_ASYM_G128),
        ({**FOREIGN, "modules_to_not_convert": ["gate"]}, "model.layers.0.block_sparse_moe.gate", None),
        ({**FOREIGN, "modules_to_not_convert": ["visual"]}, "visual.blocks.0.attn.proj", None),
        ({**FOREIGN, "modules_to_not_convert": ["visual"]}, NAME, W4_ASYM_G128),
        # transformers adds what it makes of missing keys when it saves a file again.
        ({**FOREIGN, "sym": True, "format": "gemm", "meta": None}, NAME, W4_ASYM_G128),
    ],
)
def test_scheme_of_reads_blocks_of_other_tools(block, name, expected):
    assert awq_format.scheme_of(block, name) == expected


def test_unpack_symmetric_zero_points_other_than_eight_are_refused():
    tensors = packed(scheme=W4_ASYM)
    with pytest.raises(PackingError, match="config says symmetric, but qzeros holds zero points 0 to 15"):
        awq_format.unpack(NAME, tensors, W4)
