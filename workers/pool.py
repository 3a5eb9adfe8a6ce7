"""The workers of one job: how many, with what, placed on the cluster, and begun anew when one is lost."""

import itertools
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import ray
from ray import exceptions

from quantlib.errors import RecipeError, WorkerError
from quantlib.job.memory import Room
from quantlib.job.options import JobOptions
from workers.block_worker import start_worker

# After this long a worker that could not be placed is given up; an autoscaler may need minutes for a node.
PLACEMENT_TIMEOUT_S = 900.0
LOCAL_PLACEMENT_TIMEOUT_S = 180.0
# A job that lost workers waits this long for nodes to come in place of those that went.
RENEWAL_TIMEOUT_S = 60.0
_LOOK_AGAIN_S = 2.0
# A worker that lives answers a small question within this time, unless it hangs or is loading libraries.
_ANSWER_TIMEOUT_S = 10.0

# Without GPUs: few threads a worker waste little time waiting for each other (two workers of one thread took
# four fifths of the time of one worker of two threads, wall and CPU), but each worker holds a block.
_DEFAULT_CPU_WORKERS = 4


class WorkerPool:
    """Actors of one job. Use as a context manager: they are placed on entry and killed at the end.

    Args:
        options: The request.

    Attributes:
        actors: Worker number -> `BlockWorker` handle; no number is given twice.
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
        self._options = options
        self._count = options.workers or self._offered(offered)
        self._is_local = options.ray_address is None
        self.threads = options.threads_per_worker or max(1, cores // self._count)
        self.actors: dict[int, Any] = {}
        # Asked for while the job runs: handle, and what its first answer will be.
        self._awaited: dict[int, tuple[Any, Any]] = {}
        self._newcomers: dict[int, Any] = {}
        self._num_refused = 0
        self._numbers = itertools.count()
        self._looked = time.monotonic()
        self._is_renewed = False
        if self._is_local:
            self._refuse_too_many(offered)

    def __enter__(self) -> "WorkerPool":
        timeout_s = LOCAL_PLACEMENT_TIMEOUT_S if self._is_local else PLACEMENT_TIMEOUT_S
        try:
            self._start()
            self._keep(self._placed(timeout_s, timeout_s))
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
        self._keep(self._placed(RENEWAL_TIMEOUT_S, longest_s))
        if not self.actors:
            raise self._not_placed(0, longest_s)
        self._ask_for_missing()

    def drop_lost(self) -> list[int]:
        """Do without the workers whose process or node is gone, and ask for others in their place.

        Returns:
            Their numbers. One that does not answer in time is not among them: it may be busy loading.
        """
        answers = {actor.pulse.remote(): number for number, actor in self.actors.items()}
        if not answers:
            return []
        answered, _ = ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWER_TIMEOUT_S)
        gone = [answers[reference] for reference in answered if not _is_well(reference)]
        for number in gone:
            ray.kill(self.actors.pop(number))
        self._is_renewed = True
        self._ask_for_missing()
        return sorted(gone)

    @property
    def has_newcomers(self) -> bool:
        """Whether workers that were asked for while the job runs have answered."""
        if self._options.workers is None and time.monotonic() - self._looked > _LOOK_AGAIN_S:
            self._looked = time.monotonic()
            wanted = self._offered(ray.cluster_resources()) - self._num_refused
            self._count = max(self._count, wanted)
            self._ask_for_missing()
        return bool(self._answered())

    def newcomers(self) -> list[int]:
        """Their numbers; they can be called, and are among ``actors`` once they were taken in."""
        came = []
        for number in self._answered():
            actor, reference = self._awaited.pop(number)
            if _is_well(reference):
                actor.load.remote()
                self._newcomers[number] = actor
                came.append(number)
            else:
                self._refuse(actor)
        return came

    def take_in(self, numbers: Iterable[int]) -> None:
        """Count newcomers among the workers."""
        for number in numbers:
            self.actors[number] = self._newcomers.pop(number)

    def send_away(self, numbers: Iterable[int]) -> None:
        """Do without newcomers, and ask for no others in their place."""
        for number in numbers:
            self._refuse(self._newcomers.pop(number))

    @property
    def room(self) -> Room:
        """What the node with least memory has for each worker that it may hold."""
        holding = [node for node in ray.nodes() if node["Alive"] and self._fitting_on(node)]
        shares = [min(self._count, self._fitting_on(node)) for node in holding]
        each = [node["Resources"].get("memory", 0) // n for node, n in zip(holding, shares, strict=True)]
        stores = [node["Resources"].get("object_store_memory", 0) for node in holding]
        return Room(
            worker_bytes=int(min(each, default=0)) or None,
            store_bytes=int(min(stores, default=0)) or None,
            store_workers=max(shares, default=1),
        )

    def actor(self, number: int) -> Any:
        """A worker's or a newcomer's handle."""
        return self.actors.get(number) or self._newcomers[number]

    def kill(self) -> None:
        """End all actors at once, whatever they are doing."""
        awaited = [actor for actor, _ in self._awaited.values()]
        for actor in [*self.actors.values(), *self._newcomers.values(), *awaited]:
            ray.kill(actor)
        self.actors, self._newcomers, self._awaited = {}, {}, {}

    def _refuse(self, actor: Any) -> None:
        ray.kill(actor)
        self._count -= 1
        self._num_refused += 1

    def _answered(self) -> list[int]:
        numbers = {reference: number for number, (_, reference) in self._awaited.items()}
        if not numbers:
            return []
        answered, _ = ray.wait(list(numbers), num_returns=len(numbers), timeout=0)
        return sorted(numbers[reference] for reference in answered)

    def _ask_for_missing(self) -> None:
        """Actors for which there is no place yet wait for a node; an autoscaler sees them."""
        while len(self.actors) + len(self._newcomers) + len(self._awaited) < self._count:
            actor = self._new_actor()
            self._awaited[next(self._numbers)] = (actor, actor.ready.remote())

    def _keep(self, placed: Collection[int]) -> None:
        for number in self.actors.keys() - placed:
            ray.kill(self.actors.pop(number))

    def _start(self) -> None:
        self.actors = {next(self._numbers): self._new_actor() for _ in range(self._count)}

    def _new_actor(self) -> Any:
        return start_worker(threads=self.threads, num_gpus=1 if self._uses_gpus else 0)

    def _placed(self, shortest_s: float, longest_s: float) -> list[int]:
        """Numbers of the actors that answer.

        Waits for all of them, or after ``shortest_s`` for as many as the living nodes can hold: a process may
        take long to start on a busy node. After ``longest_s`` those that answer by then are all.
        """
        waiting = {actor.ready.remote(): number for number, actor in self.actors.items()}
        began, ready = time.monotonic(), []
        while len(ready) < self._count:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_LOOK_AGAIN_S)
            waited_s = time.monotonic() - began
            is_enough = len(ready) >= min(self._count, max(1, self._fitting()))
            if waited_s >= longest_s or (waited_s >= shortest_s and is_enough):
                break
        placed = [waiting[reference] for reference in ready if self._has_started(reference)]
        for number in placed:
            self.actors[number].load.remote()
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

    def _offered(self, resources: Mapping[str, float]) -> int:
        """How many workers a job takes of a cluster with these resources, unless it is told."""
        if self._uses_gpus:
            return int(resources.get("GPU", 0))
        return _workers_for(int(resources.get("CPU", 1)), self._options)

    def _fitting(self) -> int:
        """How many workers the nodes that live can hold, were they empty."""
        return sum(self._fitting_on(node) for node in ray.nodes() if node["Alive"])

    def _fitting_on(self, node: Mapping[str, Any]) -> int:
        offered = node["Resources"]
        by_cores = int(offered.get("CPU", 0) // self.threads)
        return min(by_cores, int(offered.get("GPU", 0))) if self._uses_gpus else by_cores

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


def _is_well(answer: ray.ObjectRef) -> bool:
    try:
        ray.get(answer)
    except exceptions.RayError:
        return False
    return True


def _refused(message: str, option: str) -> RecipeError:
    error = RecipeError(message, option=option)
    error.before_work = True
    return error


def _workers_for(cores: int, options: JobOptions) -> int:
    return max(1, min(_DEFAULT_CPU_WORKERS, cores // (options.threads_per_worker or 1)))
