"""The workers of one job: how many, with what, placed on the cluster, and begun anew when one is lost."""

import itertools
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray import exceptions

from quantlib.errors import WorkerError
from quantlib.job.memory import Room
from quantlib.job.options import JobOptions
from workers.block_worker import start_worker
from workers.demand import demand, offered
from workers.gang import Gang
from workers.placement import Need, Node, capacity, hosts, the_one_gpu_model, without_other_models

_LOG = logging.getLogger(__name__)

# After this long a worker that could not be placed is given up; an autoscaler may need minutes for a node.
PLACEMENT_TIMEOUT_S = 900.0
LOCAL_PLACEMENT_TIMEOUT_S = 180.0
# A job that lost workers waits this long for nodes to come in place of those that went.
RENEWAL_TIMEOUT_S = 60.0
_LOOK_AGAIN_S = 2.0
# A worker that lives answers a small question within this time, unless it hangs or is loading libraries.
_ANSWER_TIMEOUT_S = 10.0


class WorkerPool:
    """Actors of one job. Use as a context manager: they are placed on entry and killed at the end.

    Args:
        options: The request.
        environment: Variables that workers set before they begin.

    Attributes:
        actors: Worker number -> `BlockWorker` handle; no number is given twice.
        threads: CPU threads of each.

    Raises:
        RecipeError: More was asked for than the cluster can ever hold, or its GPUs are of several models.
    """

    def __init__(self, options: JobOptions, environment: Mapping[str, str] | None = None) -> None:
        nodes = ray.nodes()
        self._options = options
        self._environment = dict(environment or {})
        self._is_local = options.ray_address is None
        self._need, self._count = demand(options, nodes)
        self.threads = self._need.cpus
        self._keeps_to_a_model = self._need.gpus > 0 and not options.mixed_gpus
        self._model: str | None = None
        self._settle_model(hosts(nodes, self._need))
        self._gang: Gang | None = None
        self.actors: dict[int, Any] = {}
        # Asked for while the job runs: handle, and what its first answer will be.
        self._awaited: dict[int, tuple[Any, Any]] = {}
        self._newcomers: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._num_refused = 0
        self._numbers = itertools.count()
        self._looked = time.monotonic()
        self._is_renewed = False

    def __enter__(self) -> "WorkerPool":
        timeout_s = LOCAL_PLACEMENT_TIMEOUT_S if self._is_local else PLACEMENT_TIMEOUT_S
        try:
            self._reserve(timeout_s)
            self._start()
            homes = self._placed(timeout_s, timeout_s)
            self._keep(homes)
            if len(self.actors) < self._count:
                raise self._not_placed(len(self.actors), timeout_s)
            # Nodes may have come since.
            self._settle_model(node for node in ray.nodes() if node["NodeID"] in homes.values())
        except BaseException:
            self._close()
            raise
        _LOG.info("%d workers are placed, each with %s", len(self.actors), self._need)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

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
            _LOG.warning("worker %d on node %s is gone; another is asked for", number, self._nodes[number])
            ray.kill(self.actors.pop(number))
        self._is_renewed = True
        self._ask_for_missing()
        return sorted(gone)

    @property
    def has_newcomers(self) -> bool:
        """Whether workers that were asked for while the job runs have answered."""
        if self._may_grow and time.monotonic() - self._looked > _LOOK_AGAIN_S:
            self._looked = time.monotonic()
            nodes = ray.nodes()
            wanted = offered(self._options, nodes, self._need_among(nodes)) - self._num_refused
            self._count = max(self._count, wanted)
            self._ask_for_missing()
        return bool(self._answered())

    def newcomers(self) -> list[int]:
        """Their numbers; they can be called, and are among ``actors`` once they were taken in."""
        came = []
        for number in self._answered():
            actor, reference = self._awaited.pop(number)
            if _is_well(reference):
                answer: dict[str, Any] = ray.get(reference)
                self._nodes[number] = answer["node"]
                actor.load.remote(self._environment)
                self._newcomers[number] = actor
                came.append(number)
            else:
                self._refuse(actor)
        return came

    def take_in(self, numbers: Iterable[int]) -> None:
        """Count newcomers among the workers."""
        for number in numbers:
            self.actors[number] = self._newcomers.pop(number)

    def send_away(self, numbers: Iterable[int], *, for_good: bool) -> None:
        """Do without newcomers; unless it is for good, others are asked for when workers are next missed."""
        for number in numbers:
            actor = self._newcomers.pop(number)
            if for_good:
                self._refuse(actor)
            else:
                ray.kill(actor)

    @property
    def room(self) -> Room:
        """What the node with least memory has for each worker that it may hold."""
        nodes = ray.nodes()
        need = self._need_among(nodes)
        holding = hosts(nodes, need)
        shares = [min(self._count, capacity([node], need)) for node in holding]
        each = [node["Resources"].get("memory", 0) // n for node, n in zip(holding, shares, strict=True)]
        stores = [node["Resources"].get("object_store_memory", 0) for node in holding]
        return Room(
            worker_bytes=int(min(each, default=0)) or None,
            store_bytes=int(min(stores, default=0)) or None,
            store_workers=max(shares, default=1),
        )

    def node_of(self, number: int) -> str:
        """Id of the node that a worker is on."""
        return self._nodes[number]

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

    @property
    def _may_grow(self) -> bool:
        # A strict placement would not hold for newcomers.
        is_strict = (self._options.placement or "").startswith("strict")
        return self._options.workers is None and not is_strict

    def _ask_for_missing(self) -> None:
        """Actors for which there is no place yet wait for a node; an autoscaler sees them."""
        while len(self._all_numbers()) < self._count:
            number = next(self._numbers)
            actor = self._new_actor(number)
            self._awaited[number] = (actor, actor.ready.remote())

    def _all_numbers(self) -> list[int]:
        return [*self.actors, *self._newcomers, *self._awaited]

    def _keep(self, placed: Collection[int]) -> None:
        for number in self.actors.keys() - placed:
            ray.kill(self.actors.pop(number))

    def _reserve(self, timeout_s: float) -> None:
        """Have all places of the first workers, where they are wanted together."""
        if self._options.placement is None:
            return
        self._gang = Gang(self._need, self._count, self._options.placement)
        if not self._gang.is_ready(timeout_s):
            raise self._not_placed(0, timeout_s)

    def _start(self) -> None:
        for _ in range(self._count):
            number = next(self._numbers)
            self.actors[number] = self._new_actor(number)

    def _new_actor(self, number: int) -> Any:
        place = {} if self._gang is None else self._gang.place(number, self._all_numbers())
        return start_worker(self._need_among(ray.nodes()), place)

    def _need_among(self, nodes: Sequence[Node]) -> Need:
        """What a worker needs, as long as the cluster has these nodes."""
        return self._need if self._model is None else without_other_models(self._need, nodes, self._model)

    def _close(self) -> None:
        self.kill()
        if self._gang is not None:
            self._gang.remove()
            self._gang = None

    def _settle_model(self, nodes: Iterable[Node]) -> None:
        """Find out which model of GPU the job runs on.

        Raises:
            RecipeError: These nodes have several.
        """
        if self._keeps_to_a_model:
            self._model = the_one_gpu_model(nodes)

    def _placed(self, shortest_s: float, longest_s: float) -> dict[int, str]:
        """Number -> node id of the actors that answer.

        Waits for all of them, or after ``shortest_s`` for as many as the living nodes can hold: a process may
        take long to start on a busy node. After ``longest_s`` those that answer by then are all.
        """
        waiting = {actor.ready.remote(): number for number, actor in self.actors.items()}
        began, ready = time.monotonic(), []
        while len(ready) < self._count:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_LOOK_AGAIN_S)
            waited_s = time.monotonic() - began
            is_enough = len(ready) >= min(self._count, max(1, self._num_places()))
            if waited_s >= longest_s or (waited_s >= shortest_s and is_enough):
                break
        homes = {waiting[reference]: self._home(reference) for reference in ready}
        placed = {number: home for number, home in homes.items() if home is not None}
        for number in placed:
            self.actors[number].load.remote(self._environment)
        self._nodes.update(placed)
        return placed

    def _home(self, reference: Any) -> str | None:
        """Node id of an actor; None for one that died on a node that went in the meantime."""
        try:
            answer: dict[str, Any] = ray.get(reference)
        except exceptions.ActorUnavailableError:
            return None
        except exceptions.RayActorError as error:
            if self._is_renewed:
                return None
            raise WorkerError(
                f"a worker did not start: {str(error).splitlines()[-1]}; is Quantmill installed on every"
                " node?"
            ) from error
        return answer["node"]

    def _num_places(self) -> int:
        """How many workers the nodes that live can hold, were they empty."""
        nodes = ray.nodes()
        return capacity(nodes, self._need_among(nodes), self._options.placement)

    def _not_placed(self, placed: int, timeout_s: float) -> WorkerError:
        room, free = self._num_places(), ray.available_resources()
        together = "" if self._gang is None else f" together ({self._options.placement})"
        missing = self._count - (room if self._gang is not None and room < self._count else placed)
        kinds = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in self._need.amounts)
        return WorkerError(
            f"{missing} of {self._count} workers could not be placed{together} within {timeout_s:.0f} s: each"
            f" needs {self._need}; the living nodes have room for {room}, were they empty, and what is free"
            f" on all of them is {kinds}; add nodes, or ask for fewer workers or threads_per_worker",
            missing=missing,
        )


def _is_well(answer: ray.ObjectRef) -> bool:
    try:
        ray.get(answer)
    except exceptions.RayError:
        return False
    return True
