"""Small floats against their definition in exact arithmetic: every code, every midpoint, all between."""

from fractions import Fraction

import pytest
import torch
from compressed_tensors.quantization.quant_args import QuantizationArgs, round_to_quantized_type_args
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.grids.levels import levels_of
from quantlib.schemes import WHOLE_ROW, WeightScheme, scheme_from_name

# Bits of exponent and mantissa, bias, and the codes of largest magnitude that are no finite numbers.
_DEFINITIONS = {"e2m1": (2, 1, 1, 0), "e4m3": (4, 3, 7, 1)}
_NAMES = list(_DEFINITIONS)
_LARGEST = {"e2m1": 6.0, "e4m3": 448.0}


def float_scheme(name):
    return WeightScheme(
        bits=1 + sum(_DEFINITIONS[name][:2]), is_symmetric=True, group_size=WHOLE_ROW, number=name
    )


def defined_magnitudes(name):
    """Of OCP's table, code after code: (-1)^s * 2^(E - bias) * (1 + M / 2^m), and without the 1 for E = 0."""
    exponent_bits, mantissa_bits, bias, num_nans = _DEFINITIONS[name]
    values = []
    for code in range((1 << (exponent_bits + mantissa_bits)) - num_nans):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        fraction = Fraction(mantissa, 1 << mantissa_bits)
        if exponent == 0:
            values.append(Fraction(2) ** (1 - bias) * fraction)
        else:
            values.append(Fraction(2) ** (exponent - bias) * (1 + fraction))
    return values


def defined_nearest(value, magnitudes):
    """The nearest magnitude with the sign of the value; of two as near ones that of the even code."""
    wanted = abs(Fraction(value))
    best = min(range(len(magnitudes)), key=lambda code: (abs(magnitudes[code] - wanted), code % 2))
    return float(magnitudes[best]) * (-1 if value < 0 else 1)


def nearest(values, name):
    levels = levels_of(float_scheme(name))
    return levels.nearest(values, None, None, out=torch.empty_like(values))


def decoded(codes, name):
    return levels_of(float_scheme(name)).decode(codes, 0, out=torch.empty(codes.shape))


@pytest.mark.parametrize("name", _NAMES)
def test_every_code_means_what_the_definition_says(name):
    scheme, magnitudes = float_scheme(name), defined_magnitudes(name)
    half = scheme.num_codes // 2
    codes = torch.arange(scheme.num_codes).to(torch.uint8)
    found = decoded(codes, name).tolist()
    assert found[: len(magnitudes)] == [float(m) for m in magnitudes]
    assert found[half : half + len(magnitudes)] == [-float(m) for m in magnitudes]
    assert max(magnitudes) == _LARGEST[name] == levels_of(scheme).reach
    finite = ~decoded(codes, name).isnan()
    again = levels_of(scheme).encode(
        decoded(codes, name)[finite], 0, out=torch.empty(int(finite.sum()), dtype=torch.int16)
    )
    # Zero has one code here.
    assert again.tolist() == [0 if code == half else code for code in codes[finite].tolist()]


def test_bytes_of_e4m3_are_those_of_torch():
    codes = torch.arange(256).to(torch.uint8)
    torch.testing.assert_close(
        decoded(codes, "e4m3"), codes.view(torch.float8_e4m3fn).float(), atol=0, rtol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", _NAMES)
def test_midpoints_and_what_lies_beside_them_go_to_the_nearest(name, dtype):
    magnitudes = defined_magnitudes(name)
    points = [float(m) for m in magnitudes]
    points += [float((a + b) / 2) for a, b in zip(magnitudes, magnitudes[1:], strict=False)]
    points += [1.03 * _LARGEST[name], 1.2 * _LARGEST[name], 1e30]
    exact = torch.tensor(points, dtype=dtype)
    beside = [torch.nextafter(exact, torch.tensor(side, dtype=dtype)) for side in (torch.inf, -torch.inf)]
    values = torch.cat([exact, *beside])
    values = torch.cat([values, -values])
    wanted = [defined_nearest(value, magnitudes) for value in values.tolist()]
    assert nearest(values, name).tolist() == wanted


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(_NAMES), st.floats(-1e3, 1e3, width=32))
def test_any_value_goes_to_the_nearest(name, value):
    found = nearest(torch.tensor([value]), name).item()
    assert found == defined_nearest(value, defined_magnitudes(name))


@pytest.mark.parametrize("name", _NAMES)
def test_rounding_is_that_of_upstream(name):
    args = QuantizationArgs(num_bits=float_scheme(name).bits, type="float", strategy="channel")
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * _LARGEST[name] / 2
    values = values.clamp(-_LARGEST[name], _LARGEST[name])
    bound = torch.tensor(_LARGEST[name])
    theirs = round_to_quantized_type_args(values, args=args, min=-bound, max=bound)
    assert torch.equal(nearest(values, name), theirs.float())


def test_result_may_take_the_place_of_the_value():
    values = torch.tensor([0.3, -5.5, 2.4])
    levels_of(scheme_from_name("MXFP4A16")).nearest(values, None, None, out=values)
    assert values.tolist() == [0.5, -6.0, 2.0]
