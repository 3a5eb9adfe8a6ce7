"""From the partial sums of an input group to the packed tensors of its linears."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantlib.calibration.hessian import add_total_
from quantlib.calibration.moments import (
    Moments,
    Total,
    about_zero,
    centered_moments,
    moments_from,
    without_sums,
)
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
        self, block: BlockPlan, group: int, tensors: Tensors, statistics: Sequence[Any], tokens: int
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Quantize and pack the linears of one group.

        Args:
            group: Its number within the block.
            tensors: The block's source tensors, by name.
            statistics: Int64 partial sums of the workers (none without data) and their exponent; where
                targets are corrected also those of the products with the reference stream.
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
        self, statistics: Sequence[Any], kinds: Sequence[bool], *, is_extended: bool
    ) -> dict[bool, Moments | None]:
        """Is centered -> moments; the totals, twice as large, are let go of before anything is solved."""
        totals, exponent, *crosses = statistics
        if not totals:
            return dict.fromkeys(kinds)
        total = self._total(totals, exponent)
        cross = self._total(*crosses, is_whole=True) if crosses else None
        found: dict[bool, Moments | None] = {}
        for is_centered in kinds:
            if is_centered:
                found[is_centered] = centered_moments(total, cross)
            elif is_extended:
                about_inputs = None if cross is None else without_sums(cross)
                found[is_centered] = moments_from(without_sums(total), about_inputs)
            else:
                found[is_centered] = moments_from(total, cross)
        return found

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

    def _total(self, totals: Sequence[torch.Tensor], exponent: int, *, is_whole: bool = False) -> Total:
        """The sum over all workers; what they gave may be mapped read-only and stays."""
        sum_CC = totals[0].to(self._device)
        if len(totals) > 1 and sum_CC is totals[0]:
            sum_CC = sum_CC.clone()
        for other_CC in totals[1:]:
            add_total_(sum_CC, other_CC.to(self._device), exponent, is_whole=is_whole)
        return Total(sum_CC=sum_CC, exponent=exponent)


def _is_coarse(corrected: CorrectedResult) -> bool:
    return corrected.rounding_error > _COARSE_SHARE * corrected.error


def _marked(corrected: CorrectedResult) -> CorrectedResult:
    report = dataclasses.replace(corrected.result.report, fallback=COARSE_BIAS)
    return dataclasses.replace(corrected, result=dataclasses.replace(corrected.result, report=report))
