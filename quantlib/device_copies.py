"""Copies between a GPU and the memory of its machine that run beside what the GPU computes.

Only copies from and to pinned memory leave it free, and only on another stream than the one that computes.
What is not pinned goes to the GPU through two pinned slots in turn: while one is sent the other is filled.
On a CPU nothing is copied; tensors are handed through.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from quantlib.errors import WorkerError
from quantlib.memory_watch import PINNED_SLOTS_BYTES

Tensors = Mapping[str, torch.Tensor]

_NUM_SLOTS = 2
SLOT_BYTES = PINNED_SLOTS_BYTES // _NUM_SLOTS


class Pending:
    """Tensors on their way.

    Args:
        tensors: Where they go.
        settle: Makes sure that whoever reads them from now on finds their values.
    """

    def __init__(self, tensors: Tensors, settle: Callable[[], None] = lambda: None) -> None:
        self._tensors, self._settle = tensors, settle

    def wait(self) -> dict[str, torch.Tensor]:
        """The tensors, once they may be read: on the GPU by work that is begun hereafter."""
        self._settle()
        return dict(self._tensors)


class DeviceCopies:
    """Copies of one stream, one after the other.

    Args:
        device: Of the work that reads and makes the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._slots: _PinnedSlots | None = None
        self._lock = threading.Lock()

    @torch.inference_mode()
    def begin(self, tensors: Tensors) -> Pending:
        """Bring tensors to the device; those that are there are handed through.

        Args:
            tensors: Those that are pinned are still read after this call: until the copy has ended only
                further copies of this object may overwrite them.

        Returns:
            The same shapes and dtypes, contiguous. `Pending.wait` has the current stream wait, and not the
            caller. With tensors that are not pinned this call itself waits until all but the last pieces are
            sent, and so for work that was begun before.

        Raises:
            WorkerError: There is no memory that can be pinned.
        """
        stream = self._own_stream()
        if stream is None:
            return Pending(tensors)
        outside = {name: found for name, found in tensors.items() if found.device.type != "cuda"}
        made = {
            name: torch.empty(found.shape, dtype=found.dtype, device=self._device)
            for name, found in outside.items()
        }
        # They may lie where work that was begun earlier still writes.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        for name, found in outside.items():
            made[name].record_stream(stream)
            self._send(found, made[name], stream)
        arrived = torch.cuda.Event()
        arrived.record(stream)
        settle = partial(self._have_current_wait, arrived)
        return Pending({**tensors, **made}, settle)

    @torch.inference_mode()
    def begin_back(self, tensors: Tensors, into: Tensors | None = None) -> Pending:
        """Bring tensors from the device to pinned memory; those that are not there are handed through.

        Args:
            into: Pinned tensors that take them, of the same names, shapes and dtypes; new ones by default.

        Returns:
            `Pending.wait` blocks the caller until they are there.

        Raises:
            WorkerError: There is no memory that can be pinned.
        """
        stream = self._own_stream()
        if stream is None:
            return Pending(tensors)
        inside = {name: found for name, found in tensors.items() if found.device.type == "cuda"}
        made = into or {name: pinned(found.shape, found.dtype) for name, found in inside.items()}
        stream.wait_stream(torch.cuda.current_stream(self._device))
        for name, found in inside.items():
            found.record_stream(stream)
            with torch.cuda.stream(stream):
                made[name].copy_(found, non_blocking=True)
        return Pending({**tensors, **made}, stream.record_event().synchronize)

    def _own_stream(self) -> torch.cuda.Stream | None:
        """Made when there is something to copy; none on a CPU."""
        if self._device.type != "cuda":
            return None
        with self._lock:
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)
            return self._stream

    def _have_current_wait(self, arrived: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(arrived)

    def _send(self, found: torch.Tensor, made: torch.Tensor, stream: torch.cuda.Stream) -> None:
        if found.is_pinned():
            with torch.cuda.stream(stream):
                made.copy_(found, non_blocking=True)
            return
        with self._lock:
            if self._slots is None:
                self._slots = _PinnedSlots()
            self._slots.send(found, made, stream)


class _PinnedSlots:
    """Two slots of pinned memory that are filled and sent in turn."""

    def __init__(self) -> None:
        self._slots = [pinned((SLOT_BYTES,), torch.uint8) for _ in range(_NUM_SLOTS)]
        self._sent = [torch.cuda.Event(blocking=True) for _ in self._slots]
        self._next = 0

    def send(self, found: torch.Tensor, made: torch.Tensor, stream: torch.cuda.Stream) -> None:
        source, target = _bytes_of(found.contiguous()), _bytes_of(made)
        for start, end in pieces(source.numel(), SLOT_BYTES):
            slot, sent = self._slots[self._next][: end - start], self._sent[self._next]
            self._next = (self._next + 1) % _NUM_SLOTS
            sent.synchronize()  # until then it holds what is on its way
            slot.copy_(source[start:end])
            with torch.cuda.stream(stream):
                target[start:end].copy_(slot, non_blocking=True)
            sent.record(stream)


def pinned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in pinned memory, not filled.

    Raises:
        WorkerError: There is no memory that can be pinned.

    Cost: the next power of two of its bytes, which PyTorch keeps for tensors to come.
    """
    try:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        torch.cuda.synchronize()  # where work that was begun before has failed, this says so
        raise WorkerError(
            f"{math.prod(shape) * dtype.itemsize} bytes of this machine's memory could not be pinned for the"
            f" GPU: {error}; give the workers more memory, or allow more device_memory",
            option="device_memory",
        ) from error


def pieces(num_bytes: int, most: int) -> Iterator[tuple[int, int]]:
    """Start and end of parts in order, all but the last as long as they may be.

    >>> list(pieces(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    for start in range(0, num_bytes, most):
        yield start, min(start + most, num_bytes)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
