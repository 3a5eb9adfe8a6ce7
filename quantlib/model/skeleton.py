"""A model as parts: which tensors and linears every decoder block has, and live modules built one at a time.

The skeleton holds no weights. It is built from ``config.json`` and the names of the stored tensors within
seconds, whatever the size of the model, and pickles as just those two.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from quantlib.errors import CheckpointError
from quantlib.model.block_inputs import BlockInputs, run_block
from quantlib.model.block_spec import BlockSpec, LinearSpec, describe_block, refuse_unhandled
from quantlib.model.families import model_class, open_config
from quantlib.model.late_weights import LateWeight, put_late_, run_in_parts_
from quantlib.model.linearize import linearize_
from quantlib.model.materialize import Slot, copy_module, fill_
from quantlib.model.meta_model import build_meta_model, compute_buffers, find_blocks, put_buffers_
from quantlib.model.outer import OuterModel
from quantlib.model.rehearsal import refuse_unlike_trace
from quantlib.model.rounded_inputs import round_inputs_
from quantlib.model.sources import Sources
from quantlib.model.trace import ModelTrace, trace_forward
from quantlib.model.unused import why_unused
from quantlib.schemes import ActivationScheme

__all__ = ["BlockInputs", "BlockSpec", "LinearSpec", "OuterModel", "Skeleton", "load_skeleton", "run_block"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Skeleton:
    """The structure of one model; `load_skeleton` makes it.

    Attributes:
        model_type: ``config.json``'s.
        prelude_tensors: Checkpoint names of the tensors used before block 0, and of those used nowhere.
        tail_tensors: Those used after the last block; a tied embedding is in both.
        untied_tensors: Stored names that ``config.json`` ties to other tensors, which are stored too; they
            are used as they are stored, as transformers does.
        unused_reasons: Stored names that no part of the model uses, sorted -> why.
        outside_linears: Names of the linears outside the blocks (the head, tied or not).
    """

    model_type: str
    prelude_tensors: tuple[str, ...]
    tail_tensors: tuple[str, ...]
    untied_tensors: tuple[str, ...]
    unused_reasons: Mapping[str, str]
    outside_linears: tuple[str, ...]
    _source: tuple[dict[str, Any], tuple[str, ...]]
    _model: PreTrainedModel
    _blocks: nn.ModuleList
    _specs: tuple[BlockSpec, ...]
    _sources: Sources
    _block_slots: tuple[tuple[Slot, ...], ...]
    _num_outputs: tuple[int | None, ...]
    _outer_slots: tuple[Slot, ...]

    @property
    def unused_tensors(self) -> tuple[str, ...]:
        """Stored names that no part of the model uses, sorted."""
        return tuple(self.unused_reasons)

    @property
    def num_blocks(self) -> int:
        """How many decoder blocks the model has."""
        return len(self._specs)

    @property
    def kept_linears(self) -> tuple[str, ...]:
        """Names of the linears in blocks that cannot be quantized; see `BlockSpec`."""
        return tuple(name for spec in self._specs for name in spec.kept_linears)

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
        inputs: Mapping[str, ActivationScheme] = MappingProxyType({}),
    ) -> nn.Module:
        """Block ``i``, live, in eval mode, without gradients.

        Args:
            i: Which block.
            tensors: Checkpoint name -> tensor, at least all of ``block_spec(i).tensors`` that are not late.
                They are cast to ``dtype`` and moved where necessary; otherwise the block shares their memory.
            dtype: Of the parameters.
            device: Where they go.
            late: Checkpoint name -> weight of a linear that is made only while the linear runs.
            inputs: Name of a linear -> what it rounds its inputs to.

        Raises:
            CheckpointError: A tensor is missing or has a wrong shape.
        """
        slots = self._block_slots[i]
        live = copy_module(self._blocks[i])
        # What is stored in another orientation, or as a part of a tensor, is not made late.
        found = {slot.path: late[slot.tensor] for slot in slots if slot.tensor in late and slot.view is None}
        early = [slot for slot in slots if slot.path not in found or slot.attribute != "weight"]
        fill_(live, early, self._sources.converted(early, tensors), dtype=dtype, device=device)
        run_in_parts_(live)
        put_late_(live, found, dtype=dtype, device=device)
        paths = {linear.name: linear.path for linear in self._specs[i].linears}
        round_inputs_(live, {paths[name]: scheme for name, scheme in inputs.items()})
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
        given = [s for s in self._outer_slots if all(name in tensors for name in self._sources.stored([s]))]
        fill_(model, given, self._sources.converted(given, tensors), dtype=dtype, device=device)
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
    model = build_meta_model(opened, model_class(opened))
    path, blocks = find_blocks(model)
    sources = Sources(model, tensor_names)
    buffers = compute_buffers(model)
    for block in blocks:
        linearize_(block)
    refuse_unhandled(path, blocks)
    trace = trace_forward(model, path)
    num_outputs = tuple(block.num_outputs for block in trace.blocks)
    refuse_unlike_trace(model, path, trace)
    put_buffers_(model, buffers)
    outside = sources.slots(model, skip=path)
    outer_slots = _used_slots(outside, trace, opened)
    places = [f"{path}.{index}" for index in range(len(blocks))]
    block_slots = tuple(
        tuple(sources.slots(block, place)) for place, block in zip(places, blocks, strict=True)
    )
    specs = tuple(
        describe_block(*parts, sources)
        for parts in zip(places, blocks, trace.blocks, block_slots, strict=True)
    )
    stored = set(tensor_names)
    used = [*sources.stored(outer_slots), *(name for spec in specs for name in spec.tensors)]
    _refuse_missing(used, stored, opened.model_type)
    prelude, tail = _ends(_tensors_by_module(outer_slots, sources), trace)
    return Skeleton(
        model_type=opened.model_type,
        prelude_tensors=prelude,
        tail_tensors=tail,
        untied_tensors=_stored_although_tied(model, outer_slots),
        unused_reasons=why_unused(
            model,
            stored.difference(used),
            blocks=_before_number(specs[0].prefix),
            num_blocks=len(specs),
            other_towers=frozenset(sources.stored(outside)),
        ),
        outside_linears=_outside_linears(model, outside),
        _source=(config, tensor_names),
        _model=model,
        _blocks=blocks,
        _specs=specs,
        _sources=sources,
        _block_slots=block_slots,
        _num_outputs=num_outputs,
        _outer_slots=outer_slots,
    )


def _used_slots(slots: list[Slot], trace: ModelTrace, config: PretrainedConfig) -> tuple[Slot, ...]:
    """Without those of other towers: of a multimodal model, only what a forward of text runs is used."""
    if config.get_text_config(decoder=True) is config:
        return tuple(slots)
    run = {*trace.prelude, *trace.tail}
    return tuple(slot for slot in slots if slot.path in run)


def _outside_linears(model: nn.Module, slots: list[Slot]) -> tuple[str, ...]:
    """Checkpoint names of the linears outside the blocks; of a head tied to the embedding, its module's."""
    times_used = Counter(slot.tensor for slot in slots)
    names = []
    for slot in slots:
        if slot.attribute == "weight" and isinstance(model.get_submodule(slot.path), nn.Linear):
            is_own = times_used[slot.tensor] == 1 and slot.tensor.endswith(".weight")
            names.append(slot.tensor.removesuffix(".weight") if is_own else slot.path)
    return tuple(names)


