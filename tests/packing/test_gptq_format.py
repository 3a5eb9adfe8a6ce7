"""The GPTQ layout against a slow decoder of its own, and its config block against the rules readers apply."""

import json
import re

import pytest
import torch

from quantlib.errors import PackingError
from quantlib.packing import gptq_format
from quantlib.schemes import WHOLE_ROW, WeightScheme
from tests.support.big_integers import codes_of, words_of
from tests.support.random_linears import random_quantized

NAME = "model.layers.0.mlp.down_proj"
W4 = WeightScheme(bits=4, is_symmetric=True, group_size=32)
W8 = WeightScheme(bits=8, is_symmetric=True, group_size=64)


def decoded_levels(tensors, bits, zero_is_shifted):
    """Levels [out][in] as Python floats, as the layout is defined on paper."""
    scales, g_idx = tensors[f"{NAME}.scales"].tolist(), tensors[f"{NAME}.g_idx"].tolist()
    codes = [codes_of(words, bits) for words in tensors[f"{NAME}.qweight"].T.tolist()]
    stored = [codes_of(words, bits) for words in tensors[f"{NAME}.qzeros"].tolist()]
    shift = int(zero_is_shifted)
    return [
        [scales[g][o] * (codes[o][i] - stored[g][o] - shift) for i, g in enumerate(g_idx)]
        for o in range(len(scales[0]))
    ]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 48, WHOLE_ROW])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_pack_slow_decoder_finds_the_levels(bits, group_size, is_symmetric):
    scheme = WeightScheme(bits=bits, is_symmetric=is_symmetric, group_size=group_size)
    quantized = random_quantized(64, 96, scheme, scale_dtype=torch.float16, seed=bits)
    block = gptq_format.quantization_config({NAME: scheme})
    shifted = block["checkpoint_format"] == "gptq"
    found = decoded_levels(gptq_format.pack(NAME, quantized), bits, zero_is_shifted=shifted)
    assert torch.equal(torch.tensor(found), quantized.dequantize())


def test_pack_asymmetric_zero_of_0_does_not_disturb_its_neighbours():
    scheme = WeightScheme(bits=4, is_symmetric=False, group_size=WHOLE_ROW)
    quantized = random_quantized(32, 32, scheme, scale_dtype=torch.float16)
    zeros = [0, 5, 0, 3, 8, 0, 15, 1] * 4
    quantized.zero_RG.copy_(torch.tensor(zeros, dtype=torch.uint8)[:, None])
    packed = gptq_format.pack(NAME, quantized)
    assert [w & 0xFFFFFFFF for w in packed[f"{NAME}.qzeros"][0].tolist()] == [0x1F083050] * 4
    assert gptq_format.unpack(NAME, packed, scheme).zero_RG.flatten().tolist() == zeros


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, [0x55555555]),
        (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        (4, [0x77777777]),
        (8, [0x7F7F7F7F]),
    ],
)
def test_pack_symmetric_zero_words_are_the_known_ones(bits, words):
    scheme = WeightScheme(bits=bits, is_symmetric=True, group_size=32)
    packed = gptq_format.pack(NAME, random_quantized(96, 64, scheme, scale_dtype=torch.float16))
    repeats = 96 * bits // 32 // len(words)
    for found in packed[f"{NAME}.qzeros"].tolist():
        assert [word & 0xFFFFFFFF for word in found] == words * repeats


