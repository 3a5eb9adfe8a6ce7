"""What every storage engine does. Nothing above this package knows which engine runs.

A URI is ``s3://bucket/key`` or ``file:///absolute/path``. Errors are ours (`quantlib.errors`):
ObjectNotFoundError for a missing object or bucket, StorageError for refused credentials and the like,
TransientStorageError once the engine's own retries are used up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from quantlib.storage.traffic import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One stored object. ``etag`` changes whenever the object's content is replaced."""

    uri: str
    size_bytes: int
    etag: str


class ObjectWriter(Protocol):
    """Streams one object; it appears under its final name only when the block ends without an error.

    Used as a context manager. An error inside the block aborts the upload and leaves nothing behind.
    After a clean exit ``info`` holds what was stored.
    """

    info: ObjectInfo

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append; ``data`` may be changed by the caller afterwards."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


class Store(Protocol):
    """The whole interface to object storage. Every method may be called from several threads at once.

    Attributes:
        traffic: What this store has read and written so far.
    """

    traffic: Traffic

    def head(self, uri: str) -> ObjectInfo:
        """Size and etag of one object."""
        ...

    def list(self, prefix_uri: str, *, recursive: bool = True) -> Sequence[ObjectInfo]:
        """All objects below a prefix ("folder"), sorted by uri; empty when there are none.

        Args:
            prefix_uri: The folder; ``s3://b/x`` does not list ``s3://b/xy``.
            recursive: False leaves out what lies in folders below it.
        """
        ...

    def read(self, uri: str) -> bytes:
        """A whole small object."""
        ...

    def read_ranges(self, info: ObjectInfo, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview]:
        """Byte ranges [start, end) of the very object ``info`` describes, in the order asked for.

        Neighbouring ranges are fetched together and requests run concurrently; memory is that of the result
        plus a bounded number of requests. Results may share memory with each other: a range kept alive keeps
        alive what was fetched with it (at most `ranges.MAX_REQUEST_BYTES`).

        Raises:
            CheckpointError: The object changed since ``info`` was taken (other etag), or a range lies
                outside of it.
        """
        ...

    def open_writer(self, uri: str) -> ObjectWriter:
        """Begin to stream an object of any size, replacing what is there."""
        ...

    def write(self, uri: str, data: bytes) -> ObjectInfo:
        """Store a small object, replacing what is there."""
        ...

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Store a small object unless there is one already; says whether it was stored.

        After False, or after a TransientStorageError, read the object to see whose it is: an answer that
        was lost on the way looks the same as a race that was lost.
        """
        ...

    def delete(self, uri: str) -> None:
        """Remove one object; no error when there is none."""
        ...
