"""Which Ray cluster a job uses and how many workers it gets."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import exceptions

from quantlib.errors import RecipeError, WorkerError
from quantlib.job.options import JobOptions
from workers.block_worker import start_worker

# After this long a worker that could not be placed is given up; an autoscaler may need minutes for a node.
PLACEMENT_TIMEOUT_S = 900.0
LOCAL_PLACEMENT_TIMEOUT_S = 180.0

# Without GPUs: few threads a worker waste little time waiting for each other (two workers of one thread took
# four fifths of the time of one worker of two threads, wall and CPU), but each worker holds a block.
_DEFAULT_CPU_WORKERS = 4

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


@contextmanager
def block_workers(options: JobOptions) -> Iterator[tuple[list[Any], int]]:
    """As many actors as the options ask for and the threads of each; placed, answering, killed at the end.

    Raises:
        RecipeError: More was asked for than the cluster can ever hold.
        WorkerError: A worker could not be placed in time.
    """
    offered = ray.cluster_resources()
    uses_gpus = options.device != "cpu" and offered.get("GPU", 0) >= 1
    if options.device == "cuda" and not uses_gpus:
        raise _refused("device cuda was asked for, but the cluster offers no GPU; choose cpu", "device")
    cores = int(offered.get("CPU", 1))
    count = options.workers or (int(offered["GPU"]) if uses_gpus else _workers_for(cores, options))
    threads = options.threads_per_worker or max(1, cores // count)
    needed = {"CPU": threads * count, "GPU": count if uses_gpus else 0}
    if options.ray_address is None:
        for kind, amount in needed.items():
            if amount > offered.get(kind, 0):
                raise _refused(
                    f"{count} workers of {threads} threads need {amount} {kind}, this machine offers"
                    f" {offered.get(kind, 0):g}; ask for fewer workers or threads_per_worker",
                    "workers",
                )
    actors = [start_worker(n, threads=threads, num_gpus=1 if uses_gpus else 0) for n in range(count)]
    try:
        _wait_until_placed(
            actors, LOCAL_PLACEMENT_TIMEOUT_S if options.ray_address is None else PLACEMENT_TIMEOUT_S
        )
        yield actors, threads
    finally:
        for actor in actors:
            ray.kill(actor)


def _refused(message: str, option: str) -> RecipeError:
    error = RecipeError(message, option=option)
    error.before_work = True
    return error


def _workers_for(cores: int, options: JobOptions) -> int:
    return max(1, min(_DEFAULT_CPU_WORKERS, cores // (options.threads_per_worker or 1)))


def _wait_until_placed(actors: list[Any], timeout_s: float) -> None:
    waiting = [actor.ready.remote() for actor in actors]
    ready, missing = ray.wait(waiting, num_returns=len(waiting), timeout=timeout_s)
    if missing:
        raise WorkerError(
            f"{len(missing)} of {len(waiting)} workers could not be placed within {timeout_s:.0f} s;"
            f" the cluster offers {ray.available_resources()}",
            missing=len(missing),
        )
    try:
        ray.get(ready)
    except exceptions.RayActorError as error:
        raise WorkerError(
            f"a worker did not start: {str(error).splitlines()[-1]}; is Quantmill installed on every node?"
        ) from error
