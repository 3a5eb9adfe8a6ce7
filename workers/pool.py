"""The workers of one job: how many, with what, placed on the cluster, and begun anew when one is lost."""

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import exceptions

from quantlib.errors import RecipeError, WorkerError
from quantlib.job.options import JobOptions
from workers.block_worker import start_worker

# After this long a worker that could not be placed is given up; an autoscaler may need minutes for a node.
PLACEMENT_TIMEOUT_S = 900.0
LOCAL_PLACEMENT_TIMEOUT_S = 180.0
# A job that lost workers waits this long for nodes to come in place of those that went.
RENEWAL_TIMEOUT_S = 60.0
_LOOK_AGAIN_S = 2.0

# Without GPUs: few threads a worker waste little time waiting for each other (two workers of one thread took
# four fifths of the time of one worker of two threads, wall and CPU), but each worker holds a block.
_DEFAULT_CPU_WORKERS = 4


class WorkerPool:
    """Actors of one job. Use as a context manager: they are placed on entry and killed at the end.

    Args:
        options: The request.

    Attributes:
        actors: `BlockWorker` handles, by worker number.
        threads: CPU threads of each.

    Raises:
        RecipeError: More was asked for than the cluster can ever hold.
    """

    def __init__(self, options: JobOptions) -> None:
        offered = ray.cluster_resources()
        self._uses_gpus = options.device != "cpu" and offered.get("GPU", 0) >= 1
        if options.device == "cuda" and not self._uses_gpus:
            raise _refused("device cuda was asked for, but the cluster offers no GPU; choose cpu", "device")
        cores = int(offered.get("CPU", 1))
        fitting = int(offered["GPU"]) if self._uses_gpus else _workers_for(cores, options)
        self._count = options.workers or fitting
        self._is_local = options.ray_address is None
        self.threads = options.threads_per_worker or max(1, cores // self._count)
        self.actors: list[Any] = []
        self._is_renewed = False
        if self._is_local:
            self._refuse_too_many(offered)

    def __enter__(self) -> "WorkerPool":
        timeout_s = LOCAL_PLACEMENT_TIMEOUT_S if self._is_local else PLACEMENT_TIMEOUT_S
        try:
            self._start()
            self.actors = self._placed(timeout_s, timeout_s)
            if len(self.actors) < self._count:
                raise self._not_placed(len(self.actors), timeout_s)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def renew(self) -> None:
        """Kill what is left and start again; without the lost nodes after `RENEWAL_TIMEOUT_S`.

        Raises:
            WorkerError: Not one could be placed.
        """
        self.kill()
        self._is_renewed = True
        self._start()
        longest_s = LOCAL_PLACEMENT_TIMEOUT_S if self._is_local else PLACEMENT_TIMEOUT_S
        placed = self._placed(RENEWAL_TIMEOUT_S, longest_s)
        for actor in self.actors:
            if actor not in placed:
                ray.kill(actor)
        self.actors = placed
        if not placed:
            raise self._not_placed(0, longest_s)

    def kill(self) -> None:
        """End all actors at once, whatever they are doing."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def _start(self) -> None:
        num_gpus = 1 if self._uses_gpus else 0
        self.actors = [start_worker(threads=self.threads, num_gpus=num_gpus) for _ in range(self._count)]

    def _placed(self, shortest_s: float, longest_s: float) -> list[Any]:
        """The actors that answer.

        Waits for all of them, or after ``shortest_s`` for as many as the living nodes can hold: a process may
        take long to start on a busy node. After ``longest_s`` those that answer by then are all.
        """
        waiting = {actor.ready.remote(): actor for actor in self.actors}
        began, ready = time.monotonic(), []
        while len(ready) < self._count:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_LOOK_AGAIN_S)
            waited_s = time.monotonic() - began
            is_enough = len(ready) >= min(self._count, max(1, self._fitting()))
            if waited_s >= longest_s or (waited_s >= shortest_s and is_enough):
                break
        placed = [waiting[reference] for reference in ready if self._has_started(reference)]
        for actor in placed:
            actor.load.remote()
        return placed

    def _has_started(self, reference: Any) -> bool:
        """False for an actor that died on a node that went in the meantime."""
        try:
            ray.get(reference)
        except exceptions.ActorUnavailableError:
            return False
        except exceptions.RayActorError as error:
            if self._is_renewed:
                return False
            raise WorkerError(
                f"a worker did not start: {str(error).splitlines()[-1]}; is Quantmill installed on every"
                " node?"
            ) from error
        return True

    def _fitting(self) -> int:
        """How many workers the nodes that live can hold, were they empty."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        by_cores = [int(node.get("CPU", 0) // self.threads) for node in nodes]
        by_gpus = [int(node.get("GPU", 0)) if self._uses_gpus else self._count for node in nodes]
        return sum(min(cores, gpus) for cores, gpus in zip(by_cores, by_gpus, strict=True))

    def _not_placed(self, placed: int, timeout_s: float) -> WorkerError:
        missing = self._count - placed
        each = f"{self.threads} CPU" + (" and 1 GPU" if self._uses_gpus else "")
        free = ", ".join(f"{ray.available_resources().get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
        return WorkerError(
            f"{missing} of {self._count} workers could not be placed within {timeout_s:.0f} s: each needs"
            f" {each} on one node, and what is free on all nodes is {free}; add nodes, or ask for fewer"
            " workers or threads_per_worker",
            missing=missing,
        )

    def _refuse_too_many(self, offered: Mapping[str, float]) -> None:
        needed = {"CPU": self.threads * self._count, "GPU": self._count if self._uses_gpus else 0}
        for kind, amount in needed.items():
            if amount > offered.get(kind, 0):
                raise _refused(
                    f"{self._count} workers of {self.threads} threads need {amount} {kind}, this machine"
                    f" offers {offered.get(kind, 0):g}; ask for fewer workers or threads_per_worker",
                    "workers",
                )


def _refused(message: str, option: str) -> RecipeError:
    error = RecipeError(message, option=option)
    error.before_work = True
    return error


def _workers_for(cores: int, options: JobOptions) -> int:
    return max(1, min(_DEFAULT_CPU_WORKERS, cores // (options.threads_per_worker or 1)))