def test_pack_three_bits_have_the_shapes_that_readers_allocate():
    scheme = WeightScheme(bits=3, is_symmetric=False, group_size=32)
    quantized = random_quantized(96, 64, scheme, scale_dtype=torch.float16, seed=5)
    packed = gptq_format.pack(NAME, quantized)
    assert {name.rpartition(".")[2]: tuple(tensor.shape) for name, tensor in packed.items()} == {
        "qweight": (64 // 32 * 3, 96),
        "qzeros": (2, 96 // 32 * 3),
        "scales": (2, 96),
        "g_idx": (64,),
    }
    for zeros, words in zip(quantized.zero_RG.T.tolist(), packed[f"{NAME}.qzeros"].tolist(), strict=True):
        assert [word & 0xFFFFFFFF for word in words] == words_of(zeros, 3)


def test_unpack_three_bit_zeros_of_a_writer_that_shifted_whole_words_are_refused():
    scheme = WeightScheme(bits=3, is_symmetric=True, group_size=32)
    packed = gptq_format.pack(NAME, random_quantized(32, 32, scheme, scale_dtype=torch.float16))
    # Fields of 4 in three words, less constants that stand in reverse order.
    ones = words_of([1] * 32, 3)
    wrong = [(word - one) % 2**32 for word, one in zip(words_of([4] * 32, 3), ones[::-1], strict=True)]
    packed[f"{NAME}.qzeros"] = torch.tensor([wrong]).to(torch.int32)
    with pytest.raises(PackingError, match="config says symmetric, but qzeros holds fields 0 to"):
        gptq_format.unpack(NAME, packed, scheme)


def test_unpack_symmetric_zeros_of_either_convention_are_read():
    quantized = random_quantized(32, 32, W4, scale_dtype=torch.float16)
    packed = gptq_format.pack(NAME, quantized)
    packed[f"{NAME}.qzeros"].fill_(-2004318072)
    assert torch.equal(gptq_format.unpack(NAME, packed, W4).dequantize(), quantized.dequantize())
    packed[f"{NAME}.qzeros"].fill_(0x66666666)
    with pytest.raises(PackingError, match="fields 6 to 6 where 7"):
        gptq_format.unpack(NAME, packed, W4)


def test_unpack_reordered_groups_are_refused():
    packed = gptq_format.pack(NAME, random_quantized(32, 64, W4, scale_dtype=torch.float16))
    packed[f"{NAME}.g_idx"] = packed[f"{NAME}.g_idx"].flip(0)
    with pytest.raises(PackingError, match="desc_act"):
        gptq_format.unpack(NAME, packed, W4)


@pytest.mark.parametrize(("rows", "columns", "side"), [(48, 64, "out"), (64, 48, "in")])
def test_check_side_that_fills_no_whole_words_is_refused(rows, columns, side):
    scheme = WeightScheme(bits=4, is_symmetric=True, group_size=WHOLE_ROW)
    with pytest.raises(PackingError, match=f"{side} features in multiples of 32, got 48"):
        gptq_format.check(NAME, rows, columns, scheme)


def test_scale_dtype_is_fp16_and_others_are_refused():
    assert gptq_format.scale_dtype(torch.bfloat16) == torch.float16
    with pytest.raises(PackingError, match="float16, got torch.bfloat16"):
        gptq_format.pack(NAME, random_quantized(32, 32, W4, scale_dtype=torch.bfloat16))


def linears(*blocks, names=("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")):
    return [f"model.layers.{block}.{name}" for block in blocks for name in names]


def reader_finds(block, name):
    """The rule of vLLM and GPTQModel: dynamic in order, match at the start, minus skips, plus overrides."""
    for pattern, override in block["dynamic"].items():
        if pattern.startswith("-:") and re.match(pattern[2:], name):
            return None
        if pattern.startswith("+:") and re.match(pattern[2:], name):
            return override["bits"], override["group_size"]
    return block["bits"], block["group_size"]


def test_quantization_config_of_one_scheme_states_it():
    block = gptq_format.quantization_config(dict.fromkeys(linears(0, 1), W4), ["lm_head"])
    stated = {k: block[k] for k in ("quant_method", "bits", "group_size", "desc_act", "sym", "lm_head")}
    assert stated == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }
    assert (block["checkpoint_format"], block["pack_dtype"], block["dynamic"]) == ("gptq", "int32", {})
    assert re.fullmatch(r"quantmill:\d+\.\d+\.\d+.*", block["meta"]["quantizer"][0])
    assert json.loads(gptq_format.side_files(block)["quantize_config.json"]) == block


def test_quantization_config_asymmetric_declares_v2():
    scheme = WeightScheme(bits=4, is_symmetric=False, group_size=32)
    block = gptq_format.quantization_config(dict.fromkeys(linears(0), scheme))
    assert (block["checkpoint_format"], block["sym"]) == ("gptq_v2", False)
    assert gptq_format.scheme_of(block, NAME) == scheme


MIXED = {
    **dict.fromkeys(linears(0, 1, 2, 11), W4),
    **dict.fromkeys(linears(1), None),
    "model.layers.2.mlp.down_proj": W8,
    "model.layers.0.self_attn.o_proj": None,
}


def test_quantization_config_of_mixed_schemes_is_read_alike_by_readers():
    block = gptq_format.quantization_config(MIXED, ["model.vision.proj", "lm_head"])
    for name, scheme in MIXED.items():
        expected = None if scheme is None else (scheme.bits, scheme.group_size)
        assert reader_finds(block, name) == expected, name
        assert gptq_format.scheme_of(block, name) == scheme, name
    assert reader_finds(block, "model.vision.proj") is None
    # Readers that fuse q, k and v ask for a name that is in no checkpoint.
    assert reader_finds(block, "model.layers.1.self_attn.qkv_proj") is None
    assert reader_finds(block, "model.layers.11.self_attn.qkv_proj") == (4, 32)


def test_quantization_config_mixing_symmetries_is_refused():
    asymmetric = WeightScheme(bits=4, is_symmetric=False, group_size=32)
    with pytest.raises(PackingError, match="cannot mix"):
        gptq_format.quantization_config(MIXED | {NAME: asymmetric})


FOREIGN = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
W4_G128 = WeightScheme(bits=4, is_symmetric=True, group_size=128)
W8_G128 = WeightScheme(bits=8, is_symmetric=True, group_size=128)
W3_G128 = WeightScheme(bits=3, is_symmetric=True, group_size=128)
W4_ROW = WeightScheme(bits=4, is_symmetric=True, group_size=WHOLE_ROW)
W4_ASYM_G128 = WeightScheme(bits=4, is_symmetric=False, group_size=128)


@pytest.mark.parametrize(
    ("extra", "name", "expected"),
    [
        ({}, NAME, W4_G128),
        ({}, "lm_head", None),
        ({"lm_head": True}, "lm_head", W4_G128),
        ({"checkpoint_format": "gptq_v2"}, NAME, W4_G128),
        ({"modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.down_proj"]]}, NAME, W4_G128),
        ({"modules_in_block_to_quantize": [["mlp.up_proj"]]}, NAME, None),
        ({"modules_in_block_to_quantize": ["proj"]}, NAME, None),
        ({"desc_act": True, "group_size": -1}, NAME, W4_ROW),
        ({"dynamic": {r".*\.down_proj": {"bits": 8}}}, NAME, W8_G128),
        ({"bits": 3}, NAME, W3_G128),
        ({"dynamic": {r"-:.*\.mlp\..*": {}, r"+:.*": {"bits": 8}}}, NAME, None),
        ({"dynamic": {r"-:down_proj": {}}}, NAME, W4_G128),
        ({"sym": False, "checkpoint_format": "gptq_v2"}, NAME, W4_ASYM_G128),
    ],
)
def test_scheme_of_reads_blocks_of_other_tools(extra, name, expected):
    assert gptq_format.scheme_of(FOREIGN | extra, name) == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"bits": 5}, "checkpoints of 2, 3, 4, 8 bits are read; got bits 5"),
        ({"bits": 3, "checkpoint_format": "gptq_p"}, "gptq_p"),
        ({"bits": None}, "bits None"),
        ({"desc_act": True}, "desc_act"),
        ({"sym": False}, "asymmetric"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"pack_dtype": "int64"}, "int64"),
        ({"group_size": "128"}, "'128'"),
        ({"dynamic": {"-:(": {}}}, "broken regex"),
    ],
)
def test_scheme_of_what_cannot_be_unpacked_is_refused(extra, message):
    with pytest.raises(PackingError, match=message):
        gptq_format.scheme_of(FOREIGN | extra, NAME)
