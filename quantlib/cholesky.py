"""Cholesky factors in place: by the library, and by panels of our own where the library is not to be trusted.

C columns, P columns of a panel, B rows below it. A matrix comes with contiguous columns, as LAPACK and
cuSOLVER want it: as their output over their own input it is factored where it stands. Neither way asks the
device how it went; the status says, whenever somebody looks.
"""

from collections.abc import Callable, Mapping

import torch

# Takes a symmetric [C, C] with contiguous columns, of which only the lower triangle counts, and makes it the
# factor L of L L^T, zero above the diagonal. Gives int32 [] on its device, zero if the matrix is positive
# definite; else what is left in the matrix means nothing.
Cholesky = Callable[[torch.Tensor], torch.Tensor]

# Wide enough for fast products, narrow enough that what a panel takes beside the matrix is small: at 8192
# columns a quarter of it, at 53248 a twenty-fifth.
_PANEL_COLUMNS = 1024


def library_cholesky_(matrix_CC: torch.Tensor) -> torch.Tensor:
    """Factor a matrix by LAPACK or cuSOLVER; see `Cholesky`.

    Cost: C**3 / 3 floating point operations; beside the matrix the library's workspace.
    """
    status = torch.empty((), dtype=torch.int32, device=matrix_CC.device)
    # The very same tensor as input and output: nothing is copied before the library is called.
    return torch.linalg.cholesky_ex(matrix_CC, out=(matrix_CC, status))[1]


def blocked_cholesky_(matrix_CC: torch.Tensor, panel_columns: int = _PANEL_COLUMNS) -> torch.Tensor:
    """Factor a matrix panel by panel, looking right; see `Cholesky`.

    The library sees no matrix larger than a panel is wide; what remains are products and triangular solves.

    Args:
        panel_columns: How wide a panel is.

    Numerics: sums are grouped by panels, so that it differs from the library's factor in last bits.

    Cost: C**3 / 3 floating point operations, and C**2 * P for the upper halves of squares on the diagonal;
        beside the matrix about twice a panel.
    """
    columns = len(matrix_CC)
    status = torch.zeros((), dtype=torch.int32, device=matrix_CC.device)
    for start in range(0, columns, panel_columns):
        end = min(start + panel_columns, columns)
        panel = slice(start, end)
        corner_PP, failed = torch.linalg.cholesky_ex(matrix_CC[panel, panel])
        status = torch.maximum(status, failed.abs())
        matrix_CC[panel, panel] = corner_PP
        below_BP = matrix_CC[end:, panel]
        # X L^T = below, solved for X.
        below_BP.copy_(torch.linalg.solve_triangular(corner_PP.mT, below_BP, upper=True, left=False))
        for first in range(end, columns, panel_columns):
            # Only the lower triangle is ever read.
            rest = slice(first, min(first + panel_columns, columns))
            matrix_CC[first:, rest].addmm_(below_BP[first - end :], matrix_CC[rest, panel].mT, alpha=-1.0)
    matrix_CC.tril_()
    return status


LIBRARY, BLOCKED = "library", "blocked"
# In the order in which they are preferred.
CHOLESKYS: Mapping[str, Cholesky] = {LIBRARY: library_cholesky_, BLOCKED: blocked_cholesky_}
