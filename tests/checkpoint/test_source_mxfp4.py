"""MXFP4 experts against transformers' own conversion."""

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantlib.errors import CheckpointError
from tests.support.quantized_sources import opened, read_source, write_source

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def stored(experts=3, rows=48, groups=2):
    """Every byte there is, and exponents a bf16 holds."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(90, 150, (experts, rows, groups), generator=generator, dtype=torch.uint8)
    return {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales}


def test_experts_are_those_of_transformers_in_values_and_orientation(tmp_path):
    tensors = {**stored(), f"{EXPERTS}_bias": torch.ones(3, 48).bfloat16()}
    found = read_source(write_source(tmp_path, tensors, MXFP4))
    assert set(found) == {EXPERTS, f"{EXPERTS}_bias"}
    wanted = convert_moe_packed_tensors(*stored().values(), dtype=torch.bfloat16)
    assert found[EXPERTS].shape == (3, 64, 48)
    assert torch.equal(found[EXPERTS], wanted)


def test_every_code_and_exponent_has_the_value_of_the_specification(tmp_path):
    codes = torch.arange(16, dtype=torch.uint8)
    tensors = {
        "x_blocks": (codes | codes.flip(0) << 4).reshape(1, 1, 1, 16),
        "x_scales": torch.tensor([[[129]]], dtype=torch.uint8),
    }
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = positive + [-value for value in positive]
    wanted = [4 * v for pair in zip(values, values[::-1], strict=True) for v in pair]
    found = read_source(write_source(tmp_path, tensors, MXFP4))["x"]
    assert found.flatten().tolist() == wanted


@pytest.mark.parametrize(
    "broken",
    [
        {f"{EXPERTS}_scales": None},
        {f"{EXPERTS}_scales": torch.zeros(3, 48, 1, dtype=torch.uint8)},
        {f"{EXPERTS}_blocks": torch.zeros(3, 48, 32, dtype=torch.uint8)},
    ],
)
def test_blocks_without_fitting_scales_are_refused(tmp_path, broken):
    tensors = {name: tensor for name, tensor in {**stored(), **broken}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match="and as many scales"):
        opened(write_source(tmp_path, tensors, MXFP4))
