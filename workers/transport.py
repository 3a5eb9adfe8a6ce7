"""How the crew reaches workers that are Ray actors, and what their failures become."""

from collections.abc import Sequence
from typing import Any

import ray
from ray import exceptions

from quantlib.errors import QuantError, WorkerError

# Methods that may run beside computation, in the actor's storage lane.
_STORAGE_METHODS = ("read", "read_packed", "write")


class RayTransport:
    """Workers behind actor handles.

    Args:
        actors: `BlockWorker` handles, by worker number.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors
        self.num_workers = len(actors)

    def submit(self, worker: int, method: str, *arguments: Any) -> ray.ObjectRef:
        """Start a method of a worker.

        The arguments travel inside a tuple: Ray then passes references on as references, and the worker
        fetches each where it is used.
        """
        actor = self._actors[worker]
        lane = actor.store if method in _STORAGE_METHODS else actor.compute
        return lane.remote(method, arguments)

    def result(self, handle: ray.ObjectRef) -> Any:
        """Wait for a method.

        Raises:
            QuantError: Of the worker's own raising, or WorkerError when the worker was lost.
        """
        try:
            return ray.get(handle)
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, QuantError):
                raise cause from None
            raise
        except (exceptions.RayActorError, exceptions.ObjectLostError) as error:
            raise WorkerError(
                f"a worker was lost ({type(error).__name__}): {str(error).splitlines()[0]};"
                " start the same command again to go on from the last finished unit"
            ) from error
