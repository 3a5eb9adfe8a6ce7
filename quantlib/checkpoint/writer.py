"""Streams one output shard to its final place, hashing what is sent.

Nothing is stored unless every tensor is exactly what the plan promised: an output that differs from its
index would be found only by whoever serves it.
"""

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from quantlib.checkpoint.dtypes import dtype_name
from quantlib.checkpoint.header import TensorEntry
from quantlib.checkpoint.layout import ShardLayout, layout_shard
from quantlib.checkpoint.reader import tensor_of
from quantlib.errors import PackingError
from quantlib.job.plan import TensorSpec
from quantlib.storage import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReceipt:
    """What was stored: sha256 (hex) and size of the whole object, and its etag."""

    sha256: str
    size_bytes: int
    etag: str


class ShardForm(Protocol):
    """What a shard is as a file."""

    def layout(self, specs: Sequence[TensorSpec]) -> ShardLayout:
        """Every byte but those of the tensors, which stand in the order of their specs."""
        ...

    def stored(self, spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as the file holds it."""
        ...

    def restored(self, spec: TensorSpec, view: memoryview) -> torch.Tensor:
        """A tensor from its bytes in the file: the inverse of `stored`."""
        ...


class SafetensorsForm:
    """A safetensors file."""

    def layout(self, specs: Sequence[TensorSpec]) -> ShardLayout:
        """See `quantlib.checkpoint.layout`."""
        return layout_shard(specs)

    def stored(self, spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """As it is."""
        return tensor

    def restored(self, spec: TensorSpec, view: memoryview) -> torch.Tensor:
        """As it is."""
        entry = TensorEntry(
            name=spec.name, dtype=spec.dtype, shape=spec.shape, shard="", start=0, end=len(view)
        )
        return tensor_of(view, entry)


SAFETENSORS = SafetensorsForm()


def write_shard(
    store: Store,
    uri: str,
    specs: Sequence[TensorSpec],
    tensors: Mapping[str, torch.Tensor],
    form: ShardForm = SAFETENSORS,
) -> ShardReceipt:
    """Write tensors as one object, in the order of their specs.

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
    with ShardWriter(store, uri, specs, form) as shard:
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
        form: What the file is.
    """

    receipt: ShardReceipt

    def __init__(
        self, store: Store, uri: str, specs: Sequence[TensorSpec], form: ShardForm = SAFETENSORS
    ) -> None:
        self._form, self._layout = form, form.layout(specs)
        self._missing = deque(specs)
        self._digest = hashlib.sha256()
        self._writer = store.open_writer(uri)
        self._position = 0

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
        spec = self._missing[0]
        _check_promise(spec, tensor)
        start, end = self._layout.offsets[spec.name]
        self._fill(start)
        content = tensor_bytes(self._form.stored(spec, tensor))
        assert len(content) == end - start, "a form stores what it lays out"
        self._send(content)
        self._missing.popleft()

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None and self._missing:
            missing = PackingError(f"tensor {self._missing[0].name!r} was promised, but is not there")
            self._open.__exit__(PackingError, missing, None)
            raise missing
        if kind is None:
            try:
                self._fill(self._layout.size_bytes)
            except BaseException as failed:
                self._open.__exit__(type(failed), failed, failed.__traceback__)
                raise
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
        self._position += len(content)

    def _fill(self, position: int) -> None:
        """Send zeros up to a position, where a form wants tensors to begin at multiples of something."""
        if position > self._position:
            self._send(bytes(position - self._position))


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
