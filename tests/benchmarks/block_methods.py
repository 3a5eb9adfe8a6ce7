"""Methods as a worker has them on a device: with factors made in a way that is right there."""

from collections.abc import Mapping

import torch

from quantlib.cholesky import CHOLESKYS
from quantlib.cholesky_check import CholeskyCheck, checked_choleskys
from quantlib.methods import METHODS, methods_with
from quantlib.methods.whole_solve import Method


def checked_methods(columns: int, device: torch.device) -> tuple[Mapping[str, Method], CholeskyCheck | None]:
    """Name -> method, and what was found of a GPU; a worker has no check of a CPU.

    Args:
        columns: Of the widest linear.

    Raises:
        DeviceError: A GPU does not make right factors in any way.
    """
    if device.type == "cpu":
        return METHODS, None
    check = checked_choleskys(columns, device)
    return methods_with(CHOLESKYS[check.way]), check


def check_line(check: CholeskyCheck | None) -> str:
    """What came of the check."""
    if check is None:
        return "factors: by the library, of a CPU without a check"
    problems = "".join(f"; {way} failed: {problem}" for way, problem in check.problems.items())
    return f"factors: the way {check.way} is right with {check.columns} columns{problems}"
