"""Partial sums of a cell as whole matrices, which tests compare and spoil more easily than panels."""

import torch

from quantlib.calibration.partials import Partial
from quantlib.panels import panels_of


def partial_of(
    x_NC: torch.Tensor, reference_NC: torch.Tensor | None = None, *, has_sums: bool = False
) -> Partial:
    """Of a cell in one batch."""
    partial = Partial(x_NC.shape[1], is_whole=reference_NC is not None, has_sums=has_sums)
    partial.add_(x_NC, reference_NC)
    return partial


def matrix_of(partial: Partial) -> torch.Tensor:
    """fp32 [C, C]; of a symmetric sum the lower triangle is valid, and what is in no panel is zero."""
    columns = partial.panels[-1].shape[1]
    matrix_CC = torch.zeros(columns, columns)
    for (start, end), panel_PL in zip(panels_of(columns), partial.panels, strict=True):
        matrix_CC[start:end, : panel_PL.shape[1]] = panel_PL
    return matrix_CC


def panels_from(matrix_CC: torch.Tensor, *, is_whole: bool = False) -> list[torch.Tensor]:
    """What a total adds."""
    columns = len(matrix_CC)
    return [matrix_CC[start:end, : columns if is_whole else end] for start, end in panels_of(columns)]


def gram_lower(x_NC: torch.Tensor) -> torch.Tensor:
    """X^T X of a cell in one batch, as `matrix_of` gives it."""
    return matrix_of(partial_of(x_NC))


def cross_product(reference_NC: torch.Tensor, x_NC: torch.Tensor) -> torch.Tensor:
    """X_ref^T X of a cell in one batch."""
    return matrix_of(partial_of(x_NC, reference_NC))
