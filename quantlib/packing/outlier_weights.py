"""Single weights that are kept beside the codes, in a checkpoint of any layout: the sparse form.

Of a linear with R out features, M of whose weights are kept in every row: ``<linear>.outlier_index`` uint16
[R, M], their columns, rising in every row; ``<linear>.outlier_weight`` [R, M] in the dtype of the model, what
they mean. All else is as the layout has it: the codes at these places are the nearest levels of the same
weights. config.json says under ``quantization_config.outliers`` how many of a thousand weights of a row every
quantized linear keeps, ``weights_per_mille``, ``except`` for those that are listed; M follows from that and
the in features (`quantlib.solver_settings.weights_per_row`).

No serving engine reads these tensors. This project does, whenever it reads such a checkpoint.
"""

import torch

from quantlib.errors import PackingError
from quantlib.outlier_weights import OutlierWeights
from quantlib.packing.checks import require_shape
from quantlib.packing.outlier_columns import WEIGHT, WEIGHT_DTYPES

INDEX = "outlier_index"
# What a uint16 can name.
_MOST_COLUMNS = 1 << 16


def tensors_of_weights(
    name: str, outliers: OutlierWeights, shape: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """The two tensors of a linear; also on the meta device.

    Raises:
        PackingError: They contradict each other or the linear's shape, or its columns are too many.
    """
    _check(name, outliers.column_RM, outliers.weight_RM, shape)
    return {
        f"{name}.{INDEX}": outliers.column_RM.to(torch.uint16).contiguous(),
        f"{name}.{WEIGHT}": outliers.weight_RM.contiguous(),
    }


def weights_of_tensors(
    name: str, index_RM: torch.Tensor, weight_RM: torch.Tensor, shape: tuple[int, ...]
) -> OutlierWeights:
    """What `tensors_of_weights` made the tensors of.

    Raises:
        PackingError: They contradict each other or the linear's shape.
    """
    if index_RM.dtype != torch.uint16:
        raise PackingError(
            f"{name}: columns of weights that are kept are named in uint16, found {index_RM.dtype}",
            linear=name,
        )
    column_RM = index_RM.int()
    _check(name, column_RM, weight_RM, shape)
    return OutlierWeights(column_RM=column_RM, weight_RM=weight_RM)


def are_rising_rows(column_RM: torch.Tensor, end: int) -> bool:
    """Whether every row names columns of a linear of ``end`` in order, each once.

    Shapes:
        column_RM: int32 [R, M].

    >>> are_rising_rows(torch.tensor([[0, 5], [2, 3]]), 6), are_rising_rows(torch.tensor([[0, 5], [3, 3]]), 6)
    (True, False)
    """
    is_within = bool(((column_RM >= 0) & (column_RM < end)).all())
    return is_within and bool((column_RM.diff(dim=1) > 0).all())


def _check(name: str, column_RM: torch.Tensor, weight_RM: torch.Tensor, shape: tuple[int, ...]) -> None:
    rows, columns = shape
    if column_RM.ndim != 2:
        raise PackingError(
            f"tensor {name}.{INDEX} must have two dims, got {tuple(column_RM.shape)}", linear=name
        )
    require_shape(f"{name}.{INDEX}", column_RM, (rows, column_RM.shape[1]))
    require_shape(f"{name}.{WEIGHT}", weight_RM, tuple(column_RM.shape))
    if weight_RM.dtype not in WEIGHT_DTYPES:
        raise PackingError(
            f"{name}: weights that are kept are stored in bf16, fp16 or fp32, found {weight_RM.dtype}",
            linear=name,
        )
    if columns > _MOST_COLUMNS:
        raise PackingError(
            f"{name}: single weights can be kept of at most {_MOST_COLUMNS} columns, found {columns}; keep"
            " this linear as it is by a rule, or keep columns instead",
            linear=name,
        )
    if not column_RM.is_meta and not are_rising_rows(column_RM, columns):
        raise PackingError(
            f"{name}: the columns of weights that are kept must rise in every row, from 0 to at most"
            f" {columns - 1}; the checkpoint is damaged",
            linear=name,
        )
