"""From the partial sums of an input group to the packed tensors of its linears, a row tile at a time.

What is C x C is made once a group and kept while its tiles are solved; codes, scales and figures are the same
however tiles are shared out. Small groups that are alike are solved as one batch, which on a CPU gives what
each gives alone.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from quantlib.calibration.moments import Moments, about_zero, centered_moments, moments_from
from quantlib.calibration.totals import Total, add_totals_
from quantlib.checkpoint.dtypes import torch_dtype
from quantlib.device_copies import DeviceCopies, Pending
from quantlib.grids.given_scales import GivenScales, given_scales
from quantlib.job.expert_groups import GroupTokens
from quantlib.job.fused_sets import by_module
from quantlib.job.group_tiles import GroupTile, group_tiles
from quantlib.job.plan import BlockPlan, LinearPlan
from quantlib.methods import METHODS
from quantlib.methods.contracts import (
    COARSE_BIAS,
    NO_ROUTED_TOKENS,
    LinearReport,
    LinearResult,
    Prepared,
    SolvedRows,
)
from quantlib.methods.fitted_scales import cuts_half_step
from quantlib.methods.whole_solve import Method, given_to, merged_rows
from quantlib.packing.contracts import PackingFormat
from quantlib.packing.outliers import pack_linear
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import SolverSettings
from quantlib.steps import CorrectedResult, correct_bias

Tensors = Mapping[str, torch.Tensor]
# Linear -> its rows in a tile.
TileRows = Mapping[str, SolvedRows]
# Totals of X^T X (none without data), of the products with the reference stream where targets are corrected,
# and of X^T X of all experts' tokens where those stand in for an expert's own.
Statistics = Sequence[Sequence[Total]]

# Of the whole error: where rounding a bias to its stored dtype costs more than this, codes that need less of
# the bias may be better.
_COARSE_SHARE = 0.02


@dataclass(slots=True)
class _Shared:
    """What the tiles of a group share.

    Attributes:
        given: Linear -> what its scales owe to the whole weight, where they do.
        prepared: Method -> what it has prepared.
    """

    block: int
    group: int
    moments: Moments | None
    given: Mapping[str, GivenScales]
    prepared: dict[str, Prepared] = field(default_factory=dict)


class GroupSolver:
    """Quantizes and packs input groups, all in one way.

    Args:
        height: Most rows of a tile; by default from columns and device.
        methods: Name -> method, on the device.
    """

    def __init__(
        self,
        packer: PackingFormat,
        settings: SolverSettings,
        device: torch.device,
        height: int | None = None,
        methods: Mapping[str, Method] = METHODS,
    ) -> None:
        self._packer, self._settings, self._device = packer, settings, device
        self._height, self._methods, self._copies = height, methods, DeviceCopies(device)
        self._shared: _Shared | None = None

    def tiles(self, block: BlockPlan) -> dict[int, list[GroupTile]]:
        """Input group -> its tiles."""
        return group_tiles(block, self._device.type, self._height)

    def solve(
        self, block: BlockPlan, group: int, tensors: Tensors, statistics: Statistics, tokens: GroupTokens
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Quantize and pack the linears of one group.

        Args:
            group: Its number within the block.
            tensors: The block's source tensors, by name.
            statistics: Totals of the workers.
            tokens: Behind the sums.

        Returns:
            Packed tensors on the CPU, by name, and the rows of the report.
        """
        self.forget()
        if group in block.centered_groups:
            results = self._with_biases(block, group, tensors, statistics, tokens.total)
            return self._packed(block, results, tokens)
        tiles = self.tiles(block)[group]
        solved = [self._solved_tile(block, tile, tensors, statistics, tokens) for tile in tiles]
        self.forget()
        return self._packed(block, _merged(block, group, solved), tokens)

    def solve_batch(
        self,
        block: BlockPlan,
        groups: Sequence[int],
        tensors: Tensors,
        statistics: Sequence[Statistics],
        tokens: Sequence[GroupTokens],
    ) -> list[tuple[dict[str, torch.Tensor], list[dict[str, Any]]]]:
        """Quantize and pack groups that are alike as one batch; see `quantlib.job.alike_groups`.

        Args:
            groups: Their numbers within the block.
            statistics: Of each group.
            tokens: Of each group.

        Returns:
            Of each group what `solve` gives.
        """
        if len(groups) == 1:
            return [self.solve(block, groups[0], tensors, statistics[0], tokens[0])]
        self.forget()
        linears = [_linears_of(block, group) for group in groups]
        method, scheme = linears[0][0].method, linears[0][0].scheme
        assert method is not None and scheme is not None, "only such linears are in a group"
        weights = [{x.name: x.weight.of(tensors).to(self._device) for x in alike} for alike in linears]
        prepared = [
            self._prepare(method, self._shrunk_moments(sums, behind), behind)
            for sums, behind in zip(statistics, tokens, strict=True)
        ]
        scale_dtype = self._scale_dtype(weights[0])
        given = [self._given(here, scheme, scale_dtype) for here in weights]
        solved = self._methods[method].solve_batch(
            prepared, weights, scheme, scale_dtype=scale_dtype, given=given
        )
        begun = [
            self._begin_packed(block, _merged(block, group, [rows]), behind)
            for group, rows, behind in zip(groups, solved, tokens, strict=True)
        ]
        return [(_arrived(packed), rows) for packed, rows in begun]

    def solve_tile(
        self,
        block: BlockPlan,
        tile: GroupTile,
        tensors: Tensors,
        statistics: Statistics,
        tokens: GroupTokens,
    ) -> dict[str, SolvedRows]:
        """Quantize a tile of a group that has several; arguments as for `solve`.

        What its group shares is kept for the next tile, until `forget`.

        Returns:
            Linear -> its rows, on the CPU.
        """
        solved = self._solved_tile(block, tile, tensors, statistics, tokens)
        return {name: rows.to("cpu") for name, rows in solved.items()}

    def forget(self) -> None:
        """Let go of what was prepared."""
        self._shared = None

    def pack(
        self, block: BlockPlan, group: int, solved: Sequence[TileRows], tokens: GroupTokens
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Pack the linears of a group from all its tiles, in order; gives what `solve` gives."""
        there = [{name: rows.to(self._device) for name, rows in tile.items()} for tile in solved]
        return self._packed(block, _merged(block, group, there), tokens)

    def _solved_tile(
        self,
        block: BlockPlan,
        tile: GroupTile,
        tensors: Tensors,
        statistics: Statistics,
        tokens: GroupTokens,
    ) -> dict[str, SolvedRows]:
        linear = next(linear for linear in block.linears if linear.name == tile.runs[0].name)
        assert linear.method is not None and linear.scheme is not None, "only such linears are in a group"
        shared = self._shared_of(block, tile.group, tensors, statistics, tokens)
        prepared = self._prepared(shared, linear.method, tokens)
        stored = {found.name: found.weight for found in block.linears}
        weights = {
            run.name: stored[run.name].of(tensors)[run.start : run.end].to(self._device) for run in tile.runs
        }
        return prepared.solve(
            weights,
            linear.scheme,
            scale_dtype=self._scale_dtype(weights),
            given=given_to(tile.runs, shared.given),
        )

    def _shared_of(
        self, block: BlockPlan, group: int, tensors: Tensors, statistics: Statistics, tokens: GroupTokens
    ) -> _Shared:
        shared = self._shared
        if shared is None or (shared.block, shared.group) != (block.index, group):
            self.forget()
            moments = self._shrunk_moments(statistics, tokens)
            given = self._given_to_all(block, group, tensors)
            shared = self._shared = _Shared(block.index, group, moments, given)
        return shared

    def _given_to_all(self, block: BlockPlan, group: int, tensors: Tensors) -> dict[str, GivenScales]:
        given: dict[str, GivenScales] = {}
        linears = _linears_of(block, group)
        for scheme in dict.fromkeys(linear.scheme for linear in linears):
            if scheme is not None and scheme.owes_to_whole:
                alike = [linear for linear in linears if linear.scheme == scheme]
                weights = {linear.name: linear.weight.of(tensors).to(self._device) for linear in alike}
                given |= self._given(weights, scheme, self._scale_dtype(weights))
        return given

    def _given(
        self, weights: Tensors, scheme: WeightScheme, scale_dtype: torch.dtype
    ) -> dict[str, GivenScales]:
        return given_scales(
            weights,
            by_module(weights).values(),
            scheme,
            scale_dtype=scale_dtype,
            cuts_half_step=cuts_half_step(self._settings.scale_search),
        )

    def _prepared(self, shared: _Shared, method: str, tokens: GroupTokens) -> Prepared:
        if method not in shared.prepared:
            shared.prepared[method] = self._prepare(method, shared.moments, tokens)
        return shared.prepared[method]

    def _prepare(self, method: str, moments: Moments | None, tokens: GroupTokens) -> Prepared:
        return self._methods[method].prepare(
            hessian_CC=None if moments is None else moments.hessian_CC,
            cross_CC=None if moments is None else moments.cross_CC,
            num_tokens=tokens.total,
            solver=self._settings,
        )

    def _shrunk_moments(self, statistics: Statistics, tokens: GroupTokens) -> Moments | None:
        """About zero, with what stands in for tokens that a group lacks."""
        moments = self._moments(statistics, is_centered=False, is_extended=False)
        if moments is not None and statistics[2]:
            add_totals_(moments.hessian_CC, statistics[2], share=tokens.shared_share)
        return moments

    def _moments(self, statistics: Statistics, *, is_centered: bool, is_extended: bool) -> Moments | None:
        totals, crosses, _ = statistics
        if not totals:
            return None
        if is_centered:
            return centered_moments(totals, crosses, device=self._device)
        return moments_from(totals, crosses, is_extended=is_extended, device=self._device)

    def _scale_dtype(self, weights: Tensors) -> torch.dtype:
        return self._packer.scale_dtype(next(iter(weights.values())).dtype)

    def _packed(
        self, block: BlockPlan, results: Iterable[LinearResult], tokens: GroupTokens
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        packed, rows = self._begin_packed(block, results, tokens)
        return _arrived(packed), rows

    def _begin_packed(
        self, block: BlockPlan, results: Iterable[LinearResult], tokens: GroupTokens
    ) -> tuple[list[Pending], list[dict[str, Any]]]:
        """The tensors of each linear on their way to the CPU, while the next one is packed."""
        packed: list[Pending] = []
        rows: list[dict[str, Any]] = []
        dtypes = {linear.name: torch_dtype(linear.weight_dtype) for linear in block.linears}
        for result in results:
            name = result.report.name
            quantized = dataclasses.replace(result.quantized, model_dtype=dtypes[name])
            tensors = pack_linear(self._packer, name, quantized)
            if result.bias_R is not None:
                tensors = {**tensors, f"{name}.bias": result.bias_R}
            packed.append(self._copies.begin_back(tensors))
            rows.append(_with_tokens(result.report, tokens).to_dict())
        return packed, rows

    def _with_biases(
        self, block: BlockPlan, group: int, tensors: Tensors, statistics: Statistics, tokens: int
    ) -> list[LinearResult]:
        """A group in which some linear has a bias that is corrected."""
        linears = _linears_of(block, group)
        given = self._given_to_all(block, group, tensors)
        results: dict[str, LinearResult] = {}
        for is_centered in (False, True):
            chosen = [linear for linear in linears if linear.corrects_bias == is_centered]
            if chosen:
                moments = self._moments(statistics, is_centered=is_centered, is_extended=True)
                results |= self._solved(chosen, tensors, moments, tokens, given)
        return [results[linear.name] for linear in linears]

    def _solved(
        self,
        linears: Sequence[LinearPlan],
        tensors: Tensors,
        moments: Moments | None,
        tokens: int,
        given: Mapping[str, GivenScales],
    ) -> dict[str, LinearResult]:
        weights = {linear.name: linear.weight.of(tensors).to(self._device) for linear in linears}
        results = self._quantized(linears, weights, moments, tokens, given)
        if moments is None or moments.mean_C is None:
            return results

        def with_bias(name: str, result: LinearResult) -> CorrectedResult:
            bias_R = tensors[f"{name}.bias"].to(self._device)
            return correct_bias(result, weights[name], bias_R, moments, num_tokens=tokens)

        found = {name: with_bias(name, result) for name, result in results.items()}
        coarse = [linear for linear in linears if _is_coarse(found[linear.name])]
        if coarse:
            chosen = {linear.name: weights[linear.name] for linear in coarse}
            plain = self._quantized(coarse, chosen, about_zero(moments, tokens), tokens, given)
            others = {name: with_bias(name, result) for name, result in plain.items()}
            found |= {name: _marked(x) for name, x in others.items() if x.error < found[name].error}
        return {name: corrected.result for name, corrected in found.items()}

    def _quantized(
        self,
        linears: Sequence[LinearPlan],
        weights: Tensors,
        moments: Moments | None,
        tokens: int,
        given: Mapping[str, GivenScales],
    ) -> dict[str, LinearResult]:
        results: dict[str, LinearResult] = {}
        for method in sorted({linear.method for linear in linears if linear.method}):
            schemes = {
                linear.name: linear.scheme
                for linear in linears
                if linear.method == method and linear.scheme is not None
            }
            results |= self._methods[method](
                {name: weights[name] for name in schemes},
                schemes,
                hessian_CC=None if moments is None else moments.hessian_CC,
                cross_CC=None if moments is None else moments.cross_CC,
                num_tokens=tokens,
                scale_dtype=self._scale_dtype(weights),
                solver=self._settings,
                height=self._height,
                given=given,
            )
        return results


def _arrived(packed: Sequence[Pending]) -> dict[str, torch.Tensor]:
    return {name: tensor for pending in packed for name, tensor in pending.wait().items()}


def _linears_of(block: BlockPlan, group: int) -> list[LinearPlan]:
    return [linear for linear in block.linears if linear.name in block.input_groups[group]]


def _merged(block: BlockPlan, group: int, solved: Sequence[TileRows]) -> Iterator[LinearResult]:
    """One linear after the other, so that the codes of only one are there twice."""
    for linear in _linears_of(block, group):
        yield merged_rows(linear.name, [tile[linear.name] for tile in solved if linear.name in tile])


def _with_tokens(report: LinearReport, tokens: GroupTokens) -> LinearReport:
    report = dataclasses.replace(report, outlier_columns=tokens.outlier_columns)
    if tokens.shared is None:
        return report
    lacks_all = tokens.own == 0 and report.fallback is None and report.method != "rtn"
    return dataclasses.replace(
        report,
        tokens=tokens.own,
        shared_tokens=tokens.shared,
        dropped_tokens=tokens.dropped,
        fallback=NO_ROUTED_TOKENS if lacks_all else report.fallback,
    )


def _is_coarse(corrected: CorrectedResult) -> bool:
    return corrected.rounding_error > _COARSE_SHARE * corrected.error


def _marked(corrected: CorrectedResult) -> CorrectedResult:
    report = dataclasses.replace(corrected.result.report, fallback=COARSE_BIAS)
    return dataclasses.replace(corrected, result=dataclasses.replace(corrected.result, report=report))
