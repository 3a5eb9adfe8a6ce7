"""Streams one output shard to its final place, hashing what is sent.

Nothing is written unless every tensor is exactly what the plan promised: an output that differs from its
index would be found only by whoever serves it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quantlib.checkpoint.dtypes import dtype_name
from quantlib.checkpoint.layout import layout_shard
from quantlib.errors import PackingError
from quantlib.job.plan import TensorSpec
from quantlib.storage import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReceipt:
    """What was stored: sha256 (hex) and size of the whole object, and its etag."""

    sha256: str
    size_bytes: int
    etag: str


def write_shard(
    store: Store, uri: str, specs: Sequence[TensorSpec], tensors: Mapping[str, torch.Tensor]
) -> ShardReceipt:
    """Write tensors as a safetensors object, in the order of their specs.

    Shapes:
        As in the specs; tensors may lie on any device and need not be contiguous.

    Raises:
        PackingError: Names, dtypes or shapes differ from the specs; nothing has been written then.
        StorageError: The store refused.

    Cost: one tensor's copy where it is not contiguous or not on the CPU, and the parts on their way.
    """
    layout = layout_shard(specs)
    _check_promise(specs, tensors)
    digest = hashlib.sha256(layout.header)
    with store.open_writer(uri) as writer:
        writer.write(layout.header)
        for spec in specs:
            content = tensor_bytes(tensors[spec.name])
            digest.update(content)
            writer.write(content)
    return ShardReceipt(sha256=digest.hexdigest(), size_bytes=layout.size_bytes, etag=writer.info.etag)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a view of its memory where that is possible."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _check_promise(specs: Sequence[TensorSpec], tensors: Mapping[str, torch.Tensor]) -> None:
    promised = {spec.name for spec in specs}
    for name in sorted(promised.symmetric_difference(tensors)):
        found = "was promised, but is not there" if name in promised else "is there, but was not promised"
        raise PackingError(f"tensor {name!r} {found}; nothing was written", tensor=name)
    for spec in specs:
        tensor = tensors[spec.name]
        if tensor.is_meta:
            raise PackingError(
                f"tensor {spec.name!r} has no values (it is on the meta device)", tensor=spec.name
            )
        made = (dtype_name(tensor.dtype), tuple(tensor.shape))
        if made != (spec.dtype, spec.shape):
            raise PackingError(
                f"tensor {spec.name!r} was promised as {spec.dtype} {list(spec.shape)} and made as {made[0]}"
                f" {list(made[1])}; nothing was written",
                tensor=spec.name,
            )
