"""Local files as a store.

Writes go to a temporary name in the same folder and are renamed, so that no reader sees half an object.
An etag is the file's modification time, size and inode: replacing a file changes it. Left out: folders as
objects (an empty folder lists as nothing), and guarding `write` against `replace_if_match` on the same file.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from quantlib.errors import (
    CheckpointError,
    NoSpaceError,
    ObjectNotFoundError,
    StorageError,
    TransientStorageError,
)
from quantlib.storage import local_files
from quantlib.storage.contracts import ObjectInfo
from quantlib.storage.ranges import MAX_IN_FLIGHT, fetch_ranges
from quantlib.storage.traffic import Traffic
from quantlib.storage.uris import file_path

# What network file systems answer while their server is away.
_MAY_PASS = (errno.EAGAIN, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


class LocalStore:
    """`contracts.Store` over the file system."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._executor = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="local-read")

    def head(self, uri: str) -> ObjectInfo:
        """Size, etag and time of one file."""
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
            for path in local_files.files_below(file_path(prefix_uri), recursive=recursive):
                # A file may vanish between being seen and being looked at.
                with suppress(FileNotFoundError):
                    found.append(_info(f"file://{path}", path.stat()))
        return sorted(found, key=lambda info: info.uri)

    def read(self, uri: str) -> bytes:
        """A whole small file."""
        return self.read_with_info(uri)[0]

    def read_with_info(self, uri: str) -> tuple[bytes, ObjectInfo]:
        """A whole small file with the etag of that very version."""
        with _translated(uri, "read"), Path(file_path(uri)).open("rb") as file:
            info = _info(uri, os.fstat(file.fileno()))
            content = file.read()
            _check_unchanged(info, file)
        self.traffic.count(read=len(content))
        return content, info

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
            return local_files.link_new(target, data)

    def replace_if_match(self, uri: str, data: bytes, etag: str) -> ObjectInfo | None:
        """Replace a small file only while the one that is there still has this etag."""
        self.traffic.count(written=len(data))
        target = Path(file_path(uri))
        if not target.parent.is_dir():
            return None
        with _translated(uri, "write"), local_files.locked(target):
            try:
                present = target.stat()
            except FileNotFoundError:
                return None
            if _info(uri, present).etag != etag:
                return None
            return _info(uri, local_files.replace(target, data, newer_than=present))

    def abort_uploads(self, prefix_uri: str) -> int:
        """Remove part files (and locks) that no living process of this machine has open; how many."""
        self.traffic.count()
        with _translated(prefix_uri, "delete"):
            return local_files.remove_abandoned(file_path(prefix_uri))

    def delete(self, uri: str) -> None:
        """Remove one file; no error when there is none."""
        self.traffic.count()
        target = Path(file_path(uri))
        if not target.parent.is_dir():
            return
        with _translated(uri, "delete"):
            local_files.remove(target)


class LocalWriter:
    """`contracts.ObjectWriter` over a temporary file that is renamed at the end."""

    info: ObjectInfo

    def __init__(self, uri: str, traffic: Traffic) -> None:
        self._uri = uri
        self._target = Path(file_path(uri))
        self._traffic = traffic

    def __enter__(self) -> Self:
        with _translated(self._uri, "write"):
            self._part, self._file = local_files.open_part(self._target)
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
                status = local_files.flush_to_disk(self._file)
                self._part.replace(self._target)
                self._file.close()
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
        if error.errno in local_files.FULL:
            raise NoSpaceError(
                f"the disk or the quota is full, {uri} could not be written ({error.strerror});"
                " free space, then run the same command again",
                uri=uri,
            ) from error
        if error.errno in local_files.NO_LOCKS:
            raise StorageError(
                f"the file system of {uri} has no file locks, which one writer at a time needs;"
                " use a folder on another one, or S3",
                uri=uri,
            ) from error
        kind = TransientStorageError if error.errno in _MAY_PASS else StorageError
        raise kind(f"this machine would not {action} {uri}: {error.strerror}", uri=uri) from error


def _absent(uri: str) -> ObjectNotFoundError:
    return ObjectNotFoundError(f"{uri} does not exist or is not a file", uri=uri)


def _info(uri: str, status: os.stat_result) -> ObjectInfo:
    etag = f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"
    # Not the modification time, which whoever copies files with their times sets back.
    return ObjectInfo(uri=uri, size_bytes=status.st_size, etag=etag, modified_s=status.st_ctime)


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
