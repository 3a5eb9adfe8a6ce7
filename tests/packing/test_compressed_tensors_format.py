"""The pack-quantized layout and its config block, read by the compressed-tensors package itself."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantlib.errors import PackingError
from quantlib.packing import compressed_tensors_format
from quantlib.packing.bits import PACKED_BITS, pack_words, unpack_words
from quantlib.schemes import WHOLE_ROW, WeightScheme
from tests.support.big_integers import words_of
from tests.support.random_linears import random_quantized

NAME = "model.layers.0.mlp.down_proj"
W4 = WeightScheme(bits=4, is_symmetric=True, group_size=32)
W4_ASYM = WeightScheme(bits=4, is_symmetric=False, group_size=16)
W8_ROW = WeightScheme(bits=8, is_symmetric=True, group_size=WHOLE_ROW)
W3 = WeightScheme(bits=3, is_symmetric=True, group_size=32)
W3_ASYM = WeightScheme(bits=3, is_symmetric=False, group_size=16)
W5 = WeightScheme(bits=5, is_symmetric=True, group_size=32)
W6_ASYM = WeightScheme(bits=6, is_symmetric=False, group_size=16)
W2_ASYM = WeightScheme(bits=2, is_symmetric=False, group_size=64)


def upstream_config(block):
    return QuantizationConfig.model_validate(json.loads(json.dumps(block)))


def upstream_levels(tensors, scheme):
    """What compressed-tensors makes of the tensors of one linear."""
    parsed = upstream_config(compressed_tensors_format.quantization_config({NAME: scheme}))
    compressor = BaseCompressor.get_value_from_registry(parsed.format)
    local = {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items()}
    assert set(local) == set(compressor.compression_param_names(parsed.config_groups["group_0"]))
    return compressor.decompress(local, parsed.config_groups["group_0"])["weight"]


@settings(deadline=None, max_examples=80)
@given(
    bits=st.sampled_from(PACKED_BITS),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**31),
)
def test_words_are_those_of_upstream_in_both_directions(bits, rows, columns, dim, seed):
    # Upstream fails on its own words here: 4-bit codes of one line and less than 9 rows.
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    signed = (codes - (1 << (bits - 1))).to(torch.int8)
    theirs = pack_to_int32(signed, bits, packed_dim=dim)
    ours = pack_words(codes.to(torch.uint8), bits=bits, dim=dim)
    assert torch.equal(ours, theirs)
    length = (rows, columns)[dim]
    assert torch.equal(unpack_words(theirs, bits=bits, dim=dim, length=length), codes.to(torch.uint8))
    if not (bits == 4 and dim == 0 and rows <= 8):
        assert torch.equal(unpack_from_int32(ours, bits, codes.shape, packed_dim=dim), signed)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [(48, 64, 16), (19, 30, 6), (33, 37, WHOLE_ROW), (1, 8, 8), (40, 256, 128)],
)
def test_pack_upstream_decompresses_to_the_levels(bits, is_symmetric, rows, columns, group_size):
    scheme = WeightScheme(bits=bits, is_symmetric=is_symmetric, group_size=group_size)
    quantized = random_quantized(rows, columns, scheme, scale_dtype=torch.float32, seed=bits)
    found = upstream_levels(compressed_tensors_format.pack(NAME, quantized), scheme)
    assert torch.equal(found, quantized.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pack_upstream_rounds_levels_once_to_a_half_precision_scale(dtype):
    quantized = random_quantized(40, 64, W4_ASYM, scale_dtype=dtype)
    found = upstream_levels(compressed_tensors_format.pack(NAME, quantized), W4_ASYM)
    assert found.dtype == dtype
    assert torch.equal(found, quantized.dequantize().to(dtype))


@pytest.mark.parametrize("scheme", [W4, W4_ASYM, W8_ROW, W3, W3_ASYM, W5, W6_ASYM, W2_ASYM])
def test_unpack_reads_what_upstream_compressed(scheme):
    quantized = random_quantized(48, 64, scheme, scale_dtype=torch.float32)
    parsed = upstream_config(compressed_tensors_format.quantization_config({NAME: scheme}))
    args = parsed.config_groups["group_0"]
    state = {"weight": quantized.dequantize(), "weight_scale": quantized.scale_RG}
    if quantized.zero_RG is not None:
        state["weight_zero_point"] = (quantized.zero_RG.int() - scheme.middle_code).to(torch.int8)
    written = BaseCompressor.get_value_from_registry(parsed.format).compress(state, args)
    tensors = {f"{NAME}.{name}": tensor for name, tensor in written.items()}
    assert torch.equal(compressed_tensors_format.unpack(NAME, tensors, scheme).codes_RC, quantized.codes_RC)
    ours = compressed_tensors_format.pack(NAME, quantized)
    assert set(ours) == set(tensors)
    assert all(torch.equal(ours[name], tensors[name]) for name in ours)


def test_unpack_shape_that_contradicts_the_words_is_refused():
    packed = compressed_tensors_format.pack(NAME, random_quantized(8, 64, W4, scale_dtype=torch.float32))
    packed[f"{NAME}.weight_shape"] = torch.tensor([8, 96])
    with pytest.raises(PackingError, match=r"weight_packed must be \(8, 12\)"):
        compressed_tensors_format.unpack(NAME, packed, W4)


@pytest.mark.parametrize(("bits", "columns", "needed"), [(3, 151, 15), (5, 91, 15), (6, 76, 15)])
def test_unpack_words_with_gaps_are_refused_by_their_number(bits, columns, needed):
    scheme = WeightScheme(bits=bits, is_symmetric=True, group_size=WHOLE_ROW)
    quantized = random_quantized(8, columns, scheme, scale_dtype=torch.float32)
    packed = compressed_tensors_format.pack(NAME, quantized)
    # No code crosses a word, as releases of compressed-tensors before June 2026 packed them.
    each = 32 // bits
    with_gaps = [
        [words_of(row[i : i + each], bits)[0] for i in range(0, columns, each)]
        for row in quantized.codes_RC.tolist()
    ]
    packed[f"{NAME}.weight_packed"] = torch.tensor(with_gaps).to(torch.int32)
    with pytest.raises(PackingError, match=rf"weight_packed must be \(8, {needed}\), got \(8, 16\)"):
        compressed_tensors_format.unpack(NAME, packed, scheme)


def test_ragged_last_group_is_refused_here_because_upstream_refuses_it():
    with pytest.raises(PackingError, match=r"40 columns, got 32; use -1 \(whole row\)"):
        compressed_tensors_format.check(NAME, 8, 40, W4)
    tensors = {
        f"{NAME}.weight_packed": torch.zeros(8, 5, dtype=torch.int32),
        f"{NAME}.weight_scale": torch.ones(8, 2),
        f"{NAME}.weight_shape": torch.tensor([8, 40]),
    }
    with pytest.raises(ValueError, match="divis"):
        upstream_levels(tensors, W4)


def test_scale_dtype_is_the_models_own():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert compressed_tensors_format.scale_dtype(dtype) == dtype
    with pytest.raises(PackingError, match="float64"):
        compressed_tensors_format.scale_dtype(torch.float64)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.down_proj = (nn.Linear(64, 64) for _ in range(3))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 64)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.lm_head = nn.Linear(64, 8)


def names_in_blocks():
    return [f"layers.{i}.{name}" for i in range(3) for name in ("q_proj", "k_proj", "down_proj")]


ASSIGNMENTS = {
    "one_scheme": dict.fromkeys(names_in_blocks(), W4),
    "one_scheme_some_kept": dict.fromkeys(names_in_blocks(), W4)
    | {"layers.0.q_proj": None, "layers.2.down_proj": None},
    "five_schemes_some_kept": dict.fromkeys(names_in_blocks(), W4)
    | {
        "layers.0.q_proj": None,
        "layers.1.q_proj": W8_ROW,
        "layers.1.k_proj": W4_ASYM,
        "layers.2.q_proj": W5,
        "layers.2.k_proj": W6_ASYM,
    },
}


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_quantization_config_upstream_gives_each_linear_its_scheme(assignment):
    schemes = ASSIGNMENTS[assignment]
    block = compressed_tensors_format.quantization_config(schemes, ["lm_head"])
    with torch.device("meta"):
        model = Model()
    apply_quantization_config(model, upstream_config(block), show_progress=False)
    for name, module in model.named_modules():
        applied = getattr(module, "quantization_scheme", None)
        expected = schemes.get(name)
        if expected is None:
            assert applied is None, name
            continue
        weights = applied.weights
        group_size = WHOLE_ROW if weights.strategy == "channel" else weights.group_size
        assert (weights.num_bits, weights.symmetric, group_size) == (
            expected.bits,
            expected.is_symmetric,
            expected.group_size,
        ), name
    for name in [*schemes, "lm_head"]:
        assert compressed_tensors_format.scheme_of(block, name) == schemes.get(name), name


def test_quantization_config_ignores_exactly_the_kept_linears():
    block = compressed_tensors_format.quantization_config(ASSIGNMENTS["one_scheme_some_kept"], ["lm_head"])
    assert block["ignore"] == ["layers.0.q_proj", "layers.2.down_proj", "lm_head"]
    assert block["quant_method"] == "compressed-tensors"
    assert block["format"] == "pack-quantized"
    assert block["quantization_status"] == "compressed"
    assert compressed_tensors_format.side_files(block) == {}


@pytest.mark.parametrize(
    ("preset", "bits", "symmetric"),
    [
        ("W2A16", 2, True),
        ("W3A16", 3, True),
        ("W4A16", 4, True),
        ("W4A16_ASYM", 4, False),
        ("W5A16", 5, True),
        ("W6A16", 6, True),
        ("W8A16", 8, True),
    ],
)
def test_scheme_of_reads_what_upstream_writes(preset, bits, symmetric):
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head", "re:.*gate$"],
    )
    block = json.loads(config.model_dump_json())
    expected = WeightScheme(bits=bits, is_symmetric=symmetric, group_size=128)
    assert compressed_tensors_format.scheme_of(block, NAME) == expected
    assert compressed_tensors_format.scheme_of(block, "lm_head") is None
    assert compressed_tensors_format.scheme_of(block, "model.layers.0.mlp.gate") is None


def group(targets, **weights):
    return {"targets": targets, "weights": {"num_bits": 4, "group_size": 32, "strategy": "group"} | weights}


def test_scheme_of_full_name_wins_over_regex_and_regex_over_class():
    block = {
        "format": "pack-quantized",
        "config_groups": {
            "a": group(["Linear"]),
            "b": group(["re:.*down_proj"], num_bits=8),
            "c": group([NAME], num_bits=2),
        },
    }
    assert compressed_tensors_format.scheme_of(block, NAME).bits == 2
    assert compressed_tensors_format.scheme_of(block, NAME.replace("0", "1")).bits == 8
    assert compressed_tensors_format.scheme_of(block, "model.layers.0.mlp.up_proj").bits == 4


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"format": "pack-quantized", "config_groups": {"a": group(["Linear"], num_bits=7)}},
            "of 2, 3, 4, 5, 6, 8 bits are read; got .* 7 bits",
        ),
        ({"format": "pack-quantized", "config_groups": {"a": group(["Linear"], type="float")}}, "float"),
        ({"format": "float-quantized", "config_groups": {"a": group(["Linear"])}}, "float-quantized"),
        (
            {"format": "pack-quantized", "config_groups": {"a": group(["Linear"], strategy="block")}},
            "block",
        ),
        (
            {"format": "pack-quantized", "config_groups": {"a": group(["Linear"], actorder="group")}},
            "actorder",
        ),
        ({"format": "pack-quantized", "config_groups": {"W4A16": ["Linear"]}}, "presets"),
        ({"format": "pack-quantized", "config_groups": {"a": group(["re:("])}}, "broken regex"),
        (
            {
                "format": "pack-quantized",
                "config_groups": {"a": group(["Linear"]) | {"input_activations": {"num_bits": 8}}},
            },
            "activations",
        ),
    ],
)
def test_scheme_of_what_cannot_be_unpacked_is_refused(block, message):
    with pytest.raises(PackingError, match=message):
        compressed_tensors_format.scheme_of(block, NAME)
