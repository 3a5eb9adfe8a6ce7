"""Which Ray cluster a job uses: the one at an address, one already joined, or a small one of its own."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from quantlib.errors import WorkerError
from quantlib.units import parse_bytes

_WORKER_ENVIRONMENT = {
    # Tensors are mapped from the object store instead of copied out of it.
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    # A member of an NCCL group that is lost becomes an error at the others instead of their end.
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    # glibc gives an actor's thread a heap of its own that returns large tensors to the system as soon as they
    # are free; to fault their pages in again cost a twentieth of a capture. The one heap left keeps tensors
    # up to 32 MiB (larger ones are mapped and unmapped) and returns what is free beyond 256 MiB at its end.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}


@contextmanager
def cluster(address: str | None, object_store_memory: str | None = None) -> Iterator[None]:
    """A connection to a Ray cluster: the one at ``address``, one already joined, or a small one of our own.

    Args:
        object_store_memory: Of the one of our own; others have what they were started with.

    Raises:
        WorkerError: There is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    for name, value in {**_WORKER_ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0"}.items():
        os.environ.setdefault(name, value)
    if address:
        where: dict[str, Any] = {"address": address, "runtime_env": {"env_vars": _WORKER_ENVIRONMENT}}
    else:
        # Workers inherit this process's environment; a runtime_env would keep Ray from using the processes
        # that it starts ahead.
        where = {"address": "local", "include_dashboard": False}
        if object_store_memory is not None:
            where["object_store_memory"] = parse_bytes(object_store_memory, "object_store_memory")
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, TimeoutError, RuntimeError, ValueError) as error:
        wanted = f"no Ray cluster answers at {address}" if address else "Ray could not be started here"
        raise WorkerError(
            f"{wanted}: {str(error).splitlines()[0]}; check the address, RAY_AUTH_MODE and TMPDIR"
            " (Ray's socket paths may have 107 characters)",
            address=address,
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
