"""How the crew reaches workers that are Ray actors, and what their failures become.

No wait is endless: Ray tells of processes and nodes that died, and a worker that hangs is found by its pulse,
a small question in a lane of its own, which every worker must answer within `SILENCE_LIMIT_S`.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import exceptions

from quantlib.errors import QuantError, WorkerLostError
from quantlib.job.memory import Room
from quantlib.job.transport import EXCHANGE_METHODS, STORAGE_METHODS
from workers.pool import WorkerPool

PULSE_S = 20.0
SILENCE_LIMIT_S = 300.0

# What Ray raises when a worker, its node or a value it kept is gone or out of reach.
LOST = (
    exceptions.RayActorError,
    exceptions.ObjectLostError,
    exceptions.NodeDiedError,
    exceptions.OutOfMemoryError,
    exceptions.WorkerCrashedError,
    exceptions.LocalRayletDiedError,
)


class RayTransport:
    """Workers behind actor handles.

    Args:
        pool: The actors.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._asked: dict[Any, tuple[ray.ObjectRef, float]] = {}

    @property
    def workers(self) -> list[int]:
        """Numbers of the workers there are now."""
        return list(self._pool.actors)

    @property
    def room(self) -> Room:
        """The memory that their nodes have for them."""
        return self._pool.room

    def node_of(self, worker: int) -> str:
        """Id of a worker's node."""
        return self._pool.node_of(worker)

    def submit(self, worker: int, method: str, *arguments: Any) -> ray.ObjectRef:
        """Start a method of a worker.

        The arguments travel inside a tuple: Ray then passes references on as references, and the worker
        fetches each where it is used.
        """
        actor = self._pool.actor(worker)
        lane = actor.compute
        if method in STORAGE_METHODS:
            lane = actor.store
        elif method in EXCHANGE_METHODS:
            lane = actor.exchange
        return lane.remote(method, arguments)

    def when_done(self, handle: ray.ObjectRef, call: Callable[[], None]) -> None:
        """Call, from a thread of Ray's, once a method has ended; small values only, they are fetched."""
        handle.future().add_done_callback(lambda _: call())

    def result(self, handle: ray.ObjectRef) -> Any:
        """Wait for a method.

        Raises:
            QuantError: Of the worker's own raising, or WorkerLostError when a worker is gone or silent.
        """
        while not ray.wait([handle], timeout=PULSE_S)[0]:
            self.feel_pulses()
        try:
            return ray.get(handle)
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, QuantError):
                raise cause from None
            # A worker that waited for another one's value tells of that one's death.
            if isinstance(cause, LOST):
                raise lost_worker(cause) from error
            raise
        except LOST as error:
            raise lost_worker(error) from error

    def drop_lost(self) -> list[int]:
        """Do without the workers that are gone; see `WorkerPool.drop_lost`."""
        with self._lock:
            self._asked.clear()
        return self._pool.drop_lost()

    @property
    def has_newcomers(self) -> bool:
        """Whether workers came that do not take part yet; see `WorkerPool.has_newcomers`."""
        return self._pool.has_newcomers

    def newcomers(self) -> list[int]:
        """Their numbers; they can be called, but are not among the workers yet."""
        return self._pool.newcomers()

    def take_in(self, newcomers: Sequence[int]) -> None:
        """Count newcomers among the workers."""
        self._pool.take_in(newcomers)

    def send_away(self, newcomers: Sequence[int], *, for_good: bool) -> None:
        """Do without newcomers; unless it is for good, others may come in their place."""
        self._pool.send_away(newcomers, for_good=for_good)

    def renew(self) -> None:
        """Start all workers anew; see `WorkerPool.renew`."""
        with self._lock:
            self._asked.clear()
        self._pool.renew()

    def feel_pulses(self) -> None:
        """Ask every worker for a sign of life.

        Raises:
            WorkerLostError: One has not answered for `SILENCE_LIMIT_S`.
        """
        now = time.monotonic()
        with self._lock:
            for number, actor in list(self._pool.actors.items()):
                reference, since = self._asked.get(actor, (None, now))
                if reference is None or ray.wait([reference], timeout=0)[0]:
                    self._asked[actor] = (actor.pulse.remote(), now)
                elif now - since > SILENCE_LIMIT_S:
                    raise WorkerLostError(
                        f"worker {number} has not answered for {now - since:.0f} s", worker=number
                    )


def lost_worker(error: Exception) -> WorkerLostError:
    """What Ray said of a worker that is gone, as an error of ours."""
    words = next((line for line in str(error).splitlines() if line.strip()), "")
    return WorkerLostError(f"a worker was lost ({type(error).__name__}): {words}")
