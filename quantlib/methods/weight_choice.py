"""Which single weights of a row are worth 16 bits, and the grid of the others.

R rows (out features), C columns (in features), M weights that are kept of every row. A weight is worth it
that its group's grid does not reach, so the choice takes a grid that need not reach far: first one is fitted
without the M largest magnitudes of every row; then those are kept whose rounding on it costs most, and the
grid is fitted anew without them.
"""

from collections.abc import Callable

import torch

from quantlib.fresh_bytes import fresh_bytes
from quantlib.grids.affine import AffineGrid, rounded_parts, with_codes
from quantlib.grouping import row_parts
from quantlib.outlier_weights import largest_entries

# Columns of weights [R, M] that a grid need not suit -> the grid.
Fit = Callable[[torch.Tensor], AffineGrid]


def choose_weights(
    weight_RC: torch.Tensor, count: int, fit: Fit, *, saliency_C: torch.Tensor | None
) -> torch.Tensor:
    """The weights of every row whose rounding costs most: (w - level(w))**2 * saliency.

    Shapes:
        weight_RC: floating [R, C], finite.
        saliency_C: [C], not negative, what a squared error in a column costs; None for the same everywhere.
            By 1 / diag(H^-1) it costs that much after all other columns have made up for it.

    Args:
        count: M; at most C.
        fit: Of the same rows.

    Returns:
        int64 [R, M], rising in every row. No row's depends on another.

    Cost: a search of scales; temporary memory of the codes and a handful of rows.

    Source: the criterion of SpQR (arXiv 2306.03078), which is that of Optimal Brain Surgeon for a single
        weight; there as a threshold for a linear, not a number for a row.
    """
    largest = [largest_entries(weight_RC[part].abs(), count) for part in row_parts(weight_RC)]
    grid = fit(torch.cat(largest))
    quantized = with_codes(grid, fresh_bytes(weight_RC.shape, weight_RC.device))
    # Relative to the largest: squares of what is tiny should not all underflow to the same zero.
    weight_C = None if saliency_C is None else (saliency_C / saliency_C.max()).sqrt()
    chosen = []
    for part in rounded_parts(weight_RC, grid, quantized.codes_RC):
        cost_RC = quantized.rows(part.rows).dequantize(out=part.work_RC).sub_(part.exact_RC).abs_()
        if weight_C is not None:
            cost_RC.mul_(weight_C)
        chosen.append(largest_entries(cost_RC, count))
    return torch.cat(chosen)
