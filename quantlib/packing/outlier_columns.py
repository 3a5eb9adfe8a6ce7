"""Columns that are kept beside the codes, in a checkpoint of any layout.

Of a linear with R out features, K of whose columns are kept: ``<linear>.outlier_columns`` int32 [K], which
they are, rising; ``<linear>.outlier_weight`` [R, K] in the dtype of the model, what they mean. All else is as
the layout has it: the codes of these columns are the nearest levels of the same weights. config.json says
under ``quantization_config.outliers`` how many ``columns`` every quantized linear keeps, ``except`` for those
that are listed.

No serving engine reads these tensors. This project does, whenever it reads such a checkpoint.
"""

from collections.abc import Sequence

import torch

from quantlib.errors import PackingError
from quantlib.outlier_columns import OutlierColumns
from quantlib.packing.checks import require_shape

COLUMNS, WEIGHT = "outlier_columns", "outlier_weight"
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tensors_of_columns(
    name: str, outliers: OutlierColumns, shape: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """The two tensors of a linear; also on the meta device.

    Raises:
        PackingError: They contradict each other or the linear's shape.
    """
    _check(name, outliers.column_K, outliers.weight_RK, shape)
    return {f"{name}.{COLUMNS}": outliers.column_K, f"{name}.{WEIGHT}": outliers.weight_RK.contiguous()}


def columns_of_tensors(
    name: str, column_K: torch.Tensor, weight_RK: torch.Tensor, shape: tuple[int, ...]
) -> OutlierColumns:
    """What `tensors_of_columns` made the tensors of.

    Raises:
        PackingError: They contradict each other or the linear's shape.
    """
    _check(name, column_K, weight_RK, shape)
    return OutlierColumns(column_K=column_K, weight_RK=weight_RK)


def are_rising(columns: Sequence[int], end: int) -> bool:
    """Whether columns of a linear of ``end`` are named in order, each once.

    >>> are_rising([0, 5], 6), are_rising([5, 0], 6), are_rising([5, 5], 6), are_rising([6], 6)
    (True, False, False, False)
    """
    return all(a < b for a, b in zip((-1, *columns), (*columns, end), strict=True))


def _check(name: str, column_K: torch.Tensor, weight_RK: torch.Tensor, shape: tuple[int, ...]) -> None:
    require_shape(f"{name}.{COLUMNS}", column_K, (column_K.numel(),))
    require_shape(f"{name}.{WEIGHT}", weight_RK, (shape[0], column_K.numel()))
    if column_K.dtype != torch.int32 or weight_RK.dtype not in WEIGHT_DTYPES:
        raise PackingError(
            f"{name}: columns that are kept are named in int32 and stored in bf16, fp16 or fp32, found"
            f" {column_K.dtype} and {weight_RK.dtype}",
            linear=name,
        )
    if not column_K.is_meta and not are_rising(column_K.tolist(), shape[1]):
        raise PackingError(
            f"{name}: the columns that are kept must rise from 0 to at most {shape[1] - 1}; the checkpoint is"
            " damaged",
            linear=name,
        )
