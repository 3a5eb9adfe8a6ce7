"""From the partial sums of an input group to the packed tensors of its linears."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantlib.calibration.moments import Moments, about_zero, centered_moments, moments_from
from quantlib.calibration.totals import Total
from quantlib.job.plan import BlockPlan, LinearPlan
from quantlib.methods.contracts import COARSE_BIAS, LinearResult
from quantlib.packing.contracts import PackingFormat
from quantlib.solver_settings import SolverSettings
from quantlib.steps import CorrectedResult, correct_bias, solve_group

Tensors = Mapping[str, torch.Tensor]

# Of the whole error: where rounding a bias to its stored dtype costs more than this, codes that need less of
# the bias may be better.
_COARSE_SHARE = 0.02


class GroupSolver:
    """Quantizes and packs input groups, all in one way."""

    def __init__(self, packer: PackingFormat, settings: SolverSettings, device: torch.device) -> None:
        self._packer, self._settings, self._device = packer, settings, device

    def solve(
        self,
        block: BlockPlan,
        group: int,
        tensors: Tensors,
        statistics: Sequence[Sequence[Total]],
        tokens: int,
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Quantize and pack the linears of one group.

        Args:
            group: Its number within the block.
            tensors: The block's source tensors, by name.
            statistics: Totals of the workers (none without data); where targets are corrected also those of
                the products with the reference stream.
            tokens: Calibration tokens behind the sums.

        Returns:
            Packed tensors on the CPU, by name, and the rows of the report.
        """
        linears = [linear for linear in block.linears if linear.name in block.input_groups[group]]
        kinds = sorted({linear.corrects_bias for linear in linears})
        moments = self._moments(statistics, kinds, is_extended=group in block.centered_groups)
        results: dict[str, LinearResult] = {}
        for is_centered in kinds:
            chosen = [linear for linear in linears if linear.corrects_bias == is_centered]
            results |= self._solved(chosen, tensors, moments[is_centered], tokens)
        results = {linear.name: results[linear.name] for linear in linears}
        packed: dict[str, torch.Tensor] = {}
        for name, result in results.items():
            packed |= {key: value.cpu() for key, value in self._packer.pack(name, result.quantized).items()}
            if result.bias_R is not None:
                packed[f"{name}.bias"] = result.bias_R.cpu()
        return packed, [result.report.to_dict() for result in results.values()]

    def _moments(
        self, statistics: Sequence[Sequence[Total]], kinds: Sequence[bool], *, is_extended: bool
    ) -> dict[bool, Moments | None]:
        """Is centered -> moments."""
        totals, crosses = statistics
        if not totals:
            return dict.fromkeys(kinds)
        return {
            is_centered: centered_moments(totals, crosses, device=self._device)
            if is_centered
            else moments_from(totals, crosses, is_extended=is_extended, device=self._device)
            for is_centered in kinds
        }

    def _solved(
        self, linears: Sequence[LinearPlan], tensors: Tensors, moments: Moments | None, tokens: int
    ) -> dict[str, LinearResult]:
        weights = {linear.name: tensors[f"{linear.name}.weight"].to(self._device) for linear in linears}
        results = self._quantized(linears, weights, moments, tokens)
        if moments is None or moments.mean_C is None:
            return results

        def with_bias(name: str, result: LinearResult) -> CorrectedResult:
            bias_R = tensors[f"{name}.bias"].to(self._device)
            return correct_bias(result, weights[name], bias_R, moments, num_tokens=tokens)

        found = {name: with_bias(name, result) for name, result in results.items()}
        coarse = [linear for linear in linears if _is_coarse(found[linear.name])]
        if coarse:
            chosen = {linear.name: weights[linear.name] for linear in coarse}
            plain = self._quantized(coarse, chosen, about_zero(moments, tokens), tokens)
            others = {name: with_bias(name, result) for name, result in plain.items()}
            found |= {name: _marked(x) for name, x in others.items() if x.error < found[name].error}
        return {name: corrected.result for name, corrected in found.items()}

    def _quantized(
        self,
        linears: Sequence[LinearPlan],
        weights: Tensors,
        moments: Moments | None,
        tokens: int,
    ) -> dict[str, LinearResult]:
        stored = next(iter(weights.values())).dtype
        return solve_group(
            weights,
            linears,
            hessian_CC=None if moments is None else moments.hessian_CC,
            cross_CC=None if moments is None else moments.cross_CC,
            num_tokens=tokens,
            scale_dtype=self._packer.scale_dtype(stored),
            solver=self._settings,
        )


def _is_coarse(corrected: CorrectedResult) -> bool:
    return corrected.rounding_error > _COARSE_SHARE * corrected.error


def _marked(corrected: CorrectedResult) -> CorrectedResult:
    report = dataclasses.replace(corrected.result.report, fallback=COARSE_BIAS)
    return dataclasses.replace(corrected, result=dataclasses.replace(corrected.result, report=report))
