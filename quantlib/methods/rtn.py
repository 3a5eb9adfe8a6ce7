"""Round to nearest: each weight to its closest level, on scales of least squared error. Needs no data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantlib.fresh_bytes import fresh_bytes
from quantlib.grids.affine import rounded_parts, with_codes
from quantlib.grids.given_scales import NOTHING_GIVEN, GivenScales
from quantlib.methods.contracts import Circumstances, SolvedRows
from quantlib.methods.fitted_scales import fitted_scales
from quantlib.methods.measures import check_finite, check_shape, error_energy, plain_energies, weight_energy
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import SolverSettings


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
    """

    hessian_CC: torch.Tensor | None
    circumstances: Circumstances
    settings: SolverSettings

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
        grid = fitted_scales(
            weight_RC,
            scheme,
            search=self.settings.scale_search,
            scale_dtype=scale_dtype,
            importance_C=None,
            given=given,
        )
        codes_RC = fresh_bytes(weight_RC.shape, weight_RC.device)
        quantized = with_codes(grid, codes_RC, None if given is None else given.nested)
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
