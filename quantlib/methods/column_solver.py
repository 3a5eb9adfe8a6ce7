"""Error feedback column by column: the inner loop of GPTQ in its left-looking form.

R rows (out features), C columns (in features), G groups of columns. Columns are solved from the last position
of the factor's order to the first; the target of one is its weight plus the errors of all solved before it,
weighted by the factor. The weight is never overwritten, scales stay as they were fitted, and rows know
nothing of each other.

Three levels share the work: one product for a batch of columns, one for a leaf inside it, one operation on
what is left of the leaf for a column. Linears of one shape share the calls of the last level, whatever their
inputs: for small ones the calls cost more than the arithmetic.
"""

from collections.abc import Sequence
from types import EllipsisType

import torch

from quantlib.grids.affine import AffineGrid, whole_vectors
from quantlib.kernels.contracts import ColumnKernel
from quantlib.linalg import Factor
from quantlib.methods import column_tile
from quantlib.methods.column_tile import Chosen, ColumnTile
from quantlib.methods.kept_weights import NOTHING_KEPT, Kept
from quantlib.methods.product_precision import carrying_products


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
        dtype; on CUDA the caller keeps TF32 off (torch's default). On a CPU a row's codes do not depend on
        the rows stacked with it.

    Cost: R * C**2 / 2 multiply-adds; memory of one and a half times the weight, the codes included.

    Source: Frantar et al., GPTQ (arXiv 2210.17323), rewritten with R from H = R R^T (arXiv 2507.18553).
    """
    (found,) = solve_codes_of_batch([weight_RC], [grid], [factor])
    return found.codes_RC, found.num_clipped_R


def solve_codes_of_batch(
    weights: Sequence[torch.Tensor],
    grids: Sequence[AffineGrid],
    factors: Sequence[Factor],
    *,
    kept: Kept = NOTHING_KEPT,
    kernel: ColumnKernel | None | EllipsisType = ...,
    in_tf32: bool = False,
) -> list[Chosen]:
    """`solve_codes` of several row tiles of one shape and scheme, each with a factor of its own.

    Args:
        kept: Columns at the factors' first positions, or single weights, that are kept.
        kernel: As of `column_tile.ColumnTile`.
        in_tf32: As of `product_precision.carrying_products`.

    Numerics: on a CPU the codes of each are those that it has alone.
    """
    num_rows, columns = weights[0].shape
    filled_rows = whole_vectors(num_rows, weights[0].device)
    if filled_rows is not None:
        filled = solve_codes_of_batch(
            [weight_RC[filled_rows] for weight_RC in weights],
            [grid.rows(filled_rows) for grid in grids],
            factors,
            kept=kept.rows(filled_rows),
            kernel=kernel,
            in_tf32=in_tf32,
        )
        return [found.first_rows(num_rows) for found in filled]
    tile = ColumnTile(weights, grids, [factor.order_C for factor in factors], kept, kernel)
    for end in range(columns, 0, -column_tile.BATCH_COLUMNS):
        start = max(0, end - column_tile.BATCH_COLUMNS)
        with carrying_products(weights[0].device, in_tf32=in_tf32):
            _carry_errors(tile, factors, start, end)
        batch = slice(start, end)
        tile.solve_batch(start, end, [factor.feedback_CC[batch, batch] for factor in factors])
    return tile.found()


def _carry_errors(tile: ColumnTile, factors: Sequence[Factor], start: int, end: int) -> None:
    """Make the targets of positions [start, end), given that all from ``end`` on are solved."""
    batch = slice(start, end)
    for factor, error_CR, target_BR in zip(factors, tile.error_ECR, tile.targets(start, end), strict=True):
        torch.addmm(error_CR[batch], factor.feedback_CC[end:, batch].T, error_CR[end:], out=target_BR)
