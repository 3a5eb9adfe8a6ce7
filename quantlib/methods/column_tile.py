"""Some rows of a weight while codes are chosen for their columns, one column after another.

R rows (out features), C columns (in features), B columns of a batch, L of a leaf inside it, G groups. All is
transposed, so that a column is contiguous and an operation vectorizes. Rows of the buffers are positions of
an order, the last being solved first, except in ``codes_CR``, which is in natural column order.
"""

import torch

from quantlib.grids.affine import AffineGrid, nearest_offsets, num_clipped_, offset_bounds

# Part of what the output bits depend on (floating point sums are grouped by them): never tuned per machine.
BATCH_COLUMNS = 128
LEAF_COLUMNS = 16


class ColumnTile:
    """State of the solve of some rows.

    Args:
        weight_RC: [R, C], in the dtype of the arithmetic.
        grid: Scales of these rows, in their stored dtype.
        order_C: int64 [C], position -> column.

    Attributes:
        weight_CR: The weight by position.
        error_CR: Weight minus level by position; zero where no code was chosen yet.
        codes_CR: uint8, by column.
        num_clipped_R: How many targets lay more than half a step outside the grid.
    """

    def __init__(self, weight_RC: torch.Tensor, grid: AffineGrid, order_C: torch.Tensor) -> None:
        rows, columns = weight_RC.shape
        dtype, device = weight_RC.dtype, weight_RC.device
        lowest_RG, highest_RG = offset_bounds(grid, dtype)
        self._order_C = order_C
        self.weight_CR = torch.empty(columns, rows, dtype=dtype, device=device)
        for start in range(0, columns, BATCH_COLUMNS):
            part = slice(start, start + BATCH_COLUMNS)
            self.weight_CR[part] = weight_RC.index_select(1, order_C[part]).T
        self.error_CR = torch.zeros(columns, rows, dtype=dtype, device=device)
        self._target_BR = torch.empty(BATCH_COLUMNS, rows, dtype=dtype, device=device)
        self._offset_BR = torch.empty_like(self._target_BR)
        self._scale_GR = grid.scale_RG.T.to(dtype).contiguous()
        self._lowest_GR = lowest_RG.T.contiguous()
        self._group_C = order_C // grid.scheme.columns_per_group(columns)
        # Views made once: making them in the loop would cost as much as the arithmetic of a small linear.
        self._groups = self._group_C.tolist()
        self._weights = self.weight_CR.unbind(0)
        self._errors = self.error_CR.unbind(0)
        self._targets = self._target_BR.unbind(0)
        self._offsets = self._offset_BR.unbind(0)
        self._scales = self._scale_GR.unbind(0)
        self._lowest = self._lowest_GR.unbind(0)
        self._highest = highest_RG.T.contiguous().unbind(0)
        self.codes_CR = torch.empty(columns, rows, dtype=torch.uint8, device=device)
        self.num_clipped_R = torch.zeros(rows, dtype=torch.int64, device=device)

    def take_codes(self, codes_RC: torch.Tensor) -> None:
        """Start from codes that were chosen before."""
        for start in range(0, codes_RC.shape[1], BATCH_COLUMNS):
            part = slice(start, start + BATCH_COLUMNS)
            group_B = self._group_C[part]
            offset_BR = codes_RC.index_select(1, self._order_C[part]).T + self._lowest_GR[group_B]
            scale_BR = self._scale_GR[group_B]
            torch.addcmul(self.weight_CR[part], offset_BR, scale_BR, value=-1, out=self.error_CR[part])

    def targets(self, start: int, end: int) -> torch.Tensor:
        """The buffer [end - start, R] for the targets of positions [start, end)."""
        return self._target_BR[: end - start]

    def solve_leaf(self, start: int, end: int, batch_start: int, feedback_LL: torch.Tensor) -> None:
        """Choose offsets for positions [start, end), last first; their errors take effect at once.

        Shapes:
            feedback_LL: [j, i]: what the error at position start + j adds to the target at start + i. The
                errors of positions that are not solved yet are those of an earlier pass, or zero.
        """
        error_RL = self.error_CR[start:end].T
        feedback_columns = feedback_LL.unbind(1)
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

    def keep(self, start: int, end: int) -> None:
        """Turn the batch's offsets into codes and count what was clipped; targets hold quotients by now."""
        quotient_BR, offset_BR = self._target_BR[: end - start], self._offset_BR[: end - start]
        self.num_clipped_R += num_clipped_(quotient_BR, offset_BR, dim=0)
        codes_BR = offset_BR.sub_(self._lowest_GR[self._group_C[start:end]]).to(torch.uint8)
        self.codes_CR.index_copy_(0, self._order_C[start:end], codes_BR)
