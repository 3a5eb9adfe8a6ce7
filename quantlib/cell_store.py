"""The streams of a cell as a stored object: written for a checkpoint of the activations, read back whole."""

import hashlib
from collections.abc import Mapping

import torch

from quantlib.checkpoint.dtypes import dtype_name
from quantlib.checkpoint.header import LENGTH_BYTES, header_length, parse_header
from quantlib.checkpoint.reader import tensor_of
from quantlib.checkpoint.writer import write_shard
from quantlib.errors import ChecksumError
from quantlib.job.activations import ActivationCheckpoint, cell_uri
from quantlib.job.plan import TensorSpec
from quantlib.storage import Store, uri_name


def write_cell(
    store: Store, work: str, block: int, key: str, streams: Mapping[str, torch.Tensor]
) -> tuple[str, int]:
    """Store the streams of one cell; gives sha256 and size of the object.

    Shapes:
        Every stream [B, T, D] in the compute dtype.
    """
    specs = [
        TensorSpec(name=name, dtype=dtype_name(hidden.dtype), shape=tuple(hidden.shape))
        for name, hidden in sorted(streams.items())
    ]
    receipt = write_shard(store, cell_uri(work, block, key), specs, streams)
    return receipt.sha256, receipt.size_bytes


def read_cell(store: Store, work: str, checkpoint: ActivationCheckpoint, key: str) -> dict[str, torch.Tensor]:
    """The streams of one cell, on the CPU.

    Raises:
        ChecksumError: What is stored is not what was recorded.
    """
    sha256, size_bytes = checkpoint.cells[key]
    info = store.head(cell_uri(work, checkpoint.block, key))
    content = store.read_ranges(info, [(0, info.size_bytes)])[0]
    if info.size_bytes != size_bytes or hashlib.sha256(content).hexdigest() != sha256:
        raise ChecksumError(
            f"{info.uri} does not have the sha256 it was recorded with ({sha256[:12]}); the job can go on"
            " without this checkpoint",
            uri=info.uri,
        )
    # Out of the bytes that were checked: read once more, they could come damaged.
    shard, size = uri_name(info.uri), len(content)
    end = LENGTH_BYTES + header_length(content[:LENGTH_BYTES], shard=shard, object_bytes=size)
    header = parse_header(bytes(content[LENGTH_BYTES:end]), shard=shard, object_bytes=size)
    return {
        name: tensor_of(content[entry.start : entry.end], entry).clone()
        for name, entry in header.tensors.items()
    }
