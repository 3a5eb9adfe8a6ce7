"""From the partial sums of an input group to the packed tensors of its linears."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantlib.calibration.hessian import add_total_
from quantlib.calibration.moments import Moments, Total, centered_moments, moments_from, without_sums
from quantlib.job.plan import BlockPlan, LinearPlan, Plan
from quantlib.methods.contracts import LinearResult
from quantlib.packing.contracts import PackingFormat
from quantlib.solver_settings import SolverSettings
from quantlib.steps import correct_bias, solve_group

Tensors = Mapping[str, torch.Tensor]


class GroupSolver:
    """Quantizes and packs input groups as a plan says."""

    def __init__(self, plan: Plan, packer: PackingFormat, device: torch.device) -> None:
        self._packer, self._device = packer, device
        self._settings = SolverSettings.from_options(plan.options)

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
        totals, exponent, *crosses = statistics
        total = cross = None
        if totals:
            total = self._total(totals, exponent)
        if crosses:
            cross = self._total(*crosses, is_whole=True)
        linears = [linear for linear in block.linears if linear.name in block.input_groups[group]]
        results: dict[str, LinearResult] = {}
        for is_centered in (False, True):
            chosen = [linear for linear in linears if linear.corrects_bias == is_centered]
            if chosen:
                is_extended = group in block.centered_groups
                moments = _moments(total, cross, is_extended=is_extended, is_centered=is_centered)
                results |= self._solved(chosen, tensors, moments, tokens)
        results = {linear.name: results[linear.name] for linear in linears}
        packed: dict[str, torch.Tensor] = {}
        for name, result in results.items():
            packed |= {key: value.cpu() for key, value in self._packer.pack(name, result.quantized).items()}
            if result.bias_R is not None:
                packed[f"{name}.bias"] = result.bias_R.cpu()
        return packed, [result.report.to_dict() for result in results.values()]

    def _solved(
        self, linears: Sequence[LinearPlan], tensors: Tensors, moments: Moments | None, tokens: int
    ) -> dict[str, LinearResult]:
        weights = {linear.name: tensors[f"{linear.name}.weight"].to(self._device) for linear in linears}
        stored = tensors[f"{linears[0].name}.weight"].dtype
        results = solve_group(
            weights,
            linears,
            hessian_CC=None if moments is None else moments.hessian_CC,
            cross_CC=None if moments is None else moments.cross_CC,
            num_tokens=tokens,
            scale_dtype=self._packer.scale_dtype(stored),
            solver=self._settings,
        )
        if moments is None or moments.mean_C is None:
            return results
        return {
            name: correct_bias(
                result, weights[name], tensors[f"{name}.bias"].to(self._device), moments, num_tokens=tokens
            )
            for name, result in results.items()
        }

    def _total(self, totals: Sequence[torch.Tensor], exponent: int, *, is_whole: bool = False) -> Total:
        """The sum over all workers; what they gave may be mapped read-only and stays."""
        sum_CC = totals[0].to(self._device)
        if len(totals) > 1:
            sum_CC = sum_CC.clone()
        for other_CC in totals[1:]:
            add_total_(sum_CC, other_CC.to(self._device), exponent, is_whole=is_whole)
        return Total(sum_CC=sum_CC, exponent=exponent)


def _moments(
    total: Total | None, cross: Total | None, *, is_extended: bool, is_centered: bool
) -> Moments | None:
    if total is None:
        return None
    if is_centered:
        return centered_moments(total, cross)
    if is_extended:
        total, cross = without_sums(total), None if cross is None else without_sums(cross)
    return moments_from(total, cross)
