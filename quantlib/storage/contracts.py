"""What every storage engine does. Nothing above this package knows which engine runs.

A URI is ``s3://bucket/key`` or ``file:///absolute/path``. Errors are ours (`quantlib.errors`):
ObjectNotFoundError for a missing object or bucket, StorageError for refused credentials and the like,
TransientStorageError once the engine's own retries are used up, NoSpaceError when the store is full,
ChecksumError for bytes that arrive damaged again and again. Every call on S3 ends within a stated time
(`s3_settings.CALL_LIMIT_S`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from quantlib.storage.traffic import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One stored object.

    Attributes:
        uri: Its address.
        size_bytes: Of its content.
        etag: Changes whenever the content is replaced.
        modified_s: When the object came to be as it is, in seconds since the epoch by the store's clock, as
            `Store.head` and `Store.list` tell it; None from other calls. It tells no version from another.
    """

    uri: str
    size_bytes: int
    etag: str
    modified_s: float | None = field(default=None, compare=False)


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
        """Size, etag and time of one object."""
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

    def read_with_info(self, uri: str) -> tuple[bytes, ObjectInfo]:
        """A whole small object with the etag of that very version."""
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

        Of callers with different contents exactly one is told True. An answer that was lost on the way is
        settled here, by reading the object: equal content counts as stored. So callers with equal contents
        may all be told True; put something of your own into ``data`` (a run id) when that matters.

        Raises:
            TransientStorageError: It could not be found out; the object may still appear.
        """
        ...

    def replace_if_match(self, uri: str, data: bytes, etag: str) -> ObjectInfo | None:
        """Store a small object only while the one that is there still has this etag.

        Of callers with the same etag and different contents exactly one gets its ObjectInfo; the others get
        None, as for an object that is gone. Lost answers are settled as in `put_if_absent`: equal content
        counts as stored, and its present etag is returned. On local files this guards against other calls of
        `replace_if_match`, `put_if_absent` and `delete`, not against `write` or `open_writer` of the object.

        Raises:
            TransientStorageError: It could not be found out; the object may still change.
        """
        ...

    def abort_uploads(self, prefix_uri: str) -> int:
        """Give up unfinished uploads below a prefix (``prefix/...``); returns how many there were.

        On S3 these are multipart uploads, which cost money and are not listed as objects; of local files the
        hidden part files, but none that a living process of this machine has open. The caller makes sure that
        nobody streams an object there; small objects may be written meanwhile.
        """
        ...

    def delete(self, uri: str) -> None:
        """Remove one object; no error when there is none."""
        ...
