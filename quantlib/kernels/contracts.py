"""What goes through the columns of a batch on a GPU, and which kernel there is for a device.

E linears, R rows (out features), B positions of a column batch, G groups of all linears.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from quantlib.grids.levels import Levels


@dataclass(frozen=True, slots=True)
class GroupScales:
    """What belongs to groups, those of one linear after those of the other.

    Shapes:
        scale_GR: fp32 [G, R], contiguous.
        lowest_GR: fp32 [G, R], contiguous; smallest offset of integers.
        highest_GR: fp32 [G, R], contiguous; largest.
    """

    scale_GR: torch.Tensor
    lowest_GR: torch.Tensor
    highest_GR: torch.Tensor


@dataclass(frozen=True, slots=True)
class KeptEntries:
    """Entries of a batch that are kept in a floating dtype.

    Shapes:
        is_kept_EBR: bool [E, B, R], contiguous; which.
        value_EBR: fp32 [E, B, R], contiguous; receives what is kept there. Other entries mean nothing.

    Attributes:
        dtype: In which they are kept: fp32, bf16 or fp16.
    """

    is_kept_EBR: torch.Tensor
    value_EBR: torch.Tensor
    dtype: torch.dtype


class ColumnKernel(Protocol):
    """Chooses the offsets of a batch of columns, the last position first."""

    def __call__(
        self,
        target_EBR: torch.Tensor,
        error_EBR: torch.Tensor,
        offset_EBR: torch.Tensor,
        feedback_EBB: torch.Tensor,
        scales: GroupScales,
        group_EB: torch.Tensor,
        levels: Levels,
        kept: KeptEntries | None = None,
    ) -> None:
        """Change the first three.

        Shapes:
            target_EBR: fp32 [E, B, R], with the errors of all columns solved before; becomes the quotients,
                target over scale, or where a weight is kept its offset.
            error_EBR: fp32 [E, B, R], weights; becomes weight less level, or less what is kept.
            offset_EBR: fp32 [E, B, R], receives the offsets.
            feedback_EBB: fp32 [E, B, B]; [j, i] with j > i is what the error at j adds to the target at i.
            group_EB: int64 [E, B], of every position its row in ``scales``.

        Tensors may be views; rows are contiguous.

        Args:
            levels: Of the number format.
            kept: Entries that take their target, rounded to a dtype, in place of a level.
        """
        ...


def column_kernel(*, dtype: torch.dtype, device: torch.device) -> ColumnKernel | None:
    """What suits a dtype and a device; None where torch's operations have to do."""
    if device.type != "cuda" or dtype != torch.float32:
        return None
    from quantlib.kernels.column_batch import solve_columns  # Triton is there where CUDA is

    return solve_columns
