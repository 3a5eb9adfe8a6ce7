"""Second moments of a linear's input, summed so that no order of cells or workers changes a bit.

C columns (in features), N tokens of one cell. A cell's partial sum X^T X is a fp32 product. Partials meet in
an int64 fixed-point total, whose exponent the first cell decides: integer addition has no order, so any
number of workers, any assignment of cells and any repetition after a fault end in the same total.

Of X^T X only the lower triangle is computed and summed, in panels of rows; what a total holds above the
diagonal is not read by anyone. The product of two streams' inputs, X_ref^T X, is summed whole, likewise.
"""

import math
from collections.abc import Iterator

import torch

from quantlib.errors import NumericsError

# Totals stay below 2**62: two of them added still fit an int64 and can be checked afterwards.
_TOTAL_BITS = 62
_LIMIT = 2**_TOTAL_BITS
# By this many bits all cells together may exceed num_cells times the first one.
_HEADROOM_BITS = 10
# Part of what the output bits depend on, as the sum of a cell is taken over such pieces.
_CONVERTED_TOKENS = 1024
# A cell without any signal says nothing about the next; take 1 for its largest diagonal entry.
_DEFAULT_DIAGONAL = 1.0


def gram_lower(x_NC: torch.Tensor) -> torch.Tensor:
    """X^T X of one cell, lower triangle.

    Shapes:
        x_NC: fp32, bf16 or fp16 [N, C].

    Returns:
        fp32 [C, C]. Valid on and below the diagonal; above it, part of the entries are zero.

    Numerics: products of bf16 or fp16 inputs are exact in fp32; sums are taken in fp32 on every device. On a
        CPU torch would return a product rounded to 16 bits: such inputs are converted, some tokens at a time.

    Cost: N * C**2 * (1/2 + 1/32) multiply-adds from 2048 columns up; memory of the result, and on a CPU of
        1024 tokens in fp32.
    """
    columns = x_NC.shape[1]
    gram_CC = torch.zeros(columns, columns, dtype=torch.float32, device=x_NC.device)
    for part_NC in _multipliable(x_NC):
        for start, end in _panels(columns):
            _add_product_(gram_CC[start:end, :end], part_NC[:, start:end], part_NC[:, :end])
    return gram_CC


def cross_product(reference_NC: torch.Tensor, x_NC: torch.Tensor) -> torch.Tensor:
    """X_ref^T X of one cell, whole: fp32 [C, C]; otherwise as `gram_lower`."""
    columns = x_NC.shape[1]
    cross_CC = torch.zeros(columns, columns, dtype=torch.float32, device=x_NC.device)
    for its_NC, part_NC in zip(_multipliable(reference_NC), _multipliable(x_NC), strict=True):
        _add_product_(cross_CC, its_NC, part_NC)
    return cross_CC


def _multipliable(x_NC: torch.Tensor) -> Iterator[torch.Tensor]:
    """The inputs as they are, or in pieces of fp32 where a product of them would be rounded."""
    if x_NC.device.type == "cuda" or x_NC.dtype == torch.float32:
        yield x_NC
    else:
        yield from (piece_NC.float() for piece_NC in x_NC.split(_CONVERTED_TOKENS))


def _add_product_(sum_LC: torch.Tensor, left_NL: torch.Tensor, right_NC: torch.Tensor) -> None:
    if left_NL.dtype == torch.float32:
        sum_LC.addmm_(left_NL.T, right_NC)
    else:
        sum_LC += torch.mm(left_NL.T, right_NC, out_dtype=torch.float32)


def exponent_for(max_diagonal: float, num_cells: int) -> int:
    """How many bits below 1 the fixed-point total keeps.

    Args:
        max_diagonal: Largest diagonal entry of the first cell's partial sum; 0 where it saw only zeros.
        num_cells: Cells that will be summed, the first included.

    Raises:
        NumericsError: ``max_diagonal`` is negative or not finite.

    >>> exponent_for(1.0, 8), exponent_for(1000.0, 1), exponent_for(0.001, 1)
    (49, 42, 61)
    """
    if not (math.isfinite(max_diagonal) and max_diagonal >= 0):
        raise NumericsError(
            f"the first cell's largest second moment must be finite and not negative, found {max_diagonal};"
            " look for the calibration row whose activations are not finite"
        )
    diagonal_bits = math.ceil(math.log2(max_diagonal or _DEFAULT_DIAGONAL))
    return _TOTAL_BITS - math.ceil(math.log2(num_cells)) - _HEADROOM_BITS - diagonal_bits


