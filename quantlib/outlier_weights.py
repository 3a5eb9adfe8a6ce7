"""Single weights that are kept in the dtype of the weight, beside the codes of all: the sparse form.

R rows (out features), C columns (in features), M weights that are kept of every row. Each row has as many, of
its own choice: so neither how rows are cut into tiles nor who solves which changes one, and the sizes
of all tensors follow from shapes. Their codes are the nearest levels of the same weights, as of
`quantlib.outlier_columns`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierWeights:
    """What some weights of every row mean in the place of their codes.

    Shapes:
        column_RM: int32 [R, M], rising in every row.
        weight_RM: floating [R, M], finite.
    """

    column_RM: torch.Tensor
    weight_RM: torch.Tensor

    @property
    def num_weights(self) -> int:
        """How many are kept."""
        return self.weight_RM.numel()

    def rows(self, part: slice | torch.Tensor) -> "OutlierWeights":
        """Of some rows, by slice (then as views) or index."""
        return OutlierWeights(column_RM=self.column_RM[part], weight_RM=self.weight_RM[part])

    def to(self, device: torch.device | str) -> "OutlierWeights":
        """The same on a device."""
        return OutlierWeights(column_RM=self.column_RM.to(device), weight_RM=self.weight_RM.to(device))

    def taken_from(self, weight_RC: torch.Tensor) -> torch.Tensor:
        """A weight less what these mean."""
        return weight_RC.scatter_add(1, self.column_RM.long(), -self.weight_RM.to(weight_RC.dtype))

    def put_into_(self, level_RC: torch.Tensor) -> torch.Tensor:
        """Overwrite their levels; gives ``level_RC``."""
        return level_RC.scatter_(1, self.column_RM.long(), self.weight_RM.to(level_RC.dtype))

    def erase_from_(self, offset_RC: torch.Tensor) -> torch.Tensor:
        """Set their offsets to zero; gives ``offset_RC``."""
        return offset_RC.scatter_(1, self.column_RM.long(), 0.0)


def joined_weights(parts: Sequence[OutlierWeights]) -> OutlierWeights:
    """Of a linear that was cut into rows, in order."""
    return OutlierWeights(
        column_RM=torch.cat([part.column_RM for part in parts]),
        weight_RM=torch.cat([part.weight_RM for part in parts]),
    )


def largest_entries(value_RC: torch.Tensor, count: int) -> torch.Tensor:
    """The columns of the largest values of every row; of equal ones the lowest first.

    Shapes:
        value_RC: floating [R, C], no NaN.

    Args:
        count: At most C.

    Returns:
        int64 [R, count], rising in every row; no row's depends on another.

    >>> largest_entries(torch.tensor([[1.0, 9.0, 4.0, 9.0], [2.0, 2.0, 2.0, 2.0]]), 2).tolist()
    [[1, 3], [0, 1]]
    """
    # The least of them is a number whatever equals it; which of equal ones topk names is not said.
    least_R1 = value_RC.topk(count, dim=1).values[:, -1:]
    is_larger_RC, is_least_RC = value_RC > least_R1, value_RC == least_R1
    missing_R1 = count - is_larger_RC.sum(1, keepdim=True)
    is_among_RC = is_larger_RC | (is_least_RC & (is_least_RC.cumsum(1) <= missing_R1))
    return is_among_RC.nonzero()[:, 1].view(len(value_RC), count)