def _stored_although_tied(model: PreTrainedModel, slots: Iterable[Slot]) -> tuple[str, ...]:
    stored = {".".join(filter(None, (slot.path, slot.attribute))): slot.tensor for slot in slots}
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    pairs = ((stored.get(tied), stored.get(to)) for tied, to in ties.items())
    return tuple(tied for tied, to in pairs if tied is not None and to is not None and tied != to)


def _before_number(prefix: str) -> str | None:
    """What the names of all blocks begin with, from the prefix of the first: the part before its 0."""
    parts = prefix.split(".")
    return ".".join(parts[: parts.index("0")]) if "0" in parts[1:] else None


def _tensors_by_module(slots: Iterable[Slot], sources: Sources) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for slot in slots:
        names.setdefault(slot.path, []).extend(sources.stored([slot]))
    return names


def _refuse_missing(used: list[str], stored: set[str], model_type: str) -> None:
    missing = [name for name in used if name not in stored]
    if missing:
        raise CheckpointError(
            f"a {model_type} model of this config.json needs tensor {missing[0]}"
            f" ({len(missing)} of its {len(used)} tensors are missing), the checkpoint does not store it;"
            " complete the checkpoint or correct config.json",
            tensor=missing[0],
        )


def _ends(tensors: Mapping[str, Sequence[str]], trace: ModelTrace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Checkpoint names used before and after the blocks, in the order their modules run.

    Args:
        tensors: Module path -> names of its stored tensors.
        trace: What ran when.
    """
    tail = [name for path in trace.tail for name in tensors[path]]
    prelude = [name for path in trace.prelude for name in tensors[path]]
    prelude += [name for names in tensors.values() for name in names if name not in tail]
    return tuple(dict.fromkeys(prelude)), tuple(dict.fromkeys(tail))
