"""What every quantization method takes and gives back.

R rows (out features), C columns (in features). A method sees the linears of one input group together, because
they share the activations and therefore the Hessian.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import DEFAULT_SOLVER, SolverSettings

# Kinds of `LinearReport.fallback` beside the rungs of `linalg` below the first.
RTN_NO_TOKENS = "rtn_no_tokens"
RTN_CONSTANT_INPUTS = "rtn_constant_inputs"
RTN_NOT_FACTORED = "rtn_not_factored"
COARSE_BIAS = "coarse_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearReport:
    """What happened to one linear.

    Attributes:
        name: Module name.
        method: The method asked for.
        bits: Bits of a code.
        predicted_error: What rounding should cost, known before a code is chosen: scale**2 / 12 times the
            factor's pivots squared, summed, over tr(W H W^T); None without a factor. The real error is above
            it where weights are clipped.
        relative_error: tr(E H E^T) / tr(W H W^T) with E = W - levels and the undamped Hessian; without a
            Hessian |E|**2 / |W|**2.
        damping_fraction: Damping of the factor used, as a fraction of the mean live diagonal; 0 without one.
        damping_attempts: Factorizations tried; 0 without one.
        tokens: Calibration tokens behind the Hessian.
        dead_columns: Input features that were zero in every token.
        clipped_fraction: Share of the weights (after feedback) more than half a step outside the grid.
        bounded_scales: Groups whose scale did not fit the stored dtype and was moved to its bound.
        fallback: None, or what was done instead of the first choice: ``more_damping``, ``float64_factor``,
            ``shrinkage``, ``rtn_no_tokens``, ``rtn_constant_inputs`` (all zero, or about the mean),
            ``rtn_not_factored``, ``coarse_bias`` (codes about zero, as the bias cannot take up the mean).
        bias_change: The change of the bias squared and summed over the rows, over the mean square of the
            weight's outputs about their mean. None where it was not corrected. The two errors are then about
            the mean (but for ``coarse_bias``), and ``relative_error`` holds what rounding left of the bias.
    """

    name: str
    method: str
    bits: int
    predicted_error: float | None
    relative_error: float
    damping_fraction: float
    damping_attempts: int
    tokens: int
    dead_columns: int
    clipped_fraction: float
    bounded_scales: int
    fallback: str | None
    bias_change: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values under the attribute names."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearResult:
    """A quantized linear, its report, and its bias [R] in the stored dtype where that changed."""

    quantized: QuantizedLinear
    report: LinearReport
    bias_R: torch.Tensor | None = None


class Method(Protocol):
    """A way to choose codes."""

    def __call__(
        self,
        weights: Mapping[str, torch.Tensor],
        schemes: Mapping[str, WeightScheme],
        *,
        hessian_CC: torch.Tensor | None,
        cross_CC: torch.Tensor | None = None,
        num_tokens: int,
        scale_dtype: torch.dtype,
        solver: SolverSettings = DEFAULT_SOLVER,
    ) -> dict[str, LinearResult]:
        """Quantize the linears of one input group.

        Shapes:
            weights: Name -> floating [R, C], taken as fp32; R may differ. Not changed.
            hessian_CC: fp32 [C, C], a positive multiple of X^T X over the calibration tokens; None without
                calibration. Not changed.

            cross_CC: fp32 [C, C], X_ref^T X by the same measure, where the targets are the outputs that the
                weights give on the reference inputs X_ref; None otherwise. Not changed.

        Args:
            weights: Linears that read the same input.
            schemes: Name -> scheme, for every name in ``weights``.
            hessian_CC: Second moments of the input.
            num_tokens: Tokens summed in ``hessian_CC``.
            scale_dtype: Dtype in which the output format stores scales.
            solver: The choices that are left to the method.

        Returns:
            Name -> result, in the order of ``weights``.

        Raises:
            NumericsError: A weight or the Hessian is not finite, or shapes do not fit.
        """
        ...
