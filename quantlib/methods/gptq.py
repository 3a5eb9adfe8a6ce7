"""GPTQ: round one input feature after the other and let the rest make up for the error, as the Hessian says.

R rows (out features), C columns (in features). Scales come from the original weights in their natural groups
and stay fixed while the columns are solved, so the file needs no column order. Afterwards, if asked for,
scales are fitted to the codes and the columns are gone over again. Linears that read the same input share one
factorization; their rows are solved in tiles, each of one scheme. Tiles of one shape, each of an input group
of its own (the experts of a block), may be solved as one batch, which changes no bit on a CPU. The choices
are `contracts.SolverSettings`.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from quantlib.cholesky import Cholesky, library_cholesky_
from quantlib.column_order import activation_order, group_aware_order, natural_order, with_last
from quantlib.errors import NumericsError
from quantlib.grids.given_scales import NOTHING_GIVEN, GivenScales
from quantlib.linalg import DAMPED, factor_hessian, inverse_diagonal
from quantlib.methods.contracts import (
    RTN_CONSTANT_INPUTS,
    RTN_NO_TOKENS,
    RTN_NOT_FACTORED,
    Circumstances,
    Prepared,
    SolvedRows,
)
from quantlib.methods.feedback_tiles import FeedbackTile, Problem, solve_tiles
from quantlib.methods.measures import at_least_fp32, check_weights
from quantlib.methods.rtn import Rounding, num_dead_columns
from quantlib.methods.target_correction import corrected_weight, target_change
from quantlib.outlier_columns import strongest_columns
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import SolverSettings


def prepare(
    *,
    hessian_CC: torch.Tensor | None,
    cross_CC: torch.Tensor | None,
    num_tokens: int,
    solver: SolverSettings,
    cholesky_: Cholesky = library_cholesky_,
) -> Prepared:
    """Error feedback for the linears of an input group (see `contracts.Prepare` for other arguments).

    Without a single token (an expert nobody was routed to), without any signal, or when no rung of the ladder
    in `linalg` gives a factor, rows are rounded to nearest and their reports say so.

    Args:
        cholesky_: Makes all factors.

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
        change_CC=None if cross_CC is None else target_change(hessian_CC, cross_CC, cholesky_),
        num_tokens=num_tokens,
        settings=solver,
        cholesky_=cholesky_,
    )


def solve_batch(
    prepared: Sequence[Prepared],
    tiles: Sequence[Mapping[str, torch.Tensor]],
    scheme: WeightScheme,
    *,
    scale_dtype: torch.dtype,
    given: Sequence[Mapping[str, GivenScales]] = (),
) -> list[dict[str, SolvedRows]]:
    """Quantize row tiles of several input groups as one batch; see `contracts.SolveBatch`."""
    solvable: dict[int, FeedbackTile] = {}
    found: dict[int, dict[str, SolvedRows]] = {}
    owed = given or [NOTHING_GIVEN] * len(tiles)
    for number, (group, weights, to_tile) in enumerate(zip(prepared, tiles, owed, strict=True)):
        tile = group.tile(weights, scheme, to_tile) if isinstance(group, _Feedback) else None
        if tile is None:
            found[number] = group.solve(weights, scheme, scale_dtype=scale_dtype, given=to_tile)
        else:
            solvable[number] = tile
    solved = solve_tiles(list(solvable.values()), scheme, scale_dtype=scale_dtype) if solvable else []
    found |= dict(zip(solvable, solved, strict=True))
    return [found[number] for number in range(len(prepared))]


