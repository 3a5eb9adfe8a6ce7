"""A packed linear in another layout: the same linear, or a refusal."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import PackingError
from quantlib.grids.formats import PORTABLE_SCALES
from quantlib.grids.stored_scale import round_to_stored
from quantlib.packing import FORMATS
from quantlib.packing.repacking import repacked
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WeightScheme
from tests.support.format_limits import GROUP_SIZES, HELD_BITS
from tests.support.random_linears import random_quantized

_MODEL_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _portable(scheme: WeightScheme, dtype: torch.dtype, seed: int = 0) -> QuantizedLinear:
    quantized = random_quantized(64, 96, scheme, scale_dtype=torch.float32, seed=seed)
    scale_RG = round_to_stored(quantized.scale_RG, dtype, PORTABLE_SCALES).to(dtype)
    return dataclasses.replace(quantized, scale_RG=scale_RG)


def _have_something_in_common(one: str, other: str) -> bool:
    group_sizes = {GROUP_SIZES[name] for name in (one, other) if name in GROUP_SIZES}
    return bool(set(HELD_BITS[one]).intersection(HELD_BITS[other])) and len(group_sizes) < 2


@pytest.mark.parametrize(
    ("from_", "to"),
    [pair for pair in itertools.product(FORMATS, repeat=2) if _have_something_in_common(*pair)],
)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_repacked_linear_is_what_packing_it_gives(from_, to, data):
    widths = sorted(set(HELD_BITS[from_]).intersection(HELD_BITS[to]))
    only = [GROUP_SIZES[name] for name in (from_, to) if name in GROUP_SIZES]
    # Asymmetric codes of GGUF have other scales than portable ones.
    is_symmetric = bool(only) or data.draw(st.booleans())
    scheme = WeightScheme(
        bits=data.draw(st.sampled_from(widths)),
        is_symmetric=is_symmetric,
        group_size=data.draw(st.sampled_from(only[:1] or [-1, 32, 48])),
        scales=PORTABLE_SCALES,
    )
    model_dtype = data.draw(st.sampled_from(_MODEL_DTYPES))
    packer, other = FORMATS[from_], FORMATS[to]
    quantized = _portable(scheme, packer.scale_dtype(model_dtype), seed=data.draw(st.integers(0, 99)))
    bias = torch.arange(64.0)
    tensors = {**packer.pack("m.up", quantized), "m.up.bias": bias, "m.gate.bias": bias}
    found = repacked("m.up", scheme, tensors, packer, other, model_dtype)
    assert found.pop("m.up.bias") is bias
    scale_RG = quantized.scale_RG.to(other.scale_dtype(model_dtype))
    wanted = other.pack("m.up", dataclasses.replace(quantized, scale_RG=scale_RG))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name])


def test_scale_that_the_other_layout_would_round_is_refused():
    scheme = WeightScheme(bits=4, is_symmetric=True, group_size=32)
    quantized = _portable(scheme, torch.float16)
    scale_RG = quantized.scale_RG.clone()
    scale_RG[3, 1] = 1 + 2.0**-10
    tensors = FORMATS["gptq"].pack("m", dataclasses.replace(quantized, scale_RG=scale_RG))
    with pytest.raises(PackingError, match="a scale in torch.float16 is not exact in torch.bfloat16"):
        repacked("m", scheme, tensors, FORMATS["gptq"], FORMATS["compressed-tensors"], torch.bfloat16)
