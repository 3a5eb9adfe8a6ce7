"""Row tiles through error feedback: scales, codes, passes over them, and what is left of the error.

R rows (out features), C columns (in features). Tiles of one shape and scheme are solved as one batch, each
with a factor of its own. Only the loop over columns runs for all of them at once; every other step takes one
tile after the other, and on a CPU no bit of a tile depends on the rest of its batch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from quantlib.grids.affine import AffineGrid, with_codes
from quantlib.grids.given_scales import GivenScales, stacked
from quantlib.grids.levels import levels_of
from quantlib.linalg import Factor
from quantlib.methods.column_solver import solve_codes_of_batch
from quantlib.methods.column_tile import Chosen
from quantlib.methods.contracts import Circumstances, SolvedRows
from quantlib.methods.coordinate_descent import descend_in_batch
from quantlib.methods.fitted_scales import fitted_scales
from quantlib.methods.kept_weights import Kept
from quantlib.methods.measures import error_energy, expected_energy, weight_energy
from quantlib.methods.scale_refit import refit_scales
from quantlib.methods.weight_choice import choose_weights
from quantlib.outlier_columns import OutlierColumns
from quantlib.outlier_weights import OutlierWeights
from quantlib.outliers import Outliers
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import SolverSettings, weights_per_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What rows of one input and group width have in common.

    Shapes:
        hessian_CC: Not damped.
        importance_C: Of the columns, for the search of scales; None where that does not ask.
        kept_K: int64 [K], columns that are kept beside the codes: those at the factor's first positions.
        saliency_C: Of the columns, for the choice of single weights that are kept; None where none are.

    Attributes:
        factor: Of the damped Hessian.
        circumstances: For the reports.
    """

    factor: Factor
    hessian_CC: torch.Tensor
    importance_C: torch.Tensor | None
    kept_K: torch.Tensor
    saliency_C: torch.Tensor | None
    circumstances: Circumstances
    settings: SolverSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackTile:
    """Rows of linears of one input and scheme.

    Shapes:
        weight_RC: At which the solver aims, in the dtype of the arithmetic.

    Attributes:
        targets: Linear -> its rows, views of ``weight_RC``.
        problem: What belongs to their columns.
        kept_dtype: In which columns and weights are kept: that of the stored weights.
        given: Linear -> what the scales of its rows owe to the whole weight, where they do.
    """

    targets: Mapping[str, torch.Tensor]
    weight_RC: torch.Tensor
    problem: Problem
    kept_dtype: torch.dtype
    given: Mapping[str, GivenScales]


@dataclass(frozen=True, slots=True)
class _Fitted:
    """The grid of a tile before its solve, and the columns int64 [R, M] of weights it need not suit."""

    grid: AffineGrid
    without_RM: torch.Tensor | None


@dataclass(slots=True)
class _Solved:
    """What was chosen for a tile, and the grid of its codes."""

    chosen: Chosen
    grid: AffineGrid
    kept_K: torch.Tensor
    single_RM: torch.Tensor | None
    kept_dtype: torch.dtype

    @property
    def outliers(self) -> Outliers | None:
        """As they are stored."""
        if self.single_RM is not None:
            weight_RM = self.chosen.kept_RK.to(self.kept_dtype)
            return OutlierWeights(column_RM=self.single_RM.int(), weight_RM=weight_RM)
        if not len(self.kept_K):
            return None
        column_K, place_K = self.kept_K.sort()
        weight_RK = self.chosen.kept_RK.index_select(1, place_K).to(self.kept_dtype)
        return OutlierColumns(column_K=column_K.int(), weight_RK=weight_RK)


def solve_tiles(
    tiles: Sequence[FeedbackTile], scheme: WeightScheme, *, scale_dtype: torch.dtype
) -> list[dict[str, SolvedRows]]:
    """Quantize tiles of one shape, with the same settings, as one batch.

    Args:
        scheme: Of all linears.
        scale_dtype: Dtype in which the output format stores scales.

    Returns:
        Of each tile: linear -> its rows.
    """
    fitted = [_fitted(tile, scheme, scale_dtype) for tile in tiles]
    solved = _solved(tiles, fitted)
    return [
        _parts(tile, found, expected_scale_RG=before.grid.scale_RG)
        for tile, found, before in zip(tiles, solved, fitted, strict=True)
    ]


