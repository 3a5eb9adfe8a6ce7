"""A matrix as groups of columns, and as handfuls of rows that stay in a cache.

R rows (out features), C columns (in features), G groups of consecutive columns, S columns of one group.
"""

import torch

# On a CPU 2 MiB of fp32: a few such buffers stay in a cache that cores share while one operation after the
# other passes over them; in parts that fit a core's own, calls take more than arithmetic saves. Other devices
# want few large calls.
_CPU_ELEMENTS = 1 << 19
_DEVICE_ELEMENTS = 1 << 24


def by_group(matrix_RC: torch.Tensor, width: int) -> torch.Tensor:
    """The groups of every row: [R, G, S], a view unless the last group is ragged.

    Args:
        matrix_RC: Any dtype.
        width: Columns of a group; a ragged last one is filled up with zeros.

    >>> by_group(torch.tensor([[1, 2, 3]]), 2).tolist()
    [[[1, 2], [3, 0]]]
    """
    missing = -matrix_RC.shape[1] % width
    filled_RC = torch.nn.functional.pad(matrix_RC, (0, missing)) if missing else matrix_RC
    return filled_RC.unflatten(1, (-1, width))


def row_parts(matrix_RC: torch.Tensor) -> list[slice]:
    """All rows in order, a handful at a time.

    >>> row_parts(torch.empty(40, 1 << 14))
    [slice(0, 32, None), slice(32, 64, None)]
    """
    rows, columns = matrix_RC.shape
    elements = _CPU_ELEMENTS if matrix_RC.device.type == "cpu" else _DEVICE_ELEMENTS
    step = max(1, elements // max(1, columns))
    return [slice(start, start + step) for start in range(0, rows, step)]
