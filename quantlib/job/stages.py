"""What the loop over blocks is run by, and what it tells: directly, or as tasks of an orchestrator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class StageFuture(Protocol[T_co]):
    """A stage that was started."""

    def result(self, timeout: float | None = None) -> T_co:
        """Wait for the stage, at most ``timeout`` seconds; raises what it raised, or TimeoutError."""
        ...


class StageRunner(Protocol):
    """Runs stages: directly, or as tasks of an orchestrator."""

    def submit(self, name: str, function: Callable[..., T], *arguments: Any) -> StageFuture[T]:
        """Start a stage. ``name`` is for people."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedBlock:
    """A block of an output that was gone through: quantized, and compared where there is evaluation text.

    Attributes:
        output: Address of the output.
        row: What is known of the block, as `quantlib.job.report.block_row` puts it.
    """

    output: str
    row: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a job is: ``done`` of ``total`` blocks' worth of work, and what comes next.

    Attributes:
        done: Blocks' worth of work that is done.
        total: Of all.
        label: What is being done, for people.
        finished: The block that was just gone through, of every output.
    """

    done: float
    total: float
    label: str
    finished: tuple[FinishedBlock, ...] = ()
