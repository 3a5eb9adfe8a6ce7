"""Columns kept beside the codes, in every layout: what was packed is what is read, and what is promised."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.outlier_columns import OutlierColumns
from quantlib.packing import FORMATS
from quantlib.packing.outliers import all_packed_names, pack_linear, unpack_linear
from quantlib.packing.specs import packed_on_meta
from quantlib.quantized import joined_rows
from quantlib.schemes import WeightScheme
from tests.support.random_linears import random_quantized

NAME, W4 = "model.layers.0.mlp.up_proj", WeightScheme(bits=4, is_symmetric=True, group_size=32)


def kept(rows, columns, names, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(len(names))
    return OutlierColumns(
        column_K=torch.tensor(sorted(names), dtype=torch.int32),
        weight_RK=torch.randn(rows, len(names), generator=generator).to(dtype),
    )


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "awq"])
@settings(max_examples=20, deadline=None)
@given(names=st.sets(st.integers(0, 63), min_size=1, max_size=20), data=st.data())
def test_unpacked_is_what_was_packed(format_name, names, data):
    packer = FORMATS[format_name]
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    plain = random_quantized(32, 64, W4, scale_dtype=packer.scale_dtype(torch.bfloat16))
    quantized = dataclasses.replace(plain, outliers=kept(32, 64, names, dtype))
    packed = pack_linear(packer, NAME, quantized)
    assert set(packed) <= set(all_packed_names(packer, NAME))
    promised = packed_on_meta(
        packer, NAME, rows=32, columns=64, scheme=W4, model_dtype=torch.bfloat16, num_outliers=len(names)
    )
    assert {n: t.shape for n, t in packed.items()} == {n: t.shape for n, t in promised.items()}
    found = unpack_linear(packer, NAME, packed, W4)
    assert torch.equal(found.outliers.column_K, quantized.outliers.column_K)
    assert torch.equal(found.outliers.weight_RK, quantized.outliers.weight_RK)
    level_RC, plain_RC = found.dequantize(), plain.dequantize()
    for column in range(64):
        place = sorted(names).index(column) if column in names else None
        wanted_R = plain_RC[:, column] if place is None else quantized.outliers.weight_RK[:, place].float()
        assert torch.equal(level_RC[:, column], wanted_R), column
    # Who reads the layout alone finds the codes.
    assert torch.equal(packer.unpack(NAME, packed, W4).dequantize(), plain.dequantize())


def test_rows_of_a_linear_make_the_linear_again():
    plain = random_quantized(32, 64, W4, scale_dtype=torch.bfloat16)
    whole = dataclasses.replace(plain, outliers=kept(32, 64, {3, 60}))
    parts = [whole.rows(slice(0, 7)), whole.rows(slice(7, 32))]
    assert torch.equal(parts[1].dequantize(), whole.dequantize()[7:])
    again = joined_rows(parts)
    assert torch.equal(again.dequantize(), whole.dequantize())
    assert again.outliers.column_K.tolist() == [3, 60]
