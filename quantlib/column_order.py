"""The orders in which error feedback may take columns: total orders, the same on every device.

C columns. An order maps positions to columns, and *the last position is solved first* (see `linalg`).
"""

import torch


def activation_order(diagonal_C: torch.Tensor) -> torch.Tensor:
    """Columns by rising diagonal, so that the largest is at the last position and solved first.

    Shapes:
        diagonal_C: [C].

    Returns:
        int64 [C], position -> column; of equal ones the lowest column comes last.

    >>> activation_order(torch.tensor([2.0, 5.0, 2.0])).tolist()
    [2, 0, 1]
    """
    return torch.argsort(diagonal_C, descending=True, stable=True).flip(0)


def natural_order(columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Columns so that the first is at the last position and solved first: int64 [C].

    >>> natural_order(3).tolist()
    [2, 1, 0]
    """
    return torch.arange(columns, device=device).flip(0)


def with_last(order_C: torch.Tensor, last_K: torch.Tensor) -> torch.Tensor:
    """The order in which some columns are solved after all others, the first of them before the second.

    Shapes:
        order_C: int64 [C], position -> column.
        last_K: int64 [K], columns.

    >>> with_last(natural_order(5), torch.tensor([3, 1])).tolist()
    [1, 3, 4, 2, 0]
    """
    return torch.cat((last_K.flip(0), order_C[~torch.isin(order_C, last_K)]))


def group_aware_order(diagonal_C: torch.Tensor, width: int) -> torch.Tensor:
    """Activation order within groups of ``width`` columns, whole groups by their largest diagonal.

    Returns:
        int64 [C], position -> column; a total order as in `activation_order`.

    >>> group_aware_order(torch.tensor([1.0, 2.0, 9.0, 0.0]), 2).tolist()
    [0, 1, 3, 2]
    """
    groups = diagonal_C.split(width)
    peaks = torch.stack([group.max() for group in groups])
    columns = [activation_order(group) + number * width for number, group in enumerate(groups)]
    return torch.cat([columns[number] for number in activation_order(peaks).tolist()])
