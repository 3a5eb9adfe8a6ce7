"""Checks of the inputs of a method and the error figure in its report.

R rows (out features), C columns (in features). The error is taken from the codes and scales that go to the
packer, not from the solver's own books, so a solver's mistake shows in it.
"""

import math
from collections.abc import Iterable, Mapping

import torch

from quantlib.errors import NumericsError
from quantlib.grouping import row_parts
from quantlib.quantized import QuantizedLinear

# A tile's rows: enough for a fast product, few enough that its temporary copies stay small beside a solve's.
_FEWEST_TILE_ROWS, _MOST_TILE_ROWS = {"cpu": 512, "cuda": 2048}, 4096
_TILE_ELEMENTS = 1 << 20
# Columns at a time: only one triangle of the Hessian is used. What a GPU gains in calls and in work for
# all its multiprocessors is more than the squares on the diagonal cost.
_COLUMN_BATCH = {"cpu": 256, "cuda": 2048}


def check_weights(weights: Mapping[str, torch.Tensor], hessian_CC: torch.Tensor | None) -> None:
    """Refuse what no method can quantize.

    Raises:
        NumericsError: A weight that is not a matrix, has another width than the Hessian, or holds a NaN or
            infinity; names the linear.
    """
    for name, weight_RC in weights.items():
        check_shape(name, weight_RC, hessian_CC)
        check_finite(name, weight_RC)


def check_shape(name: str, weight_RC: torch.Tensor, hessian_CC: torch.Tensor | None) -> None:
    """The part of `check_weights` that looks at no value."""
    if weight_RC.ndim != 2 or weight_RC.numel() == 0:
        raise NumericsError(
            f"{name}: a weight must be a matrix that is not empty, found shape {tuple(weight_RC.shape)}",
            linear=name,
        )
    if hessian_CC is not None and hessian_CC.shape != (weight_RC.shape[1],) * 2:
        raise NumericsError(
            f"{name}: {weight_RC.shape[1]} columns need a Hessian of that size, found"
            f" {tuple(hessian_CC.shape)}; linears of one call must read the same input",
            linear=name,
        )


def check_finite(name: str, weight_RC: torch.Tensor) -> None:
    """The part of `check_weights` that looks at every value: a pass over memory."""
    lowest, highest = (bound.item() for bound in torch.aminmax(weight_RC))
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise NumericsError(
            f"{name}: weights must be finite, found values from {lowest} to {highest};"
            " the source checkpoint is damaged or was saved from a diverged run",
            linear=name,
        )


def at_least_fp32(weight_RC: torch.Tensor) -> torch.Tensor:
    """The weight in fp32, unless it is wider."""
    return weight_RC.to(torch.promote_types(weight_RC.dtype, torch.float32))


def share(error: float, whole: float) -> float:
    """A loss as a share of what a weight does altogether; zero for a weight that does nothing."""
    # Rounding may leave an error of nothing slightly below zero.
    return max(error, 0.0) / whole if whole > 0 else 0.0


def relative_error(
    weight_RC: torch.Tensor, quantized: QuantizedLinear, hessian_CC: torch.Tensor | None
) -> float:
    """`error_energy` as a share of `weight_energy`."""
    return share(error_energy(weight_RC, quantized, hessian_CC), weight_energy(weight_RC, hessian_CC))


def weight_energy(weight_RC: torch.Tensor, hessian_CC: torch.Tensor | None) -> float:
    """tr(W H W^T); without a Hessian |W|**2.

    Shapes:
        weight_RC: floating [R, C]; taken as fp32.
        hessian_CC: fp32 [C, C], symmetric, undamped.

    Numerics: products in fp32, sums in fp64; without a Hessian those of a row in fp32.

    Cost: R * C**2 multiply-adds; temporary memory of a row tile.
    """
    tiles = (at_least_fp32(weight_RC[part]) for part in _tiles(weight_RC, hessian_CC))
    return _total(_energy(tile_RC, hessian_CC) for tile_RC in tiles)


