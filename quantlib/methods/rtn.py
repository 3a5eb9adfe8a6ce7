"""Round to nearest: each weight to its closest level, on scales of least squared error. Needs no data."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from quantlib.fresh_bytes import fresh_bytes
from quantlib.grids.affine import rounded_parts, with_codes
from quantlib.grids.given_scales import NOTHING_GIVEN, GivenScales
from quantlib.methods.contracts import Circumstances, SolvedRows
from quantlib.methods.fitted_scales import fitted_scales
from quantlib.methods.measures import check_finite, check_shape, error_energy, plain_energies, weight_energy
from quantlib.methods.weight_choice import Fit, choose_weights
from quantlib.outlier_columns import OutlierColumns, strongest_columns
from quantlib.outlier_weights import OutlierWeights
from quantlib.outliers import Outliers
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import SolverSettings, weights_per_row


def prepare(
    *,
    hessian_CC: torch.Tensor | None,
    cross_CC: torch.Tensor | None,  # noqa: ARG001 - rounding has no targets
    num_tokens: int,
    solver: SolverSettings,
) -> "Rounding":
    """Rounding of an input group's linears (see `contracts.Prepare` for arguments).

    Scales cover the extremes with ``minmax`` and ``absmax``; every other search is one for the least squared
    error. The Hessian does not influence a code; where there is one, the reported error is weighted by it.
    """
    return Rounding(
        hessian_CC=hessian_CC,
        circumstances=Circumstances(
            method="rtn", tokens=num_tokens, dead_columns=num_dead_columns(hessian_CC)
        ),
        settings=solver,
    )


def num_dead_columns(hessian_CC: torch.Tensor | None) -> int:
    """Columns that were zero in every token."""
    return 0 if hessian_CC is None else int((hessian_CC.diagonal() == 0).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Rounds row tiles; also what is left to a method that cannot do better.

    Attributes:
        hessian_CC: By which errors are weighted.
        circumstances: For the reports.
        settings: Which scales.
        keeps_outliers: Whether columns or weights are kept as settings say, beside the codes.
        kept_dtype: In which dtype; None for that of the weights.
    """

    hessian_CC: torch.Tensor | None
    circumstances: Circumstances
    settings: SolverSettings
    keeps_outliers: bool = False
    kept_dtype: torch.dtype | None = None

    def solve(
        self,
        weights: Mapping[str, torch.Tensor],
        scheme: WeightScheme,
        *,
        scale_dtype: torch.dtype,
        given: Mapping[str, GivenScales] = NOTHING_GIVEN,
    ) -> dict[str, SolvedRows]:
        """Round a row tile; see `contracts.Prepared`."""
        solved: dict[str, SolvedRows] = {}
        for name, weight_RC in weights.items():
            check_shape(name, weight_RC, self.hessian_CC)
            solved[name] = self._rounded(weight_RC, scheme, scale_dtype, given.get(name))
            # A weight that is not finite leaves no finite sum of squares: only then is it worth to look.
            if not math.isfinite(solved[name].weight_energy):
                check_finite(name, weight_RC)
        return solved

    def _rounded(
        self,
        weight_RC: torch.Tensor,
        scheme: WeightScheme,
        scale_dtype: torch.dtype,
        given: GivenScales | None,
    ) -> SolvedRows:
        fit = partial(
            fitted_scales,
            weight_RC,
            scheme,
            search=self.settings.scale_search,
            scale_dtype=scale_dtype,
            importance_C=None,
            given=given,
        )
        outliers, without_K = self._outliers(weight_RC, lambda without_RM: fit(without_K=without_RM))
        grid = fit(without_K=without_K)
        codes_RC = fresh_bytes(weight_RC.shape, weight_RC.device)
        quantized = with_codes(grid, codes_RC, None if given is None else given.nested)
        quantized = dataclasses.replace(quantized, outliers=outliers)
        num_clipped, whole, lost = 0, 0.0, 0.0
        for part in rounded_parts(weight_RC, grid, codes_RC):
            num_clipped += int(part.num_clipped_R.sum())
            if self.hessian_CC is None:
                energies = plain_energies(part.exact_RC, quantized.rows(part.rows), part.work_RC)
                whole, lost = whole + energies[0], lost + energies[1]
        if self.hessian_CC is not None:
            whole = weight_energy(weight_RC, self.hessian_CC)
            lost = error_energy(weight_RC, quantized, self.hessian_CC)
        return SolvedRows(
            quantized=quantized,
            circumstances=self.circumstances,
            weight_energy=whole,
            error_energy=lost,
            expected_energy=None,
            num_clipped=num_clipped,
            num_bounded=int(grid.is_bounded_RG.sum()),
        )

    def _outliers(self, weight_RC: torch.Tensor, fit: Fit) -> tuple[Outliers | None, torch.Tensor | None]:
        """What is kept, and its columns int64 [K] or [R, M]."""
        settings, dtype = self.settings, self.kept_dtype or weight_RC.dtype
        diagonal_C = None if self.hessian_CC is None else self.hessian_CC.diagonal()
        if self.keeps_outliers and settings.outlier_columns:
            column_K = strongest_columns(diagonal_C, settings.outlier_columns)
            column_K = column_K.to(weight_RC.device).sort().values
            weight_RK = weight_RC.index_select(1, column_K).to(dtype)
            return OutlierColumns(column_K=column_K.int(), weight_RK=weight_RK), column_K
        if self.keeps_outliers and settings.outlier_weights:
            count = weights_per_row(weight_RC.shape[1], settings.outlier_weights)
            column_RM = choose_weights(weight_RC, count, fit, saliency_C=diagonal_C)
            weight_RM = weight_RC.gather(1, column_RM).to(dtype)
            return OutlierWeights(column_RM=column_RM.int(), weight_RM=weight_RM), column_RM
        return None, None
