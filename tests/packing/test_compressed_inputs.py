"""Layouts beside rounded inputs, read and written by the compressed-tensors package itself."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import PackingError
from quantlib.grids.levels import levels_of
from quantlib.packing import FORMATS, compressed_tensors_format
from quantlib.packing.compressed_inputs import inputs_from_values, inputs_values
from quantlib.packing.specs import packed_on_meta
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import ROUNDED_INPUTS_NAMES, WeightScheme, scheme_from_name

NAME = "model.layers.0.mlp.down_proj"
LAYOUTS = {
    "W8A8": "int-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "FP8_DYNAMIC_TENSOR": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "MXFP4": "mxfp4-pack-quantized",
    "MXFP8": "mxfp8-quantized",
}


def random_linear(rows, columns, name, *, dtype=torch.float32, seed=0):
    """Any code that is a number, without negative zeros."""
    generator, scheme = torch.Generator().manual_seed(seed), scheme_from_name(name)
    codes_RC = torch.randint(0, scheme.num_codes, (rows, columns), generator=generator).to(torch.uint8)
    if name != "W8A8":
        values_RC = levels_of(scheme).decode(codes_RC, 0, out=torch.empty(rows, columns))
        codes_RC = torch.where(values_RC.isfinite() & (values_RC != 0), codes_RC, 0)
    shape = (rows, scheme.num_groups(columns))
    if name in ("MXFP4", "MXFP8"):
        scale_RG = (2.0 ** torch.randint(-30, 20, shape, generator=generator)).bfloat16()
    else:
        scale_RG = (torch.rand(shape, generator=generator) + 0.01).to(dtype)
    if name in ("FP8_DYNAMIC_TENSOR", "FP8_BLOCK"):  # of fewer rows than a block has
        scale_RG = scale_RG[:1].expand(shape).contiguous()
    return QuantizedLinear(codes_RC=codes_RC, scale_RG=scale_RG, zero_RG=None, scheme=scheme)


def block_of(name):
    return compressed_tensors_format.quantization_config({NAME: scheme_from_name(name)})


def upstream(name):
    """Their compressor for our config block, and what it takes of the scheme."""
    parsed = QuantizationConfig.model_validate(json.loads(json.dumps(block_of(name))))
    return BaseCompressor.get_value_from_registry(parsed.format), parsed.config_groups["group_0"]


@pytest.mark.parametrize("name", ROUNDED_INPUTS_NAMES)
def test_config_is_that_of_the_upstream_preset(name):
    """Names are those of the presets: not FP8, whose scales are one a tensor and static."""
    assert block_of(name)["format"] == LAYOUTS[name]
    has_preset = name != "FP8_DYNAMIC_TENSOR"
    ours, theirs = upstream(name)[1], preset_name_to_scheme(name if has_preset else "FP8_DYNAMIC", ["Linear"])
    assert ours.input_activations == theirs.input_activations
    if has_preset:
        assert ours.weights == theirs.weights
    else:
        assert ours.weights == theirs.weights.model_copy(update={"strategy": ours.weights.strategy})
        assert ours.weights.strategy == "tensor"
    assert ours.output_activations is theirs.output_activations is None


@pytest.mark.parametrize("name", ROUNDED_INPUTS_NAMES)
def test_upstream_decompresses_to_the_levels(name):
    quantized = random_linear(48, 256, name)
    compressor, scheme = upstream(name)
    packed = compressed_tensors_format.pack(NAME, quantized)
    local = {key.removeprefix(f"{NAME}."): tensor for key, tensor in packed.items()}
    assert set(local) == set(compressor.compression_param_names(scheme))
    assert torch.equal(compressor.decompress(local, scheme)["weight"].float(), quantized.dequantize())


@pytest.mark.parametrize("name", ROUNDED_INPUTS_NAMES)
def test_upstream_compresses_the_levels_to_our_tensors(name):
    quantized = random_linear(48, 256, name)
    compressor, scheme = upstream(name)
    ours = compressed_tensors_format.pack(NAME, quantized)
    scale = quantized.scale_RG if name.startswith("MX") else ours[f"{NAME}.weight_scale"]
    state = {"weight": quantized.dequantize(), "weight_scale": scale.float()}
    written = compressor.compress(state, scheme)
    assert {f"{NAME}.{key}" for key in written} == set(ours)
    for key, tensor in written.items():
        mine = ours[f"{NAME}.{key}"]
        assert mine.dtype == tensor.dtype
        assert torch.equal(mine.view(torch.uint8), tensor.view(torch.uint8)), key


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(ROUNDED_INPUTS_NAMES),
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 999),
)
def test_unpack_of_packed_linear_is_identical(name, rows, groups, dtype, seed):
    columns = (128 if name == "FP8_BLOCK" else 32) * groups
    quantized = random_linear(rows, columns, name, dtype=dtype, seed=seed)
    packed = compressed_tensors_format.pack(NAME, quantized)
    found = compressed_tensors_format.unpack(NAME, packed, quantized.scheme)
    assert found.scheme == quantized.scheme and found.zero_RG is None
    assert torch.equal(found.codes_RC, quantized.codes_RC)
    assert torch.equal(found.scale_RG, quantized.scale_RG)
    promised = packed_on_meta(
        compressed_tensors_format,
        NAME,
        rows=rows,
        columns=columns,
        scheme=quantized.scheme,
        model_dtype=dtype,
    )
    assert list(promised) == list(packed)
    for key, tensor in packed.items():
        assert tensor.is_contiguous(), key
        assert (promised[key].dtype, promised[key].shape) == (tensor.dtype, tensor.shape), key


def test_scales_and_bytes_of_int8():
    scheme = scheme_from_name("W8A8")
    codes_RC = torch.tensor([[0, 1, 127, 128, 129, 255]], dtype=torch.uint8)
    quantized = QuantizedLinear(
        codes_RC=codes_RC, scale_RG=torch.tensor([[0.5]]), zero_RG=None, scheme=scheme
    )
    packed = compressed_tensors_format.pack(NAME, quantized)
    assert packed[f"{NAME}.weight"].tolist() == [[-128, -127, -1, 0, 1, 127]]
    assert packed[f"{NAME}.weight_scale"].tolist() == [[0.5]]


def test_config_of_several_schemes_reads_back():
    schemes = {name: scheme_from_name(name) for name in (*ROUNDED_INPUTS_NAMES, "MXFP4A16", "FP8A16")}
    schemes |= {"W8A16": scheme_from_name("W8A16", -1), "kept": None}
    block = compressed_tensors_format.quantization_config(schemes, ["lm_head"])
    assert block["format"] == "mixed-precision"
    QuantizationConfig.model_validate(json.loads(json.dumps(block)))
    for name, scheme in schemes.items():
        assert compressed_tensors_format.scheme_of(block, name) == scheme
        inputs = compressed_tensors_format.inputs_of(block, name)
        assert inputs == (None if scheme is None else scheme.inputs)


def test_values_of_another_tool_with_all_its_nothings_are_known():
    values = {
        **(inputs_values(scheme_from_name("W8A8").inputs) or {}),
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "zp_dtype": None,
    }
    assert inputs_from_values(values, NAME) == scheme_from_name("W8A8").inputs


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("W8A8", {"dynamic": False}, "dynamic False"),
        ("W8A8", {"dynamic": "local"}, "dynamic local"),
        ("W8A8", {"strategy": "tensor"}, "strategy tensor"),
        ("W8A8", {"symmetric": False}, "symmetric False"),
        ("FP8_DYNAMIC", {"strategy": "group", "group_size": 64}, "group_size 64"),
        ("FP8_DYNAMIC", {"num_bits": 4}, "num_bits 4"),
        ("MXFP8", {"scale_dtype": None}, "strategy group"),
        ("MXFP4", {"type": "int"}, "type int"),
    ],
)
def test_inputs_that_are_rounded_in_another_way_are_refused_by_what_they_are(name, change, words):
    block = block_of(name)
    block["config_groups"]["group_0"]["input_activations"] |= change
    for read in (compressed_tensors_format.scheme_of, compressed_tensors_format.inputs_of):
        with pytest.raises(PackingError, match=f"input_activations of {NAME} are .*{words}"):
            read(block, NAME)


@pytest.mark.parametrize("values", ["W8A8", [8], 8, True])
def test_inputs_that_are_no_object_are_refused(values):
    with pytest.raises(PackingError, match=f"input_activations of {NAME} are .* wanted an object"):
        inputs_from_values(values, NAME)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("W8A8", {"format": "pack-quantized"}, "input_activations 8-bit int by token, which is not read"),
        ("W8A8", {"weights": {"num_bits": 4}}, "'num_bits': 4.* read is 8 bits"),
        ("W8A8", {"weights": {"symmetric": False}}, "'symmetric': False.* read is 8 bits"),
        ("W8A8", {"input_activations": None}, "inputs as they are; read is 8 bits"),
        ("W8A8", {"output_activations": {"num_bits": 8}}, "rounded outputs"),
        ("FP8_DYNAMIC", {"weights": {"strategy": "block"}}, "of floats these are read"),
        ("FP8_BLOCK", {"weights": {"block_structure": [64, 64]}}, "of floats these are read"),
        ("FP8_DYNAMIC", {"input_activations": None}, "inputs as they are; of floats these are read"),
        ("FP8_DYNAMIC", {"format": "naive-quantized"}, "inputs 8-bit e4m3 by token; of floats"),
    ],
)
def test_weights_beside_other_inputs_than_those_of_a_scheme_are_refused(name, change, words):
    block = block_of(name)
    group = block["config_groups"]["group_0"]
    for key, value in change.items():
        group[key] = {**group[key], **value} if isinstance(value, dict) and group[key] else value
    with pytest.raises(PackingError, match=words):
        compressed_tensors_format.scheme_of(block, NAME)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": lambda t: t.int()}, "must be torch.int8"),
        ({"weight": None}, "weight is missing"),
        ({"weight_scale": lambda t: t[:-1]}, r"weight_scale must be \(8, 1\)"),
        ({"weight_scale": None}, "weight_scale is missing"),
    ],
)
def test_malformed_int8_tensors_are_refused(change, words):
    packed = compressed_tensors_format.pack(NAME, random_linear(8, 64, "W8A8"))
    for key, damage in change.items():
        tensor = packed.pop(f"{NAME}.{key}")
        if damage is not None:
            packed[f"{NAME}.{key}"] = damage(tensor)
    with pytest.raises(PackingError, match=words):
        compressed_tensors_format.unpack(NAME, packed, scheme_from_name("W8A8"))


@pytest.mark.parametrize("name", ROUNDED_INPUTS_NAMES)
def test_other_formats_refuse_rounded_inputs(name):
    for format_name in FORMATS:
        if format_name != "compressed-tensors":
            with pytest.raises(PackingError, match="inputs are rounded to|holds (integers|scheme)"):
                FORMATS[format_name].check(NAME, 64, 64, scheme_from_name(name))


def test_other_weights_beside_rounded_inputs_are_refused():
    inputs = scheme_from_name("W8A8").inputs
    scheme = WeightScheme(bits=4, is_symmetric=True, group_size=32, inputs=inputs)
    names = ", ".join(ROUNDED_INPUTS_NAMES)
    with pytest.raises(PackingError, match=f"beside weights of {names}, not of 4 bits"):
        compressed_tensors_format.check(NAME, 64, 64, scheme)


def test_columns_that_are_no_whole_groups_of_inputs_are_refused():
    """Blocks of weights may be ragged, but compressed-tensors cannot round such inputs."""
    compressed_tensors_format.check(NAME, 64, 200, scheme_from_name("FP8A16_BLOCK"))
    with pytest.raises(PackingError, match="inputs rounded in groups of 128 need whole groups, found 200"):
        compressed_tensors_format.check(NAME, 64, 200, scheme_from_name("FP8_BLOCK"))
