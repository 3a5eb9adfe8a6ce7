"""First and second moments of an input group, from exact totals to what a method is given.

Where a linear has a bias that may change, the best codes are those for the *centered* inputs, and the bias
then takes up what is constant: quantized or not, a bias is a column that reads 1 and is not rounded, and
eliminating it leaves the covariance. So totals of such a group have one row and column more, for that 1.

C columns (in features), E = C + 1, N tokens of one cell.
"""

import math
from dataclasses import dataclass

import torch

from quantlib.calibration.hessian import cross_from, hessian_from, mirror_

# Rows converted to fp64 at a time.
_PANEL_ROWS = 256
# Of a column's mean square: a spread below it is what rounding left of partial sums in fp32.
_LEAST_SPREAD = 2.0**-20


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """An exact sum over all cells: int64 with its exponent; its lower triangle counts, or all of it."""

    sum_CC: torch.Tensor
    exponent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """What a method and the correction of biases read.

    Shapes:
        hessian_CC: fp32 [C, C], X^T X, or about the mean where ``mean_C`` is given.
        cross_CC: fp32 [C, C], X_ref^T X likewise; None without a reference stream.
        mean_C: fp64 [C], of the inputs; None where nothing was centered.
        reference_mean_C: fp64 [C], of the reference inputs; that of the inputs without them.
    """

    hessian_CC: torch.Tensor
    cross_CC: torch.Tensor | None
    mean_C: torch.Tensor | None = None
    reference_mean_C: torch.Tensor | None = None


def with_sums(product_CC: torch.Tensor, left_NC: torch.Tensor, right_NC: torch.Tensor) -> torch.Tensor:
    """The product [left, 1]^T [right, 1], given left^T right.

    Shapes:
        product_CC: fp32 [C, C].
        left_NC, right_NC: floating [N, C].

    Returns:
        fp32 [E, E]: last row the sums of ``right``, last column those of ``left``, N in the corner.
    """
    columns = len(product_CC)
    extended_EE = product_CC.new_empty(columns + 1, columns + 1)
    extended_EE[:columns, :columns] = product_CC
    extended_EE[columns, :columns] = right_NC.sum(0, dtype=torch.float64)
    extended_EE[:columns, columns] = left_NC.sum(0, dtype=torch.float64)
    extended_EE[columns, columns] = len(right_NC)
    return extended_EE


def moments_from(total: Total, cross: Total | None) -> Moments:
    """Moments about zero, from totals that are not extended."""
    return Moments(
        hessian_CC=hessian_from(total.sum_CC, total.exponent),
        cross_CC=None if cross is None else cross_from(cross.sum_CC, cross.exponent),
    )


def without_sums(total: Total) -> Total:
    """The part of an extended total that is about the inputs alone."""
    return Total(sum_CC=total.sum_CC[:-1, :-1], exponent=total.exponent)


def centered_moments(total: Total, cross: Total | None) -> Moments:
    """Moments about the mean, from extended totals.

    A column whose spread drowns in the rounding of its mean is a dead column: its row and column are zero.

    Numerics: the means are taken off in fp64, before anything is rounded to fp32: where a mean is large
        beside the spread, a difference of fp32 matrices would leave little but rounding.

    Cost: memory of the results and of two panels in 64 bits.
    """
    # Without a token there is nothing to divide.
    count = max(math.ldexp(total.sum_CC[-1, -1].item(), -total.exponent), 1.0)
    mean_C = total.sum_CC[-1, :-1].double().mul_(2.0**-total.exponent).div_(count)
    reference_mean_C, cross_CC = mean_C, None
    hessian_CC = _centered(total, mean_C, mean_C, count)
    mirror_(hessian_CC)
    is_constant_C = hessian_CC.diagonal() <= _LEAST_SPREAD * count * mean_C.square()
    hessian_CC[is_constant_C] = 0.0
    hessian_CC[:, is_constant_C] = 0.0
    if cross is not None:
        reference_mean_C = cross.sum_CC[:-1, -1].double().mul_(2.0**-cross.exponent).div_(count)
        cross_CC = _centered(cross, reference_mean_C, mean_C, count)
        cross_CC[:, is_constant_C] = 0.0
    return Moments(hessian_CC=hessian_CC, cross_CC=cross_CC, mean_C=mean_C, reference_mean_C=reference_mean_C)


def about_zero(centered: Moments, num_tokens: int) -> Moments:
    """Centered moments with their means put back, in fp32."""
    assert centered.mean_C is not None and centered.reference_mean_C is not None
    mean_C, reference_mean_C = centered.mean_C.float(), centered.reference_mean_C.float()
    cross_CC = centered.cross_CC
    return Moments(
        hessian_CC=torch.addr(centered.hessian_CC, mean_C, mean_C, alpha=num_tokens),
        cross_CC=None
        if cross_CC is None
        else torch.addr(cross_CC, reference_mean_C, mean_C, alpha=num_tokens),
    )


def _centered(
    total: Total, left_mean_C: torch.Tensor, right_mean_C: torch.Tensor, count: float
) -> torch.Tensor:
    """fp32 [C, C]: the total less count * left_mean right_mean^T; of a lower triangle only that is right."""
    columns = len(left_mean_C)
    centered_CC = torch.empty(columns, columns, dtype=torch.float32, device=total.sum_CC.device)
    for start in range(0, columns, _PANEL_ROWS):
        part = slice(start, min(start + _PANEL_ROWS, columns))
        panel_PC = total.sum_CC[part, :columns].double().mul_(2.0**-total.exponent)
        centered_CC[part] = panel_PC.addr_(left_mean_C[part], right_mean_C, alpha=-count)
    return centered_CC
