"""First and second moments of an input group, from exact totals to what a method is given.

Where a linear has a bias that may change, the best codes are those for the *centered* inputs, and the bias
then takes up what is constant: quantized or not, a bias is a column that reads 1 and is not rounded, and
eliminating it leaves the covariance. So totals of such a group have one row and column more, for that 1
(`partials.Partial` with sums).

C columns (in features), E = C + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantlib.calibration.hessian import mirror_
from quantlib.calibration.totals import Total, matrix_from, merged_panels

# Of a column's mean square: a spread below it is what rounding left of partial sums in fp32.
_LEAST_SPREAD = 2.0**-20


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


def moments_from(
    totals: Sequence[Total], crosses: Sequence[Total], *, is_extended: bool, device: torch.device
) -> Moments:
    """Moments about zero.

    Args:
        totals: Of X^T X, one a worker.
        crosses: Of X_ref^T X likewise; empty without a reference stream.
        is_extended: Whether sums are beside them, which are left out.
        device: Where the moments are made.
    """
    columns = totals[0].columns - is_extended
    return Moments(
        hessian_CC=matrix_from(totals, columns=columns, device=device),
        cross_CC=matrix_from(crosses, columns=columns, device=device) if crosses else None,
    )


def centered_moments(totals: Sequence[Total], crosses: Sequence[Total], *, device: torch.device) -> Moments:
    """Moments about the mean, from extended totals (see `moments_from`).

    A column whose spread drowns in the rounding of its mean is a dead column: its row and column are zero.

    Numerics: the means are taken off in fp64, before anything is rounded to fp32: where a mean is large
        beside the spread, a difference of fp32 matrices would leave little but rounding.

    Cost: memory of the results and of three panels in 64 bits.
    """
    last_E = sum(
        (total.panels[-1][-1].to(device) for total in totals[1:]), totals[0].panels[-1][-1].to(device)
    )
    sums_E = last_E.double().mul_(2.0 ** -totals[0].exponent)
    # Without a token there is nothing to divide.
    count = max(sums_E[-1].item(), 1.0)
    mean_C = sums_E[:-1].div(count)
    reference_mean_C, cross_CC = mean_C, None
    hessian_CC = _centered(totals, mean_C, mean_C, count)
    mirror_(hessian_CC)
    is_constant_C = hessian_CC.diagonal() <= _LEAST_SPREAD * count * mean_C.square()
    hessian_CC[is_constant_C] = 0.0
    hessian_CC[:, is_constant_C] = 0.0
    if crosses:
        last_columns = [panel_PE[:, -1] for _, _, panel_PE in merged_panels(crosses, device)]
        reference_mean_C = torch.cat(last_columns)[:-1].double().mul_(2.0 ** -crosses[0].exponent).div_(count)
        cross_CC = _centered(crosses, reference_mean_C, mean_C, count)
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
    totals: Sequence[Total], left_mean_C: torch.Tensor, right_mean_C: torch.Tensor, count: float
) -> torch.Tensor:
    """fp32 [C, C]: the sum less count * left_mean right_mean^T; a symmetric one only below the diagonal."""
    columns = len(left_mean_C)
    centered_CC = torch.zeros(columns, columns, dtype=torch.float32, device=left_mean_C.device)
    for start, end, panel_PE in merged_panels(totals, left_mean_C.device):
        end = min(end, columns)
        panel_PL = panel_PE[: end - start, :columns].double().mul_(2.0 ** -totals[0].exponent)
        right_mean_L = right_mean_C[: panel_PL.shape[1]]
        centered_CC[start:end, : panel_PL.shape[1]] = panel_PL.addr_(
            left_mean_C[start:end], right_mean_L, alpha=-count
        )
    return centered_CC
