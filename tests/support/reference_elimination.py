"""GPTQ by elimination, in float64 numpy: the oracle for the invariants of the whole method.

Nothing is factored. The inverse of the damped Hessian is written out, and one column after another is rounded
and eliminated from it as in Gaussian elimination (the form of the optimal brain surgeon). Damping, order and
the scales of the extremes are worked out here as well. It shares no code with quantlib.
"""

import itertools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Eliminated:
    """What came of a solve; everything in natural column order.

    codes [R, C]; loss [R], the sum of what every column cost when it was rounded; clipped [R], how many
    targets lay more than half a step outside the grid; pivots [C], what a unit error of a column costs when
    the columns after it make up for it (the squared diagonal of R in H = R R^T).
    """

    codes: np.ndarray
    loss: np.ndarray
    clipped: np.ndarray
    pivots: np.ndarray


def damped_hessian(hessian: np.ndarray, num_tokens: int) -> np.ndarray:
    """Dead columns take no part in the mean; between 0.2 % and 50 % of it are added."""
    diagonal = hessian.diagonal()
    fraction = min(max(0.1 * len(hessian) / num_tokens, 0.002), 0.5)
    return hessian + fraction * diagonal[diagonal > 0].mean() * np.eye(len(hessian))


def solving_order(name: str, hessian: np.ndarray, width: int) -> list[int]:
    """Columns, the first to be solved first; of equal ones the lowest column."""
    diagonal = hessian.diagonal()
    columns = list(range(len(hessian)))
    if name == "natural":
        return columns
    peak = [diagonal[c // width * width :][:width].max() for c in columns]
    if name == "group-aware":
        return sorted(columns, key=lambda c: (-peak[c], c // width, -diagonal[c], c))
    return sorted(columns, key=lambda c: (-diagonal[c], c))


def scales_of_extremes(weight: np.ndarray, bits: int, is_symmetric: bool, width: int) -> np.ndarray:
    """[R, G], before they are rounded to a stored dtype."""
    low, high = _extremes(weight, width)
    return (np.maximum(-low, high) * 2 if is_symmetric else high - low) / (2**bits - 1)


def zeros_of_extremes(
    weight: np.ndarray, stored: np.ndarray, bits: int, is_symmetric: bool, width: int
) -> np.ndarray:
    """[R, G], the codes that mean zero on the stored scales."""
    if is_symmetric:
        return np.full(stored.shape, 2 ** (bits - 1))
    return np.clip(np.rint(-_extremes(weight, width)[0] / stored), 0, 2**bits - 1).astype(int)


def _extremes(weight: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    groups = [weight[:, start : start + width] for start in range(0, weight.shape[1], width)]
    low = np.stack([np.minimum(group.min(1), 0) for group in groups], 1)
    return low, np.stack([np.maximum(group.max(1), 0) for group in groups], 1)


def solve_by_elimination(
    weight: np.ndarray,
    damped: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    *,
    width: int,
    bits: int,
    order: list[int],
) -> Eliminated:
    """Round a column, let the others make up for the error, strike it out of the inverse, and so on."""
    inverse, running = np.linalg.inv(damped), weight.astype(np.float64)
    codes = np.zeros(weight.shape, dtype=int)
    pivots, loss, clipped = np.zeros(len(damped)), np.zeros(len(weight)), np.zeros(len(weight), dtype=int)
    for column in order:
        step, offset = scale[:, column // width].astype(np.float64), zero[:, column // width]
        target = running[:, column]
        code = np.clip(np.rint(target / step) + offset, 0, 2**bits - 1).astype(int)
        miss = target - (code - offset) * step
        pivots[column] = 1 / inverse[column, column]
        running -= np.outer(miss * pivots[column], inverse[column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) * pivots[column]
        codes[:, column] = code
        loss += miss**2 * pivots[column]
        clipped += np.abs(miss / step) > 0.5
    return Eliminated(codes=codes, loss=loss, clipped=clipped, pivots=pivots)


def quadratic(error: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """e H e^T of every row e, [R]."""
    return np.einsum("ri,ij,rj->r", error, hessian, error)


def every_loss(weight: np.ndarray, hessian: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All choices of one level a column for a single row [C], as indices [K, C], and what each costs, [K].

    levels [L, C]: what may be chosen for every column.
    """
    choices = np.array(list(itertools.product(range(len(levels)), repeat=len(weight))))
    chosen = levels[choices, np.arange(len(weight))]
    return choices, quadratic(weight - chosen, hessian)
