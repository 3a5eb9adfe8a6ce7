"""A model as parts: which tensors and linears every decoder block has, and live modules built one at a time.

The skeleton holds no weights. It is built from ``config.json`` and the names of the stored tensors within
seconds, whatever the size of the model, and pickles as just those two.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantlib.errors import CheckpointError
from quantlib.model.block_inputs import BlockInputs, run_block
from quantlib.model.block_spec import BlockSpec, LinearSpec, describe_block, refuse_unhandled
from quantlib.model.families import open_config
from quantlib.model.late_weights import LateWeight, put_late_, run_in_parts_
from quantlib.model.materialize import Slot, copy_module, fill_
from quantlib.model.meta_model import build_meta_model, find_blocks, restore_buffers_
from quantlib.model.outer import OuterModel
from quantlib.model.trace import ModelTrace, own_tensors, trace_forward

__all__ = ["BlockInputs", "BlockSpec", "LinearSpec", "OuterModel", "Skeleton", "load_skeleton", "run_block"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Skeleton:
    """The structure of one model; `load_skeleton` makes it.

    Attributes:
        model_type: ``config.json``'s.
        prelude_tensors: Checkpoint names of the tensors used before block 0, and of those used nowhere.
        tail_tensors: Those used after the last block; a tied embedding is in both.
        unused_tensors: Stored names that no part of the model uses.
        outside_linears: Names of the linears outside the blocks (the head, tied or not).
    """

    model_type: str
    prelude_tensors: tuple[str, ...]
    tail_tensors: tuple[str, ...]
    unused_tensors: tuple[str, ...]
    outside_linears: tuple[str, ...]
    _source: tuple[dict[str, Any], tuple[str, ...]]
    _model: PreTrainedModel
    _blocks: nn.ModuleList
    _specs: tuple[BlockSpec, ...]
    _num_outputs: tuple[int | None, ...]
    _outer_slots: tuple[Slot, ...]

    @property
    def num_blocks(self) -> int:
        """How many decoder blocks the model has."""
        return len(self._specs)

    def block_spec(self, i: int) -> BlockSpec:
        """The parts of block ``i``."""
        return self._specs[i]

    def build_block(
        self,
        i: int,
        tensors: Mapping[str, torch.Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        late: Mapping[str, LateWeight] = MappingProxyType({}),
    ) -> nn.Module:
        """Block ``i``, live, in eval mode, without gradients.

        Args:
            i: Which block.
            tensors: Checkpoint name -> tensor, at least all of ``block_spec(i).tensors`` that are not late.
                They are cast to ``dtype`` and moved where necessary; otherwise the block shares their memory.
            dtype: Of the parameters.
            device: Where they go.
            late: Checkpoint name -> weight of a linear that is made only while the linear runs.

        Raises:
            CheckpointError: A tensor is missing or has a wrong shape.
        """
        block = self._blocks[i]
        prefix = self._specs[i].prefix
        slots = [
            Slot(path=s.path, attribute=s.attribute, tensor=f"{prefix}.{s.tensor}") for s in _slots(block)
        ]
        live = copy_module(block)
        early = [slot for slot in slots if slot.tensor not in late]
        fill_(live, early, tensors, dtype=dtype, device=device)
        run_in_parts_(live)
        found = {slot.path: late[slot.tensor] for slot in slots if slot.tensor in late}
        put_late_(live, found, dtype=dtype, device=device)
        return live

    def build_outer(
        self, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype, device: torch.device | str
    ) -> OuterModel:
        """The model around its blocks.

        Args:
            tensors: Checkpoint name -> tensor: ``prelude_tensors`` for `OuterModel.embed`, ``tail_tensors``
                for `OuterModel.logits`, or both. What is not given stays without weights.
            dtype: Of the parameters.
            device: Where they go.

        Raises:
            CheckpointError: A tensor has a wrong shape.
        """
        no_blocks = nn.ModuleList()
        model = copy_module(self._model, {id(self._blocks): no_blocks})
        given = [slot for slot in self._outer_slots if slot.tensor in tensors]
        fill_(model, given, tensors, dtype=dtype, device=device)
        return OuterModel(
            dtype=dtype,
            device=torch.device(device),
            _model=model,
            _no_blocks=no_blocks,
            _blocks=tuple(self._blocks),
            _num_outputs=self._num_outputs,
            _missing_prelude=tuple(name for name in self.prelude_tensors if name not in tensors),
            _missing_tail=tuple(name for name in self.tail_tensors if name not in tensors),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (load_skeleton, self._source)


def load_skeleton(config: Mapping[str, Any], tensor_names: Collection[str]) -> Skeleton:
    """The structure of the model that a checkpoint stores.

    Args:
        config: The values of ``config.json``.
        tensor_names: Names of all stored tensors.

    Raises:
        UnsupportedModelError: The model is of an unknown family or lacks a property this tool relies on.
        CheckpointError: ``config.json`` is invalid or a tensor that the model needs is not stored.

    Cost: shapes only, a few MiB of module objects; one forward on the meta device. Asked for the same model
        again, as a worker is that plans a job and then works on it, it gives the same object.
    """
    return _load(json.dumps(config), tuple(tensor_names))


@lru_cache(maxsize=1)
def _load(config_json: str, tensor_names: tuple[str, ...]) -> Skeleton:
    config = json.loads(config_json)
    opened = open_config(config)
    model = build_meta_model(opened)
    path, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        refuse_unhandled(f"{path}.{index}", block)
    trace = trace_forward(model, path)
    restore_buffers_(model)
    specs = tuple(
        describe_block(index, f"{path}.{index}", block, trace.blocks[index])
        for index, block in enumerate(blocks)
    )
    stored = set(tensor_names)
    outer_slots = _tied(_slots(model, skip=path), model.all_tied_weights_keys, stored)
    block_tensors = [name for spec in specs for name in spec.tensors]
    used = [slot.tensor for slot in outer_slots] + block_tensors
    _refuse_missing(used, stored, opened.model_type)
    prelude, tail = _ends(outer_slots, trace)
    return Skeleton(
        model_type=opened.model_type,
        prelude_tensors=prelude,
        tail_tensors=tail,
        unused_tensors=tuple(sorted(stored.difference(used))),
        outside_linears=tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(f"{path}.")
        ),
        _source=(config, tensor_names),
        _model=model,
        _blocks=blocks,
        _specs=specs,
        _num_outputs=tuple(block.num_outputs for block in trace.blocks),
        _outer_slots=outer_slots,
    )


def _slots(module: nn.Module, skip: str | None = None) -> list[Slot]:
    """One slot a stored tensor, named by its place in the module; ``skip`` leaves out a submodule."""
    return [
        Slot(path=path, attribute=name, tensor=f"{path}.{name}" if path else name)
        for path, inner in module.named_modules()
        if skip is None or not (path == skip or path.startswith(f"{skip}."))
        for name in own_tensors(inner)
    ]


def _tied(slots: list[Slot], tied: Mapping[str, str], stored: set[str]) -> tuple[Slot, ...]:
    """Slots with checkpoint names: of a tied pair the stored one serves both.

    Ties are known by configuration and name (``tied``: name -> the name it is tied to), never by address.
    A checkpoint may store both although its configuration ties them; then each is used under its own name, as
    transformers does when they differ (and when they are equal it makes no difference).
    """
    other = {**tied, **{source: target for target, source in tied.items()}}
    renamed = []
    for slot in slots:
        name = slot.tensor
        if name not in stored and other.get(name) in stored:
            name = other[name]
        renamed.append(Slot(path=slot.path, attribute=slot.attribute, tensor=name))
    return tuple(renamed)


def _refuse_missing(used: list[str], stored: set[str], model_type: str) -> None:
    missing = [name for name in used if name not in stored]
    if missing:
        raise CheckpointError(
            f"a {model_type} model of this config.json needs tensor {missing[0]}"
            f" ({len(missing)} of its {len(used)} tensors are missing), the checkpoint does not store it;"
            " complete the checkpoint or correct config.json",
            tensor=missing[0],
        )


def _ends(slots: tuple[Slot, ...], trace: ModelTrace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Checkpoint names used before and after the blocks, in the order their modules run."""
    names: dict[str, list[str]] = {}
    for slot in slots:
        names.setdefault(slot.path, []).append(slot.tensor)
    tail = [name for path in trace.tail for name in names[path]]
    prelude = [name for path in trace.prelude for name in names[path]]
    prelude += [slot.tensor for slot in slots if slot.tensor not in tail]
    return tuple(dict.fromkeys(prelude)), tuple(dict.fromkeys(tail))
