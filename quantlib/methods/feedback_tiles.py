"""Row tiles through error feedback: scales, codes, passes over them, and what is left of the error.

R rows (out features), C columns (in features). Tiles of one shape and scheme are solved as one batch, each
with a factor of its own. Only the loop over columns runs for all of them at once; every other step takes one
tile after the other, and on a CPU no bit of a tile depends on the rest of its batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quantlib.grids.affine import AffineGrid, with_codes
from quantlib.grids.given_scales import GivenScales, stacked
from quantlib.grids.levels import levels_of
from quantlib.linalg import Factor
from quantlib.methods.column_solver import solve_codes_of_batch
from quantlib.methods.contracts import Circumstances, SolvedRows
from quantlib.methods.coordinate_descent import descend_in_batch
from quantlib.methods.fitted_scales import fitted_scales
from quantlib.methods.measures import error_energy, expected_energy, weight_energy
from quantlib.methods.scale_refit import refit_scales
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import SolverSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What rows of one input and group width have in common.

    Shapes:
        hessian_CC: Not damped.
        importance_C: Of the columns, for the search of scales; None where that does not ask.

    Attributes:
        factor: Of the damped Hessian.
        circumstances: For the reports.
    """

    factor: Factor
    hessian_CC: torch.Tensor
    importance_C: torch.Tensor | None
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
        given: Linear -> what the scales of its rows owe to the whole weight, where they do.
    """

    targets: Mapping[str, torch.Tensor]
    weight_RC: torch.Tensor
    problem: Problem
    given: Mapping[str, GivenScales]


@dataclass(slots=True)
class _Solved:
    """Codes of a tile, clipped targets a row, and the grid they are codes of."""

    codes_RC: torch.Tensor
    num_clipped_R: torch.Tensor
    grid: AffineGrid


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
        _parts(tile, found, expected_scale_RG=grid.scale_RG)
        for tile, found, grid in zip(tiles, solved, fitted, strict=True)
    ]


def _fitted(tile: FeedbackTile, scheme: WeightScheme, scale_dtype: torch.dtype) -> AffineGrid:
    problem = tile.problem
    return fitted_scales(
        tile.weight_RC,
        scheme,
        search=problem.settings.scale_search,
        scale_dtype=scale_dtype,
        importance_C=problem.importance_C,
        given=stacked([tile.given[name] for name in tile.targets]) if tile.given else None,
    )


def _solved(tiles: Sequence[FeedbackTile], fitted: Sequence[AffineGrid]) -> list[_Solved]:
    weights = [tile.weight_RC for tile in tiles]
    factors = [tile.problem.factor for tile in tiles]
    codes = solve_codes_of_batch(weights, fitted, factors)
    solved = [_Solved(*found, grid) for found, grid in zip(codes, fitted, strict=True)]
    settings = tiles[0].problem.settings
    refits = settings.refits_scales and not fitted[0].scheme.has_given_scales
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
            tile.weight_RC, found.codes_RC, found.grid, problem.hessian_CC, damping=problem.factor.damping
        )


def _descend_(solved: Sequence[_Solved], tiles: Sequence[FeedbackTile]) -> None:
    passed = descend_in_batch(
        [tile.weight_RC for tile in tiles],
        [found.codes_RC for found in solved],
        [found.grid for found in solved],
        [tile.problem.hessian_CC for tile in tiles],
        dampings=[tile.problem.factor.damping for tile in tiles],
        orders=[tile.problem.factor.order_C for tile in tiles],
    )
    for found, (codes_RC, num_clipped_R) in zip(solved, passed, strict=True):
        found.codes_RC, found.num_clipped_R = codes_RC, num_clipped_R


def _parts(tile: FeedbackTile, solved: _Solved, *, expected_scale_RG: torch.Tensor) -> dict[str, SolvedRows]:
    """Of every linear its rows, and what they cost; expected is what the scales before any refit promise."""
    problem, grid, found, start = tile.problem, solved.grid, {}, 0
    factor, width = problem.factor, grid.scheme.columns_per_group(tile.weight_RC.shape[1])
    for name, target_rC in tile.targets.items():
        part = slice(start, start + len(target_rC))
        start = part.stop
        expected = None
        if levels_of(grid.scheme).is_uniform:
            scale_rG = expected_scale_RG[part]
            expected = expected_energy(scale_rG, factor.pivots_C, factor.order_C, width)
        nested = tile.given[name].nested if tile.given else None
        quantized = with_codes(grid.rows(part), solved.codes_RC[part].clone(), nested)
        found[name] = SolvedRows(
            quantized=quantized,
            circumstances=problem.circumstances,
            weight_energy=weight_energy(target_rC, problem.hessian_CC),
            error_energy=error_energy(target_rC, quantized, problem.hessian_CC),
            expected_energy=expected,
            num_clipped=int(solved.num_clipped_R[part].sum()),
            num_bounded=int(grid.is_bounded_RG[part].sum()),
        )
    return found
