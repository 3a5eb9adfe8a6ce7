"""GPTQ: round one input feature after the other and let the rest make up for the error, as the Hessian says.

R rows (out features), C columns (in features). Scales come from the original weights in their natural groups
and stay fixed while the columns are solved, so the file needs no column order. Afterwards, if asked for,
scales are fitted to the codes and the columns are gone over again. Linears that read the same input share one
factorization, and those with equal schemes one solve. The choices are `contracts.SolverSettings`.
"""

import dataclasses
from collections.abc import Mapping

import torch

from quantlib.column_order import activation_order, group_aware_order, natural_order
from quantlib.errors import NumericsError
from quantlib.grids.affine import AffineGrid, with_codes
from quantlib.grids.fit import fit_to_extremes, search_scales
from quantlib.linalg import DAMPED, Factor, factor_hessian, inverse_diagonal
from quantlib.methods.column_solver import solve_codes
from quantlib.methods.column_tile import stacks
from quantlib.methods.contracts import (
    RTN_CONSTANT_INPUTS,
    RTN_NO_TOKENS,
    RTN_NOT_FACTORED,
    LinearReport,
    LinearResult,
)
from quantlib.methods.coordinate_descent import descend
from quantlib.methods.measures import (
    at_least_fp32,
    check_weights,
    error_energy,
    expected_energy,
    share,
    weight_energy,
)
from quantlib.methods.rtn import round_linear
from quantlib.methods.scale_refit import refit_scales
from quantlib.methods.target_correction import corrected_weights
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import DEFAULT_SOLVER, SolverSettings


def quantize_linears(
    weights: Mapping[str, torch.Tensor],
    schemes: Mapping[str, WeightScheme],
    *,
    hessian_CC: torch.Tensor | None,
    cross_CC: torch.Tensor | None = None,
    num_tokens: int,
    scale_dtype: torch.dtype,
    solver: SolverSettings = DEFAULT_SOLVER,
) -> dict[str, LinearResult]:
    """Quantize the linears of one input group with error feedback (see `contracts.Method` for arguments).

    Without a single token (an expert nobody was routed to), without any signal, or when no rung of the ladder
    in `linalg` gives a factor, the linears are rounded to nearest and their reports say so.

    Raises:
        NumericsError: A weight or the Hessian is not finite, shapes do not fit, or tokens were counted
            but no Hessian is given.
    """
    check_weights(weights, hessian_CC)
    weights = {name: at_least_fp32(weight_RC) for name, weight_RC in weights.items()}
    if hessian_CC is None and num_tokens > 0:
        raise NumericsError(
            f"gptq needs the Hessian of its {num_tokens} tokens, found none; use rtn for a run without data"
        )
    if hessian_CC is None or num_tokens == 0 or not bool(hessian_CC.any()):
        fallback = RTN_CONSTANT_INPUTS if num_tokens else RTN_NO_TOKENS
        return _round_all(weights, schemes, None, num_tokens, scale_dtype, solver, fallback)
    if cross_CC is not None:
        weights = corrected_weights(weights, hessian_CC, cross_CC)
    factors: dict[int | None, Factor | None] = {}
    results: dict[str, LinearResult] = {}
    for scheme in dict.fromkeys(schemes[name] for name in weights):
        stack = {name: weight_RC for name, weight_RC in weights.items() if schemes[name] == scheme}
        width = scheme.columns_per_group(hessian_CC.shape[0])
        key = width if solver.column_order == "group-aware" else None
        if key not in factors:
            order_C = _order(hessian_CC, solver.column_order, width)
            factors[key] = factor_hessian(hessian_CC, num_tokens=num_tokens, order_C=order_C)
        factor = factors[key]
        if factor is None:
            results |= _round_all(
                stack, schemes, hessian_CC, num_tokens, scale_dtype, solver, RTN_NOT_FACTORED
            )
        else:
            problem = _Problem(factor=factor, hessian_CC=hessian_CC, num_tokens=num_tokens, settings=solver)
            for names in stacks(stack):
                part = {name: stack[name] for name in names}
                results |= _quantize_stack(part, scheme, problem, scale_dtype)
    return {name: results[name] for name in weights}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """What the linears of an input group have in common."""

    factor: Factor
    hessian_CC: torch.Tensor
    num_tokens: int
    settings: SolverSettings


