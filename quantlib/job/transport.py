"""How a job reaches its workers, wherever they are."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from quantlib.job.memory import Room

# What a worker does in lanes of their own, beside its computation: moving bytes from and to storage, and what
# other workers wait for.
STORAGE_METHODS = ("read", "bring_ahead", "read_packed", "write", "finish_unit", "check_finished")
EXCHANGE_METHODS = ("give", "add_bands", "host_group", "join_group", "reduce_bands")

# Stands for a value on a worker, or for one that is being made there.
Handle = Any


class Transport(Protocol):
    """Starts methods of numbered workers and waits for them.

    A worker is a `quantlib.block_runner.BlockRunner`: in this process, or inside a Ray actor. A handle given
    as an argument reaches the other worker as the value it stands for.
    """

    @property
    def workers(self) -> list[int]:
        """Numbers of the workers there are now; no number is given twice."""
        ...

    @property
    def room(self) -> Room:
        """The memory that their machines have for them."""
        ...

    def node_of(self, worker: int) -> str:
        """The machine that a worker is on; workers of one map what any of them shares."""
        ...

    def submit(self, worker: int, method: str, *arguments: Any) -> Handle:
        """Start ``method`` on a worker; handles among the arguments (also inside lists) become values."""
        ...

    def result(self, handle: Handle) -> Any:
        """Wait for a handle's value; raises our own errors."""
        ...

    def when_done(self, handle: Handle, call: Callable[[], None]) -> None:
        """Call, from any thread, once a handle has its value or its error; the call returns at once."""
        ...

    def feel_pulses(self) -> None:
        """Make sure that all workers live.

        Raises:
            WorkerLostError: One is gone or silent.
        """
        ...

    def drop_lost(self) -> list[int]:
        """Do without the workers that are gone; gives their numbers."""
        ...

    @property
    def has_newcomers(self) -> bool:
        """Whether workers are there that were not yet given: for lost ones, or because the cluster grew."""
        ...

    def newcomers(self) -> list[int]:
        """Their numbers, for `submit`; they are among ``workers`` once they were taken in."""
        ...

    def take_in(self, newcomers: Sequence[int]) -> None:
        """Count newcomers among the workers."""
        ...

    def send_away(self, newcomers: Sequence[int], *, for_good: bool) -> None:
        """Do without newcomers; unless it is for good, others may come in their place."""
        ...

    def renew(self) -> None:
        """Start all workers anew, elsewhere or fewer of them where that must be.

        Raises:
            WorkerError: Not one could be had.
        """
        ...


def results(transport: Transport, handles: Iterable[Handle]) -> list[Any]:
    """Wait for several; all were begun before the first is waited for."""
    return [transport.result(handle) for handle in list(handles)]


def ask_all(transport: Transport, method: str, *arguments: Any) -> list[Any]:
    """Call a method of every worker, all at a time."""
    return results(transport, (transport.submit(worker, method, *arguments) for worker in transport.workers))


def ask_one(transport: Transport, method: str, *arguments: Any) -> Any:
    """Call a method of some worker."""
    return transport.result(transport.submit(transport.workers[0], method, *arguments))
