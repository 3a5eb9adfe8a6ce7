"""The actor: one device, one `BlockRunner`, two lanes (computation, storage).

Large results are put in Ray's object store, where the workers of a node map one copy; the driver only ever
holds references to them.
"""

from typing import Any

import ray

_STORAGE_LANE = "storage"


class BlockWorker:
    """A worker of a job.

    Args:
        number: Which worker this is, from 0.
    """

    def __init__(self, number: int) -> None:
        # Imported here so that the driver, which ships this class, needs neither torch nor transformers.
        from quantlib.block_runner import BlockRunner

        self._runner = BlockRunner(number, share=ray.put)

    def ready(self) -> int:
        """Answers once the actor runs; gives its process id."""
        import os

        return os.getpid()

    def compute(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method of the runner; object references among the arguments become values."""
        return getattr(self._runner, method)(*(_resolved(argument) for argument in arguments))

    @ray.method(concurrency_group=_STORAGE_LANE)
    def store(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """The same in the lane that may run beside computation: reads and writes."""
        return getattr(self._runner, method)(*(_resolved(argument) for argument in arguments))


def _resolved(argument: Any) -> Any:
    if isinstance(argument, ray.ObjectRef):
        return ray.get(argument)
    if isinstance(argument, list):
        return [_resolved(item) for item in argument]
    return argument


def start_worker(number: int, *, threads: int, num_gpus: int) -> Any:
    """Ask Ray for an actor with these resources; gives its handle at once, placed or not.

    It is not restarted when it dies: its activations would be gone, and only the job can rebuild them.
    """
    actor: Any = ray.remote(concurrency_groups={_STORAGE_LANE: 1})(BlockWorker)  # pyright: ignore[reportCallIssue]
    return actor.options(num_cpus=threads, num_gpus=num_gpus, max_restarts=0).remote(number)
