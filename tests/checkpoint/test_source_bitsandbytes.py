"""4-bit and 8-bit weights that bitsandbytes makes, against its own dequantization."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch

from quantlib.errors import CheckpointError
from tests.support.quantized_sources import opened, read_in_short_runs, read_source, write_source

NAME = "model.layers.0.mlp.down_proj.weight"
FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]}


def four_bit(rows, columns, dtype=torch.bfloat16, **how):
    """What is stored of a random matrix, and what bitsandbytes makes of it."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    packed, state = bnb.quantize_4bit(weight, **how)
    stored = {f"{NAME}.{name}": part for name, part in state.as_dict(packed=True).items()}
    # A block a row: bitsandbytes 0.50 misreads on a CPU blocks that go on in the next row.
    if weight.numel() % state.blocksize == 0:
        state.shape = torch.Size((weight.numel() // state.blocksize, state.blocksize))
    return {NAME: packed, **stored}, bnb.dequantize_4bit(packed, state).reshape(rows, columns)


@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("rows", "columns", "size"), [(256, 192, 64), (130, 64, 128), (200, 96, 64)])
def test_four_bits(tmp_path, kind, is_nested, rows, columns, size):
    stored, wanted = four_bit(rows, columns, blocksize=size, quant_type=kind, compress_statistics=is_nested)
    folder = write_source(tmp_path, {**stored, "lm_head.weight": torch.ones(2, 2)}, FOUR_BIT)
    found = read_source(folder)
    assert set(found) == {NAME, "lm_head.weight"}
    assert torch.equal(found[NAME], wanted)


def test_runs_of_rows_that_begin_within_a_block_of_scales_are_the_same(tmp_path):
    stored, wanted = four_bit(300, 33 * 2, blocksize=4096, quant_type="nf4", compress_statistics=True)
    assert torch.equal(read_in_short_runs(write_source(tmp_path, stored, FOUR_BIT))[NAME], wanted)


def test_codes_in_words_of_another_dtype(tmp_path):
    stored, wanted = four_bit(64, 64, quant_type="nf4", quant_storage=torch.bfloat16)
    assert stored[NAME].dtype == torch.bfloat16
    assert torch.equal(read_source(write_source(tmp_path, stored, FOUR_BIT))[NAME], wanted)


def test_eight_bits(tmp_path):
    weight = torch.randn(130, 64, generator=torch.Generator().manual_seed(0)).half()
    codes, scale, _ = bnb.int8_vectorwise_quant(weight)
    stored = {
        NAME: codes,
        NAME.replace("weight", "SCB"): scale,
        NAME.replace("weight", "weight_format"): torch.tensor(0, dtype=torch.uint8),
    }
    folder = write_source(
        tmp_path, stored, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"dtype": "float32"}
    )
    found = read_source(folder)
    assert list(found) == [NAME]
    # bitsandbytes multiplies by a rounded 1 / 127: one unit in the last place of fp32.
    torch.testing.assert_close(found[NAME], bnb.int8_vectorwise_dequant(codes, scale), rtol=3e-7, atol=0)


def state_of(values):
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        (".absmax", None, "wanted absmax, codes"),
        (".absmax", torch.ones(3), "has 3 scales, one for every 64"),
        (".quant_state.bitsandbytes__nf4", torch.tensor([1, 2], dtype=torch.uint8), "cannot be understood"),
        (".quant_state.bitsandbytes__nf4", state_of({"shape": [64]}), "cannot be understood"),
        (".quant_state.bitsandbytes__nf4", state_of({"shape": [64, 64], "blocksize": 0}), "cannot be:"),
        (".quant_state.bitsandbytes__nf4", state_of({"shape": [64, 32], "blocksize": 64}), "by its quant_s"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(tmp_path, part, value, said):
    stored, _ = four_bit(64, 64, quant_type="nf4", compress_statistics=False)
    tensors = {n: t for n, t in {**stored, NAME + part: value}.items() if t is not None}
    with pytest.raises(CheckpointError, match=said):
        opened(write_source(tmp_path, tensors, FOUR_BIT))


def test_eight_bit_scales_without_codes_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="wanted an int8"):
        opened(write_source(tmp_path, {NAME.replace("weight", "SCB"): torch.ones(4)}, FOUR_BIT))
