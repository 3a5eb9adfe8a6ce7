"""Scales by the search that was asked for.

R rows (out features), C columns (in features).
"""

import torch

from quantlib.errors import NumericsError
from quantlib.grids.affine import AffineGrid
from quantlib.grids.fit import fit_to_extremes, search_scales
from quantlib.grids.given_scales import GivenScales
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import FROM_EXTREMES


def fitted_scales(
    weight_RC: torch.Tensor,
    scheme: WeightScheme,
    *,
    search: str,
    scale_dtype: torch.dtype,
    importance_C: torch.Tensor | None,
    given: GivenScales | None = None,
    without_K: torch.Tensor | None = None,
) -> AffineGrid:
    """The grid of a row tile.

    Shapes:
        weight_RC: floating [R, C], finite.
        importance_C: fp32 [C], by which the search weighs errors; None for equal importance. Extremes need
            none.
        without_K: int64, what scales need not suit: columns [K], or those of single weights [R, K]; None for
            none.

    Args:
        search: One of `quantlib.solver_settings.SCALE_SEARCHES`.
        scale_dtype: Dtype in which the output format stores scales.
        given: What the scales owe to the whole weight; None where they owe nothing.
    """
    if given is None and scheme.owes_to_whole:
        raise NumericsError(f"scales of {scheme} need what they owe to the whole weight, found nothing given")
    if given is not None and given.grid is not None:
        return given.grid
    divisor_R1 = None if given is None else given.divisor_R1
    if without_K is not None:
        # Zero is a level of every grid and widens none.
        weight_RC = weight_RC.scatter(1, without_K.expand(len(weight_RC), -1), 0.0)
    if search in FROM_EXTREMES:
        return fit_to_extremes(
            weight_RC,
            scheme,
            scale_dtype=scale_dtype,
            cuts_half_step=cuts_half_step(search),
            divisor_R1=divisor_R1,
        )
    return search_scales(
        weight_RC, scheme, scale_dtype=scale_dtype, importance_C=importance_C, divisor_R1=divisor_R1
    )


def cuts_half_step(search: str) -> bool:
    """Whether scales by a search may cut the positive extreme of a symmetric group by half a step."""
    return search != "absmax"