def _quantize_stack(
    weights: Mapping[str, torch.Tensor], scheme: WeightScheme, problem: _Problem, scale_dtype: torch.dtype
) -> dict[str, LinearResult]:
    """Linears of one scheme through one solve."""
    parts = list(weights.values())
    weight_RC = torch.cat(parts) if len(parts) > 1 else parts[0]
    grid = _fitted(weight_RC, scheme, problem, scale_dtype)
    fitted_scale_RG = grid.scale_RG
    codes_RC, num_clipped_R, grid = _solved(weight_RC, grid, problem)
    factor, results, start = problem.factor, {}, 0
    width = scheme.columns_per_group(weight_RC.shape[1])
    for name, original_rC in weights.items():
        part = slice(start, start + len(original_rC))
        start = part.stop
        quantized = with_codes(grid.rows(part), codes_RC[part].clone())
        energy = weight_energy(original_rC, problem.hessian_CC)
        expected = expected_energy(fitted_scale_RG[part], factor.pivots_C, factor.order_C, width)
        report = LinearReport(
            name=name,
            method="gptq",
            bits=scheme.bits,
            predicted_error=share(expected, energy),
            relative_error=share(error_energy(original_rC, quantized, problem.hessian_CC), energy),
            damping_fraction=factor.damping_fraction,
            damping_attempts=factor.num_attempts,
            tokens=problem.num_tokens,
            dead_columns=factor.num_dead_columns,
            clipped_fraction=int(num_clipped_R[part].sum()) / original_rC.numel(),
            bounded_scales=int(grid.is_bounded_RG[part].sum()),
            fallback=None if factor.rung == DAMPED else factor.rung,
        )
        results[name] = LinearResult(quantized=quantized, report=report)
    return results


def _fitted(
    weight_RC: torch.Tensor, scheme: WeightScheme, problem: _Problem, scale_dtype: torch.dtype
) -> AffineGrid:
    search = problem.settings.scale_search
    if search == "minmax":
        return fit_to_extremes(weight_RC, scheme, scale_dtype=scale_dtype)
    importance_C = None
    if search == "hessian":
        importance_C = _importance(problem.hessian_CC)
    elif search == "inverse-hessian":
        importance_C = 1.0 / inverse_diagonal(problem.factor)
    return search_scales(weight_RC, scheme, scale_dtype=scale_dtype, importance_C=importance_C)


def _solved(
    weight_RC: torch.Tensor, grid: AffineGrid, problem: _Problem
) -> tuple[torch.Tensor, torch.Tensor, AffineGrid]:
    """Codes, clipped targets a row, and the grid they are codes of."""
    hessian_CC, factor, settings = problem.hessian_CC, problem.factor, problem.settings
    codes_RC, num_clipped_R = solve_codes(weight_RC, grid, factor)
    damping = factor.damping
    for _ in range(settings.descent_passes):
        if settings.refits_scales:
            grid = refit_scales(weight_RC, codes_RC, grid, hessian_CC, damping=damping)
        codes_RC, num_clipped_R = descend(
            weight_RC, codes_RC, grid, hessian_CC, damping=damping, order_C=factor.order_C
        )
    if settings.refits_scales and not settings.descent_passes:
        grid = refit_scales(weight_RC, codes_RC, grid, hessian_CC, damping=damping)
    return codes_RC, num_clipped_R, grid


def _order(hessian_CC: torch.Tensor, name: str, width: int) -> torch.Tensor:
    if name == "natural":
        return natural_order(len(hessian_CC), hessian_CC.device)
    if name == "group-aware":
        return group_aware_order(hessian_CC.diagonal(), width)
    return activation_order(hessian_CC.diagonal())


def _importance(hessian_CC: torch.Tensor) -> torch.Tensor:
    """diag(H); a column that no token reached counts as much as the least used one, not as nothing."""
    diagonal_C = hessian_CC.diagonal()
    return torch.where(diagonal_C > 0, diagonal_C, diagonal_C[diagonal_C > 0].min())


def _round_all(
    weights: Mapping[str, torch.Tensor],
    schemes: Mapping[str, WeightScheme],
    hessian_CC: torch.Tensor | None,
    num_tokens: int,
    scale_dtype: torch.dtype,
    solver: SolverSettings,
    fallback: str,
) -> dict[str, LinearResult]:
    results = {}
    for name, weight_RC in weights.items():
        rounded = round_linear(
            name,
            weight_RC,
            schemes[name],
            hessian_CC=hessian_CC,
            num_tokens=num_tokens,
            scale_dtype=scale_dtype,
            solver=solver,
        )
        report = dataclasses.replace(rounded.report, method="gptq", fallback=fallback)
        results[name] = LinearResult(quantized=rounded.quantized, report=report)
    return results
