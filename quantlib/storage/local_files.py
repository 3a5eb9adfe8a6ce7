"""How files change safely on disk: part files, a lock a file, and what a killed process leaves of them.

Everything here raises OSError. Hidden files are told by their ending and are never listed as objects. Locks
are flock's: they end with their process, and network file systems carry them between machines.
"""

import errno
import fcntl
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_PART_SUFFIX = ".quantmill-part"
_LOCK_SUFFIX = ".quantmill-lock"
# A lock is held for one small write to disk; a stopped holder must not stop everybody else.
LOCK_LIMIT_S = 30.0
_LOCK_PAUSE_S = 0.01
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def open_part(target: Path) -> tuple[Path, BinaryIO]:
    """A new file beside the target; a lock on it says that somebody writes it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _hidden(target, uuid.uuid4().hex + _PART_SUFFIX)
    file = part.open("xb")
    # Some file systems have no locks; there every part file looks abandoned.
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return part, file


def flush_to_disk(file: BinaryIO, *, newer_than: os.stat_result | None = None) -> os.stat_result:
    """Put everything on disk, with a modification time that no former version of the file has.

    The system's own time is that of its last clock tick, milliseconds ago, and an inode may be used again at
    once: two versions could not be told apart.
    """
    file.flush()
    now_ns = time.time_ns()
    if newer_than is not None:
        now_ns = max(now_ns, newer_than.st_mtime_ns + 1)
    os.utime(file.fileno(), ns=(now_ns, now_ns))
    os.fsync(file.fileno())
    return os.fstat(file.fileno())


def link_new(target: Path, data: bytes) -> bool:
    """Make a file unless the name is taken; whether it was made."""
    part, file = open_part(target)
    try:
        with file:
            file.write(data)
            flush_to_disk(file)
            # A link, unlike a rename, fails when the name is taken.
            target.hardlink_to(part)
    except FileExistsError:
        # A network file system may make the link and lose the answer.
        with suppress(FileNotFoundError):
            return target.samefile(part)
        return False
    finally:
        part.unlink()
    return True


def replace(target: Path, data: bytes, *, newer_than: os.stat_result) -> os.stat_result:
    """Put a new version in the place of a file; its status."""
    part, file = open_part(target)
    try:
        with file:
            file.write(data)
            status = flush_to_disk(file, newer_than=newer_than)
            part.replace(target)
    except OSError:
        with suppress(FileNotFoundError):
            part.unlink()
        raise
    return status


def remove(target: Path) -> None:
    """Remove a file, not while it is being replaced; no error when there is none."""
    try:
        with locked(target):
            target.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in FULL + NO_LOCKS:
            raise
        # Where no lock can be made, no file can be replaced either; and removing makes room.
        target.unlink(missing_ok=True)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of one file: a hidden file beside it, removed at the end.

    Raises:
        TimeoutError: Another has held it for LOCK_LIMIT_S.
    """
    path = _hidden(target, f"{zlib.crc32(os.fsencode(target.name)):08x}{_LOCK_SUFFIX}")
    deadline = time.monotonic() + LOCK_LIMIT_S
    while (lock := _try_lock(path, os.O_CREAT)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, f"{path} is locked by a process that does not go on")
        time.sleep(_LOCK_PAUSE_S)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
        os.close(lock)


def remove_abandoned(folder: str) -> int:
    """Remove part files and locks below a folder that no living process has open; how many part files."""
    count = 0
    for path in files_below(folder, hidden=True):
        if _remove_unless_locked(path) and path.name.endswith(_PART_SUFFIX):
            count += 1
    return count


def files_below(root: str, *, recursive: bool = True, hidden: bool = False) -> Iterator[Path]:
    """Files below a folder: objects, or, if ``hidden``, part files and locks."""
    for folder, folders, names in os.walk(root, onerror=_raise_unless_absent):
        if not recursive:
            folders.clear()
        for name in names:
            if hidden == (name.startswith(".") and name.endswith((_PART_SUFFIX, _LOCK_SUFFIX))):
                yield Path(folder, name)


def _hidden(target: Path, ending: str) -> Path:
    # Long names are cut: a file name holds at most 255 bytes.
    return target.with_name(f".{target.name[:50]}.{ending}")


def _try_lock(path: Path, more_flags: int) -> int | None:
    """A descriptor that holds the lock, or None while another has it."""
    descriptor = os.open(path, os.O_RDWR | more_flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A former holder may have removed the file since it was opened here; such a lock guards nothing.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _remove_unless_locked(path: Path) -> bool:
    try:
        lock = _try_lock(path, 0)
    except FileNotFoundError:
        return False
    if lock is None:
        return False
    path.unlink()
    os.close(lock)
    return True


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