def _fitted(tile: FeedbackTile, scheme: WeightScheme, scale_dtype: torch.dtype) -> _Fitted:
    problem, weight_RC = tile.problem, tile.weight_RC
    fit = partial(
        fitted_scales,
        weight_RC,
        scheme,
        search=problem.settings.scale_search,
        scale_dtype=scale_dtype,
        importance_C=problem.importance_C,
        given=stacked([tile.given[name] for name in tile.targets]) if tile.given else None,
    )
    if problem.saliency_C is None:
        return _Fitted(fit(without_K=problem.kept_K if len(problem.kept_K) else None), None)
    count = weights_per_row(weight_RC.shape[1], problem.settings.outlier_weights)
    single_RM = choose_weights(
        weight_RC, count, lambda without_RM: fit(without_K=without_RM), saliency_C=problem.saliency_C
    )
    return _Fitted(fit(without_K=single_RM), single_RM)


def _kept(tiles: Sequence[FeedbackTile], singles: Sequence[torch.Tensor | None]) -> Kept:
    return Kept(
        num_columns=len(tiles[0].problem.kept_K),
        weights=[single_RM for single_RM in singles if single_RM is not None],
        dtype=tiles[0].kept_dtype,
    )


def _solved(tiles: Sequence[FeedbackTile], fitted: Sequence[_Fitted]) -> list[_Solved]:
    weights = [tile.weight_RC for tile in tiles]
    factors = [tile.problem.factor for tile in tiles]
    chosen = solve_codes_of_batch(
        weights,
        [before.grid for before in fitted],
        factors,
        kept=_kept(tiles, [before.without_RM for before in fitted]),
        in_tf32=tiles[0].problem.settings.tf32_feedback,
    )
    solved = [
        _Solved(found, before.grid, tile.problem.kept_K, before.without_RM, tile.kept_dtype)
        for found, before, tile in zip(chosen, fitted, tiles, strict=True)
    ]
    settings = tiles[0].problem.settings
    refits = settings.refits_scales and not fitted[0].grid.scheme.has_given_scales
    for _ in range(settings.descent_passes):
        if refits:
            _refit_(solved, tiles)
        _descend_(solved, tiles)
    if refits and not settings.descent_passes:
        _refit_(solved, tiles)
    return solved


def _refit_(solved: Sequence[_Solved], tiles: Sequence[FeedbackTile]) -> None:
    for found, tile in zip(solved, tiles, strict=True):
        problem = tile.problem
        found.grid = refit_scales(
            tile.weight_RC,
            found.chosen.codes_RC,
            found.grid,
            problem.hessian_CC,
            damping=problem.factor.damping,
            outliers=found.outliers,
        )


def _descend_(solved: Sequence[_Solved], tiles: Sequence[FeedbackTile]) -> None:
    passed = descend_in_batch(
        [tile.weight_RC for tile in tiles],
        [found.chosen.codes_RC for found in solved],
        [found.grid for found in solved],
        [tile.problem.hessian_CC for tile in tiles],
        dampings=[tile.problem.factor.damping for tile in tiles],
        orders=[tile.problem.factor.order_C for tile in tiles],
        kept=_kept(tiles, [found.single_RM for found in solved]),
        kept_weights=[found.chosen.kept_RK for found in solved],
        in_tf32=tiles[0].problem.settings.tf32_feedback,
    )
    for found, chosen in zip(solved, passed, strict=True):
        found.chosen = chosen


def _parts(tile: FeedbackTile, solved: _Solved, *, expected_scale_RG: torch.Tensor) -> dict[str, SolvedRows]:
    """Of every linear its rows, and what they cost; expected is what the scales before any refit promise."""
    problem, grid, found, start = tile.problem, solved.grid, {}, 0
    factor, width = problem.factor, grid.scheme.columns_per_group(tile.weight_RC.shape[1])
    pivots_C, outliers, single_RM = factor.pivots_C, solved.outliers, solved.single_RM
    if len(problem.kept_K):
        # What is kept leaves no error to expect.
        pivots_C = pivots_C.clone()
        pivots_C[: len(problem.kept_K)] = 0.0
    for name, target_rC in tile.targets.items():
        part = slice(start, start + len(target_rC))
        start = part.stop
        expected = None
        if levels_of(grid.scheme).is_uniform:
            scale_rG = expected_scale_RG[part]
            single_rM = None if single_RM is None else single_RM[part]
            expected = expected_energy(scale_rG, pivots_C, factor.order_C, width, single_rM)
        nested = tile.given[name].nested if tile.given else None
        quantized = with_codes(grid.rows(part), solved.chosen.codes_RC[part].clone(), nested)
        if outliers is not None:
            quantized = dataclasses.replace(quantized, outliers=outliers.rows(part))
        found[name] = SolvedRows(
            quantized=quantized,
            circumstances=problem.circumstances,
            weight_energy=weight_energy(target_rC, problem.hessian_CC),
            error_energy=error_energy(target_rC, quantized, problem.hessian_CC),
            expected_energy=expected,
            num_clipped=int(solved.chosen.num_clipped_R[part].sum()),
            num_bounded=int(grid.is_bounded_RG[part].sum()),
        )
    return found
