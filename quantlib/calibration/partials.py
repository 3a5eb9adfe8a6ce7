"""Second moments of one cell, batch after batch: what joins an exact total.

C columns (in features), N tokens of a batch, S rows of a strip, P rows of a panel, L columns of either.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from quantlib.calibration.hessian import add_cross_product_, add_gram_
from quantlib.panels import panels_of, strip_shapes

# Rows that begin at multiples of 16 bytes are what the fastest products of a GPU can write.
_ALIGNED_COLUMNS = 4


class Partial:
    """X^T X of a cell, lower triangle, or of two streams X_ref^T X, whole; sums are in fp32.

    Args:
        columns: Of the inputs.
        is_whole: Whether there are two streams.
        has_sums: Whether the inputs have a column more, a 1 that every token reads: then the last row holds
            sums of X, the last column those of X_ref, and the corner the number of tokens.
        device: Where the inputs are.
    """

    def __init__(
        self,
        columns: int,
        *,
        is_whole: bool = False,
        has_sums: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        size, device = columns + has_sums, torch.device(device)
        self._is_whole = is_whole
        shapes = [(size, size)] if is_whole else strip_shapes(size, device.type)
        self._strips = [_zeros(rows, length, device) for rows, length in shapes]
        self._panels = tuple(panels_in(self._strips, is_whole=is_whole))
        self._sums_2C = torch.zeros(2, columns, dtype=torch.float64, device=device) if has_sums else None
        self._num_tokens = 0

    def add_(self, x_NC: torch.Tensor, reference_NC: torch.Tensor | None = None) -> None:
        """Add the tokens of a batch.

        Shapes:
            x_NC, reference_NC: fp32, bf16 or fp16 [N, C].

        Args:
            reference_NC: Of the other stream, where there are two.
        """
        if reference_NC is None:
            add_gram_(self._strips, x_NC)
        else:
            add_cross_product_(self._strips[0], reference_NC, x_NC)
        if self._sums_2C is not None:
            self._sums_2C[0] += x_NC.sum(0, dtype=torch.float64)
            if reference_NC is not None:
                self._sums_2C[1] += reference_NC.sum(0, dtype=torch.float64)
            self._num_tokens += len(x_NC)

    @property
    def panels(self) -> tuple[torch.Tensor, ...]:
        """The sum so far: fp32 [P, L], shaped as those of a `totals.Total`."""
        self._place_sums()
        return self._panels

    @property
    def diagonal(self) -> torch.Tensor:
        """fp32, of the sum so far."""
        self._place_sums()
        return torch.cat([strip_SL.diagonal(strip_SL.shape[1] - len(strip_SL)) for strip_SL in self._strips])

    @property
    def peak(self) -> float:
        """The largest entry, without its sign."""
        if not self._is_whole:  # of X^T X it is on the diagonal
            return float(self.diagonal.max())
        return max(float(panel_PL.abs().max()) for panel_PL in self.panels)

    def _place_sums(self) -> None:
        if self._sums_2C is None:
            return
        self._panels[-1][-1, :-1] = self._sums_2C[0]
        self._panels[-1][-1, -1] = self._num_tokens
        if self._is_whole:
            self._strips[0][:-1, -1] = self._sums_2C[1]


def panels_in(strips: Sequence[torch.Tensor], *, is_whole: bool) -> Iterator[torch.Tensor]:
    """Views [P, L] of the strips [S, L] of a sum, shaped as `panels.panel_shapes` has them.

    Args:
        is_whole: The sum is one strip, and counts on either side of its diagonal.
    """
    panels = list(panels_of(strips[-1].shape[1]))
    first = 0
    for strip_SL in strips:
        last = first + len(strip_SL)
        for start, end in panels:
            if first <= start < last:
                yield strip_SL[start - first : end - first, : None if is_whole else end]
        first = last


def _zeros(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    step = _ALIGNED_COLUMNS if device.type == "cuda" else 1
    width = math.ceil(columns / step) * step
    return torch.zeros(rows, width, dtype=torch.float32, device=device)[:, :columns]
