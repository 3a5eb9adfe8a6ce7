"""GPTQ as first published, in float64 numpy, one column at a time: the oracle of the solver tests.

It takes the road the project does not: damp, invert, take the upper Cholesky factor of the inverse, and push
each column's error into the columns still to come. It shares no code with quantlib.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ReferenceSolution:
    """codes [R, C] in natural order; loss [R] = tr of the damped quadratic form of every row's error."""

    codes: np.ndarray
    levels: np.ndarray
    loss: np.ndarray
    upper: np.ndarray
    order: np.ndarray


def solve_reference(
    weight: np.ndarray,
    hessian: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    *,
    group_width: int,
    num_codes: int,
    damping: float,
    values: np.ndarray | None = None,
) -> ReferenceSolution:
    """Column by column over falling diagonal; ``damping`` is what is added to the diagonal, absolute.

    weight [R, C], hessian [C, C], scale and zero [R, G]; ``values`` [V] are what codes mean where they are
    no integers: the nearest is looked for among all of them.
    """
    weight, hessian = weight.astype(np.float64), hessian.astype(np.float64)
    num_rows, num_columns = weight.shape
    order = np.array(sorted(range(num_columns), key=lambda c: (-hessian[c, c], c)))
    damped = hessian[np.ix_(order, order)] + damping * np.eye(num_columns)
    inverse = np.linalg.inv(damped)
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
    running = weight[:, order].copy()
    codes = np.zeros((num_rows, num_columns), dtype=np.int64)
    levels = np.zeros((num_rows, num_columns))
    loss = np.zeros(num_rows)
    for position, column in enumerate(order):
        step = scale[:, column // group_width].astype(np.float64)
        offset = zero[:, column // group_width].astype(np.float64)
        if values is None:
            code = np.clip(np.rint(running[:, position] / step) + offset, 0, num_codes - 1)
            level = (code - offset) * step
        else:
            code = np.abs(running[:, position, None] / step[:, None] - values).argmin(1)
            level = values[code] * step
        error = (running[:, position] - level) / upper[position, position]
        for later in range(position + 1, num_columns):
            running[:, later] -= error * upper[position, later]
        codes[:, column], levels[:, column] = code, level
        loss += error**2
    return ReferenceSolution(codes=codes, levels=levels, loss=loss, upper=upper, order=order)


def correlated_inputs(num_tokens: int, num_columns: int, seed: int) -> np.ndarray:
    """Inputs [N, C] like those of a language model: uneven feature sizes, strong correlation."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(num_columns, num_columns)) / np.sqrt(num_columns) + np.eye(num_columns)
    sizes = np.exp(rng.normal(size=num_columns))
    return rng.normal(size=(num_tokens, num_columns)) @ mixing * sizes
