"""Scales of a matrix: one, one a row, one a group of columns, or one a block of rows and columns.

R rows, C columns of the matrix; a block is ``(rows, columns)`` that share a scale.
"""

from collections.abc import Sequence

import torch

from quantlib.errors import CheckpointError

Block = tuple[int, int]


def block_of(
    name: str, shape: tuple[int, int], scale_shape: tuple[int, ...], declared: Sequence[int] | None = None
) -> Block:
    """What shares a scale, from shapes.

    Args:
        name: Of the weight, for messages.
        shape: (R, C).
        scale_shape: Of the scales.
        declared: The block that the config states; at the edges it may be cut.

    Raises:
        CheckpointError: So many scales do not fit the weight.

    >>> block_of("w", (256, 512), (2, 4), (128, 128)), block_of("w", (256, 512), (256, 4))
    ((128, 128), (1, 128))
    """
    rows, columns = shape
    if scale_shape in ((), (1,), (1, 1)):
        return shape
    if scale_shape in ((rows,), (rows, 1)):
        return 1, columns
    if declared is not None and len(declared) == 2:
        if scale_shape == (-(-rows // declared[0]), -(-columns // declared[1])):
            return declared[0], declared[1]
    elif (
        len(scale_shape) == 2 and all(scale_shape) and not (rows % scale_shape[0] or columns % scale_shape[1])
    ):
        return rows // scale_shape[0], columns // scale_shape[1]
    raise CheckpointError(
        f"{name} is {list(shape)} and its scales are {list(scale_shape)}"
        + (f", which is not one for every {declared[0]} x {declared[1]}" if declared else "")
        + "; the checkpoint or its config.json is damaged",
        tensor=name,
    )


def scale_rows(scale: torch.Tensor, block: Block, columns: int, start: int, end: int) -> torch.Tensor:
    """The scale of every value of rows [start, end): fp32, [end - start, C] or what is expanded to it."""
    values = exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    grid = values.reshape(-1, -(-columns // block[1]))
    grid = grid[torch.arange(start, end) // block[0]]
    return grid if grid.shape[1] == 1 else grid.repeat_interleave(block[1], dim=1)[:, :columns]


def groups_of_columns(g_idx_C: torch.Tensor, num_groups: int, linear: str) -> torch.Tensor:
    """The group of each column, int64 [C].

    Raises:
        CheckpointError: A column is in a group that has no scale.
    """
    group_C = g_idx_C.long()
    if int(group_C.min()) < 0 or int(group_C.max()) >= num_groups:
        raise CheckpointError(
            f"{linear}: columns are in groups {int(group_C.min())} to {int(group_C.max())}, there are scales"
            f" of {num_groups}; the checkpoint is damaged",
            linear=linear,
        )
    return group_C


def exponents(codes: torch.Tensor) -> torch.Tensor:
    """Powers of two of E8M0 bytes, fp32; 255 means NaN."""
    return codes.view(torch.float8_e8m0fnu).float()
