"""The reported error, against the traces written out in float64."""

import pytest
import torch

from quantlib.grids.affine import nearest_codes, with_codes
from quantlib.grids.fit import fit_to_extremes
from quantlib.methods import measures
from quantlib.methods.measures import relative_error
from quantlib.schemes import scheme_from_name
from tests.support.reference_solver import correlated_inputs


@pytest.mark.parametrize(("tile_rows", "column_batch"), [(4096, 256), (7, 64), (1, 300), (5, 1)])
@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM"])
def test_relative_error_equals_traces_in_float64(name, tile_rows, column_batch, monkeypatch):
    monkeypatch.setattr(measures, "_FEWEST_TILE_ROWS", {"cpu": tile_rows})
    monkeypatch.setattr(measures, "_MOST_TILE_ROWS", tile_rows)
    monkeypatch.setattr(measures, "_COLUMN_BATCH", {"cpu": column_batch})
    w = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(correlated_inputs(500, 300, 0))
    grid = fit_to_extremes(w, scheme_from_name(name, 64), scale_dtype=torch.bfloat16)
    quantized = with_codes(grid, nearest_codes(w, grid)[0])
    output, lost = x @ w.double().T, x @ (w.double() - quantized.dequantize().double()).T
    found = relative_error(w, quantized, (x.T @ x).float())
    assert found == pytest.approx((lost.square().sum() / output.square().sum()).item(), rel=1e-5)
