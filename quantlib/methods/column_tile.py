"""Some rows of weights while codes are chosen for their columns, one column after another.

E linears that are solved as one batch, R rows (out features) of each, C columns (in features), B columns of a
column batch, L of a leaf inside it, G groups. Rows know nothing of each other, linears even less: each has
its own order of columns and its own feedback. What works on single entries is done for all of them in one
operation, products are taken linear by linear, so that no bit depends on which linears make a batch.

The first K positions, which are solved last, may be of columns that are kept in a floating dtype: their
targets are rounded to that and take up what rounding all others left. So do single weights, wherever their
columns come in the order: they take up what was left by those before.

All is transposed, so that a column is contiguous and an operation vectorizes. Columns of the buffers are by
position of an order, the last being solved first, except in ``codes_ECR``, which is in natural column order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch

from quantlib.grids.affine import AffineGrid, nearest_offsets, num_clipped_, offset_bounds
from quantlib.grids.levels import levels_of
from quantlib.kernels.contracts import ColumnKernel, GroupScales, KeptEntries, column_kernel
from quantlib.methods.kept_weights import NOTHING_KEPT, Kept, SingleWeights

# Part of what the output bits depend on (floating point sums are grouped by them): never tuned per machine.
BATCH_COLUMNS = 128
LEAF_COLUMNS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What was chosen for some rows of a linear.

    Shapes:
        codes_RC: uint8, in natural column order.
        num_clipped_R: int64, how many targets of each row lay more than half a step outside the grid.
        kept_RK: Weights that are kept, in the dtype of the arithmetic: of columns by position, or single ones
            by column.
    """

    codes_RC: torch.Tensor
    num_clipped_R: torch.Tensor
    kept_RK: torch.Tensor

    def first_rows(self, count: int) -> "Chosen":
        """Without those that filled up a vector."""
        return Chosen(
            codes_RC=self.codes_RC[:count],
            num_clipped_R=self.num_clipped_R[:count],
            kept_RK=self.kept_RK[:count],
        )


