"""A checkpoint made of our tensors and config block, loaded by transformers itself on CPU."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

from quantlib.packing import compressed_tensors_format
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import FLOAT_NAMES, WHOLE_ROW, WeightScheme, scheme_from_name

W4 = WeightScheme(bits=4, is_symmetric=True, group_size=32)
W4_ASYM = WeightScheme(bits=4, is_symmetric=False, group_size=16)
W8_ROW = WeightScheme(bits=8, is_symmetric=True, group_size=WHOLE_ROW)
W3 = WeightScheme(bits=3, is_symmetric=True, group_size=32)
W5 = WeightScheme(bits=5, is_symmetric=True, group_size=32)
W6_ASYM = WeightScheme(bits=6, is_symmetric=False, group_size=32)
W2_ASYM = WeightScheme(bits=2, is_symmetric=False, group_size=32)
FLOATS = {name: scheme_from_name(name) for name in FLOAT_NAMES}


def tiny_llama(is_tied):
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=is_tied,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def float_codes(quotient, scheme):
    """Codes of the nearest small floats and what they mean; those of 8 bits are torch's own bytes."""
    if scheme.bits == 8:
        stored = quotient.clamp(-448, 448).to(torch.float8_e4m3fn)
        return stored.view(torch.uint8), stored.float()
    number = (quotient.abs()[..., None] - _E2M1).abs().argmin(-1)
    values = torch.where(quotient < 0, -_E2M1[number], _E2M1[number])
    return (number + 8 * (values < 0)).to(torch.uint8), values


def rounded_floats(grouped, scheme):
    """Likewise: the largest value for whole rows, the power of two of absmax for groups."""
    largest = grouped.abs().amax(-1, keepdim=True)
    if scheme.scales == "e4m3":
        divisor = 448 * 6 / largest.max()
        scale = (largest / 6 * divisor).to(torch.float8_e4m3fn).float() / divisor
    elif scheme.scales == "e8m0":
        scale = (2.0 ** (largest.log2().floor() - (8 if scheme.bits == 8 else 2))).bfloat16()
    else:
        scale = (largest.amax(0, keepdim=True) if scheme.group_size == 0 else largest) / 448
        scale = scale.expand_as(largest).contiguous()
    codes, values = float_codes(grouped / scale, scheme)
    return codes, values * scale, scale


def rounded_to_nearest(weight, scheme):
    """Plain round to nearest, written out here: nothing of the product decides about codes."""
    rows, columns = weight.shape
    width = scheme.columns_per_group(columns)
    grouped = weight.reshape(rows, columns // width, width)
    if scheme in FLOATS.values():
        codes, levels, scale = rounded_floats(grouped, scheme)
        divisor_R1 = 448 * 6 / weight.abs().max().expand(rows, 1) if scheme.scales == "e4m3" else None
        quantized = QuantizedLinear(
            codes_RC=codes.reshape(rows, columns),
            scale_RG=scale.squeeze(-1),
            zero_RG=None,
            scheme=scheme,
            divisor_R1=divisor_R1,
        )
        return quantized, levels.reshape(rows, columns)
    top = 2**scheme.bits - 1
    if scheme.is_symmetric:
        scale = 2 * grouped.abs().amax(-1, keepdim=True) / top
        zero = torch.full_like(scale, 2 ** (scheme.bits - 1))
    else:
        low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale).round().clamp(0, top)
    codes = (grouped / scale + zero).round().clamp(0, top)
    quantized = QuantizedLinear(
        codes_RC=codes.reshape(rows, columns).to(torch.uint8),
        scale_RG=scale.squeeze(-1),
        zero_RG=None if scheme.is_symmetric else zero.squeeze(-1).to(torch.uint8),
        scheme=scheme,
    )
    return quantized, (scale * (codes - zero)).reshape(rows, columns)


def assigned_schemes(model, assignment):
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    if assignment.startswith("mixed"):
        by_layer = {"0": W4, "1": W8_ROW, "2": None}
        if assignment == "mixed_with_floats":
            by_layer = {"0": FLOATS["FP8A16"], "1": FLOATS["MXFP4A16"], "2": W4}
        return {name: by_layer[name.split(".")[2]] for name in names}
    schemes = {
        "symmetric": W4,
        "asymmetric": W4_ASYM,
        "whole_row": W8_ROW,
        "three_bits": W3,
        "five_bits": W5,
        "six_bits_asymmetric": W6_ASYM,
        "two_bits_asymmetric": W2_ASYM,
        **FLOATS,
    }
    return dict.fromkeys(names, schemes[assignment])


def write_checkpoint(folder, model, schemes):
    """Our files, and the model they describe: the same one with its levels put in place."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, scheme in schemes.items():
        if scheme is None:
            continue
        quantized, levels = rounded_to_nearest(tensors.pop(f"{name}.weight"), scheme)
        tensors |= compressed_tensors_format.pack(name, quantized)
        model.get_submodule(name).weight.data.copy_(levels)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "quantization_config": compressed_tensors_format.quantization_config(schemes, ["lm_head"]),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("assignment", "is_tied"),
    [
        ("symmetric", True),
        ("asymmetric", False),
        ("whole_row", False),
        ("mixed", True),
        ("three_bits", False),
        ("five_bits", False),
        ("six_bits_asymmetric", False),
        ("two_bits_asymmetric", False),
        ("FP8A16", False),
        ("FP8A16_TENSOR", False),
    ],
)
def test_transformers_logits_equal_those_of_the_dequantized_model(tmp_path, assignment, is_tied):
    original = tiny_llama(is_tied)
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    # Loaded without being dequantized, asymmetric files fail in compressed-tensors 0.20, its own too.
    how = (
        {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        if assignment.endswith("asymmetric")
        else {}
    )
    with torch.no_grad():
        before = original(ids).logits
        expected_model = write_checkpoint(tmp_path, original, assigned_schemes(original, assignment))
        expected = expected_model(ids).logits
        loaded, notes = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, output_loading_info=True, **how
        )
        found = loaded(ids).logits
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    # Same levels in fp32: only the order of sums may differ. Quantization itself moves logits far more.
    assert (before - expected).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ["MXFP4A16", "MXFP8A16", "NVFP4A16", "mixed_with_floats"])
def test_transformers_unpacks_the_levels_of_powers_of_two(tmp_path, assignment):
    original = tiny_llama(is_tied=False)
    schemes = assigned_schemes(original, assignment)
    expected = write_checkpoint(tmp_path, original, schemes)
    # compressed-tensors unpacks them to bf16 and wants a model of that dtype.
    loaded, notes = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    # Weights are unpacked by the first forward.
    loaded(torch.zeros(1, 4, dtype=torch.int64))
    for name, scheme in schemes.items():
        found, wanted = (model.get_submodule(name).weight.float() for model in (loaded, expected))
        # A power of two times a small float is exact in bf16; other scales are rounded there, and so are
        # levels.
        is_exact = scheme in (FLOATS["MXFP4A16"], FLOATS["MXFP8A16"])
        torch.testing.assert_close(found, wanted, atol=0, rtol=0 if is_exact else 2**-6)
