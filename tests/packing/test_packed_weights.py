"""Single weights kept beside the codes, in every layout: what was packed is read, and what was promised."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import PackingError
from quantlib.outlier_weights import OutlierWeights
from quantlib.packing import FORMATS
from quantlib.packing.outliers import all_packed_names, pack_linear, unpack_linear
from quantlib.packing.specs import packed_on_meta
from quantlib.quantized import joined_rows
from quantlib.schemes import WeightScheme
from tests.support.random_linears import random_quantized

NAME, W4 = "model.layers.0.mlp.up_proj", WeightScheme(bits=4, is_symmetric=True, group_size=32)


def kept(rows, columns, count, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    order_RC = torch.rand(rows, columns, generator=generator).argsort(1)
    return OutlierWeights(
        column_RM=order_RC[:, :count].sort(1).values.int(),
        weight_RM=torch.randn(rows, count, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "awq"])
@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 64),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_unpacked_is_what_was_packed(format_name, count, seed, dtype):
    packer = FORMATS[format_name]
    plain = random_quantized(32, 64, W4, scale_dtype=packer.scale_dtype(torch.bfloat16))
    quantized = dataclasses.replace(plain, outliers=kept(32, 64, count, seed, dtype))
    packed = pack_linear(packer, NAME, quantized)
    assert set(packed) <= set(all_packed_names(packer, NAME))
    promised = packed_on_meta(
        packer, NAME, rows=32, columns=64, scheme=W4, model_dtype=dtype, num_outlier_weights=count
    )
    index = f"{NAME}.outlier_index"
    assert {n: t.shape for n, t in packed.items()} == {n: t.shape for n, t in promised.items()}
    assert packed[index].dtype == promised[index].dtype == torch.uint16
    found = unpack_linear(packer, NAME, packed, W4)
    assert torch.equal(found.outliers.column_RM, quantized.outliers.column_RM)
    assert torch.equal(found.outliers.weight_RM, quantized.outliers.weight_RM)
    level_RC, wanted_RC = found.dequantize(), plain.dequantize()
    for row, (columns, weights) in enumerate(
        zip(packed[index].tolist(), packed[f"{NAME}.outlier_weight"].tolist(), strict=True)
    ):
        for column, weight in zip(columns, weights, strict=True):
            wanted_RC[row, column] = weight
    assert torch.equal(level_RC, wanted_RC)
    # Who reads the layout alone finds the codes.
    assert torch.equal(packer.unpack(NAME, packed, W4).dequantize(), plain.dequantize())


def test_rows_of_a_linear_make_the_linear_again():
    plain = random_quantized(32, 64, W4, scale_dtype=torch.bfloat16)
    whole = dataclasses.replace(plain, outliers=kept(32, 64, 3))
    parts = [whole.rows(slice(0, 7)), whole.rows(slice(7, 32))]
    assert torch.equal(parts[1].dequantize(), whole.dequantize()[7:])
    again = joined_rows(parts)
    assert torch.equal(again.dequantize(), whole.dequantize())
    assert torch.equal(again.outliers.column_RM, whole.outliers.column_RM)


def test_the_last_column_that_can_be_named_is_and_more_columns_are_refused():
    packer = FORMATS["compressed-tensors"]
    for columns in (1 << 16, (1 << 16) + 32):
        plain = random_quantized(1, columns, W4, scale_dtype=torch.bfloat16)
        outliers = OutlierWeights(
            column_RM=torch.tensor([[0, (1 << 16) - 1]], dtype=torch.int32),
            weight_RM=torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16),
        )
        quantized = dataclasses.replace(plain, outliers=outliers)
        if columns == 1 << 16:
            found = unpack_linear(packer, NAME, pack_linear(packer, NAME, quantized), W4)
            assert found.dequantize()[0, [0, -1]].tolist() == [1.0, -2.0]
            continue
        promised = {"rows": 1, "columns": columns, "scheme": W4, "model_dtype": torch.bfloat16}
        for make in (
            lambda q=quantized: pack_linear(packer, NAME, q),
            lambda p=promised: packed_on_meta(packer, NAME, num_outlier_weights=2, **p),
        ):
            with pytest.raises(PackingError, match="of at most 65536 columns, found 65568"):
                make()
