"""Round to nearest: each weight to its closest level, on scales of least squared error. Needs no data."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantlib.grids.affine import nearest_codes, with_codes
from quantlib.grids.fit import fit_to_extremes, search_scales
from quantlib.methods.contracts import Circumstances, SolvedRows
from quantlib.methods.measures import check_weights, error_energy, weight_energy
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

    Scales cover the extremes with ``minmax``; every other search is one for the least squared error. The
    Hessian does not influence a code; where there is one, the reported error is weighted by it.
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
        self, weights: Mapping[str, torch.Tensor], scheme: WeightScheme, *, scale_dtype: torch.dtype
    ) -> dict[str, SolvedRows]:
        """Round a row tile; see `contracts.Prepared`."""
        check_weights(weights, self.hessian_CC)
        return {name: self._rounded(weight_RC, scheme, scale_dtype) for name, weight_RC in weights.items()}

    def _rounded(self, weight_RC: torch.Tensor, scheme: WeightScheme, scale_dtype: torch.dtype) -> SolvedRows:
        fit = fit_to_extremes if self.settings.scale_search == "minmax" else search_scales
        grid = fit(weight_RC, scheme, scale_dtype=scale_dtype)
        codes_RC, num_clipped_R = nearest_codes(weight_RC, grid)
        quantized = with_codes(grid, codes_RC)
        return SolvedRows(
            quantized=quantized,
            circumstances=self.circumstances,
            weight_energy=weight_energy(weight_RC, self.hessian_CC),
            error_energy=error_energy(weight_RC, quantized, self.hessian_CC),
            expected_energy=None,
            num_clipped=int(num_clipped_R.sum()),
            num_bounded=int(grid.is_bounded_RG.sum()),
        )
