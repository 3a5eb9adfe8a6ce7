"""Streams one output shard to its final place, hashing what is sent.

Nothing is stored unless every tensor is exactly what the plan promised: an output that differs from its
index would be found only by whoever serves it.
"""

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

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
    promised = {spec.name for spec in specs}
    for name in sorted(promised.symmetric_difference(tensors)):
        found = "was promised, but is not there" if name in promised else "is there, but was not promised"
        raise PackingError(f"tensor {name!r} {found}; nothing was written", tensor=name)
    for spec in specs:
        _check_promise(spec, tensors[spec.name])
    with ShardWriter(store, uri, specs) as shard:
        for spec in specs:
            shard.add(tensors[spec.name])
    return shard.receipt


class ShardWriter:
    """Writes a shard tensor by tensor, as they come.

    Used as a context manager: an error inside the block, or a tensor that is missing at its end, leaves
    nothing behind. After a clean exit ``receipt`` holds what was stored.

    Args:
        store: Where the shard goes.
        uri: Its address.
        specs: Of all tensors, in file order.
    """

    receipt: ShardReceipt

    def __init__(self, store: Store, uri: str, specs: Sequence[TensorSpec]) -> None:
        self._layout = layout_shard(specs)
        self._missing = deque(specs)
        self._digest = hashlib.sha256()
        self._writer = store.open_writer(uri)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._writer)
            self._send(self._layout.header)
            self._open = stack.pop_all()
        return self

    def add(self, tensor: torch.Tensor) -> None:
        """Append the tensor of the next spec.

        Raises:
            PackingError: It differs from the spec.
        """
        _check_promise(self._missing[0], tensor)
        self._send(tensor_bytes(tensor))
        self._missing.popleft()

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None and self._missing:
            missing = PackingError(f"tensor {self._missing[0].name!r} was promised, but is not there")
            self._open.__exit__(PackingError, missing, None)
            raise missing
        self._open.__exit__(kind, *error)
        if kind is None:
            self.receipt = ShardReceipt(
                sha256=self._digest.hexdigest(),
                size_bytes=self._layout.size_bytes,
                etag=self._writer.info.etag,
            )

    def _send(self, content: bytes | memoryview) -> None:
        self._digest.update(content)
        self._writer.write(content)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a view of its memory where that is possible."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _check_promise(spec: TensorSpec, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise PackingError(f"tensor {spec.name!r} has no values (it is on the meta device)", tensor=spec.name)
    made = (dtype_name(tensor.dtype), tuple(tensor.shape))
    if made != (spec.dtype, spec.shape):
        raise PackingError(
            f"tensor {spec.name!r} was promised as {spec.dtype} {list(spec.shape)} and made as {made[0]}"
            f" {list(made[1])}; nothing was written",
            tensor=spec.name,
        )
