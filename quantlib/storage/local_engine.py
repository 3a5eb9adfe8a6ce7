"""Local files as a store.

Writes go to a temporary name in the same folder and are renamed, so that no reader sees half an object.
An etag is the file's modification time, size and inode: replacing a file changes it. Left out: locking, and
folders as objects (an empty folder lists as nothing).
"""

import errno
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from quantlib.errors import CheckpointError, ObjectNotFoundError, StorageError, TransientStorageError
from quantlib.storage.contracts import ObjectInfo
from quantlib.storage.ranges import MAX_IN_FLIGHT, fetch_ranges
from quantlib.storage.traffic import Traffic
from quantlib.storage.uris import file_path

_PART_SUFFIX = ".quantmill-part"
# What network file systems answer while their server is away.
_MAY_PASS = (errno.EAGAIN, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


class LocalStore:
    """`contracts.Store` over the file system."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._executor = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="local-read")

    def head(self, uri: str) -> ObjectInfo:
        """Size and etag of one file."""
        self.traffic.count()
        with _translated(uri, "read"):
            status = Path(file_path(uri)).stat()
        if not stat.S_ISREG(status.st_mode):
            raise _absent(uri)
        return _info(uri, status)

    def list(self, prefix_uri: str, *, recursive: bool = True) -> Sequence[ObjectInfo]:
        """All files below a folder, sorted by uri; symbolic links to files count as files."""
        self.traffic.count()
        found = []
        with _translated(prefix_uri, "list"):
            for path in _files_below(file_path(prefix_uri), recursive):
                # A file may vanish between being seen and being looked at.
                with suppress(FileNotFoundError):
                    found.append(_info(f"file://{path}", path.stat()))
        return sorted(found, key=lambda info: info.uri)

    def read(self, uri: str) -> bytes:
        """A whole small file."""
        with _translated(uri, "read"):
            content = Path(file_path(uri)).read_bytes()
        self.traffic.count(read=len(content))
        return content

    def read_ranges(self, info: ObjectInfo, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview]:
        """Byte ranges of the very file that ``info`` describes."""
        with _translated(info.uri, "read"), Path(file_path(info.uri)).open("rb") as file:
            _check_unchanged(info, file)

            def fetch(start: int, end: int) -> memoryview:
                self.traffic.count(read=end - start)
                return _pread(file.fileno(), start, end)

            views = fetch_ranges(info, ranges, fetch, self._executor)
            _check_unchanged(info, file)
        return views

    def open_writer(self, uri: str) -> "LocalWriter":
        """Begin to stream a file."""
        return LocalWriter(uri, self.traffic)

    def write(self, uri: str, data: bytes) -> ObjectInfo:
        """Store a small file, replacing what is there."""
        with self.open_writer(uri) as writer:
            writer.write(data)
        return writer.info

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Store a small file unless there is one already; says whether it was stored."""
        self.traffic.count(written=len(data))
        target = Path(file_path(uri))
        with _translated(uri, "write"):
            part, file = _open_part(target)
            try:
                with file:
                    file.write(data)
                    _flush_to_disk(file)
                # A link, unlike a rename, fails when the name is taken.
                target.hardlink_to(part)
            except FileExistsError:
                return False
            finally:
                part.unlink()
        return True

    def delete(self, uri: str) -> None:
        """Remove one file; no error when there is none."""
        self.traffic.count()
        with _translated(uri, "delete"), suppress(FileNotFoundError):
            Path(file_path(uri)).unlink()


class LocalWriter:
    """`contracts.ObjectWriter` over a temporary file that is renamed at the end."""

    info: ObjectInfo

    def __init__(self, uri: str, traffic: Traffic) -> None:
        self._uri = uri
        self._target = Path(file_path(uri))
        self._traffic = traffic

    def __enter__(self) -> Self:
        with _translated(self._uri, "write"):
            self._part, self._file = _open_part(self._target)
        return self

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append to the temporary file."""
        with _translated(self._uri, "write"):
            self._file.write(data)
        self._traffic.count(written=len(data), requests=0)

    def __exit__(self, *error: object) -> None:
        self._traffic.count()
        if error[0] is not None:
            self._discard()
            return
        try:
            with _translated(self._uri, "write"):
                _flush_to_disk(self._file)
                status = os.fstat(self._file.fileno())
                self._file.close()
                self._part.replace(self._target)
        except StorageError:
            self._discard()
            raise
        self.info = _info(self._uri, status)

    def _discard(self) -> None:
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._part.unlink()


@contextmanager
def _translated(uri: str, action: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise _absent(uri) from error
    except OSError as error:
        kind = TransientStorageError if error.errno in _MAY_PASS else StorageError
        raise kind(f"this machine would not {action} {uri}: {error.strerror}", uri=uri) from error


def _absent(uri: str) -> ObjectNotFoundError:
    return ObjectNotFoundError(f"{uri} does not exist or is not a file", uri=uri)


def _info(uri: str, status: os.stat_result) -> ObjectInfo:
    etag = f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"
    return ObjectInfo(uri=uri, size_bytes=status.st_size, etag=etag)


def _check_unchanged(info: ObjectInfo, file: BinaryIO) -> None:
    if _info(info.uri, os.fstat(file.fileno())).etag != info.etag:
        raise CheckpointError(
            f"{info.uri} was replaced or changed while in use; begin again with the new file", uri=info.uri
        )


def _pread(descriptor: int, start: int, end: int) -> memoryview:
    """Read [start, end); shorter where the file ends early."""
    content = np.empty(end - start, dtype=np.uint8).data
    done = 0
    while done < len(content):
        count = os.preadv(descriptor, [content[done:]], start + done)
        if count == 0:
            break
        done += count
    return content[:done]


def _open_part(target: Path) -> tuple[Path, BinaryIO]:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Long names are cut: a file name holds at most 255 bytes.
    part = target.with_name(f".{target.name[:60]}.{uuid.uuid4().hex}{_PART_SUFFIX}")
    return part, part.open("xb")


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _files_below(root: str, recursive: bool) -> Iterator[Path]:
    for folder, folders, names in os.walk(root, onerror=_raise_unless_absent):
        if not recursive:
            folders.clear()
        for name in names:
            if not (name.startswith(".") and name.endswith(_PART_SUFFIX)):
                yield Path(folder, name)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