class ColumnTile:
    """State of the solve of some rows.

    Args:
        weights: E of [R, C], in the dtype of the arithmetic.
        grids: Of one scheme; scales of these rows, in their stored dtype.
        orders: E of int64 [C], position -> column.
        kept: Columns or single weights that are kept.
        kernel: What goes through the columns of a batch; None for one operation after the other. By default
            what suits device and dtype.

    Attributes:
        error_ECR: Weight minus level by position; the weight itself where no code was chosen yet.
        codes_ECR: uint8, by column.
        num_clipped_ER: How many targets lay more than half a step outside the grid.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        grids: Sequence[AffineGrid],
        orders: Sequence[torch.Tensor],
        kept: Kept = NOTHING_KEPT,
        kernel: ColumnKernel | None | EllipsisType = ...,
    ) -> None:
        (rows, columns), count = weights[0].shape, len(weights)
        kind = {"dtype": weights[0].dtype, "device": weights[0].device}
        self._scheme, self._orders = grids[0].scheme, orders
        self._kernel = column_kernel(**kind) if kernel is ... else kernel
        self._levels = levels_of(self._scheme)
        self.error_ECR = torch.empty(count, columns, rows, **kind)
        for error_CR, weight_RC, order_C in zip(self.error_ECR, weights, orders, strict=True):
            for start in range(0, columns, BATCH_COLUMNS):
                part = slice(start, start + BATCH_COLUMNS)
                error_CR[part] = weight_RC.index_select(1, order_C[part]).T
        self.codes_ECR = torch.empty(count, columns, rows, dtype=torch.uint8, device=kind["device"])
        self.num_clipped_ER = torch.zeros(count, rows, dtype=torch.int64, device=kind["device"])
        self._kept_EKR = torch.empty(count, kept.num_columns, rows, **kind)
        self._num_kept, self._kept_dtype = kept.num_columns, kept.dtype
        self._singles: SingleWeights | None = None
        if kept.weights:
            self._singles = SingleWeights(kept.weights, orders, kept.dtype, self.error_ECR)
        self._target_EBR = torch.empty(count, BATCH_COLUMNS, rows, **kind)
        self._offset_EBR = torch.empty_like(self._target_EBR)
        # The groups of one linear after those of the other, so that one lookup serves all.
        self._scale_GR = torch.cat([grid.scale_RG.T for grid in grids]).to(kind["dtype"])
        bounds = [offset_bounds(grid, kind["dtype"]) for grid in grids]
        self._lowest_GR = torch.cat([lowest_RG.T for lowest_RG, _ in bounds])
        self._highest_GR = torch.cat([highest_RG.T for _, highest_RG in bounds])
        self._scales = GroupScales(self._scale_GR, self._lowest_GR, self._highest_GR)
        first_group_E1 = torch.arange(0, len(self._scale_GR), len(self._scale_GR) // count)[:, None]
        self._group_EC = torch.stack(list(orders)) // self._scheme.columns_per_group(columns)
        self._group_EC += first_group_E1.to(self._group_EC.device)
        # Of one linear a position's group is looked up among views: nothing is copied.
        self._groups = self._group_EC[0].tolist() if count == 1 and self._kernel is None else None
        # Views made once: making them in the loop would cost as much as the arithmetic of a small linear.
        self._errors = self.error_ECR.split(1, 1)
        self._targets = self._target_EBR.split(1, 1)
        self._offsets = self._offset_EBR.split(1, 1)
        self._unsolved: dict[tuple[int, int], list[torch.Tensor]] = {}

    def take_codes(self, codes: Sequence[torch.Tensor], kept: Sequence[torch.Tensor] = ()) -> None:
        """Start from what was chosen before: E of uint8 [R, C], and weights kept, E of [R, K]."""
        columns = self.error_ECR.shape[1]
        weight_EKR = self.error_ECR[:, : self._num_kept].clone()
        kept_EKR = torch.stack(list(kept)).transpose(1, 2) if kept else weight_EKR
        left_EMR = None if self._singles is None else self._singles.taken_from(self.error_ECR, kept_EKR)
        for start in range(0, columns, BATCH_COLUMNS):
            part = slice(start, min(start + BATCH_COLUMNS, columns))
            of_columns = [
                codes_RC.index_select(1, order_C[part]).T
                for codes_RC, order_C in zip(codes, self._orders, strict=True)
            ]
            code_EBR = torch.stack(of_columns)
            offset_EBR = torch.empty_like(code_EBR, dtype=self.error_ECR.dtype)
            self._levels.decode(code_EBR, self._zero(part), out=offset_EBR)
            self.error_ECR[:, part].addcmul_(offset_EBR, self._by_position(self._scale_GR, part), value=-1)
        if self._num_kept:
            self.error_ECR[:, : self._num_kept] = weight_EKR - kept_EKR
        if self._singles is not None and left_EMR is not None:
            self._singles.put_into_(self.error_ECR, left_EMR)

    def targets(self, start: int, end: int) -> torch.Tensor:
        """The buffer [E, end - start, R] for the targets of positions [start, end)."""
        return self._target_EBR[:, : end - start]

    def solve_batch(self, start: int, end: int, feedback: Sequence[torch.Tensor]) -> None:
        """Choose codes for positions [start, end), last first; their errors take effect at once.

        Args:
            feedback: Of each linear [B, B]; [j, i] with j > i is what the error at position start + j adds to
                the target at start + i. All other errors are in the targets already, and ``error_ECR`` holds
                the weights of these positions.
        """
        if self._singles is not None:
            self._singles.open(start, end)
        if self._kernel is None:
            self._solve_leaves(start, end, feedback)
        else:
            self._solve_on_chip(self._kernel, start, end, feedback)
        if self._singles is not None:
            self._singles.close()
        self._keep(slice(start, end))

    def found(self) -> list[Chosen]:
        """Of each linear what was chosen."""
        kept_EKR = self._kept_EKR if self._singles is None else self._singles.weight_EMR
        return [
            Chosen(codes_RC=codes_CR.T.contiguous(), num_clipped_R=num_clipped_R, kept_RK=kept_KR.T)
            for codes_CR, num_clipped_R, kept_KR in zip(
                self.codes_ECR, self.num_clipped_ER, kept_EKR, strict=True
            )
        ]

    def _solve_on_chip(
        self, kernel: ColumnKernel, start: int, end: int, feedback: Sequence[torch.Tensor]
    ) -> None:
        count = end - start
        kept = self._kept_entries(start, end)
        kernel(
            self._target_EBR[:, :count],
            self.error_ECR[:, start:end],
            self._offset_EBR[:, :count],
            feedback[0][None] if len(feedback) == 1 else torch.stack(list(feedback)),
            self._scales,
            self._group_EC[:, start:end],
            self._levels,
            kept,
        )
        if kept is not None and self._singles is None:
            held = slice(start, min(end, self._num_kept))
            self._kept_EKR[:, held] = kept.value_EBR[:, : held.stop - start]

    def _kept_entries(self, start: int, end: int) -> KeptEntries | None:
        if self._singles is not None:
            return self._singles.entries
        if start >= self._num_kept:
            return None
        is_kept_EBR = torch.zeros_like(self._offset_EBR[:, : end - start], dtype=torch.bool)
        is_kept_EBR[:, : self._num_kept - start] = True
        values_EBR = torch.empty_like(is_kept_EBR, dtype=self._offset_EBR.dtype)
        return KeptEntries(is_kept_EBR, values_EBR, self._kept_dtype)

    def _solve_leaves(self, start: int, end: int, feedback: Sequence[torch.Tensor]) -> None:
        batch = slice(start, end)
        scales = self._columns(self._scale_GR, batch)
        bounds = self._bounds(batch)
        for leaf_end in range(end - start, 0, -LEAF_COLUMNS):
            leaf = slice(max(0, leaf_end - LEAF_COLUMNS), leaf_end)
            if start + leaf_end < end:
                solved = slice(start + leaf_end, end)
                for number, feedback_BB in enumerate(feedback):
                    self._target_EBR[number, leaf].addmm_(
                        feedback_BB[leaf_end:, leaf].T, self.error_ECR[number, solved]
                    )
            feedback_ELL = torch.stack([feedback_BB[leaf, leaf] for feedback_BB in feedback])
            self._solve_leaf(start, leaf, feedback_ELL, scales, bounds)

    def _solve_leaf(
        self,
        start: int,
        leaf: slice,
        feedback_ELL: torch.Tensor,
        scales: Sequence[torch.Tensor],
        bounds: Sequence[tuple[Any, Any]],
    ) -> None:
        feedback = _below_diagonal(feedback_ELL)
        unsolved = self._unsolved_targets(leaf)
        first_rounded = self._num_kept - start
        for place in range(leaf.stop - 1, leaf.start - 1, -1):
            target_E1R, offset_E1R, scale_E1R = self._targets[place], self._offsets[place], scales[place]
            error_E1R = self._errors[start + place]
            level_E1R = self._keep_weight(start + place, target_E1R) if place < first_rounded else None
            single = None if self._singles is None else self._singles.take(place, target_E1R)
            left_E1R = None if single is None else error_E1R - single[1]
            nearest_offsets(
                target_E1R, scale_E1R, *bounds[place], self._levels, out=offset_E1R, quotient=target_E1R
            )
            if level_E1R is None:
                # One rounding: offset times stored scale is exact in fp32.
                error_E1R.addcmul_(offset_E1R, scale_E1R, value=-1)
            else:
                error_E1R.sub_(level_E1R)
                target_E1R.copy_(offset_E1R)  # nothing is clipped where the code is not what counts
            if single is not None and left_E1R is not None:
                torch.where(single[0], left_E1R, error_E1R, out=error_E1R)
                torch.where(single[0], offset_E1R, target_E1R, out=target_E1R)
            if place > leaf.start:
                left = place - leaf.start - 1
                unsolved[left].addcmul_(feedback[left], error_E1R)

    def _keep_weight(self, position: int, target_E1R: torch.Tensor) -> torch.Tensor:
        """Round a target to the dtype in which it is kept."""
        return self._kept_EKR[:, position : position + 1].copy_(target_E1R.to(self._kept_dtype))

    def _unsolved_targets(self, leaf: slice) -> list[torch.Tensor]:
        """The first target of a leaf, the first two, ..., all but the last."""
        bounds = (leaf.start, leaf.stop)
        if bounds not in self._unsolved:
            counts = range(1, leaf.stop - leaf.start)
            self._unsolved[bounds] = [self._target_EBR[:, leaf][:, :count] for count in counts]
        return self._unsolved[bounds]

    def _by_position(self, values_GR: torch.Tensor, positions: slice) -> torch.Tensor:
        """[E, B, R]: of every position that of its group."""
        group_EB = self._group_EC[:, positions]
        return values_GR.index_select(0, group_EB.flatten()).unflatten(0, group_EB.shape)

    def _columns(self, values_GR: torch.Tensor, positions: slice) -> Sequence[torch.Tensor]:
        """The same position after position, [E, 1, R]."""
        if self._groups is None:
            return self._by_position(values_GR, positions).split(1, 1)
        by_group = values_GR[None].split(1, 1)
        return [by_group[group] for group in self._groups[positions]]

    def _bounds(self, positions: slice) -> list[tuple[Any, Any]]:
        """Smallest and largest offset of every position."""
        if self._scheme.is_symmetric:  # a bound that is a number costs less than one that is a tensor
            return [self._levels.bounds] * (positions.stop - positions.start)
        bounds = (self._columns(values_GR, positions) for values_GR in (self._lowest_GR, self._highest_GR))
        return list(zip(*bounds, strict=True))

    def _zero(self, positions: slice) -> int | torch.Tensor:
        """The code of the offset 0 at every position."""
        if self._scheme.is_symmetric:
            return self._scheme.middle_code
        return -self._by_position(self._lowest_GR, positions)

    def _keep(self, positions: slice) -> None:
        """Turn the batch's offsets into codes and count what was clipped; targets hold quotients by now."""
        count = positions.stop - positions.start
        quotient_EBR, offset_EBR = self._target_EBR[:, :count], self._offset_EBR[:, :count]
        self.num_clipped_ER += num_clipped_(quotient_EBR, offset_EBR, self._levels, dim=1)
        zero = self._zero(positions)
        zero = zero.to(torch.int16) if isinstance(zero, torch.Tensor) else zero
        code_EBR = self._levels.encode(offset_EBR, zero, out=torch.empty_like(offset_EBR, dtype=torch.int16))
        codes_EBR = code_EBR.to(torch.uint8)
        for codes_CR, codes_BR, order_C in zip(self.codes_ECR, codes_EBR, self._orders, strict=True):
            codes_CR.index_copy_(0, order_C[positions], codes_BR)


def _below_diagonal(feedback_ELL: torch.Tensor) -> Sequence[torch.Tensor]:
    """Of every row but the first what is left of the diagonal: [E, 1, 1], [E, 2, 1], ..."""
    size = feedback_ELL.shape[1]
    row, column = torch.tril_indices(size, size, -1, device=feedback_ELL.device)
    return feedback_ELL[:, row, column, None].split(list(range(1, size)), 1) if size > 1 else ()
