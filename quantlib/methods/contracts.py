"""What every quantization method takes and gives back.

R rows (out features), C columns (in features). The linears of one input group share the activations and
therefore the Hessian: what follows from it is prepared once, and then any rows of theirs are solved, in *row
tiles*.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from quantlib.grids.given_scales import NOTHING_GIVEN, GivenScales
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WeightScheme
from quantlib.solver_settings import SolverSettings

# Kinds of `LinearReport.fallback` beside the rungs of `linalg` below the first.
RTN_NO_TOKENS = "rtn_no_tokens"
RTN_CONSTANT_INPUTS = "rtn_constant_inputs"
RTN_NOT_FACTORED = "rtn_not_factored"
NO_ROUTED_TOKENS = "no_routed_tokens"
COARSE_BIAS = "coarse_bias"

# Kinds of `LinearReport.memory_step`, each tried where the one before did not do.
EMPTIED_CACHE, SMALLER_TILES, ON_CPU = "emptied_cache", "smaller_tiles", "cpu"
_MEMORY_STEPS = (None, EMPTIED_CACHE, SMALLER_TILES, ON_CPU)


def deepest_step(steps: Iterable[str | None]) -> str | None:
    """What reports of linears say whose parts took these steps.

    >>> deepest_step([None, "smaller_tiles", "emptied_cache"])
    'smaller_tiles'
    """
    return max(steps, key=_MEMORY_STEPS.index, default=None)


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
        tokens: Calibration tokens behind the Hessian; of a routed expert those that it was given.
        dead_columns: Input features that were zero in every token.
        clipped_fraction: Share of the weights (after feedback) more than half a step outside the grid.
        bounded_scales: Groups whose scale did not fit the stored dtype and was moved to its bound.
        fallback: None, or what was done instead of the first choice: ``more_damping``, ``float64_factor``,
            ``shrinkage``, ``rtn_no_tokens``, ``rtn_constant_inputs`` (all zero, or about the mean),
            ``rtn_not_factored``, ``coarse_bias`` (codes about zero, as the bias cannot take up the mean),
            ``no_routed_tokens`` (an expert with the Hessian of other experts' tokens alone).
        bias_change: The change of the bias squared and summed over the rows, over the mean square of the
            weight's outputs about their mean. None where it was not corrected. The two errors are then about
            the mean (but for ``coarse_bias``), and ``relative_error`` holds what rounding left of the bias.
        shared_tokens: Of a routed expert, how many tokens those count for that were not its own; else None.
        dropped_tokens: Such tokens that were not finite in this expert and are not counted.
        outlier_columns: Columns of the input with a magnitude of 6 or more in some token (LLM.int8's outlier
            features); None where no token was seen.
        kept_weights: Weights that are kept in 16 bits beside their codes, of columns or single ones.
        memory_step: None, or how it was solved after all when memory of the device had not sufficed:
            ``emptied_cache`` (once more), ``smaller_tiles`` (fewer rows at a time), ``cpu`` (elsewhere).
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
    shared_tokens: float | None = None
    dropped_tokens: int | None = None
    outlier_columns: int | None = None
    kept_weights: int = 0
    memory_step: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values under the attribute names."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearResult:
    """A quantized linear, its report, and its bias [R] in the stored dtype where that changed."""

    quantized: QuantizedLinear
    report: LinearReport
    bias_R: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What a report says of a solve as a whole; attributes as in `LinearReport`."""

    method: str
    tokens: int
    dead_columns: int
    damping_fraction: float = 0.0
    damping_attempts: int = 0
    fallback: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedRows:
    """Some rows of a linear, quantized, with what its report adds up over the rows.

    Attributes:
        quantized: The rows.
        circumstances: The same for all rows of a linear.
        weight_energy: `measures.weight_energy` of the rows.
        error_energy: `measures.error_energy` of the rows.
        expected_energy: `measures.expected_energy` of the rows; None without a factor, and of floats, whose
            steps are unequal.
        num_clipped: Weights (after feedback) more than half a step outside the grid.
        num_bounded: Groups whose scale did not fit the stored dtype.
        memory_step: As in `LinearReport`.
    """

    quantized: QuantizedLinear
    circumstances: Circumstances
    weight_energy: float
    error_energy: float
    expected_energy: float | None
    num_clipped: int
    num_bounded: int
    memory_step: str | None = None

    def to(self, device: torch.device | str) -> "SolvedRows":
        """The same with its tensors on a device."""
        return dataclasses.replace(self, quantized=self.quantized.to(device))


class Prepared(Protocol):
    """What the linears of an input group share, made once: all that is C x C."""

    def solve(
        self,
        weights: Mapping[str, torch.Tensor],
        scheme: WeightScheme,
        *,
        scale_dtype: torch.dtype,
        given: Mapping[str, GivenScales] = NOTHING_GIVEN,
    ) -> dict[str, SolvedRows]:
        """Quantize a row tile.

        Shapes:
            weights: Name -> floating [R, C], some rows of a linear, taken as fp32; R may differ. Not changed.

        Args:
            scheme: Of all of them.
            scale_dtype: Dtype in which the output format stores scales.
            given: Name -> what the scales of its rows owe to the whole weight, where they do.

        Returns:
            Name -> its rows, in the order of ``weights``.

        Raises:
            NumericsError: A weight is not finite, or shapes do not fit.
        """
        ...


class Prepare(Protocol):
    """A way to choose codes: what it makes of the moments of an input group."""

    def __call__(
        self,
        *,
        hessian_CC: torch.Tensor | None,
        cross_CC: torch.Tensor | None,
        num_tokens: int,
        solver: SolverSettings,
    ) -> Prepared:
        """Prepare the solve of any rows of the linears that read one input.

        Shapes:
            hessian_CC: fp32 [C, C], a positive multiple of X^T X over the calibration tokens; None without
                calibration. Not changed.

            cross_CC: fp32 [C, C], X_ref^T X by the same measure, where the targets are the outputs that the
                weights give on the reference inputs X_ref; None otherwise. Not changed.

        Args:
            num_tokens: Tokens summed in ``hessian_CC``.
            solver: The choices that are left to the method.

        Raises:
            NumericsError: The Hessian is not finite or not given for tokens that were counted.
        """
        ...


class SolveBatch(Protocol):
    """A way to solve row tiles of several input groups at once."""

    def __call__(
        self,
        prepared: Sequence[Prepared],
        tiles: Sequence[Mapping[str, torch.Tensor]],
        scheme: WeightScheme,
        *,
        scale_dtype: torch.dtype,
        given: Sequence[Mapping[str, GivenScales]] = (),
    ) -> list[dict[str, SolvedRows]]:
        """Quantize row tiles of the same numbers of rows and columns, each of an input group of its own.

        Args:
            prepared: Of each tile what the method has prepared of its input group, all with the same choices.
            tiles: What `Prepared.solve` takes of each.
            scheme: Of all linears.
            scale_dtype: Dtype in which the output format stores scales.
            given: Of each tile what `Prepared.solve` takes; by default nothing.

        Returns:
            Of each tile what `Prepared.solve` gives; on a CPU the same bits.

        Raises:
            NumericsError: A weight is not finite, or shapes do not fit.
        """
        ...
