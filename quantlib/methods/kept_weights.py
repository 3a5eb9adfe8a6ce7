"""What a solve keeps in a floating dtype: whole columns at its first positions, or single weights anywhere.

E linears that are solved as one batch, R rows (out features), C columns (in features), M single weights of
every row, B columns of a column batch. Like the tile's buffers (`column_tile`) all is transposed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from quantlib.kernels.contracts import KeptEntries


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Of every linear of a batch; of one form at most.

    Attributes:
        num_columns: First positions of the order whose columns are kept.
        weights: E of int64 [R, M], the columns of single weights, rising in every row; empty for none.
        dtype: In which they are kept.
    """

    num_columns: int = 0
    weights: Sequence[torch.Tensor] = field(default=())
    dtype: torch.dtype = torch.float32

    def rows(self, part: torch.Tensor) -> "Kept":
        """Of some rows, by index."""
        return replace(self, weights=[column_RM[part] for column_RM in self.weights])


NOTHING_KEPT = Kept()


class SingleWeights:
    """Single weights while columns of a tile are chosen: each takes its target when its column's turn comes.

    Args:
        columns: E of int64 [R, M].
        orders: E of int64 [C], position -> column.
        dtype: In which they are kept.
        like: A tensor of the arithmetic's dtype and device.

    Attributes:
        weight_EMR: What is kept, in the dtype of the arithmetic.
        entries: Those of the open batch.
    """

    def __init__(
        self,
        columns: Sequence[torch.Tensor],
        orders: Sequence[torch.Tensor],
        dtype: torch.dtype,
        like: torch.Tensor,
    ) -> None:
        pairs = zip(columns, orders, strict=True)
        self._position_EMR = torch.stack([order_C.argsort()[column_RM].T for column_RM, order_C in pairs])
        self._dtype = dtype
        self.weight_EMR = torch.zeros_like(self._position_EMR, dtype=like.dtype)
        # Of the open batch: which weights are in it, their places there, and its targets.
        self._is_here_EMR = self._place_EMR = self._target_EBR = torch.empty(0)
        self.entries: KeptEntries | None = None
        self._has_any: Sequence[bool] | None = None

    def taken_from(self, values_ECR: torch.Tensor, kept_EMR: torch.Tensor) -> torch.Tensor:
        """[E, M, R]: values by position less what is kept at their places."""
        return values_ECR.gather(1, self._position_EMR) - kept_EMR

    def put_into_(self, values_ECR: torch.Tensor, value_EMR: torch.Tensor) -> None:
        """Overwrite values by position at the places of these weights."""
        values_ECR.scatter_(1, self._position_EMR, value_EMR)

    def open(self, start: int, end: int) -> None:
        """Turn to positions [start, end)."""
        linears, _, rows = self._position_EMR.shape
        self._is_here_EMR = (self._position_EMR >= start) & (self._position_EMR < end)
        # Those elsewhere fall behind the batch: to look for the others a GPU would be waited for.
        self._place_EMR = torch.where(self._is_here_EMR, self._position_EMR - start, end - start)
        is_kept_EBR = self._place_EMR.new_zeros(linears, end - start + 1, rows, dtype=torch.bool)
        is_kept_EBR = is_kept_EBR.scatter_(1, self._place_EMR, True)[:, :-1].contiguous()
        self._target_EBR = self.weight_EMR.new_empty(is_kept_EBR.shape)
        self.entries, self._has_any = KeptEntries(is_kept_EBR, self._target_EBR, self._dtype), None

    def take(self, place: int, target_E1R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """At a place of the open batch: which rows keep their weight, bool [E, 1, R], and targets as kept.

        Nothing where none does.
        """
        assert self.entries is not None
        if self._has_any is None:
            self._has_any = self.entries.is_kept_EBR.any(2).any(0).tolist()
        if not self._has_any[place]:
            return None
        here = slice(place, place + 1)
        kept_E1R = self._target_EBR[:, here].copy_(target_E1R.to(self._dtype))
        return self.entries.is_kept_EBR[:, here], kept_E1R

    def close(self) -> None:
        """Hold on to what was taken in the open batch."""
        last = self._target_EBR.shape[1] - 1
        taken_EMR = self._target_EBR.gather(1, self._place_EMR.clamp_max(last))
        self.weight_EMR = torch.where(self._is_here_EMR, taken_EMR, self.weight_EMR)
