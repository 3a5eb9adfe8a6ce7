"""Passes over codes that were already chosen: each column anew, all others as they are.

R rows (out features), C columns (in features), B columns of a batch. With every other column fixed, the loss
tr((W - levels) H (W - levels)^T) is a parabola in the level of column i, with its minimum at
``w_i + sum_{j != i} (w_j - level_j) H_ji / H_ii``; the nearest level is the best one. So no step makes the
damped loss larger. What GPTQ decided greedily early on is thus decided again with the later columns known.
"""

from collections.abc import Sequence

import torch

from quantlib.grids.affine import AffineGrid, whole_vectors
from quantlib.methods import column_tile
from quantlib.methods.column_tile import Chosen, ColumnTile
from quantlib.methods.kept_weights import NOTHING_KEPT, Kept
from quantlib.methods.product_precision import carrying_products


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
    (found,) = descend_in_batch(
        [weight_RC], [codes_RC], [grid], [hessian_CC], dampings=[damping], orders=[order_C]
    )
    return found.codes_RC, found.num_clipped_R


def descend_in_batch(
    weights: Sequence[torch.Tensor],
    codes: Sequence[torch.Tensor],
    grids: Sequence[AffineGrid],
    hessians: Sequence[torch.Tensor],
    *,
    dampings: Sequence[float],
    orders: Sequence[torch.Tensor],
    kept: Kept = NOTHING_KEPT,
    kept_weights: Sequence[torch.Tensor] = (),
    in_tf32: bool = False,
) -> list[Chosen]:
    """`descend` of several row tiles of one shape and scheme, each with a Hessian of its own.

    Args:
        kept: Columns at the first positions, or single weights, that are kept; they are chosen anew as well.
        kept_weights: Of each what they were before, as `Chosen.kept_RK`.
        in_tf32: As of `product_precision.carrying_products`.

    Numerics: on a CPU the codes of each are those that it has alone.
    """
    num_rows, columns = weights[0].shape
    filled_rows = whole_vectors(num_rows, weights[0].device)
    if filled_rows is not None:
        filled = descend_in_batch(
            [weight_RC[filled_rows] for weight_RC in weights],
            [codes_RC[filled_rows] for codes_RC in codes],
            [grid.rows(filled_rows) for grid in grids],
            hessians,
            dampings=dampings,
            orders=orders,
            kept=kept.rows(filled_rows),
            kept_weights=[kept_RK[filled_rows] for kept_RK in kept_weights],
            in_tf32=in_tf32,
        )
        return [found.first_rows(num_rows) for found in filled]
    tile = ColumnTile(weights, grids, orders, kept)
    weight_ECR = tile.error_ECR.clone()
    tile.take_codes(codes, kept_weights)
    for end in range(columns, 0, -column_tile.BATCH_COLUMNS):
        start = max(0, end - column_tile.BATCH_COLUMNS)
        feedback = [
            _feedback(hessian_CC, damping, order_C, start, end)
            for hessian_CC, damping, order_C in zip(hessians, dampings, orders, strict=True)
        ]
        with carrying_products(weights[0].device, in_tf32=in_tf32):
            _carry_errors(tile, weight_ECR, feedback, start, end)
        tile.solve_batch(start, end, [feedback_CB[start:end] for feedback_CB in feedback])
    return tile.found()


def _feedback(
    hessian_CC: torch.Tensor, damping: float, order_C: torch.Tensor, start: int, end: int
) -> torch.Tensor:
    """[C, B]: what the error at each position adds to the targets of positions [start, end)."""
    chosen_B = order_C[start:end]
    feedback_CB = hessian_CC.index_select(1, chosen_B).index_select(0, order_C)
    return feedback_CB.div_(hessian_CC.diagonal()[chosen_B] + damping)


def _carry_errors(
    tile: ColumnTile, weight_ECR: torch.Tensor, feedback: Sequence[torch.Tensor], start: int, end: int
) -> None:
    """Make the targets of positions [start, end) anew, given weights by position and errors of all others."""
    batch = slice(start, end)
    for feedback_CB, weight_CR, error_CR, target_BR in zip(
        feedback, weight_ECR, tile.error_ECR, tile.targets(start, end), strict=True
    ):
        torch.addmm(weight_CR[batch], feedback_CB[end:].T, error_CR[end:], out=target_BR)
        target_BR.addmm_(feedback_CB[:start].T, error_CR[:start])
        # Within the batch errors of an earlier pass count for targets that are solved before them.
        target_BR.addmm_(feedback_CB[batch].triu(1).T, error_CR[batch])
        error_CR[batch] = weight_CR[batch]