def error_energy(
    weight_RC: torch.Tensor, quantized: QuantizedLinear, hessian_CC: torch.Tensor | None
) -> float:
    """tr(E H E^T) with E = W - levels; without a Hessian |E|**2. Cost as `weight_energy`."""
    return _total(
        _energy(at_least_fp32(weight_RC[part]) - quantized.rows(part).dequantize(), hessian_CC)
        for part in _tiles(weight_RC, hessian_CC)
    )


def plain_energies(
    exact_RC: torch.Tensor, quantized: QuantizedLinear, work_RC: torch.Tensor
) -> tuple[float, float]:
    """`weight_energy` and `error_energy` of a handful of rows without a Hessian.

    Shapes:
        exact_RC: The weights, [R, C] in fp32 or wider.
        work_RC: The same; overwritten.
    """
    weight = _squared_norm(exact_RC, work_RC).item()
    error_RC = quantized.dequantize(out=work_RC).sub_(exact_RC)
    return weight, _squared_norm(error_RC, work_RC).item()


def expected_energy(
    scale_RG: torch.Tensor,
    pivots_C: torch.Tensor,
    order_C: torch.Tensor,
    width: int,
    without_RM: torch.Tensor | None = None,
) -> float:
    """What error feedback should leave of a weight: sum of scale**2 / 12 * pivot**2 over all its entries.

    Without clipping the residuals are uniform within a step (arXiv 2507.18553); known before a code is
    chosen.

    Shapes:
        scale_RG: [R, G], any floating dtype.
        pivots_C: [C], of the damped Hessian's factor, by position.
        order_C: int64 [C], position -> column.
        without_RM: int64 [R, M], columns of weights that are kept and leave no error; None for none.

    Args:
        width: Columns of a group.
    """
    squares_C = torch.zeros_like(pivots_C).index_copy_(0, order_C, pivots_C.square())
    squares_G = torch.stack([group.sum() for group in squares_C.double().split(width)])
    expected = (scale_RG.double().square() @ squares_G).sum()
    if without_RM is not None:
        step_RM = scale_RG.double().gather(1, without_RM // width)
        expected -= (step_RM.square() * squares_C.double()[without_RM]).sum()
    return expected.item() / 12.0


def _tiles(weight_RC: torch.Tensor, hessian_CC: torch.Tensor | None) -> list[slice]:
    if hessian_CC is None:
        return row_parts(weight_RC)
    wanted = _TILE_ELEMENTS // weight_RC.shape[1]
    step = min(max(wanted, _FEWEST_TILE_ROWS[weight_RC.device.type]), _MOST_TILE_ROWS)
    return [slice(start, start + step) for start in range(0, weight_RC.shape[0], step)]


def _total(energies: Iterable[torch.Tensor]) -> float:
    """Summed where they are: each would be waited for."""
    return float(sum(energies))


def _energy(x_RC: torch.Tensor, hessian_CC: torch.Tensor | None) -> torch.Tensor:
    """tr(x H x^T), or |x|**2, using each entry above the diagonal once for both sides; fp64 []."""
    if hessian_CC is None:
        return _squared_norm(x_RC, torch.empty_like(x_RC))
    total = torch.zeros((), dtype=torch.float64, device=x_RC.device)
    step = _COLUMN_BATCH[x_RC.device.type]
    for start in range(0, x_RC.shape[1], step):
        batch = slice(start, start + step)
        pulled_RB = x_RC[:, batch] @ hessian_CC[batch, batch]
        if start > 0:
            pulled_RB.addmm_(x_RC[:, :start], hessian_CC[:start, batch], alpha=2.0)
        total += torch.sum(pulled_RB.mul_(x_RC[:, batch]), dtype=torch.float64)
    return total


def _squared_norm(x_RC: torch.Tensor, work_RC: torch.Tensor) -> torch.Tensor:
    """|x|**2, fp64 []; the squares go to ``work_RC``, which may be ``x_RC``."""
    return torch.mul(x_RC, x_RC, out=work_RC).sum(1).sum(dtype=torch.float64)
