"""Whether a device factors rightly, on a matrix whose factor is known in closed form.

C columns, P rows looked at together. Libraries have been seen to give wrong factors of large matrices without
a word, of sizes where a place leaves 32 bits (46341 columns and more; the widest linears have 53248). So a
device is asked for the largest factor that a job will want of it, before there is work to lose.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantlib.cholesky import CHOLESKYS, Cholesky
from quantlib.errors import DeviceError

_ROWS_TOGETHER = 256
# Of an entry. Sums of 53248 products one after the other may lose two parts in a thousand, and the matrix
# makes at most four times as much of it; of entries that stand in each other's place one in a hundred is as
# close.
_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class CholeskyCheck:
    """What became of the ways to factor on a device.

    Attributes:
        way: The first of `quantlib.cholesky.CHOLESKYS` that was right.
        columns: Of the matrix.
        problems: Way -> what was wrong with it, of those before.
    """

    way: str
    columns: int
    problems: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON values under the attribute names."""
        return {"way": self.way, "columns": self.columns, "problems": dict(self.problems)}


def check_choleskys(
    columns: int, device: torch.device, ways: Mapping[str, Cholesky] = CHOLESKYS
) -> CholeskyCheck:
    """Find a way to factor that is right on a device.

    The matrix is D (I + v v^T) D with a diagonal D. With s_j = 1 + v_1**2 + ... + v_j**2 its factor is
    L_ij = d_i v_i v_j / sqrt(s_j s_(j-1)) below the diagonal and d_j sqrt(s_j / s_(j-1)) on it: every entry
    can be looked at in C**2 steps, none is zero, and as d and v follow no pattern one that was read or
    written in a wrong place shows. Its condition is four times that of D**2, so that what is seen is no
    rounding. How precise products are is not: TF32 would pass.

    Args:
        columns: Of the matrix.
        ways: Name -> way, in the order in which they are preferred.

    Raises:
        DeviceError: None is right.

    Cost: a factor in fp32 for every way tried, and little beside its matrix.
    """
    problems: dict[str, str] = {}
    for way, cholesky_ in ways.items():
        problem = _problem(cholesky_, columns, device)
        if problem is None:
            return CholeskyCheck(way=way, columns=columns, problems=problems)
        problems[way] = problem
    found = "; ".join(f"{way}: {problem}" for way, problem in problems.items())
    raise DeviceError(
        f"the Cholesky factor of a known matrix with {columns} columns must be right on {device}, found"
        f" {found}; leave the device's memory to this worker, try another driver or release of PyTorch, or"
        " choose device cpu",
        columns=columns,
        device=str(device),
    )


@functools.cache
def checked_choleskys(columns: int, device: torch.device) -> CholeskyCheck:
    """`check_choleskys`, once in a process for a size and device."""
    found = check_choleskys(columns, device)
    # Else small tensors would settle where it had its matrix, and the first Hessian would find no such room.
    torch.cuda.empty_cache()
    return found


def _problem(cholesky_: Cholesky, columns: int, device: torch.device) -> str | None:
    known = _Known(columns, device)
    try:
        matrix_CC = torch.empty(columns, columns, device=device)
        for rows in known.rows():
            matrix_CC[rows] = known.matrix(rows)
        # Stored transposed, as columns are to be contiguous.
        status = cholesky_(matrix_CC.mT).long()
        num_wrong = torch.zeros_like(status)
        for rows in known.rows():
            wanted_PC = known.factor(rows)
            is_right_PC = (matrix_CC.mT[rows] - wanted_PC).abs_() <= wanted_PC.abs().mul_(_TOLERANCE)
            num_wrong += is_right_PC.logical_not_().sum()
        failed, wrong = torch.stack([status, num_wrong]).tolist()
    except RuntimeError as error:  # PyTorch has no other class for what its libraries say
        return str(error).partition("\n")[0]
    if failed:
        return f"status {failed}"
    return f"{wrong} wrong entries" if wrong else None


class _Known:
    """The matrix and its factor, some rows at a time, in fp32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        power_C = torch.randint(-3, 4, (columns,), generator=generator)
        v_C = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.5
        v_C *= torch.randint(0, 2, (columns,), generator=generator) * 2 - 1
        v_C *= (3.0 / v_C.square().sum()).sqrt()
        sum_C = 1.0 + v_C.square().cumsum(0)
        before_C = sum_C - v_C.square()

        def there(value_C: torch.Tensor) -> torch.Tensor:
            return value_C.to(device, torch.float32)

        # Scaling by powers of two rounds nothing.
        scale_C = torch.exp2(power_C.double())
        self._v_C, self._added_C = there(scale_C * v_C), there(scale_C.square())
        self._right_C = there(v_C / (sum_C * before_C).sqrt())
        self._pivot_C = there(scale_C * (sum_C / before_C).sqrt())

    def rows(self) -> Iterator[slice]:
        """All of them, a panel at a time."""
        columns = len(self._v_C)
        for start in range(0, columns, _ROWS_TOGETHER):
            yield slice(start, min(start + _ROWS_TOGETHER, columns))

    def matrix(self, rows: slice) -> torch.Tensor:
        """[P, C]."""
        matrix_PC = self._v_C[rows, None] * self._v_C
        matrix_PC.diagonal(rows.start).add_(self._added_C[rows])
        return matrix_PC

    def factor(self, rows: slice) -> torch.Tensor:
        """[P, C], lower triangular."""
        factor_PC = (self._v_C[rows, None] * self._right_C).tril_(rows.start)
        factor_PC.diagonal(rows.start).copy_(self._pivot_C[rows])
        return factor_PC
