"""Scales for any layout: every value is one of both bf16 and fp16, and the nearest of them."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.grids.fit import fit_to_extremes, search_scales
from quantlib.grids.formats import PORTABLE_SCALES
from quantlib.grids.stored_scale import is_outside_stored, round_to_stored
from quantlib.schemes import scheme_from_name

_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _all_portable() -> np.ndarray:
    """Positive normal fp16 numbers whose last 3 bits are 0: 8 significant bits are left."""
    halves = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float64)
    kept = np.arange(1 << 15) % 8 == 0
    return halves[kept & np.isfinite(halves) & (halves >= 2.0**-14)]


def _is_portable(scale: torch.Tensor) -> bool:
    return bool(np.isin(scale.double().numpy(), _all_portable()).all())


@pytest.mark.parametrize("dtype", _DTYPES)
@given(st.lists(st.floats(2.0**-20, 1e6, width=32), min_size=1, max_size=20))
def test_rounded_scale_is_the_nearest_portable_value(dtype, values):
    scale = torch.tensor(values, dtype=torch.float32)
    found = round_to_stored(scale, dtype, PORTABLE_SCALES)
    every = _all_portable()
    nearest = np.abs(scale.double().numpy()[:, None] - every).min(1)
    assert _is_portable(found)
    assert torch.equal(found.to(dtype).float(), found)
    assert np.array_equal(np.abs(found.double().numpy() - scale.double().numpy()), nearest)
    outside = is_outside_stored(scale, dtype, PORTABLE_SCALES)
    assert outside.tolist() == [value < every[0] or value > every[-1] for value in scale.tolist()]


@pytest.mark.parametrize("name", ["W4A16", "W3A16_ASYM"])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
def test_fitted_scales_are_the_same_portable_values_in_any_dtype(name, magnitude):
    scheme = dataclasses.replace(scheme_from_name(name, 16), scales=PORTABLE_SCALES)
    weight_RC = magnitude * torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    importance_C = torch.linspace(0.5, 2.0, 64)
    covered = [fit_to_extremes(weight_RC, scheme, scale_dtype=dtype) for dtype in _DTYPES]
    searched = [
        search_scales(weight_RC, scheme, scale_dtype=dtype, importance_C=importance_C) for dtype in _DTYPES
    ]
    for grids in (covered, searched):
        for grid, dtype in zip(grids, _DTYPES, strict=True):
            assert grid.scale_RG.dtype == dtype
            assert _is_portable(grid.scale_RG)
            assert torch.equal(grid.scale_RG.float(), grids[0].scale_RG.float())
            assert torch.equal(grid.is_bounded_RG, grids[0].is_bounded_RG)
            assert bool(grid.is_bounded_RG.any()) == (magnitude != 1.0)
