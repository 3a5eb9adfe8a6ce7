"""GPTQ: round one input feature after the other and let the rest make up for the error, as the Hessian says.

R rows (out features), C columns (in features). Scales come from the original weights in their natural groups
and stay fixed while the columns are solved, so the file needs no column order. Afterwards, if asked for,
scales are fitted to the codes and the columns are gone over again. Linears that read the same input share one
factorization; their rows are solved in tiles, each of one scheme. The choices are `contracts.SolverSettings`.
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
from quantlib.methods.contracts import (
    RTN_CONSTANT_INPUTS,
    RTN_NO_TOKENS,
    RTN_NOT_FACTORED,
    Circumstances,
    Prepared,
    SolvedRows,
)
from quantlib.methods.coordinate_descent import descend
from quantlib.methods.measures import (
    at_least_fp32,
    check_weights,
    error_energy,
    expected_energy,
    weight_energy,
)
from quantlib.methods.rtn import Rounding, num_dead_columns
from quantlib.methods.scale_refit import refit_scales
from quantlib.methods.target_correction import corrected_weight, target_change
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import SolverSettings


def prepare(
    *,
    hessian_CC: torch.Tensor | None,
    cross_CC: torch.Tensor | None,
    num_tokens: int,
    solver: SolverSettings,
) -> Prepared:
    """Error feedback for the linears of an input group (see `contracts.Prepare` for arguments).

    Without a single token (an expert nobody was routed to), without any signal, or when no rung of the ladder
    in `linalg` gives a factor, rows are rounded to nearest and their reports say so.

    Raises:
        NumericsError: The Hessian is not finite, or tokens were counted but no Hessian is given.
    """
    if hessian_CC is None and num_tokens > 0:
        raise NumericsError(
            f"gptq needs the Hessian of its {num_tokens} tokens, found none; use rtn for a run without data"
        )
    if hessian_CC is None or num_tokens == 0 or not bool(hessian_CC.any()):
        fallback = RTN_CONSTANT_INPUTS if num_tokens else RTN_NO_TOKENS
        return _rounding(None, num_tokens, solver, fallback)
    return _Feedback(
        hessian_CC=hessian_CC,
        change_CC=None if cross_CC is None else target_change(hessian_CC, cross_CC),
        num_tokens=num_tokens,
        settings=solver,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """What rows of one group width have in common.

    Attributes:
        importance_C: Of the columns, for the search of scales; None where that does not ask.
    """

    factor: Factor
    hessian_CC: torch.Tensor
    importance_C: torch.Tensor | None
    circumstances: Circumstances
    settings: SolverSettings


class _Feedback:
    """Solves row tiles; makes a factor when the first one needs it, and keeps it."""

    def __init__(
        self,
        *,
        hessian_CC: torch.Tensor,
        change_CC: torch.Tensor | None,
        num_tokens: int,
        settings: SolverSettings,
    ) -> None:
        self._hessian_CC, self._change_CC = hessian_CC, change_CC
        self._num_tokens, self._settings = num_tokens, settings
        # By the width of a group where the order of columns depends on it, else under None.
        self._problems: dict[int | None, _Problem | None] = {}

    def solve(
        self, weights: Mapping[str, torch.Tensor], scheme: WeightScheme, *, scale_dtype: torch.dtype
    ) -> dict[str, SolvedRows]:
        """Quantize a row tile; see `contracts.Prepared`."""
        check_weights(weights, self._hessian_CC)
        problem = self._problem(scheme.columns_per_group(len(self._hessian_CC)))
        parts = [self._target(weight_RC) for weight_RC in weights.values()]
        weight_RC = torch.cat(parts) if len(parts) > 1 else parts[0]
        # From here on views: else every row would be there twice.
        targets = dict(zip(weights, weight_RC.split([len(part) for part in parts]), strict=True))
        del parts
        if problem is None:
            rounding = _rounding(self._hessian_CC, self._num_tokens, self._settings, RTN_NOT_FACTORED)
            return rounding.solve(targets, scheme, scale_dtype=scale_dtype)
        return _solved_parts(targets, weight_RC, scheme, problem, scale_dtype)

    def _target(self, weight_RC: torch.Tensor) -> torch.Tensor:
        wide_RC = at_least_fp32(weight_RC)
        return wide_RC if self._change_CC is None else corrected_weight(wide_RC, self._change_CC)

    def _problem(self, width: int) -> _Problem | None:
        key = width if self._settings.column_order == "group-aware" else None
        if key not in self._problems:
            self._problems[key] = self._factored(width)
        return self._problems[key]

    def _factored(self, width: int) -> _Problem | None:
        order_C = _order(self._hessian_CC, self._settings.column_order, width)
        factor = factor_hessian(self._hessian_CC, num_tokens=self._num_tokens, order_C=order_C)
        if factor is None:
            return None
        return _Problem(
            factor=factor,
            hessian_CC=self._hessian_CC,
            importance_C=_importance(self._settings.scale_search, self._hessian_CC, factor),
            circumstances=Circumstances(
                method="gptq",
                tokens=self._num_tokens,
                dead_columns=factor.num_dead_columns,
                damping_fraction=factor.damping_fraction,
                damping_attempts=factor.num_attempts,
                fallback=None if factor.rung == DAMPED else factor.rung,
            ),
            settings=self._settings,
        )


def _rounding(
    hessian_CC: torch.Tensor | None, num_tokens: int, solver: SolverSettings, fallback: str
) -> Rounding:
    circumstances = Circumstances(
        method="gptq", tokens=num_tokens, dead_columns=num_dead_columns(hessian_CC), fallback=fallback
    )
    return Rounding(hessian_CC=hessian_CC, circumstances=circumstances, settings=solver)


def _solved_parts(
    targets: Mapping[str, torch.Tensor],
    weight_RC: torch.Tensor,
    scheme: WeightScheme,
    problem: _Problem,
    scale_dtype: torch.dtype,
) -> dict[str, SolvedRows]:
    """Rows of linears of one scheme through one solve; ``weight_RC`` is what all targets are views of."""
    grid = _fitted(weight_RC, scheme, problem, scale_dtype)
    fitted_scale_RG = grid.scale_RG
    codes_RC, num_clipped_R, grid = _solved(weight_RC, grid, problem)
    factor, found, start = problem.factor, {}, 0
    width = scheme.columns_per_group(weight_RC.shape[1])
    for name, target_rC in targets.items():
        part = slice(start, start + len(target_rC))
        start = part.stop
        quantized = with_codes(grid.rows(part), codes_RC[part].clone())
        found[name] = SolvedRows(
            quantized=quantized,
            circumstances=problem.circumstances,
            weight_energy=weight_energy(target_rC, problem.hessian_CC),
            error_energy=error_energy(target_rC, quantized, problem.hessian_CC),
            expected_energy=expected_energy(fitted_scale_RG[part], factor.pivots_C, factor.order_C, width),
            num_clipped=int(num_clipped_R[part].sum()),
            num_bounded=int(grid.is_bounded_RG[part].sum()),
        )
    return found


def _fitted(
    weight_RC: torch.Tensor, scheme: WeightScheme, problem: _Problem, scale_dtype: torch.dtype
) -> AffineGrid:
    if problem.settings.scale_search == "minmax":
        return fit_to_extremes(weight_RC, scheme, scale_dtype=scale_dtype)
    return search_scales(weight_RC, scheme, scale_dtype=scale_dtype, importance_C=problem.importance_C)


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


def _importance(search: str, hessian_CC: torch.Tensor, factor: Factor) -> torch.Tensor | None:
    """What a squared error in a column counts for.

    By the Hessian, a column that no token reached counts as much as the least used one, not as nothing.
    """
    if search == "inverse-hessian":
        return 1.0 / inverse_diagonal(factor)
    if search != "hessian":
        return None
    diagonal_C = hessian_CC.diagonal()
    return torch.where(diagonal_C > 0, diagonal_C, diagonal_C[diagonal_C > 0].min())
