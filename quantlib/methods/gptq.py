"""GPTQ: round one input feature after the other and let the rest make up for the error, as the Hessian says.

R rows (out features), C columns (in features). Scales come from the original weights in their natural groups,
searched for least error weighted by diag(H), and stay fixed while the columns are solved in order of falling
diagonal, so the file needs no column order. Linears that read the same input share one factorization, and
those with equal schemes one solve.
"""

import dataclasses
from collections.abc import Mapping

import torch

from quantlib.errors import NumericsError
from quantlib.grids.affine import with_codes
from quantlib.grids.fit import search_scales
from quantlib.linalg import DAMPED, Factor, factor_hessian
from quantlib.methods.column_solver import solve_codes
from quantlib.methods.contracts import RTN_NO_TOKENS, RTN_NOT_FACTORED, LinearReport, LinearResult
from quantlib.methods.measures import check_weights, relative_error
from quantlib.methods.rtn import round_linear
from quantlib.schemes import WeightScheme


def quantize_linears(
    weights: Mapping[str, torch.Tensor],
    schemes: Mapping[str, WeightScheme],
    *,
    hessian_CC: torch.Tensor | None,
    num_tokens: int,
    scale_dtype: torch.dtype,
) -> dict[str, LinearResult]:
    """Quantize the linears of one input group with error feedback (see `contracts.Method` for arguments).

    Without a single token (an expert nobody was routed to), or when no rung of the ladder in `linalg` gives
    a factor, the linears are rounded to nearest and their reports say so.

    Raises:
        NumericsError: A weight or the Hessian is not finite, shapes do not fit, or tokens were counted
            but no Hessian is given.
    """
    check_weights(weights, hessian_CC)
    if hessian_CC is None and num_tokens > 0:
        raise NumericsError(
            f"gptq needs the Hessian of its {num_tokens} tokens, found none; use rtn for a run without data"
        )
    if hessian_CC is None or num_tokens == 0 or not bool(hessian_CC.any()):
        return _round_all(weights, schemes, None, num_tokens, scale_dtype, RTN_NO_TOKENS)
    factor = factor_hessian(hessian_CC, num_tokens=num_tokens)
    if factor is None:
        return _round_all(weights, schemes, hessian_CC, num_tokens, scale_dtype, RTN_NOT_FACTORED)
    results: dict[str, LinearResult] = {}
    for scheme in dict.fromkeys(schemes[name] for name in weights):
        stack = {name: weight_RC for name, weight_RC in weights.items() if schemes[name] == scheme}
        results |= _quantize_stack(stack, scheme, factor, hessian_CC, num_tokens, scale_dtype)
    return {name: results[name] for name in weights}


def _quantize_stack(
    weights: Mapping[str, torch.Tensor],
    scheme: WeightScheme,
    factor: Factor,
    hessian_CC: torch.Tensor,
    num_tokens: int,
    scale_dtype: torch.dtype,
) -> dict[str, LinearResult]:
    """Linears of one scheme through one solve."""
    parts = list(weights.values())
    weight_RC = torch.cat(parts) if len(parts) > 1 else parts[0]
    importance_C = _importance(hessian_CC)
    grid = search_scales(weight_RC, scheme, scale_dtype=scale_dtype, importance_C=importance_C)
    codes_RC, num_clipped_R = solve_codes(weight_RC, grid, factor)
    results, start = {}, 0
    for name, original_rC in weights.items():
        part = slice(start, start + len(original_rC))
        start = part.stop
        quantized = with_codes(grid.rows(part), codes_RC[part].clone())
        report = LinearReport(
            name=name,
            method="gptq",
            bits=scheme.bits,
            relative_error=relative_error(original_rC, quantized, hessian_CC),
            damping_fraction=factor.damping_fraction,
            damping_attempts=factor.num_attempts,
            tokens=num_tokens,
            dead_columns=factor.num_dead_columns,
            clipped_fraction=int(num_clipped_R[part].sum()) / original_rC.numel(),
            bounded_scales=int(grid.is_bounded_RG[part].sum()),
            fallback=None if factor.rung == DAMPED else factor.rung,
        )
        results[name] = LinearResult(quantized=quantized, report=report)
    return results


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
        )
        report = dataclasses.replace(rounded.report, method="gptq", fallback=fallback)
        results[name] = LinearResult(quantized=rounded.quantized, report=report)
    return results
