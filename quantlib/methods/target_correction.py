"""Weights whose outputs on disturbed inputs come close to the original outputs on undisturbed ones.

R rows (out features), C columns (in features). A block reads X from the quantized blocks before it where the
original model has X_ref. The solver then aims at ``W X_ref^T``: the best unquantized weights for it are
``W + W (X_ref - X)^T X (X^T X)^-1``, and it works on a damped part of the way there.

Source: QEP (quantization error propagation), whose published strength and damping are the constants here.
"""

import torch

from quantlib.cholesky import Cholesky, library_cholesky_
from quantlib.errors import NumericsError

_STRENGTH = 0.5
# In units of the mean diagonal: where X says little, the weights stay.
_DAMPING = 1.0


def target_change(
    hessian_CC: torch.Tensor, cross_CC: torch.Tensor, cholesky_: Cholesky = library_cholesky_
) -> torch.Tensor:
    """What weights are multiplied by to find how far they must move.

    Shapes:
        hessian_CC: fp32 [C, C], X^T X. Not changed.
        cross_CC: fp32 [C, C], X_ref^T X over the same tokens. Not changed.

    Args:
        cholesky_: Makes the factor.

    Returns:
        fp32 [C, C].

    Raises:
        NumericsError: An entry of either matrix is not finite, or the Hessian is far from a sum of squares.

    Cost: C**3 * 4 / 3 multiply-adds; memory of four more matrices C x C.
    """
    for name, moments_CC in (("Hessian", hessian_CC), ("products with the reference", cross_CC)):
        if not bool(torch.isfinite(moments_CC).all()):
            raise NumericsError(
                f"the {name} of an input must be finite, found NaN or infinity; look for the calibration row"
                " whose activations are not finite"
            )
    # With contiguous columns, as the factor takes their place.
    damped_CC = torch.empty_like(hessian_CC, memory_format=torch.contiguous_format).mT.copy_(hessian_CC)
    damped_CC.diagonal().add_(_DAMPING * hessian_CC.diagonal().double().mean().item())
    # (X^T X + l)^-1 applied from the right; both sides transposed, as the left one is symmetric.
    if int(cholesky_(damped_CC)):
        raise NumericsError(
            "X^T X with its mean diagonal added must be positive definite, found that it is not; it is no sum"
            " of squares, so look at the statistics of this input"
        )
    return torch.cholesky_solve((cross_CC - hessian_CC).T, damped_CC).T


def corrected_weight(weight_RC: torch.Tensor, change_CC: torch.Tensor) -> torch.Tensor:
    """The weight at which a solver should aim.

    Shapes:
        weight_RC: fp32 [R, C]. Not changed.
        change_CC: fp32 [C, C], from `target_change`.

    Returns:
        fp32 [R, C], new.

    Cost: R * C**2 multiply-adds.
    """
    return torch.addmm(weight_RC, weight_RC, change_CC, alpha=_STRENGTH)
