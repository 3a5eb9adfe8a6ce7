"""Second moments of one cell, batch after batch: what joins an exact total.

C columns (in features), N tokens of a batch, P rows of a panel, L its columns.
"""

import torch

from quantlib.calibration.hessian import add_cross_product_, add_gram_
from quantlib.panels import panel_shapes, panels_of


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
        size = columns + has_sums
        self._is_whole = is_whole
        if is_whole:
            self._matrix = torch.zeros(size, size, dtype=torch.float32, device=device)
            self._panels = tuple(self._matrix[start:end] for start, end in panels_of(size))
        else:
            shapes = panel_shapes(size, is_whole=False)
            self._panels = tuple(torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes)
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
            add_gram_(self._panels, x_NC)
        else:
            add_cross_product_(self._matrix, reference_NC, x_NC)
        if self._sums_2C is not None:
            self._sums_2C[0] += x_NC.sum(0, dtype=torch.float64)
            if reference_NC is not None:
                self._sums_2C[1] += reference_NC.sum(0, dtype=torch.float64)
            self._num_tokens += len(x_NC)

    @property
    def panels(self) -> tuple[torch.Tensor, ...]:
        """The sum so far: fp32 [P, L], shaped as those of a `totals.Total`."""
        if self._sums_2C is not None:
            self._panels[-1][-1, :-1] = self._sums_2C[0]
            self._panels[-1][-1, -1] = self._num_tokens
            if self._is_whole:
                self._matrix[:-1, -1] = self._sums_2C[1]
        return self._panels

    @property
    def diagonal(self) -> torch.Tensor:
        """fp32, of the sum so far."""
        starts = [start for start, _ in panels_of(self._panels[-1].shape[1])]
        pairs = zip(starts, self.panels, strict=True)
        return torch.cat([panel_PL[:, start:].diagonal() for start, panel_PL in pairs])

    @property
    def peak(self) -> float:
        """The largest entry, without its sign."""
        if not self._is_whole:  # of X^T X it is on the diagonal
            return float(self.diagonal.max())
        return max(float(panel_PL.abs().max()) for panel_PL in self.panels)
