"""The int8 product: against sums in Python integers and floats, and against bitsandbytes."""

import math

import bitsandbytes
import bitsandbytes.functional
import pytest
import torch

from quantlib.errors import NumericsError
from quantlib.methods import METHODS
from quantlib.methods.int8_product import int8_product
from quantlib.outlier_columns import outlier_columns
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WHOLE_ROW, scheme_from_name
from quantlib.solver_settings import SolverSettings

INT8 = scheme_from_name("W8A16", WHOLE_ROW)


def inputs(tokens=12, columns=40, seed=0):
    x_NC = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x_NC[:, 5] *= 15.0
    x_NC[3, 9] = 6.0  # reached, not passed
    x_NC[4, 11] = 5.99
    x_NC[7] = 0.0
    return x_NC


def weight(rows=24, columns=40, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def absmax_int8(weight_RC):
    solver = SolverSettings(scale_search="absmax")
    found = METHODS["rtn"]({"w": weight_RC}, {"w": INT8}, scale_dtype=torch.float32, solver=solver)
    return found["w"].quantized


def reference(x_NC, quantized, threshold):
    """Token by token and row by row, codes as Python integers, the rest as float64."""
    offsets = [[code - 128 for code in row] for row in quantized.codes_RC.tolist()]
    scales = [row[0] for row in quantized.scale_RG.tolist()]
    columns = range(x_NC.shape[1])
    tokens = x_NC.tolist()
    outliers = {j for j in columns if any(abs(token[j]) >= threshold for token in tokens)}
    found = []
    for token in tokens:
        scale = max((abs(x) for x in token if abs(x) < threshold), default=0.0) / 127
        codes = [0 if j in outliers or not scale else round(token[j] / scale) for j in columns]
        outputs = []
        for row, row_scale in zip(offsets, scales, strict=True):
            whole = sum(a * b for a, b in zip(codes, row, strict=True)) * scale * row_scale
            outputs.append(whole + sum(token[j] * row[j] * row_scale for j in outliers))
        found.append(outputs)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("threshold", [6.0, 2.0, math.inf])
def test_int8_product_is_the_sum_over_codes(threshold):
    x_NC, quantized = inputs(), absmax_int8(weight())
    found = int8_product(x_NC, quantized, threshold=threshold)
    # fp32 after an exact sum: a few units in the last place of the largest term.
    torch.testing.assert_close(found.double(), reference(x_NC, quantized, threshold), atol=2e-6, rtol=1e-6)


def test_int8_product_is_that_of_bitsandbytes():
    x_NC, weight_RC = inputs().half(), weight().half()
    codes_RC, absmax_R, _ = bitsandbytes.functional.int8_vectorwise_quant(weight_RC)
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights, state.is_training = codes_RC, absmax_R, False, False
    theirs = bitsandbytes.matmul(x_NC, codes_RC, state=state, threshold=6.0)
    quantized = QuantizedLinear(
        codes_RC=(codes_RC.int() + 128).to(torch.uint8),
        scale_RG=absmax_R[:, None] / 127,
        zero_RG=None,
        scheme=INT8,
    )
    ours = int8_product(x_NC, quantized)
    assert state.idx.tolist() == outlier_columns(x_NC).nonzero().flatten().tolist() == [5, 9]
    # It rounds both products and their sum to fp16, and its 1 / 127**2 is 1.8e-5 too large.
    torch.testing.assert_close(ours, theirs.float(), atol=2e-3, rtol=1e-3)


def test_absmax_codes_are_those_of_bitsandbytes():
    weight_RC = weight(64, 96).half()
    codes_RC, absmax_R, _ = bitsandbytes.functional.int8_vectorwise_quant(weight_RC)
    quantized = absmax_int8(weight_RC)
    assert torch.equal(quantized.codes_RC.int() - 128, codes_RC.int())
    torch.testing.assert_close(quantized.scale_RG[:, 0] * 127, absmax_R, rtol=2e-7, atol=0)


def test_outlier_feature_spoils_the_product_unless_it_is_apart():
    x_NC, weight_RC = inputs(64, 128), weight(32, 128)
    x_NC[:, 5] *= 10
    exact_NR, quantized = x_NC @ weight_RC.T, absmax_int8(weight_RC)
    together, apart = (
        (int8_product(x_NC, quantized, threshold=threshold) - exact_NR).norm()
        for threshold in (math.inf, 6.0)
    )
    assert apart < together / 3


@pytest.mark.parametrize(("scheme", "size"), [("W8A16", 8), ("W8A16_ASYM", WHOLE_ROW), ("FP8A16", None)])
def test_int8_product_of_other_codes_is_refused(scheme, size):
    found = METHODS["rtn"]({"w": weight()}, {"w": scheme_from_name(scheme, size)}, scale_dtype=torch.float32)
    with pytest.raises(NumericsError, match="one scale a row"):
        int8_product(inputs(), found["w"].quantized)


def test_int8_product_of_other_inputs_is_refused():
    with pytest.raises(NumericsError, match=r"takes inputs \[N, 40\], found \(12, 41\)"):
        int8_product(inputs(columns=41), absmax_int8(weight()))
