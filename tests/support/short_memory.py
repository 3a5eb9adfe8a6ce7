"""Methods and factors that run out of memory, as a device does: in their first calls, or for many rows."""

from collections.abc import Callable
from typing import Any

import torch

from quantlib.cholesky import library_cholesky_
from quantlib.methods import METHODS, methods_with
from quantlib.methods.whole_solve import Method


class Shortage:
    """Memory that does not suffice for the first so many calls; counts how often it did not."""

    def __init__(self, num_calls: int) -> None:
        self._left, self.num_failures = num_calls, 0

    def take(self, *, is_short: bool | None = None) -> None:
        """Fail, or do not; by default as long as there are such calls left."""
        if self._left > 0 if is_short is None else is_short:
            self._left -= 1
            self.num_failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 10.56 GiB.")


def factoring_in(shortage: Shortage) -> dict[str, Method]:
    """Methods whose factors are made in such memory."""

    def cholesky_(matrix_CC: torch.Tensor) -> torch.Tensor:
        shortage.take()
        return library_cholesky_(matrix_CC)

    return methods_with(cholesky_)


def solving_in(shortage: Shortage, most_rows: int | None = None) -> dict[str, Method]:
    """Methods whose row tiles are solved in such memory; with ``most_rows`` it suffices for these, always."""

    def method(of: Method) -> Method:
        def prepare(**given: Any) -> Any:
            return _Prepared(of.prepare(**given), shortage, most_rows)

        def solve_batch(prepared: Any, tiles: Any, *arguments: Any, **given: Any) -> Any:
            if len(tiles) > 1:
                shortage.take(is_short=None if most_rows is None else True)
            return [
                group.solve(tile, *arguments, **{**given, "given": owed})
                for group, tile, owed in zip(prepared, tiles, given["given"], strict=True)
            ]

        return Method(prepare, solve_batch)

    return {name: method(found) for name, found in METHODS.items()}


class _Prepared:
    def __init__(self, prepared: Any, shortage: Shortage, most_rows: int | None) -> None:
        self._solve: Callable[..., Any] = prepared.solve
        self._shortage, self._most_rows = shortage, most_rows

    def solve(self, weights: Any, *arguments: Any, **given: Any) -> Any:
        rows = sum(len(weight_RC) for weight_RC in weights.values())
        self._shortage.take(is_short=None if self._most_rows is None else rows > self._most_rows)
        return self._solve(weights, *arguments, **given)
