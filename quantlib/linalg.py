"""The factor that error feedback needs: a damped, reversed Cholesky factorization with a ladder for failures.

With H = R R^T and R upper triangular, N = R diag(R)^-1 tells how the rounding error of an earlier column
moves the target of a later one: target_i = w_i + sum_{j<i} (w_j - q_j) N_ji, and the loss is sum_i R_ii**2 *
(target_i - q_i)**2. No inverse of H appears anywhere.

C columns. *Positions* count backward in time: the last position is solved first. In that numbering R becomes
an ordinary lower Cholesky factor, so nothing has to be flipped and the work happens in one C x C buffer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quantlib.cholesky import Cholesky, library_cholesky_
from quantlib.column_order import activation_order
from quantlib.errors import NumericsError

DAMPED, MORE_DAMPING, FLOAT64, SHRINKAGE = "damped", "more_damping", "float64_factor", "shrinkage"

_LEAST_DAMPING, _MOST_DAMPING = 0.002, 0.5
_DAMPING_GROWTH = 4.0
# In fp64 a buffer of 16384 columns takes 2 GiB.
_MOST_FLOAT64_COLUMNS = 16384
_SHRINKAGES = (0.1, 0.5, 0.9)
# Columns of an inverse at a time; a GPU wants few large products.
_INVERSE_BATCH = {"cpu": 256, "cuda": 2048}


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """The factorization of one input group's Hessian.

    Shapes:
        order_C: int64 [C], position -> column; the last position is solved first.
        feedback_CC: [C, C], unit lower triangular, by position: [j, i] with j > i is N_ji, what the error at
            position j (solved earlier) adds to the target at position i.
        pivots_C: [C], the diagonal of R by position.

    Attributes:
        damping: What was added to the diagonal.
        damping_fraction: The same as a fraction of the diagonal's mean over live columns.
        num_attempts: Factorizations tried, the successful one included.
        rung: How far down the ladder: ``damped`` (nothing went wrong), ``more_damping``,
            ``float64_factor`` or ``shrinkage``.
        num_dead_columns: Columns with a zero diagonal.
    """

    order_C: torch.Tensor
    feedback_CC: torch.Tensor
    pivots_C: torch.Tensor
    damping: float
    damping_fraction: float
    num_attempts: int
    rung: str
    num_dead_columns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    rung: str
    damping_fraction: float
    shrinkage: float
    dtype: torch.dtype


def damping_fraction_for(columns: int, num_tokens: int) -> float:
    """How much damping a Hessian needs: more, the fewer tokens it was estimated from.

    >>> damping_fraction_for(2048, 4096), damping_fraction_for(4096, 4096), damping_fraction_for(64, 10**6)
    (0.05, 0.1, 0.002)
    """
    wanted = 0.1 * columns / max(num_tokens, 1)
    return min(max(wanted, _LEAST_DAMPING), _MOST_DAMPING)


def factor_hessian(
    hessian_CC: torch.Tensor,
    *,
    num_tokens: int,
    order_C: torch.Tensor | None = None,
    cholesky_: Cholesky = library_cholesky_,
) -> Factor | None:
    """Damp, order and factor a Hessian for error feedback.

    The steps when a factorization fails: four times the damping, up to half the mean diagonal; fp64;
    off-diagonal entries shrunk toward zero. Every attempt starts from the given matrix, so damping never adds
    up.

    Shapes:
        hessian_CC: fp32 (or fp64) [C, C], symmetric, any positive multiple of X^T X. Not changed.

    Args:
        num_tokens: Tokens it was summed over; they decide the damping.
        order_C: int64 [C], position -> column; `activation_order` by default.
        cholesky_: Makes the factors.

    Returns:
        The factor in the dtype of ``hessian_CC``; None when every rung failed.

    Raises:
        NumericsError: A NaN or infinity, a negative diagonal entry, or no entry at all above zero. Damping
            would hide these, not cure them.

    Numerics: dead columns (zero diagonal) are cut loose from all others and take no part in the mean, so
        they end up rounded to nearest. Multiplying the Hessian by a power of two changes no bit of the
        feedback.

    Cost: C**3 / 3 floating point operations an attempt; one buffer of C x C beside the input, and what
        ``cholesky_`` takes. A device is waited for twice, where columns are dead three times, and once an
        attempt.
    """
    diagonal_C = hessian_CC.diagonal()
    num_dead = _num_dead_columns(hessian_CC, diagonal_C)
    live_C = diagonal_C[diagonal_C > 0] if num_dead else diagonal_C.contiguous()
    mean_live = live_C.double().mean().item()
    # Factored in units of a power of two near the mean: no size of H over- or underflows, and equal problems
    # in other units meet the same bits (the square root of an odd power of two would not be exact).
    unit = 2.0 ** math.frexp(mean_live)[1]
    if order_C is None:
        order_C = activation_order(diagonal_C)
    for num_attempts, attempt in enumerate(_ladder(hessian_CC, num_tokens), start=1):
        matrix_CC = _prepared(hessian_CC, order_C, attempt, num_dead)
        matrix_CC.mul_(1.0 / unit).diagonal().add_(attempt.damping_fraction * mean_live / unit)
        # Stored transposed: ``matrix.mT`` has contiguous columns.
        status = cholesky_(matrix_CC.mT)
        pivots_C = matrix_CC.diagonal().clone()
        if not bool(torch.isfinite(pivots_C).all() & (status == 0)):
            del matrix_CC  # or it would stand beside the one of the next attempt
            continue
        return Factor(
            order_C=order_C,
            feedback_CC=matrix_CC.mT.div_(pivots_C).to(hessian_CC.dtype),
            pivots_C=pivots_C.mul_(math.sqrt(unit)).to(hessian_CC.dtype),
            damping=attempt.damping_fraction * mean_live,
            damping_fraction=attempt.damping_fraction,
            num_attempts=num_attempts,
            rung=attempt.rung,
            num_dead_columns=num_dead,
        )
    return None


def inverse_diagonal(factor: Factor) -> torch.Tensor:
    """The diagonal of the inverse of the damped Hessian, in natural column order.

    Returns:
        [C], positive, in the dtype of the factor.

    Numerics: with H = L L^T by position, entry i of the diagonal is the squared length of column i of L^-1.

    Cost: C**3 / 3 multiply-adds; memory of a batch of columns.
    """
    columns = len(factor.pivots_C)
    step = _INVERSE_BATCH[factor.pivots_C.device.type]
    by_position_C = torch.empty_like(factor.pivots_C)
    for start in range(0, columns, step):
        # Above its own rows a column of the inverse of a lower triangle is zero.
        below_CC = factor.feedback_CC[start:, start:]
        solved_CB = _first_columns_of_inverse(below_CC, step).div_(factor.pivots_C[start:, None])
        by_position_C[start : start + step] = solved_CB.square_().sum(0)
    return torch.empty_like(by_position_C).index_copy_(0, factor.order_C, by_position_C)


def _first_columns_of_inverse(lower_CC: torch.Tensor, most: int) -> torch.Tensor:
    """[C, B]: the first columns of the inverse of a unit lower triangle, so many at most.

    Panel by panel: torch copies a whole triangle that it is to solve with, unless it is small.
    """
    columns = len(lower_CC)
    inverse_CB = torch.eye(columns, min(most, columns), dtype=lower_CC.dtype, device=lower_CC.device)
    for start in range(0, columns, most):
        own = slice(start, start + most)
        panel_PB = inverse_CB[own].addmm_(lower_CC[own, :start], inverse_CB[:start], alpha=-1.0)
        inverse_CB[own] = torch.linalg.solve_triangular(
            lower_CC[own, own], panel_PB, upper=False, unitriangular=True
        )
    return inverse_CB


def _num_dead_columns(hessian_CC: torch.Tensor, diagonal_C: torch.Tensor) -> int:
    """How many columns are zero, of a Hessian that may be factored."""
    bounds = [*torch.aminmax(hessian_CC), *torch.aminmax(diagonal_C), (diagonal_C == 0).sum()]
    # All at once: each would be waited for. In float64 a count stays what it is.
    lowest, highest, least, most, num_dead = torch.stack([bound.double() for bound in bounds]).tolist()
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise NumericsError(
            f"a Hessian must be finite, found entries from {lowest} to {highest}; look for the calibration"
            " row whose activations are not finite"
        )
    if least < 0 or most <= 0:
        raise NumericsError(
            "the diagonal of a Hessian must be zero or positive with at least one positive entry, found"
            f" {least} to {most}; it is not a sum of squares"
        )
    return int(num_dead)


def _ladder(hessian_CC: torch.Tensor, num_tokens: int) -> Iterator[_Attempt]:
    columns, dtype = hessian_CC.shape[0], hessian_CC.dtype
    fraction = damping_fraction_for(columns, num_tokens)
    yield _Attempt(rung=DAMPED, damping_fraction=fraction, shrinkage=0.0, dtype=dtype)
    while fraction < _MOST_DAMPING:
        fraction = min(fraction * _DAMPING_GROWTH, _MOST_DAMPING)
        yield _Attempt(rung=MORE_DAMPING, damping_fraction=fraction, shrinkage=0.0, dtype=dtype)
    if columns <= _MOST_FLOAT64_COLUMNS:
        yield _Attempt(rung=FLOAT64, damping_fraction=fraction, shrinkage=0.0, dtype=torch.float64)
    for shrinkage in _SHRINKAGES:
        yield _Attempt(rung=SHRINKAGE, damping_fraction=fraction, shrinkage=shrinkage, dtype=dtype)


def _prepared(
    hessian_CC: torch.Tensor, order_C: torch.Tensor, attempt: _Attempt, num_dead: int
) -> torch.Tensor:
    """A new matrix: ordered, dead columns cut loose, shrunk; not damped yet."""
    matrix_CC = hessian_CC[order_C[:, None], order_C[None, :]].to(attempt.dtype)
    diagonal_C = matrix_CC.diagonal().clone()
    if num_dead:
        is_dead_C = diagonal_C == 0
        # Zero already where the columns are truly dead; a fixed-point sum may have lost a tiny diagonal.
        matrix_CC[is_dead_C] = 0.0
        matrix_CC[:, is_dead_C] = 0.0
    if attempt.shrinkage:
        matrix_CC.mul_(1.0 - attempt.shrinkage).diagonal().copy_(diagonal_C)
    return matrix_CC
