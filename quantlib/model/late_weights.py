"""Linears in runs of rows, and linears whose weights are made only while they run.

A linear of many rows is a product for every run of them, wherever its weight is: a product of another shape
may round differently, and what a job writes must not depend on the memory it had.

R rows (out features), C columns (in features).
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard, cast

import torch
from torch import nn

from quantlib.errors import CheckpointError
from quantlib.panels import weight_runs

RowsOf = Callable[[slice], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LateWeight:
    """A weight that is not there yet.

    Attributes:
        shape: R and C.
        begin: Called once a forward; gives rows of the weight, in any floating dtype, on any device.
    """

    shape: tuple[int, ...]
    begin: Callable[[], RowsOf]


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module multiplies by its weight and does nothing else: some subclasses route or group."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def stored_weight(weight_RC: torch.Tensor) -> LateWeight:
    """A weight that stays as it is stored until it is needed."""
    return LateWeight(shape=tuple(weight_RC.shape), begin=lambda: weight_RC.__getitem__)


def run_in_parts_(block: nn.Module) -> None:
    """Have linears of many rows run as `quantlib.panels.weight_runs` says, with the weights they have."""
    for linear in block.modules():
        if is_plain_linear(linear) and len(weight_runs(linear.out_features)) > 1:
            _replace_forward_(linear, lambda weight_RC=linear.weight: weight_RC.__getitem__)


def put_late_(
    block: nn.Module, weights: Mapping[str, LateWeight], *, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Have linears make their weights when they run; their parameters stay without values.

    Args:
        weights: Path of a linear in the block -> its weight.
        dtype: In which it is run.
        device: Where.

    Raises:
        CheckpointError: A weight has a wrong shape.

    Cost: at a time the rows of one run of one linear, and what its `LateWeight` holds.
    """
    for path, weight in weights.items():
        linear = block.get_submodule(path)
        assert is_plain_linear(linear)
        if weight.shape != tuple(linear.weight.shape):
            raise CheckpointError(
                f"the weight of {path} has shape {list(weight.shape)}, the model of config.json wants"
                f" {list(linear.weight.shape)}; config.json and weights do not belong together",
                tensor=path,
            )
        empty = torch.empty(weight.shape, dtype=dtype, device="meta")
        linear.weight = nn.Parameter(empty, requires_grad=False)
        _replace_forward_(linear, partial(_live_rows, weight, dtype, device))


def _live_rows(weight: LateWeight, dtype: torch.dtype, device: torch.device | str) -> RowsOf:
    rows_of = weight.begin()
    # As it is stored to the device, and made wide there: half the bytes on the bus.
    return lambda rows: rows_of(rows).to(device).to(dtype)


def _replace_forward_(linear: nn.Linear, begin: Callable[[], RowsOf]) -> None:
    # Of the instance: hooks of the module are called as before. By proxy, or the linear would hold itself,
    # and its weight would stay until Python happens to look for such circles.
    vars(linear)["forward"] = partial(_forward, cast("nn.Linear", weakref.proxy(linear)), begin)


def _forward(linear: nn.Linear, begin: Callable[[], RowsOf], x: torch.Tensor) -> torch.Tensor:
    runs, rows_of = weight_runs(linear.out_features), begin()
    if len(runs) == 1:
        return nn.functional.linear(x, rows_of(runs[0]), linear.bias)
    output = x.new_empty(*x.shape[:-1], linear.out_features)
    for rows in runs:
        bias_R = None if linear.bias is None else linear.bias[rows]
        output[..., rows] = nn.functional.linear(x, rows_of(rows), bias_R)
    return output
