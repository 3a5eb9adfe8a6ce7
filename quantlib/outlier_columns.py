"""Columns of inputs that are far larger than others, and what is kept of the weights they meet.

N tokens, R rows (out features), C columns (in features), K columns that are kept in the dtype of the weight,
beside the codes of all columns. Their codes are the nearest levels of the same weights, so
that a reader who knows nothing of them reads a plain quantized linear, only a coarser one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# From which magnitude on an input makes its column an outlier: LLM.int8 (arXiv 2208.07339), section 3.2.
OUTLIER_THRESHOLD = 6.0
# Rows at a time on a CPU: their magnitudes stay in a cache.
_PART_ROWS = 64


def outlier_columns(x_NC: torch.Tensor, threshold: float = OUTLIER_THRESHOLD) -> torch.Tensor:
    """Which columns have an input of at least the threshold's magnitude, bool [C].

    Cost: two passes over the inputs.

    >>> outlier_columns(torch.tensor([[0.5, -6.0, 5.9], [1.0, 0.1, 0.2]])).tolist()
    [False, True, False]
    """
    found_C = torch.zeros(x_NC.shape[1], dtype=torch.bool, device=x_NC.device)
    if not len(x_NC):
        return found_C
    for part_NC in x_NC.split(_PART_ROWS if x_NC.device.type == "cpu" else len(x_NC)):
        found_C |= part_NC.abs().amax(0) >= threshold
    return found_C


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierColumns:
    """What some columns mean in the place of their codes.

    Shapes:
        column_K: int32 [K], rising.
        weight_RK: floating [R, K], finite.
    """

    column_K: torch.Tensor
    weight_RK: torch.Tensor

    @property
    def num_weights(self) -> int:
        """How many are kept."""
        return self.weight_RK.numel()

    def rows(self, part: slice | torch.Tensor) -> "OutlierColumns":
        """Of some rows, by slice (then as views) or index."""
        return OutlierColumns(column_K=self.column_K, weight_RK=self.weight_RK[part])

    def to(self, device: torch.device | str) -> "OutlierColumns":
        """The same on a device."""
        return OutlierColumns(column_K=self.column_K.to(device), weight_RK=self.weight_RK.to(device))

    def taken_from(self, weight_RC: torch.Tensor) -> torch.Tensor:
        """A weight less what these columns mean."""
        return weight_RC.index_add(1, self.column_K.long(), self.weight_RK.to(weight_RC.dtype), alpha=-1)

    def put_into_(self, level_RC: torch.Tensor) -> torch.Tensor:
        """Overwrite these columns; gives ``level_RC``."""
        return level_RC.index_copy_(1, self.column_K.long(), self.weight_RK.to(level_RC.dtype))

    def erase_from_(self, offset_RC: torch.Tensor) -> torch.Tensor:
        """Set the offsets of these columns to zero; gives ``offset_RC``."""
        return offset_RC.index_fill_(1, self.column_K.long(), 0.0)


def joined_columns(parts: Sequence[OutlierColumns]) -> OutlierColumns:
    """Of a linear that was cut into rows, in order; all have the same columns."""
    return OutlierColumns(column_K=parts[0].column_K, weight_RK=torch.cat([part.weight_RK for part in parts]))


def strongest_columns(diagonal_C: torch.Tensor | None, count: int) -> torch.Tensor:
    """The inputs of largest mean square, by which an error in their weights counts most.

    All linears of an input have the same. Where nothing is known of the inputs these are the first columns.

    Shapes:
        diagonal_C: [C], of the Hessian; None without one.

    Returns:
        int64 [count], by falling diagonal; of equal ones the lowest first.

    Source: OWQ (arXiv 2306.02272), which weighs the diagonal by the rounding error of each linear's column,
        too.

    >>> strongest_columns(torch.tensor([1.0, 9.0, 4.0, 9.0]), 3).tolist()
    [1, 3, 2]
    """
    if diagonal_C is None:
        return torch.arange(count)
    return torch.argsort(diagonal_C, descending=True, stable=True)[:count]
