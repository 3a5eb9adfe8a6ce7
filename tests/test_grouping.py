"""Matrices in handfuls of rows: the same bits whatever a handful is."""

import pytest
import torch

from quantlib import grouping
from quantlib.grids.affine import nearest_codes, with_codes
from quantlib.grids.fit import fit_to_extremes
from quantlib.grouping import by_group, row_parts
from quantlib.methods.measures import relative_error
from quantlib.packing.bits import pack_words
from quantlib.schemes import INTEGER_NAMES, scheme_from_name


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 3), (40, 5), (3, 0)])
def test_row_parts_are_all_rows_in_order(rows, columns, monkeypatch):
    monkeypatch.setattr(grouping, "_CPU_ELEMENTS", 20)
    matrix = torch.arange(rows * columns).reshape(rows, columns)
    assert torch.equal(torch.cat([matrix[part] for part in row_parts(matrix)]), matrix)


def test_by_group_of_whole_groups_is_a_view():
    matrix = torch.zeros(2, 6)
    by_group(matrix, 3)[1, 1] = 5.0
    assert matrix.tolist() == [[0.0] * 6, [0.0, 0.0, 0.0, 5.0, 5.0, 5.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [96, 90])
@pytest.mark.parametrize("name", INTEGER_NAMES)
def test_rounding_and_packing_give_the_same_bits_in_handfuls_as_at_once(name, columns, dtype, monkeypatch):
    weight_RC = torch.randn(37, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    scheme = scheme_from_name(name, 32)
    found = []
    for elements in (1 << 19, 5 * columns):
        monkeypatch.setattr(grouping, "_CPU_ELEMENTS", elements)
        grid = fit_to_extremes(weight_RC, scheme, scale_dtype=torch.bfloat16)
        codes_RC, num_clipped_R = nearest_codes(weight_RC, grid)
        words = pack_words(codes_RC, bits=scheme.bits, dim=1)
        found.append((grid.scale_RG, codes_RC, num_clipped_R, words))
        error = relative_error(weight_RC, with_codes(grid, codes_RC), None)
        levels_RC = with_codes(grid, codes_RC).dequantize().double()
        wanted = (weight_RC.double() - levels_RC).square().sum() / weight_RC.double().square().sum()
        assert error == pytest.approx(wanted.item(), rel=1e-5)
    assert all(torch.equal(at_once, in_parts) for at_once, in_parts in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM"])
def test_rounding_takes_stored_weights_as_fp32(name, dtype):
    weight_RC = torch.randn(16, 90, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight_RC[0, :32], weight_RC[1, 32:64], weight_RC[2, 40] = 0.0, -0.0, torch.finfo(dtype).min
    weight_RC[3, :32] = torch.tensor(1, dtype=torch.int16).view(dtype)  # the smallest there is
    scheme = scheme_from_name(name, 32)
    stored, wide = (fit_to_extremes(w, scheme, scale_dtype=dtype) for w in (weight_RC, weight_RC.float()))
    assert torch.equal(stored.scale_RG, wide.scale_RG)
    assert torch.equal(nearest_codes(weight_RC, stored)[0], nearest_codes(weight_RC.float(), wide)[0])
