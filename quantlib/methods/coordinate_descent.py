"""Passes over codes that were already chosen: each column anew, all others as they are.

R rows (out features), C columns (in features), B columns of a batch. With every other column fixed, the loss
tr((W - levels) H (W - levels)^T) is a parabola in the level of column i, with its minimum at
``w_i + sum_{j != i} (w_j - level_j) H_ji / H_ii``; the nearest level is the best one. So no step makes the
damped loss larger. What GPTQ decided greedily early on is thus decided again with the later columns known.
"""

import torch

from quantlib.grids.affine import AffineGrid, whole_vectors
from quantlib.methods import column_tile
from quantlib.methods.column_tile import ColumnTile


def descend(
    weight_RC: torch.Tensor,
    codes_RC: torch.Tensor,
    grid: AffineGrid,
    hessian_CC: torch.Tensor,
    *,
    damping: float,
    order_C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass of coordinate descent over all columns.

    Shapes:
        weight_RC: [R, C], finite, in the dtype of the Hessian.
        codes_RC: uint8 [R, C], where to start. Not changed.
        hessian_CC: [C, C], symmetric, not damped.

    Args:
        grid: Scales of the codes, in their stored dtype.
        damping: Added to the diagonal; positive.
        order_C: int64 [C], position -> column, the last position first.

    Returns:
        Codes uint8 [R, C], and int64 [R], how many targets of each row lay more than half a step outside the
        grid.

    Numerics: as in `column_solver.solve_codes`; on a CPU a row's codes do not depend on the rows beside it.

    Cost: R * C**2 multiply-adds; memory of two and a half times the weight and C x 128 numbers.
    """
    filled_rows = whole_vectors(len(weight_RC), weight_RC.device)
    if filled_rows is not None:
        codes_FC, num_clipped_F = descend(
            weight_RC[filled_rows],
            codes_RC[filled_rows],
            grid.rows(filled_rows),
            hessian_CC,
            damping=damping,
            order_C=order_C,
        )
        return codes_FC[: len(weight_RC)], num_clipped_F[: len(weight_RC)]
    tile = ColumnTile(weight_RC, grid, order_C)
    tile.take_codes(codes_RC)
    for end in range(weight_RC.shape[1], 0, -column_tile.BATCH_COLUMNS):
        start = max(0, end - column_tile.BATCH_COLUMNS)
        _solve_batch(tile, _feedback(hessian_CC, damping, order_C, start, end), start, end)
    return tile.codes_CR.T.contiguous(), tile.num_clipped_R


def _feedback(
    hessian_CC: torch.Tensor, damping: float, order_C: torch.Tensor, start: int, end: int
) -> torch.Tensor:
    """[C, B]: what the error at each position adds to the targets of positions [start, end)."""
    chosen_B = order_C[start:end]
    feedback_CB = hessian_CC.index_select(1, chosen_B).index_select(0, order_C)
    feedback_CB.div_(hessian_CC.diagonal()[chosen_B] + damping)
    feedback_CB[start:end].fill_diagonal_(0.0)
    return feedback_CB


def _solve_batch(tile: ColumnTile, feedback_CB: torch.Tensor, start: int, end: int) -> None:
    """Solve positions [start, end) again, given the errors of all positions."""
    error_CR, target_BR = tile.error_CR, tile.targets(start, end)
    torch.addmm(tile.weight_CR[start:end], feedback_CB[end:].T, error_CR[end:], out=target_BR)
    target_BR.addmm_(feedback_CB[:start].T, error_CR[:start])
    for leaf_end in range(end, start, -column_tile.LEAF_COLUMNS):
        leaf_start = max(start, leaf_end - column_tile.LEAF_COLUMNS)
        leaf = slice(leaf_start - start, leaf_end - start)
        for around in (slice(leaf_end, end), slice(start, leaf_start)):
            target_BR[leaf].addmm_(feedback_CB[around, leaf].T, error_CR[around])
        tile.solve_leaf(leaf_start, leaf_end, start, feedback_CB[leaf_start:leaf_end, leaf])
    tile.keep(start, end)
