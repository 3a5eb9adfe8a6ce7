"""Reads chosen tensors of a checkpoint, each byte once.

All ranges of a shard go to the store in one call, which fetches neighbours together and several requests side
by side. Tensors are views of what was fetched; no weight is copied unless its bytes lie unaligned, or unless
it is stored as codes: then it is decoded here, a run of rows at a time.
"""

from collections.abc import Collection, Mapping

import numpy as np
import torch

from quantlib.checkpoint.decoded import DecodedTensor
from quantlib.checkpoint.dtypes import torch_dtype
from quantlib.checkpoint.header import TensorEntry
from quantlib.checkpoint.index import Checkpoint
from quantlib.errors import CheckpointError
from quantlib.storage import Store

_CLONED_BYTES = 1 << 20


def read_tensors(store: Store, checkpoint: Checkpoint, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Tensors by name, in the order asked for.

    Shapes:
        As in the checkpoint; in its dtype, on the CPU, contiguous.

    Raises:
        CheckpointError: A name the checkpoint does not have, a shard that was replaced since it was opened,
            or codes that contradict what describes them.

    Numerics: what is decoded is worked out in fp32 and rounded once, half to even, to the entry's dtype.

    Cost: memory of the tensors, of what lies between them where that is at most 256 KiB, and for what is
    decoded `quantlib.checkpoint.decoded.decoding_bytes`. A tensor that is kept keeps alive what was fetched
    with it (at most 32 MiB): clone what outlives its block.
    """
    unknown = [name for name in names if name not in checkpoint.tensors]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.uri} has no tensor {unknown[0]!r} ({len(unknown)} of {len(names)} are unknown)",
            tensor=unknown[0],
        )
    fetched = fetch(store, checkpoint, _parts(checkpoint, names))
    found: dict[str, torch.Tensor] = {}
    # In the order of the file, so that codes are freed while others are decoded.
    for entry in sorted((checkpoint.tensors[name] for name in set(names)), key=lambda e: (e.shard, e.start)):
        made = checkpoint.decoded.get(entry.name)
        if made is not None:
            parts = {role: fetched.pop(part.name) for role, part in made.parts.items()}
            found[entry.name] = _decoded(made, parts, entry)
        elif checkpoint.decoded and entry.size_bytes <= _CLONED_BYTES:
            # A norm between codes would keep them.
            found[entry.name] = fetched.pop(entry.name).clone()
        else:
            found[entry.name] = fetched.pop(entry.name)
    return {name: found[name] for name in names}


def _parts(checkpoint: Checkpoint, names: Collection[str]) -> list[TensorEntry]:
    """What is stored of some tensors."""
    parts: list[TensorEntry] = []
    for name in dict.fromkeys(names):
        made = checkpoint.decoded.get(name)
        parts += [checkpoint.tensors[name]] if made is None else made.parts.values()
    return parts


def fetch(store: Store, checkpoint: Checkpoint, entries: Collection[TensorEntry]) -> dict[str, torch.Tensor]:
    """Stored tensors by name, as they are."""
    by_shard: dict[str, list[TensorEntry]] = {}
    for entry in entries:
        by_shard.setdefault(entry.shard, []).append(entry)
    found: dict[str, torch.Tensor] = {}
    for shard, wanted in by_shard.items():
        views = store.read_ranges(checkpoint.shards[shard], [(entry.start, entry.end) for entry in wanted])
        for entry, view in zip(wanted, views, strict=True):
            found[entry.name] = tensor_of(view, entry)
    return found


def tensor_of(view: memoryview, entry: TensorEntry) -> torch.Tensor:
    """A tensor over fetched bytes; a copy only where they are not aligned to the dtype."""
    dtype = torch_dtype(entry.dtype)
    if not entry.num_values:
        return torch.empty(entry.shape, dtype=dtype)
    array = np.asarray(_Fetched(view))
    if array.ctypes.data % dtype.itemsize:
        array = array.copy()
    return torch.from_numpy(array).view(dtype).reshape(entry.shape)


def _decoded(made: DecodedTensor, parts: Mapping[str, torch.Tensor], entry: TensorEntry) -> torch.Tensor:
    dtype, rows = torch_dtype(entry.dtype), made.shape[0]
    if made.row_step is None:
        return made.make_rows(parts, 0, rows).to(dtype).contiguous()
    tensor = torch.empty(made.shape, dtype=dtype)
    for start in range(0, rows, made.run_rows):
        end = min(start + made.run_rows, rows)
        tensor[start:end] = made.make_rows(parts, start, end)
    return tensor


class _Fetched:
    """Shows fetched bytes to numpy as ordinary memory and keeps them alive.

    Some engines hand out read-only buffers; torch warns of those although nobody else reads this memory.
    """

    def __init__(self, view: memoryview) -> None:
        address = np.frombuffer(view, dtype=np.uint8).ctypes.data
        self._view = view
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (len(view),),
            "data": (address, False),
        }
