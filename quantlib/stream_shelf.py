"""Where streams wait between two blocks: in memory while there is room, else on disk or beside the GPU.

Where one waits follows from sizes, from the room and from the order in which they came: what moves on by a
block takes the place it gave up.

B sequences, T positions, D hidden.
"""

import os
import tempfile
import threading
from collections import deque
from dataclasses import dataclass

import torch

from quantlib.device_copies import DeviceCopies, Pending, pinned
from quantlib.errors import WorkerError


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the file a stream is."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Aside:
    """A stream in pinned memory beside the GPU, or on its way there."""

    pinned_BTD: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.pinned_BTD.nbytes


class Shelf:
    """Keeps hidden states [B, T, D] until they are asked for.

    Args:
        room_bytes: Of memory, that of the device where there is one; None for no limit. What has no room goes
            to a file without a name in the folder for temporary files, so that nothing is left of a worker
            that dies; from a GPU, to pinned memory of its machine, by copies beside what it computes.
    """

    def __init__(self, room_bytes: int | None = None) -> None:
        self._room_bytes = room_bytes
        self._copies: DeviceCopies | None = None
        self._pinned_bytes = 0
        self._leaving: deque[Pending] = deque()
        self._free_pinned: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        self._used_bytes = 0
        self._file_bytes = 0
        self._free: dict[int, list[int]] = {}
        self._file: int | None = None
        self._lock = threading.Lock()

    @property
    def file_bytes(self) -> int:
        """The size that the file has come to."""
        return self._file_bytes

    @property
    def pinned_bytes(self) -> int:
        """Of the streams for which memory is pinned, now or to be used again."""
        return self._pinned_bytes

    def put(self, hidden_BTD: torch.Tensor) -> "Kept":
        """Keep hidden states.

        Raises:
            WorkerError: There is no room in memory, and the disk is full or no memory can be pinned.
        """
        size = hidden_BTD.nbytes
        with self._lock:
            has_room = self._room_bytes is None or self._used_bytes + size <= self._room_bytes
            self._used_bytes += size * has_room
        if has_room:
            return Kept(self, hidden_BTD)
        if hidden_BTD.device.type != "cpu":
            return Kept(self, self._set_aside(hidden_BTD))
        return Kept(self, self._written(hidden_BTD))

    def _set_aside(self, hidden_BTD: torch.Tensor) -> _Aside:
        with self._lock:
            self._copies = self._copies or DeviceCopies(hidden_BTD.device)
            free = self._free_pinned.get((hidden_BTD.shape, hidden_BTD.dtype))
            pinned_BTD = free.pop() if free else None
        if pinned_BTD is None:
            pinned_BTD = pinned(hidden_BTD.shape, hidden_BTD.dtype)
            with self._lock:
                self._pinned_bytes += pinned_BTD.nbytes
        # What reads or overwrites it later is a copy that comes after this one. Only the one before is waited
        # for: what leaves takes memory of the GPU until then, and whoever sends more may be far ahead of it.
        self._leaving.append(self._copies.begin_back({"": hidden_BTD}, into={"": pinned_BTD}))
        if len(self._leaving) > 1:
            self._leaving.popleft().wait()
        return _Aside(pinned_BTD)

    def _bring(self, aside: _Aside) -> Pending:
        assert self._copies is not None
        return self._copies.begin({"": aside.pinned_BTD})

    def _written(self, hidden_BTD: torch.Tensor) -> _Place:
        size = hidden_BTD.nbytes
        with self._lock:
            if self._file is None:
                with tempfile.TemporaryFile() as file:
                    self._file = os.dup(file.fileno())
            places = self._free.get(size)
            offset = places.pop() if places else self._file_bytes
            if offset == self._file_bytes:
                self._file_bytes += size
        view, done = _bytes_of(hidden_BTD.contiguous()), 0
        try:
            while done < size:
                done += os.pwrite(self._file, view[done:], offset + done)
        except OSError as error:
            raise WorkerError(
                f"{size} bytes of activations have no room in memory and could not be written to"
                f" {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to a larger disk, or allow more"
                " worker_memory",
                option="worker_memory",
            ) from error
        return _Place(offset, hidden_BTD.shape, hidden_BTD.dtype)

    def _read(self, place: _Place) -> torch.Tensor:
        assert self._file is not None
        hidden_BTD = torch.empty(place.shape, dtype=place.dtype)
        view, done = _bytes_of(hidden_BTD), 0
        while done < place.num_bytes:
            done += os.preadv(self._file, [view[done:]], place.offset + done)
        return hidden_BTD

    def _release(self, content: torch.Tensor | _Place | _Aside) -> None:
        with self._lock:
            if isinstance(content, _Place):
                self._free.setdefault(content.num_bytes, []).append(content.offset)
            elif isinstance(content, _Aside):
                found_BTD = content.pinned_BTD
                self._free_pinned.setdefault((found_BTD.shape, found_BTD.dtype), []).append(found_BTD)
            else:
                self._used_bytes -= content.nbytes

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def _bytes_of(hidden_BTD: torch.Tensor) -> memoryview:
    return hidden_BTD.flatten().view(torch.uint8).numpy().data


class Kept:
    """Hidden states on a shelf."""

    def __init__(self, shelf: Shelf, content: torch.Tensor | _Place | _Aside) -> None:
        self._shelf, self._content = shelf, content
        self._coming: Pending | None = None

    @property
    def num_bytes(self) -> int:
        """Of the hidden states."""
        content = self._content
        return content.nbytes if isinstance(content, torch.Tensor) else content.num_bytes

    @property
    def is_in_memory(self) -> bool:
        """Whether they take room on the shelf, and not beside it."""
        return isinstance(self._content, torch.Tensor)

    def bring(self) -> None:
        """Begin to bring them to the device from beside it: they are asked for soon, or `leave` is called."""
        if isinstance(self._content, _Aside) and self._coming is None:
            self._coming = self._shelf._bring(self._content)

    def leave(self) -> None:
        """Let go of what `bring` began and nobody asked for."""
        self._coming = None

    def get(self) -> torch.Tensor:
        """The hidden states, on the device from which they came."""
        if isinstance(self._content, _Place):
            return self._shelf._read(self._content)
        if isinstance(self._content, _Aside):
            coming, self._coming = self._coming or self._shelf._bring(self._content), None
            return coming.wait()[""]
        return self._content

    def release(self) -> None:
        """They are not asked for again."""
        self._coming = None
        self._shelf._release(self._content)
