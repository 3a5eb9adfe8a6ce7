"""Q8_0 of embeddings: byte for byte what the gguf package makes, which does as llama.cpp does."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import PackingError
from quantlib.packing import gguf_rounding
from quantlib.packing.gguf_rounding import levels_of_q8_0, round_to_q8_0

NAME = "model.embed_tokens"
KIND = gguf.GGMLQuantizationType.Q8_0
CPU = torch.device("cpu")


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 5),
    exponent=st.integers(-30, 14),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 999),
)
def test_bytes_and_levels_are_those_of_the_gguf_package(rows, blocks, exponent, dtype, seed):
    value_RC = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed)).to(dtype)
    value_RC = (value_RC.float() * 2.0**exponent).to(dtype)
    value_RC[0, :32] = 0
    found = round_to_q8_0(NAME, value_RC)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = gguf.quants.quantize(value_RC.float().numpy(), KIND)
    assert np.array_equal(found.numpy(), expected)
    levels = levels_of_q8_0(NAME, found, dtype=torch.float32, device=CPU)
    assert np.array_equal(levels.numpy(), gguf.quants.dequantize(expected, KIND))


def test_ties_go_away_from_zero_and_what_is_below_a_half_goes_down():
    # The largest magnitude makes the step 1.
    value_RC = torch.zeros(1, 32)
    value_RC[0, :6] = torch.tensor([127.0, 0.5, -0.5, 2.5, -3.5, 0.49999997])
    codes = round_to_q8_0(NAME, value_RC)[0, 2:].view(torch.int8)
    assert codes[:6].tolist() == [127, 1, -1, 3, -4, 0]


def test_runs_of_rows_are_rounded_as_the_whole_is(monkeypatch):
    value_RC = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    whole = round_to_q8_0(NAME, value_RC)
    monkeypatch.setattr(gguf_rounding, "_RUN_VALUES", 64 * 7)
    assert torch.equal(round_to_q8_0(NAME, value_RC), whole)
    levels = levels_of_q8_0(NAME, whole, dtype=torch.bfloat16, device=CPU)
    exact = torch.from_numpy(gguf.quants.dequantize(whole.numpy(), KIND))
    assert torch.equal(levels, exact.to(torch.bfloat16))


@pytest.mark.parametrize("size", [1e-12, 1e-40])
def test_values_without_a_scale_that_fp16_holds_become_zeros(size):
    value_RC = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) * size
    levels = levels_of_q8_0(NAME, round_to_q8_0(NAME, value_RC), dtype=torch.float32, device=CPU)
    assert not levels.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 127 * 65520.0])
def test_values_that_are_too_large_are_refused(value):
    value_RC = torch.zeros(2, 32)
    value_RC[1, 3] = value
    with pytest.raises(PackingError, match=r"model\.embed_tokens: a value is not finite, or too large"):
        round_to_q8_0(NAME, value_RC)


def test_columns_that_fill_no_blocks_are_refused():
    with pytest.raises(PackingError, match="blocks of 32 columns, found 48"):
        round_to_q8_0(NAME, torch.zeros(2, 48))
