"""Reads chosen tensors of a checkpoint, each byte once.

All ranges of a shard go to the store in one call, which fetches neighbours together and several requests side
by side. Tensors are views of what was fetched; no weight is copied unless its bytes lie unaligned.
"""

from collections.abc import Collection

import numpy as np
import torch

from quantlib.checkpoint.dtypes import torch_dtype
from quantlib.checkpoint.header import TensorEntry
from quantlib.checkpoint.index import Checkpoint
from quantlib.errors import CheckpointError
from quantlib.storage import Store


def read_tensors(store: Store, checkpoint: Checkpoint, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Tensors by name, in the order asked for.

    Shapes:
        As in the checkpoint; in the dtype of the source, on the CPU, contiguous.

    Raises:
        CheckpointError: A name the checkpoint does not have, or a shard that was replaced since it was
            opened.

    Cost: memory of the tensors, and of what lies between them where that is at most 256 KiB. A tensor that is
    kept keeps alive what was fetched with it (at most 32 MiB): clone what outlives its block.
    """
    unknown = [name for name in names if name not in checkpoint.tensors]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.uri} has no tensor {unknown[0]!r} ({len(unknown)} of {len(names)} are unknown)",
            tensor=unknown[0],
        )
    by_shard: dict[str, list[TensorEntry]] = {}
    for name in dict.fromkeys(names):
        entry = checkpoint.tensors[name]
        by_shard.setdefault(entry.shard, []).append(entry)
    found: dict[str, torch.Tensor] = {}
    for shard, entries in by_shard.items():
        views = store.read_ranges(checkpoint.shards[shard], [(entry.start, entry.end) for entry in entries])
        for entry, view in zip(entries, views, strict=True):
            found[entry.name] = tensor_of(view, entry)
    return {name: found[name] for name in names}


def tensor_of(view: memoryview, entry: TensorEntry) -> torch.Tensor:
    """A tensor over fetched bytes; a copy only where they are not aligned to the dtype."""
    dtype = torch_dtype(entry.dtype)
    if not entry.num_values:
        return torch.empty(entry.shape, dtype=dtype)
    array = np.asarray(_Fetched(view))
    if array.ctypes.data % dtype.itemsize:
        array = array.copy()
    return torch.from_numpy(array).view(dtype).reshape(entry.shape)


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
