"""Linears of a live block that round their inputs, as an engine does that multiplies in few bits."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from quantlib.grids.inputs import rounded_inputs
from quantlib.schemes import ActivationScheme


def round_inputs_(block: nn.Module, schemes: Mapping[str, ActivationScheme]) -> None:
    """Have linears round what they are called with; whether their weights are there or made late.

    Args:
        schemes: Path of a linear in the block -> what its inputs are rounded to.
    """
    for path, scheme in schemes.items():
        block.get_submodule(path).register_forward_pre_hook(partial(_round, scheme))


def _round(scheme: ActivationScheme, _linear: nn.Module, given: tuple[Any, ...]) -> tuple[torch.Tensor]:
    (x,) = given
    return (rounded_inputs(x, scheme),)
