"""Error feedback as its papers print it, in eager torch: what the solver's column loop is measured against.

R rows (out features), C columns (in features). Both forms take the upper Cholesky factor of the inverse of
the damped Hessian and solve columns in the order of the Hessian; scales are fixed. `column_by_column` pushes
the error of a column into all columns still to come at once; `in_batches` does so inside a batch and then for
the rest (GPTQ, arXiv 2210.17323, algorithm 1). Row major, as checkpoints are.
"""

import torch


def inverse_factor(damped_CC: torch.Tensor) -> torch.Tensor:
    """U with H^-1 = U^T U, [C, C]."""
    inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(damped_CC))
    return torch.linalg.cholesky(inverse_CC, upper=True)


def column_by_column(weight_RC: torch.Tensor, scale_RC: torch.Tensor, upper_CC: torch.Tensor) -> torch.Tensor:
    """Levels [R, C] on symmetric 4-bit grids, columns from the first to the last."""
    left_RC, levels_RC = weight_RC.clone(), torch.empty_like(weight_RC)
    _solve(left_RC, levels_RC, scale_RC, upper_CC)
    return levels_RC


def in_batches(
    weight_RC: torch.Tensor, scale_RC: torch.Tensor, upper_CC: torch.Tensor, width: int = 128
) -> torch.Tensor:
    """The same in batches of columns."""
    left_RC, levels_RC = weight_RC.clone(), torch.empty_like(weight_RC)
    for start in range(0, weight_RC.shape[1], width):
        own = slice(start, start + width)
        left_RB = left_RC[:, own].clone()
        errors_RB = _solve(left_RB, levels_RC[:, own], scale_RC[:, own], upper_CC[own, own])
        left_RC[:, start + width :] -= errors_RB @ upper_CC[own, start + width :]
    return levels_RC


def _solve(
    left_RB: torch.Tensor, levels_RB: torch.Tensor, scale_RB: torch.Tensor, upper_BB: torch.Tensor
) -> torch.Tensor:
    """Fills ``levels_RB``, uses ``left_RB`` up, and gives the errors in units of the factor's diagonal."""
    errors_RB = torch.empty_like(left_RB)
    for column in range(left_RB.shape[1]):
        wanted_R, scale_R = left_RB[:, column], scale_RB[:, column]
        level_R = torch.round(wanted_R / scale_R).clamp(-8, 7) * scale_R
        errors_RB[:, column] = (wanted_R - level_R) / upper_BB[column, column]
        levels_RB[:, column] = level_R
        left_RB[:, column:] -= errors_RB[:, column, None] * upper_BB[column, column:]
    return errors_RB
