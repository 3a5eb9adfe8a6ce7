"""Inputs rounded as a model runs, against compressed-tensors' own."""

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from quantlib.grids.inputs import rounded_inputs
from quantlib.schemes import ROUNDED_INPUTS_NAMES, scheme_from_name

SCHEMES = {name: scheme_from_name(name).inputs for name in ROUNDED_INPUTS_NAMES}
# What has no preset of its own rounds inputs as this one.
PRESETS = {"FP8_DYNAMIC_TENSOR": "FP8_DYNAMIC"}
DTYPES = [torch.float32, torch.bfloat16]


def theirs(x_BTC, name):
    """Three dims, as the linears of a block have them: with two they give one scale to all tokens."""
    args = preset_name_to_scheme(PRESETS.get(name, name), ["Linear"]).input_activations
    scale, zero = compute_dynamic_scales_and_zp(x_BTC, args, torch.nn.Identity())
    return fake_quantize(x_BTC, scale, zero, args)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nasty(kind):
    x_BTC = normal(2, 40, 384)
    if kind == "wide":
        return x_BTC * 10.0 ** torch.randint(-44, 37, (2, 40, 1), generator=torch.Generator().manual_seed(1))
    if kind == "outliers":
        x_BTC[:, :, 5] *= 1e4
    elif kind == "zeros":
        x_BTC[:, ::2] = 0.0
        x_BTC[:, 1::4, :64] = 0.0
    elif kind == "huge":
        x_BTC = x_BTC.sign() * 2.9e38
    elif kind == "subnormal":
        x_BTC *= 1e-39
    elif kind == "powers":
        # Absmax at, a little below and a little above where a group takes the next power of two.
        x_BTC = x_BTC.clamp(-1, 1)
        x_BTC[..., ::32] = (
            torch.tensor([1.0, 1.7421875, 1.75, 1.7578125, 1.9921875]).repeat(16).view(2, 40, 1)
        )
    elif kind == "ties":
        x_BTC = torch.arange(-48, 48).repeat(4).expand(2, 40, 384) / 2.0
        x_BTC[..., ::32] = 127.5
    return x_BTC


@pytest.mark.parametrize("kind", ["wide", "outliers", "zeros", "huge", "subnormal", "powers", "ties"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_rounded_as_compressed_tensors_does_bit_for_bit(name, dtype, kind):
    x_BTC = nasty(kind).to(dtype)
    found = rounded_inputs(x_BTC, SCHEMES[name])
    assert found.dtype == dtype
    assert torch.equal(found, theirs(x_BTC, name))
    if kind not in ("huge", "subnormal"):
        assert not torch.equal(found, x_BTC), "something is rounded"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_token_has_the_same_bits_whatever_comes_with_it(name, dtype):
    """More values than are rounded at a time, in rows that do not fill it evenly."""
    x_BTC = (normal(3, 211, 2048) * torch.rand(3, 211, 1)).to(dtype)
    together = rounded_inputs(x_BTC, SCHEMES[name])
    assert torch.equal(together, theirs(x_BTC, name))
    for batch, token in ((0, 0), (1, 100), (2, 210)):
        for alone in (x_BTC[batch, token], x_BTC[batch, token : token + 1], x_BTC[batch : batch + 1, token]):
            found = rounded_inputs(alone, SCHEMES[name])
            assert torch.equal(found.flatten(), together[batch, token])


@pytest.mark.parametrize("name", SCHEMES)
def test_strides_and_no_tokens(name):
    x_NC = normal(256, 40).t()
    assert torch.equal(rounded_inputs(x_NC, SCHEMES[name]), rounded_inputs(x_NC.contiguous(), SCHEMES[name]))
    assert rounded_inputs(x_NC[:0], SCHEMES[name]).shape == (0, 256)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_no_number_stays_none(name, bad):
    x_TC = normal(4, 256)
    x_TC[1, 7] = bad
    found = rounded_inputs(x_TC, SCHEMES[name])
    assert not found[1, 7].isfinite()
    assert found[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("kind", ["outliers", "zeros", "ties"])
@pytest.mark.parametrize("name", SCHEMES)
def test_fp16_is_rounded_as_theirs_where_it_holds_the_scales(name, kind):
    x_BTC = nasty(kind).half()
    assert torch.equal(rounded_inputs(x_BTC, SCHEMES[name]), theirs(x_BTC, name))