def add_partial_(
    total_CC: torch.Tensor, partial_CC: torch.Tensor, exponent: int, *, is_whole: bool = False
) -> None:
    """Add one cell's partial sum to a fixed-point total, in place.

    Shapes:
        total_CC: int64 [C, C], starts as zeros. After an error it is half changed and of no use.
        partial_CC: fp32 [C, C], from `gram_lower`.

    Args:
        exponent: From `exponent_for`; the same for every cell of a sum.
        is_whole: Both triangles count: the sum is one of `cross_product`.

    Raises:
        NumericsError: An entry of the partial sum is not finite, or the total leaves its range.

    Numerics: round(partial * 2**exponent), half to even, exact in fp64.

    Cost: temporary memory of two panels in 64 bits.
    """
    scale = 2.0**exponent
    for start, end in _panels(total_CC.shape[0]):
        total_PC = total_CC[start:end] if is_whole else total_CC[start:end, :end]
        scaled_PC = partial_CC[start:end, : total_PC.shape[1]].double().mul_(scale)
        lowest, highest = (bound.item() for bound in torch.aminmax(scaled_PC))
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise NumericsError(
                "a cell's second moments must be finite, found NaN or infinity; look for the calibration row"
                " whose activations are not finite"
            )
        # Both terms are below 2**62, so their sum cannot wrap around before it is checked.
        if max(-lowest, highest) < _LIMIT:
            total_PC += scaled_PC.round_().to(torch.int64)
            lowest, highest = (bound.item() for bound in torch.aminmax(total_PC))
        _check_range(max(-lowest, highest), exponent)


def add_total_(
    total_CC: torch.Tensor, other_CC: torch.Tensor, exponent: int, *, is_whole: bool = False
) -> None:
    """Add another worker's total of the same exponent, in place.

    Shapes:
        total_CC, other_CC: int64 [C, C], both made by `add_partial_`.

    Raises:
        NumericsError: The sum leaves its range.
    """
    for start, end in _panels(total_CC.shape[0]):
        part = (slice(start, end), slice(None) if is_whole else slice(end))
        total_CC[part] += other_CC[part]
        lowest, highest = (bound.item() for bound in torch.aminmax(total_CC[part]))
        _check_range(max(-lowest, highest), exponent)


def _check_range(largest: float, exponent: int) -> None:
    if largest >= _LIMIT:
        raise NumericsError(
            f"the sum of second moments may reach {math.ldexp(_LIMIT, -exponent):.3g}, found"
            f" {math.ldexp(largest, -exponent):.3g}: later cells exceed the first more than"
            f" {1 << _HEADROOM_BITS} times on average; sum again with a smaller exponent",
            exponent=exponent,
        )


def hessian_from(total_CC: torch.Tensor, exponent: int) -> torch.Tensor:
    """The symmetric matrix that a fixed-point total means.

    Shapes:
        total_CC: int64 [C, C], lower triangle valid. Not changed.

    Returns:
        fp32 [C, C], both triangles, equal bit for bit.

    Cost: temporary memory of two panels in 64 bits.
    """
    columns = total_CC.shape[0]
    hessian_CC = torch.empty(columns, columns, dtype=torch.float32, device=total_CC.device)
    for start, end in _panels(columns):
        hessian_CC[start:end, :end] = total_CC[start:end, :end].double().mul_(2.0**-exponent)
    mirror_(hessian_CC)
    return hessian_CC


def mirror_(matrix_CC: torch.Tensor) -> None:
    """Make the upper triangle of a matrix [C, C] that of its transpose; temporary memory of a panel."""
    for start, end in _panels(len(matrix_CC)):
        matrix_CC[:start, start:end] = matrix_CC[start:end, :start].T
        corner_PP = matrix_CC[start:end, start:end].tril()
        matrix_CC[start:end, start:end] = corner_PP + corner_PP.tril(-1).T


def cross_from(total_CC: torch.Tensor, exponent: int) -> torch.Tensor:
    """The matrix that a whole fixed-point total means, fp32 [C, C]; temporary memory of two panels."""
    cross_CC = torch.empty(total_CC.shape, dtype=torch.float32, device=total_CC.device)
    for start, end in _panels(total_CC.shape[0]):
        cross_CC[start:end] = total_CC[start:end].double().mul_(2.0**-exponent)
    return cross_CC


def _panels(columns: int) -> Iterator[tuple[int, int]]:
    """Row ranges of the panels, a function of the size alone: their shapes decide how sums are grouped.

    Sixteen panels waste a 32nd of the work above the diagonal; below 128 rows a product is no longer fast.
    """
    height = 128 * max(1, math.ceil(columns / 2048))
    for start in range(0, columns, height):
        yield start, min(start + height, columns)
