"""How much memory a process takes, and how much there is.

Memory that is shared with other processes (Ray's object store) is left out: it is counted once, for the node.
"""

import ctypes
import resource
import threading
import time
from pathlib import Path

# So often a process that maps shared memory is looked at; without any the kernel itself knows the peak.
_INTERVAL_S = 0.05
# Of glibc's malloc.h; what is kept back when memory is to be given back.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_THRESHOLD_BYTES = 1 << 16
# Freed memory that glibc keeps otherwise, and after `give_back_free_memory`: the top of a thread's heap, and
# what lies scattered between streams. Up to 144 MB were measured.
KEPT_BYTES = 144_000_000
# Both slots through which tensors go to a GPU: long enough that starting a copy costs nothing beside it.
PINNED_SLOTS_BYTES = 64 << 20
_STATUS = Path("/proc/self/status")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_MEMINFO = Path("/proc/meminfo")


def memory_bytes() -> int:
    """Of this process now, without what it shares; where the kernel does not tell, its peak."""
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fields = _fields(_STATUS)
    return fields["VmRSS"] - fields["RssShmem"]


def machine_memory_bytes() -> int | None:
    """Of this machine, or of the container if that is less; None where the kernel does not tell."""
    if not _MEMINFO.exists():
        return None
    limits = [path.read_text().strip() for path in _LIMITS if path.exists()]
    return min([_fields(_MEMINFO)["MemTotal"], *(int(limit) for limit in limits if limit.isdigit())])


def give_back_free_memory() -> None:
    """Return to the system what the C library keeps of freed memory; does nothing where it is not glibc.

    Called after a piece of work: else what one piece freed stays beside what the next one takes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def give_back_what_is_freed() -> None:
    """Have the C library return memory to the system once it is freed, at the cost of fetching it again.

    It otherwise keeps much of what tensors of up to 32 MiB took. Does nothing where it is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(parameter, _THRESHOLD_BYTES)


class _Watch:
    """Follows the memory of this process, once for all who ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_running = False
        self.seen_bytes = 0

    def begin(self) -> None:
        with self._lock:
            if not self._is_running and _STATUS.exists():
                self._is_running = True
                threading.Thread(target=self._run, name="memory", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.seen_bytes = max(self.seen_bytes, memory_bytes())
            time.sleep(_INTERVAL_S)


_WATCH = _Watch()


def watch_memory() -> None:
    """Follow the memory of this process from now on."""
    _WATCH.begin()


def peak_memory_bytes() -> int:
    """The most that this process has taken since `watch_memory`, or ever where it never shared any."""
    if not _STATUS.exists():
        return memory_bytes()
    fields = _fields(_STATUS)
    # What is shared now may have been in the kernel's peak too.
    return max(_WATCH.seen_bytes, fields["VmHWM"] if not fields["RssShmem"] else 0)


def _fields(path: Path) -> dict[str, int]:
    """Name -> bytes."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
