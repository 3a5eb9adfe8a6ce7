"""A job under way: its stages, begun and ended under the lease, and what they have come to so far."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from quantlib.errors import QuantError
from quantlib.job.activations import ActivationCheckpoint
from quantlib.job.crew import Crew
from quantlib.job.history import History
from quantlib.job.lease import Lease
from quantlib.job.manifest import DoneRecord
from quantlib.job.memory import MemoryPlan
from quantlib.job.plan import Plan
from quantlib.job.stages import Progress, StageFuture, StageRunner

T = TypeVar("T")

# Share of a block's time; they only shape the progress bar.
STAGE_WEIGHTS = {"capture": 0.5, "forward": 0.4, "solve": 0.25, "evaluate": 0.25}


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun(Generic[T]):
    """A stage of a block that is under way."""

    block: int
    kind: str
    share: float
    started: float
    future: StageFuture[T]


@dataclass(slots=True)
class Run:
    """What the loop keeps while it runs."""

    plan: Plan
    memory: MemoryPlan
    crew: Crew
    stages: StageRunner
    on_progress: Callable[[Progress], None]
    lease: Lease
    history: History
    checkpoint: ActivationCheckpoint | None = None
    records: dict[str, DoneRecord] = field(default_factory=dict)
    total: float = 1.0
    done: float = 0.0
    excluded_rows: list[int] = field(default_factory=list)
    seconds: dict[int, dict[str, float]] = field(default_factory=dict)
    errors: dict[int, dict[str, Any]] = field(default_factory=dict)
    writing: StageFuture[DoneRecord] | None = None
    ahead: Begun[dict[str, Any] | None] | None = None
    units: list[StageFuture[DoneRecord]] = field(default_factory=list)
    is_taken_up: bool = False
    is_converted: bool = False
    figures: list[dict[str, float]] | None = None

    def submit(self, name: str, function: Callable[..., T], *arguments: Any) -> StageFuture[T]:
        """Start a stage, as long as this run holds the lease."""
        self.lease.check()
        return self.stages.submit(name, counting(self.history, name, function), *arguments)

    def call(self, name: str, function: Callable[..., T], *arguments: Any) -> T:
        """Start a stage that belongs to no block, and wait for it."""
        self.on_progress(Progress(done=self.done, total=self.total, label=name))
        return self.submit(name, function, *arguments).result()

    def start(
        self, block: int, kind: str, function: Callable[..., T], *arguments: Any, share: float = 1.0
    ) -> Begun[T]:
        """Begin a stage of a block, or a share of it."""
        name, started = self.name_of(block, kind), time.monotonic()
        self.on_progress(Progress(done=self.done, total=self.total, label=name))
        future = self.submit(name, function, *arguments)
        return Begun(block=block, kind=kind, share=share, started=started, future=future)

    def end(self, begun: Begun[T]) -> T:
        """Wait for a stage of a block."""
        outcome = begun.future.result()
        seconds = self.seconds.setdefault(begun.block, {})
        seconds[begun.kind] = seconds.get(begun.kind, 0.0) + time.monotonic() - begun.started
        self.done += STAGE_WEIGHTS[begun.kind] * begun.share
        return outcome

    def stage(self, block: int, kind: str, function: Callable[..., T], *arguments: Any) -> T:
        """`start` and `end`."""
        return self.end(self.start(block, kind, function, *arguments))

    def name_of(self, block: int, kind: str) -> str:
        """What people read of a stage of a block."""
        return f"block {block + 1}/{len(self.plan.blocks)}: {kind}"

    def finish_writing(self) -> None:
        """Wait for the shard that is being written, if one is."""
        if self.writing is not None:
            self.note(self.writing.result())
            self.writing = None

    def note(self, record: DoneRecord) -> None:
        """A unit is finished."""
        self.records[record.unit] = record

    def settle(self, timeout: float | None = None) -> None:
        """Let what was begun come to its end: what was solved is not to be solved again."""
        self.crew.drop_waiting()
        begun = [*self.units, *([self.writing] if self.writing is not None else [])]
        ahead, self.units, self.writing, self.ahead = self.ahead, [], None, None
        deadline = None if timeout is None else time.monotonic() + timeout

        def left_s() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        for future in begun:
            with suppress(QuantError, TimeoutError):
                self.note(future.result(left_s()))
        if ahead is not None:
            with suppress(QuantError, TimeoutError):
                ahead.future.result(left_s())


def counting(history: History, name: str, function: Callable[..., T]) -> Callable[..., T]:
    """The same function; calls after the first are noted as retries of the stage."""
    calls = 0

    def counted(*arguments: Any) -> T:
        nonlocal calls
        calls += 1
        if calls > 1:
            history.retries[name] = history.retries.get(name, 0) + 1
        return function(*arguments)

    return counted
