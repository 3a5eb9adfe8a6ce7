"""A method on whole linears: prepare, solve every row tile, merge.

R rows (out features), C columns (in features). Who solves tiles one by one does the same, perhaps on several
machines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quantlib.grids.given_scales import NOTHING_GIVEN, GivenScales, given_scales
from quantlib.methods.contracts import (
    LinearReport,
    LinearResult,
    Prepare,
    Prepared,
    SolveBatch,
    SolvedRows,
    deepest_step,
)
from quantlib.methods.fitted_scales import cuts_half_step
from quantlib.methods.measures import check_weights, share
from quantlib.quantized import joined_rows
from quantlib.row_tiles import Tile, row_tiles, tile_height
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import DEFAULT_SOLVER, SolverSettings


def _one_by_one(
    prepared: Sequence[Prepared],
    tiles: Sequence[Mapping[str, torch.Tensor]],
    scheme: WeightScheme,
    *,
    scale_dtype: torch.dtype,
    given: Sequence[Mapping[str, GivenScales]] = (),
) -> list[dict[str, SolvedRows]]:
    return [
        group.solve(weights, scheme, scale_dtype=scale_dtype, given=owed)
        for group, weights, owed in zip(prepared, tiles, given or [NOTHING_GIVEN] * len(tiles), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to choose codes.

    Attributes:
        prepare: Its part that no row is needed for; what that gives solves row tiles.
        solve_batch: Row tiles of several input groups at once; by default one after the other.
    """

    prepare: Prepare
    solve_batch: SolveBatch = _one_by_one

    def __call__(
        self,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, WeightScheme],
        *,
        hessian_CC: torch.Tensor | None = None,
        cross_CC: torch.Tensor | None = None,
        num_tokens: int = 0,
        scale_dtype: torch.dtype,
        solver: SolverSettings = DEFAULT_SOLVER,
        height: int | None = None,
        given: Mapping[str, GivenScales] | None = None,
    ) -> dict[str, LinearResult]:
        """Quantize the linears of one input group.

        Shapes:
            weights: Name -> floating [R, C], taken as fp32; R may differ. Not changed.
            hessian_CC, cross_CC: As in `contracts.Prepare`.

        Args:
            weights: Linears that read the same input.
            schemes: Name -> scheme, for every name in ``weights``.
            num_tokens: Tokens summed in ``hessian_CC``.
            scale_dtype: Dtype in which the output format stores scales.
            solver: The choices that are left to the method.
            height: Most rows of a tile; by default from columns and device.
            given: Name -> what its scales owe to the whole weight, where they do; by default found here, as
                of weights that are fused with no other.

        Returns:
            Name -> result, in the order of ``weights``.

        Raises:
            NumericsError: A weight or the Hessian is not finite, or shapes do not fit.
        """
        check_weights(weights, hessian_CC)
        prepared = self.prepare(
            hessian_CC=hessian_CC, cross_CC=cross_CC, num_tokens=num_tokens, solver=solver
        )
        solved: dict[str, list[SolvedRows]] = {name: [] for name in weights}
        for scheme in dict.fromkeys(schemes[name] for name in weights):
            alike = {name: weight_RC for name, weight_RC in weights.items() if schemes[name] == scheme}
            owed = given
            if owed is None:
                owed = given_scales(
                    alike,
                    [(name,) for name in alike],
                    scheme,
                    scale_dtype=scale_dtype,
                    cuts_half_step=cuts_half_step(solver.scale_search),
                )
            first_RC = next(iter(alike.values()))
            most = height or tile_height(first_RC.shape[1], first_RC.device.type)
            for tile in row_tiles({name: len(weight_RC) for name, weight_RC in alike.items()}, most):
                rows = {run.name: alike[run.name][run.start : run.end] for run in tile}
                found = prepared.solve(rows, scheme, scale_dtype=scale_dtype, given=given_to(tile, owed))
                for name, part in found.items():
                    solved[name].append(part)
        return {name: merged_rows(name, parts) for name, parts in solved.items()}


def given_to(tile: Tile, given: Mapping[str, GivenScales]) -> dict[str, GivenScales]:
    """What is given to the rows of a tile, of what is given to whole weights."""
    return {run.name: given[run.name].rows(slice(run.start, run.end)) for run in tile if run.name in given}


def joined_parts(parts: Sequence[SolvedRows]) -> SolvedRows:
    """Rows of a linear from parts of them, in order; of one part that part itself.

    Numerics: energies are added in that order, in float64.
    """
    if len(parts) == 1:
        return parts[0]
    expected = [part.expected_energy for part in parts if part.expected_energy is not None]
    return SolvedRows(
        quantized=joined_rows([part.quantized for part in parts]),
        circumstances=parts[0].circumstances,
        weight_energy=sum(part.weight_energy for part in parts),
        error_energy=sum(part.error_energy for part in parts),
        expected_energy=sum(expected) if expected else None,
        num_clipped=sum(part.num_clipped for part in parts),
        num_bounded=sum(part.num_bounded for part in parts),
        memory_step=deepest_step(part.memory_step for part in parts),
    )


def merged_rows(name: str, parts: Sequence[SolvedRows]) -> LinearResult:
    """A linear and its report from its rows, in order; see `joined_parts`."""
    rows = joined_parts(parts)
    quantized, circumstances, expected = rows.quantized, rows.circumstances, rows.expected_energy
    report = LinearReport(
        name=name,
        method=circumstances.method,
        bits=quantized.scheme.bits,
        predicted_error=None if expected is None else share(expected, rows.weight_energy),
        relative_error=share(rows.error_energy, rows.weight_energy),
        damping_fraction=circumstances.damping_fraction,
        damping_attempts=circumstances.damping_attempts,
        tokens=circumstances.tokens,
        dead_columns=circumstances.dead_columns,
        clipped_fraction=rows.num_clipped / quantized.codes_RC.numel(),
        bounded_scales=rows.num_bounded,
        fallback=circumstances.fallback,
        kept_weights=0 if quantized.outliers is None else quantized.outliers.num_weights,
        memory_step=rows.memory_step,
    )
    return LinearResult(quantized=quantized, report=report)
