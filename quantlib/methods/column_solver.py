"""Error feedback column by column: the inner loop of GPTQ in its left-looking form.

R rows (out features), C columns (in features), G groups of columns. Columns are solved from the last position
of the factor's order to the first; the target of one is its weight plus the errors of all solved before it,
weighted by the factor. The weight is never overwritten, scales stay as they were fitted, and rows know
nothing of each other.

Three levels share the work: one product for a batch of columns, one for a leaf inside it, one vector
operation for a column inside the leaf.
"""

import torch

from quantlib.grids.affine import AffineGrid, whole_vectors
from quantlib.linalg import Factor
from quantlib.methods import column_tile
from quantlib.methods.column_tile import ColumnTile


def solve_codes(
    weight_RC: torch.Tensor, grid: AffineGrid, factor: Factor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes that minimize tr((W - levels) H (W - levels)^T) greedily, column after column.

    Shapes:
        weight_RC: [R, C], finite, in the dtype of the factor (fp32; fp64 for checks).

    Args:
        weight_RC: Original weights of a row tile: linears of one input and scheme, stacked along the rows.
        grid: Scales of the stacked rows, already in their stored dtype.
        factor: Of their common, damped Hessian.

    Returns:
        Codes uint8 [R, C] in natural column order, and int64 [R], how many targets of each row lay more than
        half a step outside the grid.

    Numerics: what is fed back is the exact level that the file will mean. All arithmetic in the weight's
        dtype; on CUDA the caller keeps TF32 off for fp32 products (torch's default). On a CPU a row's codes
        do not depend on the rows stacked with it.

    Cost: R * C**2 / 2 multiply-adds; memory of two and a half times the weight, the codes included.

    Source: Frantar et al., GPTQ (arXiv 2210.17323), rewritten with R from H = R R^T (arXiv 2507.18553).
    """
    filled_rows = whole_vectors(len(weight_RC), weight_RC.device)
    if filled_rows is not None:
        codes_RC, num_clipped_R = solve_codes(weight_RC[filled_rows], grid.rows(filled_rows), factor)
        return codes_RC[: len(weight_RC)], num_clipped_R[: len(weight_RC)]
    tile = ColumnTile(weight_RC, grid, factor.order_C)
    for end in range(weight_RC.shape[1], 0, -column_tile.BATCH_COLUMNS):
        _solve_batch(tile, factor.feedback_CC, max(0, end - column_tile.BATCH_COLUMNS), end)
    return tile.codes_CR.T.contiguous(), tile.num_clipped_R


def _solve_batch(tile: ColumnTile, feedback_CC: torch.Tensor, start: int, end: int) -> None:
    """Solve positions [start, end), given that all from ``end`` on are solved."""
    error_CR, target_BR = tile.error_CR, tile.targets(start, end)
    torch.addmm(tile.weight_CR[start:end], feedback_CC[end:, start:end].T, error_CR[end:], out=target_BR)
    for leaf_end in range(end, start, -column_tile.LEAF_COLUMNS):
        leaf_start = max(start, leaf_end - column_tile.LEAF_COLUMNS)
        if leaf_end < end:
            target_BR[leaf_start - start : leaf_end - start].addmm_(
                feedback_CC[leaf_end:end, leaf_start:leaf_end].T, error_CR[leaf_end:end]
            )
        tile.solve_leaf(leaf_start, leaf_end, start, feedback_CC[leaf_start:leaf_end, leaf_start:leaf_end])
    tile.keep(start, end)
