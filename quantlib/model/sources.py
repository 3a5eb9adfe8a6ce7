"""Where in the checkpoint a module's tensors come from: stored tensors, parts of them, or conversions.

Parameters of replaced modules are views of those they replace (`quantlib.model.linearize`), stored tensors
that transformers fuses are views of the fused parameter: comparing the two tells what is read from where.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantlib.errors import CheckpointError
from quantlib.model.materialize import Slot
from quantlib.model.stored_names import BuiltModel, find_stored_names, parameters_made
from quantlib.model.strided import layout, view_within
from quantlib.model.trace import own_tensors


class Sources:
    """The stored tensors of one model. Made before its modules are replaced.

    Args:
        model: As transformers builds it, on the meta device.
        tensor_names: All stored names.
    """

    def __init__(self, model: PreTrainedModel, tensor_names: Collection[str]) -> None:
        self._parameters = model.state_dict(keep_vars=True)
        self._model = BuiltModel(config=model.config, parameters=self._parameters)
        self._of_storage = {
            tensor.untyped_storage()._cdata: name for name, tensor in reversed(self._parameters.items())
        }
        # Of a tied pair the stored one serves both. Ties are known by configuration, never by address.
        ties = dict(getattr(model, "all_tied_weights_keys", {}))
        self._tied = {**ties, **{source: target for target, source in ties.items()}}
        stored = find_stored_names(model, tensor_names)
        self._renamed = stored.renamed
        self._conversions = {
            made: conversion
            for conversion in stored.conversions.values()
            for made in parameters_made(conversion)
        }
        self._pieces: dict[str, _Pieces] = {}

    def slots(self, module: nn.Module, prefix: str = "", skip: str | None = None) -> list[Slot]:
        """One slot a tensor of a module at ``prefix`` in the model; ``skip`` leaves out a submodule."""
        return [
            self._slot(path, attribute, _joined(prefix, path, attribute), tensor)
            for path, inner in module.named_modules()
            if skip is None or not (path == skip or path.startswith(f"{skip}."))
            for attribute, tensor in own_tensors(inner).items()
        ]

    def stored(self, slots: Iterable[Slot]) -> tuple[str, ...]:
        """Names of the stored tensors that slots are filled from, each once."""
        names = []
        for slot in slots:
            conversion = self._conversions.get(slot.tensor)
            names += [slot.tensor] if conversion is None else conversion.stored
        return tuple(dict.fromkeys(names))

    def is_converted(self, slot: Slot) -> bool:
        """Whether transformers computes the tensor of a slot from stored ones."""
        return slot.tensor in self._conversions

    def converted(
        self, slots: Iterable[Slot], tensors: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        """``tensors`` and those that transformers computes from them for the slots.

        Raises:
            CheckpointError: A stored tensor that one is computed from was not given.
        """
        needed = {
            id(conversion): conversion
            for conversion in (self._conversions.get(slot.tensor) for slot in slots)
            if conversion is not None
        }
        made: dict[str, torch.Tensor] = {}
        for conversion in needed.values():
            for name in conversion.stored:
                if name not in tensors:
                    raise CheckpointError(f"tensor {name} is needed and was not given", tensor=name)
            made |= conversion.run(self._model, tensors)
        return {**tensors, **made} if made else tensors

    def _slot(self, path: str, attribute: str, name: str, tensor: torch.Tensor) -> Slot:
        if name not in self._parameters:
            name = self._of_storage[tensor.untyped_storage()._cdata]
        if not self._is_stored(name) and self._is_stored(self._tied.get(name, name)):
            name = self._tied[name]
        if name not in self._pieces:
            self._pieces[name] = self._pieces_of(name)
        found, view = self._pieces[name].find(tensor)
        return Slot(path=path, attribute=attribute, tensor=found, view=view)

    def _is_stored(self, name: str) -> bool:
        return name in self._renamed or name in self._conversions

    def _pieces_of(self, name: str) -> "_Pieces":
        parameter, conversion = self._parameters[name], self._conversions.get(name)
        if conversion is None:
            return _Pieces({self._renamed.get(name, name): parameter}, name, parameter)
        pieces = conversion.pieces(self._model, parameter)
        return _Pieces(pieces, name, parameter)


class _Pieces:
    """The stored tensors that make up a parameter."""

    def __init__(self, pieces: Mapping[str, torch.Tensor], name: str, parameter: torch.Tensor) -> None:
        self._pieces = pieces
        self._exact = {layout(piece): stored for stored, piece in pieces.items()}
        self._name, self._parameter = name, parameter

    def find(self, tensor: torch.Tensor) -> tuple[str, Any]:
        """The stored tensor that holds a part of the parameter and where; else the parameter and where."""
        exact = self._exact.get(layout(tensor))
        if exact is not None:
            return exact, None
        for stored, piece in self._pieces.items():
            view = view_within(tensor, piece)
            if view is not None:
                return stored, view
        if layout(tensor) == layout(self._parameter):
            return self._name, None
        return self._name, view_within(tensor, self._parameter)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
