"""Error feedback column by column: the inner loop of GPTQ in its left-looking form.

R rows (out features), C columns (in features), G groups of columns. Columns are solved from the last position
of the factor's order to the first; the target of one is its weight plus the errors of all solved before it,
weighted by the factor. The weight is never overwritten, scales stay as they were fitted, and rows know
nothing of each other.

Three levels share the work: one product for a batch of columns, one for a leaf inside it, one vector
operation for a column inside the leaf.
"""

import torch

from quantlib.grids.affine import AffineGrid, is_clipped_, nearest_offsets, offset_bounds, whole_vectors
from quantlib.linalg import Factor

# Part of what the output bits depend on (floating point sums are grouped by them): never tuned per machine.
_BATCH_COLUMNS = 128
_LEAF_COLUMNS = 16
# Rows at a time on a CPU, where a tile's columns should stay in cache. On a GPU a tile is as wide as it gets.
_CPU_TILE_ROWS = 4096


def solve_codes(
    weight_RC: torch.Tensor, grid: AffineGrid, factor: Factor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes that minimize tr((W - levels) H (W - levels)^T) greedily, column after column.

    Shapes:
        weight_RC: [R, C], finite, in the dtype of the factor (fp32; fp64 for checks).

    Args:
        weight_RC: Original weights of linears that share input and scheme, stacked along the rows.
        grid: Scales of the stacked rows, already in their stored dtype.
        factor: Of their common, damped Hessian.

    Returns:
        Codes uint8 [R, C] in natural column order, and int64 [R], how many targets of each row lay more than
        half a step outside the grid.

    Numerics: what is fed back is the exact level that the file will mean. All arithmetic in the weight's
        dtype; on CUDA the caller keeps TF32 off for fp32 products (torch's default). On a CPU a row's codes
        do not depend on the rows stacked with it.

    Cost: R * C**2 / 2 multiply-adds; memory of three times a row tile beside the codes.

    Source: Frantar et al., GPTQ (arXiv 2210.17323), rewritten with R from H = R R^T (arXiv 2507.18553).
    """
    filled_rows = whole_vectors(len(weight_RC), weight_RC.device)
    if filled_rows is not None:
        codes_RC, num_clipped_R = solve_codes(weight_RC[filled_rows], grid.rows(filled_rows), factor)
        return codes_RC[: len(weight_RC)], num_clipped_R[: len(weight_RC)]
    rows, columns = weight_RC.shape
    tile_rows = _CPU_TILE_ROWS if weight_RC.device.type == "cpu" else rows
    codes_RC = torch.empty(rows, columns, dtype=torch.uint8, device=weight_RC.device)
    num_clipped_R = torch.empty(rows, dtype=torch.int64, device=weight_RC.device)
    for start in range(0, rows, tile_rows):
        part = slice(start, start + tile_rows)
        tile = _Tile(weight_RC[part], grid.rows(part), factor)
        for end in range(columns, 0, -_BATCH_COLUMNS):
            tile.solve_batch(max(0, end - _BATCH_COLUMNS), end)
        codes_RC[part] = tile.codes_CR.T
        num_clipped_R[part] = tile.num_clipped_R
    return codes_RC, num_clipped_R


class _Tile:
    """State of the solve of some rows: transposed, so that a column is contiguous and an operation
    vectorizes.

    Rows of the buffers are positions, except in ``codes_CR``, which is in natural column order.
    """

    def __init__(self, weight_RC: torch.Tensor, grid: AffineGrid, factor: Factor) -> None:
        rows, columns = weight_RC.shape
        dtype, device = weight_RC.dtype, weight_RC.device
        width = grid.scheme.columns_per_group(columns)
        lowest_RG, highest_RG = offset_bounds(grid, dtype)
        self._factor = factor
        self._weight_CR = weight_RC.T.contiguous().index_select(0, factor.order_C)
        # Zero where not yet solved: a leaf multiplies by all of its errors, solved or not.
        self._error_CR = torch.zeros(columns, rows, dtype=dtype, device=device)
        self._target_BR = torch.empty(_BATCH_COLUMNS, rows, dtype=dtype, device=device)
        self._offset_BR = torch.empty_like(self._target_BR)
        self._lowest_GR = lowest_RG.T.contiguous()
        self._group_C = factor.order_C // width
        # Views made once: making them in the loop would cost as much as the arithmetic of a small linear.
        self._groups = self._group_C.tolist()
        self._weights = self._weight_CR.unbind(0)
        self._errors = self._error_CR.unbind(0)
        self._targets = self._target_BR.unbind(0)
        self._offsets = self._offset_BR.unbind(0)
        self._scales = grid.scale_RG.T.to(dtype).contiguous().unbind(0)
        self._lowest = self._lowest_GR.unbind(0)
        self._highest = highest_RG.T.contiguous().unbind(0)
        self.codes_CR = torch.empty(columns, rows, dtype=torch.uint8, device=device)
        self.num_clipped_R = torch.zeros(rows, dtype=torch.int64, device=device)

    def solve_batch(self, start: int, end: int) -> None:
        """Solve positions [start, end), given that all from ``end`` on are solved."""
        feedback_CC, error_CR = self._factor.feedback_CC, self._error_CR
        target_BR = self._target_BR[: end - start]
        torch.addmm(self._weight_CR[start:end], feedback_CC[end:, start:end].T, error_CR[end:], out=target_BR)
        for leaf_end in range(end, start, -_LEAF_COLUMNS):
            leaf_start = max(start, leaf_end - _LEAF_COLUMNS)
            if leaf_end < end:
                target_BR[leaf_start - start : leaf_end - start].addmm_(
                    feedback_CC[leaf_end:end, leaf_start:leaf_end].T, error_CR[leaf_end:end]
                )
            self._solve_leaf(leaf_start, leaf_end, start)
        self._keep(start, end)

    def _solve_leaf(self, start: int, end: int, batch_start: int) -> None:
        error_RL = self._error_CR[start:end].T
        feedback_columns = self._factor.feedback_CC[start:end, start:end].unbind(1)
        for position in range(end - 1, start - 1, -1):
            group = self._groups[position]
            scale_R = self._scales[group]
            target_R = self._targets[position - batch_start]
            offset_R = self._offsets[position - batch_start]
            target_R.addmv_(error_RL, feedback_columns[position - start])
            nearest_offsets(
                target_R, scale_R, self._lowest[group], self._highest[group], out=offset_R, quotient=target_R
            )
            # One rounding: offset times stored scale is exact in fp32.
            torch.addcmul(self._weights[position], offset_R, scale_R, value=-1, out=self._errors[position])

    def _keep(self, start: int, end: int) -> None:
        """Turn the batch's offsets into codes and count what was clipped; targets hold quotients by now."""
        quotient_BR, offset_BR = self._target_BR[: end - start], self._offset_BR[: end - start]
        self.num_clipped_R += is_clipped_(quotient_BR, offset_BR).sum(0)
        codes_BR = offset_BR.sub_(self._lowest_GR[self._group_C[start:end]]).to(torch.uint8)
        self.codes_CR.index_copy_(0, self._factor.order_C[start:end], codes_BR)
