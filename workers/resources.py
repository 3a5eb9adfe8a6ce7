"""Which Ray cluster a job uses: the one at an address, one already joined, or a small one of its own."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from quantlib.errors import WorkerError

# Tensors are mapped from the object store instead of copied out of it.
_WORKER_ENVIRONMENT = {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A connection to a Ray cluster: the one at ``address``, one already joined, or a small one of our own.

    Raises:
        WorkerError: There is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.update(_WORKER_ENVIRONMENT)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    where: dict[str, Any] = {"address": address or "local"}
    if not address:
        where["include_dashboard"] = False
    try:
        ray.init(
            **where,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _WORKER_ENVIRONMENT},
        )
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
