"""8-bit floats with scales beside them, against transformers' own dequantization."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from quantlib.errors import CheckpointError
from tests.support.quantized_sources import opened, read_in_short_runs, read_source, write_source

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LINEAR = "model.layers.0.mlp.up_proj.weight"


def float8(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 40).to(torch.float8_e4m3fn)


def scales(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01


def upstream(weight, scale, dtype):
    return Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)


@pytest.mark.parametrize(
    ("weight", "scale", "declared"),
    [
        (float8(384, 256), scales(3, 2), [128, 128]),
        (float8(256, 512), scales(2, 4).bfloat16(), [128, 128]),
        (float8(256, 128), torch.tensor([[126], [130]], dtype=torch.uint8), [128, 128]),
        (float8(256, 128), torch.tensor([[0.25], [4.0]]).to(torch.float8_e8m0fnu), [128, 128]),
        (float8(70, 96), scales(), None),
        (float8(70, 96), scales(70, 1), None),
        (float8(4, 96, 64), scales(4, 3, 2), [32, 32]),
    ],
    ids=["blocks", "bf16", "exponents", "e8m0", "whole", "rows", "experts"],
)
def test_weights_are_those_of_transformers_bit_for_bit(tmp_path, weight, scale, declared):
    stored = {LINEAR: weight, f"{LINEAR}_scale_inv": scale, "model.norm.weight": torch.ones(4).bfloat16()}
    folder = write_source(tmp_path, stored, {**BLOCKS, "weight_block_size": declared})
    found = read_source(folder)
    assert set(found) == {LINEAR, "model.norm.weight"}
    assert found[LINEAR].dtype == torch.bfloat16
    assert torch.equal(found[LINEAR], upstream(weight, scale, torch.bfloat16))
    exact = read_source(folder, levels_dtype="F32")[LINEAR]
    assert torch.equal(exact, upstream(weight, scale, torch.float32))


@pytest.mark.parametrize("shape", [(200, 130), (129, 100), (1, 300), (40, 40)])
def test_blocks_at_the_edges_are_cut(tmp_path, shape):
    weight, scale = float8(*shape), scales(*(-(-size // 128) for size in shape))
    folder = write_source(tmp_path, {LINEAR: weight, f"{LINEAR}_scale_inv": scale}, BLOCKS)
    wanted = weight.float()
    for row in range(shape[0]):
        for column in range(shape[1]):
            wanted[row, column] *= scale[row // 128, column // 128]
    assert torch.equal(read_source(folder)[LINEAR], wanted.bfloat16())


def test_long_weights_decoded_in_runs_are_the_same(tmp_path):
    weight, scale = float8(900, 256), scales(8, 2)
    folder = write_source(tmp_path, {LINEAR: weight, f"{LINEAR}_scale_inv": scale}, BLOCKS)
    whole = read_source(folder)[LINEAR]
    assert torch.equal(read_in_short_runs(folder)[LINEAR], whole)


def test_what_is_not_quantized_is_read_as_it_is_and_activation_scales_are_dropped(tmp_path):
    stored = {
        LINEAR: float8(128, 128),
        f"{LINEAR}_scale": scales(1),
        LINEAR.replace("weight", "input_scale"): scales(1),
        "lm_head.weight": torch.randn(8, 4).bfloat16(),
    }
    folder = write_source(tmp_path, stored, {"quant_method": "fp8", "activation_scheme": "static"})
    _, checkpoint = opened(folder)
    assert set(checkpoint.tensors) == {LINEAR, "lm_head.weight"}
    assert list(checkpoint.dropped) == [LINEAR.replace("weight", "input_scale")]
    assert checkpoint.source_format == "fp8"
    assert "quantization_config" not in checkpoint.config
    assert torch.equal(read_source(folder)["lm_head.weight"], stored["lm_head.weight"])


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({LINEAR: float8(128, 128)}, "no shard holds its scales"),
        ({LINEAR: float8(128, 128), f"{LINEAR}_scale_inv": scales(2, 1)}, r"its scales are \[2, 1\]"),
        ({LINEAR: float8(8), f"{LINEAR}_scale_inv": scales(1)}, "wanted a matrix"),
        ({LINEAR: float8(2, 8, 8), f"{LINEAR}_scale_inv": scales(3, 1, 1)}, "has 2 experts"),
    ],
)
def test_weights_without_fitting_scales_are_refused(tmp_path, stored, said):
    with pytest.raises(CheckpointError, match=said):
        opened(write_source(tmp_path, stored, BLOCKS))


def test_an_unknown_method_is_refused_and_says_what_is_read(tmp_path):
    folder = write_source(tmp_path, {LINEAR: float8(8, 8)}, {"quant_method": "hqq"})
    with pytest.raises(CheckpointError, match="by hqq, which is not read; read are fp8, .*bitsandbytes"):
        opened(folder)


def test_codes_that_the_config_does_not_explain_are_refused(tmp_path):
    stored = {LINEAR: torch.zeros(128, 64, dtype=torch.int8), f"{LINEAR}_scale_inv": scales(1, 1)}
    with pytest.raises(CheckpointError, match=r"as I8 \[128, 64\], which its quantization_config does not"):
        opened(write_source(tmp_path, stored, BLOCKS))


def test_a_section_in_the_text_part_is_found_and_taken_out(tmp_path):
    stored = {LINEAR: float8(128, 128), f"{LINEAR}_scale_inv": scales(1, 1)}
    folder = write_source(
        tmp_path,
        stored,
        {},
        {"dtype": None, "text_config": {"hidden_size": 8, "dtype": "float16", "quantization_config": BLOCKS}},
    )
    _, checkpoint = opened(folder)
    assert checkpoint.config["text_config"] == {"hidden_size": 8, "dtype": "float16"}
    assert checkpoint.tensors[LINEAR].dtype == "F16"
