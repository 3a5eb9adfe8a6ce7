"""Round to nearest: each weight to its closest level, on scales of least squared error. Needs no data."""

from collections.abc import Mapping

import torch

from quantlib.grids.affine import nearest_codes, with_codes
from quantlib.grids.fit import fit_to_extremes, search_scales
from quantlib.methods.contracts import LinearReport, LinearResult
from quantlib.methods.measures import check_weights, relative_error
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import DEFAULT_SOLVER, SolverSettings


def quantize_linears(
    weights: Mapping[str, torch.Tensor],
    schemes: Mapping[str, WeightScheme],
    *,
    hessian_CC: torch.Tensor | None = None,
    cross_CC: torch.Tensor | None = None,  # noqa: ARG001 - rounding has no targets
    num_tokens: int = 0,
    scale_dtype: torch.dtype,
    solver: SolverSettings = DEFAULT_SOLVER,
) -> dict[str, LinearResult]:
    """Round the linears of one input group to nearest (see `contracts.Method` for arguments).

    Scales cover the extremes with ``minmax``; every other search is one for the least squared error. The
    Hessian does not influence a code; where there is one, the reported error is weighted by it.
    """
    check_weights(weights, hessian_CC)
    return {
        name: round_linear(
            name,
            weight_RC,
            schemes[name],
            hessian_CC=hessian_CC,
            num_tokens=num_tokens,
            scale_dtype=scale_dtype,
            solver=solver,
        )
        for name, weight_RC in weights.items()
    }


def round_linear(
    name: str,
    weight_RC: torch.Tensor,
    scheme: WeightScheme,
    *,
    hessian_CC: torch.Tensor | None,
    num_tokens: int,
    scale_dtype: torch.dtype,
    solver: SolverSettings,
) -> LinearResult:
    """Round one linear to nearest."""
    fit = fit_to_extremes if solver.scale_search == "minmax" else search_scales
    grid = fit(weight_RC, scheme, scale_dtype=scale_dtype)
    codes_RC, num_clipped_R = nearest_codes(weight_RC, grid)
    quantized = with_codes(grid, codes_RC)
    report = LinearReport(
        name=name,
        method="rtn",
        bits=scheme.bits,
        predicted_error=None,
        relative_error=relative_error(weight_RC, quantized, hessian_CC),
        damping_fraction=0.0,
        damping_attempts=0,
        tokens=num_tokens,
        dead_columns=0 if hessian_CC is None else int((hessian_CC.diagonal() == 0).sum()),
        clipped_fraction=int(num_clipped_R.sum()) / weight_RC.numel(),
        bounded_scales=int(grid.is_bounded_RG.sum()),
        fallback=None,
    )
    return LinearResult(quantized=quantized, report=report)
