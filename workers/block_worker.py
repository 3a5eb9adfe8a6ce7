"""The actor: one device, one `BlockRunner`, lanes for computation, storage and exchange.

Large results are put in Ray's object store, where the workers of a node map one copy; the driver only ever
holds references to them.
"""

import os
from collections.abc import Mapping
from typing import Any

import ray

from workers.log_lines import LogBuffer, LogLine
from workers.placement import Need

_STORAGE_LANE, _EXCHANGE_LANE, _PULSE_LANE = "storage", "exchange", "pulse"


class BlockWorker:
    """A worker of a job."""

    def __init__(self) -> None:
        self._runner: Any = None
        self._log = LogBuffer()
        self._log.listen()

    def ready(self) -> dict[str, Any]:
        """Answers once the actor has its place; tells its process id and its node's id."""
        return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

    def load(self, environment: Mapping[str, str] | None = None) -> None:
        """Load the libraries, which takes seconds; asked for as soon as the actor has its place.

        Args:
            environment: Variables to set first. They come by a call, because a runtime environment is written
                to Ray's logs, and credentials may be among them.
        """
        os.environ.update(environment or {})
        # Not at the top: the driver, which ships this class, needs neither torch nor transformers.
        from quantlib.block_runner import BlockRunner

        self._runner = BlockRunner(share=ray.put, host=ray.util.get_node_ip_address())

    @ray.method(concurrency_group=_PULSE_LANE)
    def pulse(self) -> None:
        """Answers at once, whatever the other lanes do, as long as the process is well."""

    @ray.method(concurrency_group=_PULSE_LANE)
    def log_lines(self) -> list[LogLine]:
        """What was logged since the last call."""
        return self._log.drain()

    def compute(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method of the runner; object references among the arguments become values."""
        if self._runner is None:
            self.load()  # it failed before, and its error was nobody's to see
        return getattr(self._runner, method)(*(_resolved(argument) for argument in arguments))

    @ray.method(concurrency_group=_STORAGE_LANE)
    def store(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """The same in the lane that may run beside computation: reads and writes."""
        return getattr(self._runner, method)(*(_resolved(argument) for argument in arguments))

    @ray.method(concurrency_group=_EXCHANGE_LANE)
    def exchange(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """The same whatever the other lanes do: other workers have nothing to do without it."""
        return getattr(self._runner, method)(*(_resolved(argument) for argument in arguments))


def _resolved(argument: Any) -> Any:
    if isinstance(argument, ray.ObjectRef):
        return ray.get(argument)
    if isinstance(argument, list):
        if argument and all(isinstance(item, ray.ObjectRef) for item in argument):
            return ray.get(argument)  # all are fetched at a time
        return [_resolved(item) for item in argument]
    return argument


def start_worker(need: Need, place: Mapping[str, Any]) -> Any:
    """Ask Ray for an actor; gives its handle at once, placed or not.

    Ray does not restart it when it dies: its activations would be gone, and only the job can rebuild them.

    Args:
        need: What it takes, and which nodes will do.
        place: Options of Ray for a reserved place, which is on such a node; none for any place.
    """
    lanes = {_STORAGE_LANE: 1, _EXCHANGE_LANE: 1, _PULSE_LANE: 1}
    actor: Any = ray.remote(concurrency_groups=lanes)(BlockWorker)  # pyright: ignore[reportCallIssue]
    return actor.options(
        num_cpus=need.cpus,
        num_gpus=need.gpus,
        resources=dict(need.resources),
        max_restarts=0,
        **(place or {"label_selector": dict(need.labels)}),
    ).remote()
