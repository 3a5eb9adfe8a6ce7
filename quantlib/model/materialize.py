"""Live copies of parts of the meta model: same modules, real tensors.

A copy costs as much as its handful of module objects. Configurations and meta parameters are shared with the
skeleton, which is never changed.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PretrainedConfig

from quantlib.errors import CheckpointError
from quantlib.strided_view import StridedView

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where a checkpoint's ``tensor`` goes: to ``attribute`` of the submodule at ``path``.

    ``view`` says which part of it, in which orientation; None is all of it as it is.
    """

    path: str
    attribute: str
    tensor: str
    view: StridedView | None = None


def copy_module(module: Module, replaced: Mapping[int, Any] | None = None) -> Module:
    """A deep copy that shares parameters and configurations.

    Args:
        module: What to copy.
        replaced: id of an object inside -> the object that stands in its place in the copy.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for inner in module.modules():
        configs = [value for value in vars(inner).values() if isinstance(value, PretrainedConfig)]
        memo.update({id(config): config for config in configs})
    memo.update(replaced or {})
    return copy.deepcopy(module, memo)


def fill_(
    module: nn.Module,
    slots: Iterable[Slot],
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Put tensors into their slots and all real buffers on the device.

    Floating tensors are cast to ``dtype``; where dtype and device match already, memory is shared. Buffers
    keep their dtype (transformers computes rotary frequencies in fp32). A tensor with several slots (a tied
    embedding) becomes one parameter.

    Raises:
        CheckpointError: A tensor is missing or has another shape than the model wants.
    """
    made: dict[tuple[str, StridedView | None], Any] = {}
    for slot in slots:
        if slot.tensor not in tensors:
            raise CheckpointError(f"tensor {slot.tensor} is needed and was not given", tensor=slot.tensor)
        owner = module.get_submodule(slot.path)
        key = (slot.tensor, slot.view)
        if key not in made:
            place = getattr(owner, slot.attribute)
            live = _live(slot, tensors[slot.tensor], place.shape, dtype, device)
            is_parameter = isinstance(place, nn.Parameter)
            made[key] = nn.Parameter(live, requires_grad=False) if is_parameter else live
        places = owner._parameters if slot.attribute in owner._parameters else owner._buffers
        places[slot.attribute] = made[key]
    for inner in module.modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                inner._buffers[name] = buffer.to(device)


def _live(
    slot: Slot, tensor: torch.Tensor, place: torch.Size, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    wanted = place if slot.view is None else torch.Size(slot.view.whole)
    if tensor.shape != wanted:
        raise CheckpointError(
            f"tensor {slot.tensor} has shape {list(tensor.shape)}, the model of config.json wants"
            f" {list(wanted)}; config.json and weights do not belong together",
            tensor=slot.tensor,
        )
    part = tensor if slot.view is None else slot.view.of(tensor)
    return part.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
