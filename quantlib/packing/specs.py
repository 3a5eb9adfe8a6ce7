"""What a format makes of a linear of some shape, learnt by packing tensors without data."""

import torch

from quantlib.grids.formats import DIVIDED_SCALES, NESTED_SCALES
from quantlib.grids.nested_scales import BLOCK_SCALES
from quantlib.grids.stored_scale import held_dtype
from quantlib.outlier_columns import OutlierColumns
from quantlib.outlier_weights import OutlierWeights
from quantlib.outliers import Outliers
from quantlib.packing.contracts import PackingFormat
from quantlib.packing.outliers import pack_linear
from quantlib.quantized import NestedScales, QuantizedLinear
from quantlib.schemes import WeightScheme


def packed_on_meta(
    packer: PackingFormat,
    name: str,
    *,
    rows: int,
    columns: int,
    scheme: WeightScheme,
    model_dtype: torch.dtype,
    num_outliers: int = 0,
    num_outlier_weights: int = 0,
) -> dict[str, torch.Tensor]:
    """Tensors on the meta device: names, dtypes and shapes of a packed linear.

    Args:
        packer: The format.
        name: Full module name.
        rows: Out features.
        columns: In features.
        scheme: How it is quantized.
        model_dtype: Of the weight before.
        num_outliers: Columns that are kept beside the codes.
        num_outlier_weights: Single weights of each row that are.

    Raises:
        PackingError: The layout cannot hold such a linear.
    """
    groups = scheme.num_groups(columns)
    scale_dtype = held_dtype(scheme.scales, packer.scale_dtype(model_dtype))
    quantized = QuantizedLinear(
        codes_RC=torch.empty(rows, columns, dtype=torch.uint8, device="meta"),
        scale_RG=torch.empty(rows, groups, dtype=scale_dtype, device="meta"),
        zero_RG=None if scheme.is_symmetric else torch.empty(rows, groups, dtype=torch.uint8, device="meta"),
        scheme=scheme,
        model_dtype=model_dtype,
        divisor_R1=torch.empty(rows, 1, device="meta") if scheme.scales == DIVIDED_SCALES else None,
        nested=_nested(rows, groups) if scheme.scales == NESTED_SCALES else None,
        outliers=_outliers(rows, num_outliers, num_outlier_weights, model_dtype),
    )
    return pack_linear(packer, name, quantized)


def _nested(rows: int, groups: int) -> NestedScales:
    return NestedScales(
        code_RG=torch.empty(rows, groups, dtype=torch.uint8, device="meta"),
        absmax_N=torch.empty(-(-rows * groups // BLOCK_SCALES), device="meta"),
        offset=torch.empty((), device="meta"),
    )


def _outliers(rows: int, num_columns: int, num_weights: int, dtype: torch.dtype) -> Outliers | None:
    if num_columns:
        return OutlierColumns(
            column_K=torch.empty(num_columns, dtype=torch.int32, device="meta"),
            weight_RK=torch.empty(rows, num_columns, dtype=dtype, device="meta"),
        )
    if num_weights:
        return OutlierWeights(
            column_RM=torch.empty(rows, num_weights, dtype=torch.int32, device="meta"),
            weight_RM=torch.empty(rows, num_weights, dtype=dtype, device="meta"),
        )
    return None