class _Feedback:
    """Solves row tiles; makes a factor when the first one needs it, and keeps it."""

    def __init__(
        self,
        *,
        hessian_CC: torch.Tensor,
        change_CC: torch.Tensor | None,
        num_tokens: int,
        settings: SolverSettings,
        cholesky_: Cholesky,
    ) -> None:
        self._hessian_CC, self._change_CC = hessian_CC, change_CC
        self._num_tokens, self._settings, self._cholesky_ = num_tokens, settings, cholesky_
        # By the width of a group where the order of columns depends on it, else under None.
        self._problems: dict[int | None, Problem | None] = {}

    def solve(
        self,
        weights: Mapping[str, torch.Tensor],
        scheme: WeightScheme,
        *,
        scale_dtype: torch.dtype,
        given: Mapping[str, GivenScales] = NOTHING_GIVEN,
    ) -> dict[str, SolvedRows]:
        """Quantize a row tile; see `contracts.Prepared`."""
        tile = self.tile(weights, scheme, given)
        if tile is None:
            targets = {name: self._target(weight_RC) for name, weight_RC in weights.items()}
            rounding = _rounding(self._hessian_CC, self._num_tokens, self._settings, RTN_NOT_FACTORED)
            rounding = dataclasses.replace(rounding, kept_dtype=_dtype_of(weights))
            return rounding.solve(targets, scheme, scale_dtype=scale_dtype, given=given)
        return solve_tiles([tile], scheme, scale_dtype=scale_dtype)[0]

    def tile(
        self, weights: Mapping[str, torch.Tensor], scheme: WeightScheme, given: Mapping[str, GivenScales]
    ) -> FeedbackTile | None:
        """A row tile that is ready to be solved; None where no rung gives a factor."""
        check_weights(weights, self._hessian_CC)
        problem = self._problem(scheme.columns_per_group(len(self._hessian_CC)))
        if problem is None:
            return None
        parts = [self._target(weight_RC) for weight_RC in weights.values()]
        weight_RC = torch.cat(parts) if len(parts) > 1 else parts[0]
        # From here on views: else every row would be there twice.
        targets = dict(zip(weights, weight_RC.split([len(part) for part in parts]), strict=True))
        return FeedbackTile(
            targets=targets, weight_RC=weight_RC, problem=problem, kept_dtype=_dtype_of(weights), given=given
        )

    def _target(self, weight_RC: torch.Tensor) -> torch.Tensor:
        wide_RC = at_least_fp32(weight_RC)
        return wide_RC if self._change_CC is None else corrected_weight(wide_RC, self._change_CC)

    def _problem(self, width: int) -> Problem | None:
        key = width if self._settings.column_order == "group-aware" else None
        if key not in self._problems:
            self._problems[key] = self._factored(width)
        return self._problems[key]

    def _factored(self, width: int) -> Problem | None:
        order_C = _order(self._hessian_CC, self._settings.column_order, width)
        kept_K = strongest_columns(self._hessian_CC.diagonal(), self._settings.outlier_columns)
        if len(kept_K):
            order_C = with_last(order_C, kept_K)
        factor = factor_hessian(
            self._hessian_CC, num_tokens=self._num_tokens, order_C=order_C, cholesky_=self._cholesky_
        )
        if factor is None:
            return None
        settings, saliency_C = self._settings, None
        if settings.outlier_weights or settings.scale_search == "inverse-hessian":
            saliency_C = 1.0 / inverse_diagonal(factor)
        return Problem(
            factor=factor,
            hessian_CC=self._hessian_CC,
            importance_C=_importance(settings.scale_search, self._hessian_CC, saliency_C),
            kept_K=order_C[: len(kept_K)],
            saliency_C=saliency_C if settings.outlier_weights else None,
            circumstances=Circumstances(
                method="gptq",
                tokens=self._num_tokens,
                dead_columns=factor.num_dead_columns,
                damping_fraction=factor.damping_fraction,
                damping_attempts=factor.num_attempts,
                fallback=None if factor.rung == DAMPED else factor.rung,
            ),
            settings=settings,
        )


def _rounding(
    hessian_CC: torch.Tensor | None, num_tokens: int, solver: SolverSettings, fallback: str
) -> Rounding:
    circumstances = Circumstances(
        method="gptq", tokens=num_tokens, dead_columns=num_dead_columns(hessian_CC), fallback=fallback
    )
    return Rounding(
        hessian_CC=hessian_CC,
        circumstances=circumstances,
        settings=solver,
        keeps_outliers=True,
    )


def _dtype_of(weights: Mapping[str, torch.Tensor]) -> torch.dtype:
    return next(iter(weights.values())).dtype


def _order(hessian_CC: torch.Tensor, name: str, width: int) -> torch.Tensor:
    if name == "natural":
        return natural_order(len(hessian_CC), hessian_CC.device)
    if name == "group-aware":
        return group_aware_order(hessian_CC.diagonal(), width)
    return activation_order(hessian_CC.diagonal())


def _importance(
    search: str, hessian_CC: torch.Tensor, saliency_C: torch.Tensor | None
) -> torch.Tensor | None:
    """What a squared error in a column counts for.

    By the Hessian, a column that no token reached counts as much as the least used one, not as nothing.
    """
    if search == "inverse-hessian":
        return saliency_C
    if search != "hessian":
        return None
    diagonal_C = hessian_CC.diagonal()
    return torch.where(diagonal_C > 0, diagonal_C, diagonal_C[diagonal_C > 0].min())
