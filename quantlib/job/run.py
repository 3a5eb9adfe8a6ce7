"""A job under way: its stages, begun and ended under the lease, and what they have come to so far."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from quantlib.errors import QuantError
from quantlib.job.activations import ActivationCheckpoint
from quantlib.job.bundle import Bundle
from quantlib.job.crew import Crew
from quantlib.job.history import History
from quantlib.job.lease import Leases
from quantlib.job.manifest import DoneRecord
from quantlib.job.memory import MemoryPlan
from quantlib.job.plan import BlockPlan, Plan, UnitPlan
from quantlib.job.report import block_row, build_report
from quantlib.job.run_log import log_block, log_retry
from quantlib.job.staged_output import has_these_shards
from quantlib.job.stages import FinishedBlock, Progress, StageFuture, StageRunner

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
class OutputState:
    """What has come of one output so far.

    Attributes:
        records: Unit -> record of those that are finished.
        errors: Block -> errors of its quantized stream.
        figures: Of every evaluation cell.
        writing: The shard of a block that is being written.
        reused: Units that an earlier start finished.
        redone: Units likewise -> what was wrong with their shards.
    """

    plan: Plan
    records: dict[str, DoneRecord] = field(default_factory=dict)
    errors: dict[int, dict[str, Any]] = field(default_factory=dict)
    figures: list[dict[str, float]] | None = None
    writing: StageFuture[DoneRecord] | None = None
    reused: list[str] = field(default_factory=list)
    redone: dict[str, str] = field(default_factory=dict)

    def history_of(self, history: History) -> History:
        """What happened to the whole job, and to this output."""
        return dataclasses.replace(history, reused_units=self.reused, redone_units=self.redone)

    def is_pending(self, block: int) -> bool:
        """Whether a block is still to be quantized."""
        return self.plan.block_units[block].name not in self.records

    def pending_units(self, stage: str) -> list[UnitPlan]:
        """Units of a stage that are still to be written."""
        return [unit for unit in self.plan.units if unit.stage == stage and unit.name not in self.records]

    def excluded_rows(self) -> set[int]:
        """Calibration rows that were left out of what is recorded."""
        return {row for record in self.records.values() for row in record.excluded_rows}


@dataclass(slots=True)
class Run:
    """What the loop keeps while it runs."""

    bundle: Bundle
    memory: MemoryPlan
    crew: Crew
    stages: StageRunner
    on_progress: Callable[[Progress], None]
    lease: Leases
    history: History
    outputs: list[OutputState]
    checkpoint: ActivationCheckpoint | None = None
    total: float = 1.0
    done: float = 0.0
    excluded_rows: list[int] = field(default_factory=list)
    seconds: dict[int, dict[str, float]] = field(default_factory=dict)
    ahead: Begun[dict[str, Any] | None] | None = None
    units: list[tuple[UnitPlan, StageFuture[DoneRecord]]] = field(default_factory=list)
    is_taken_up: bool = False
    is_converted: bool = False
    staged: list[dict[str, Any]] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        """What is read, run and summed."""
        return self.bundle.shared

    def pending(self, block: BlockPlan) -> list[int]:
        """Outputs for which a block is still to be quantized."""
        return [n for n, output in enumerate(self.outputs) if output.is_pending(block.index)]

    def wants_statistics(self, block: BlockPlan) -> bool:
        """Whether some output needs sums to quantize a block."""
        plans = [self.outputs[number].plan for number in self.pending(block)]
        return any(plan.blocks[block.index].is_calibrated for plan in plans)

    @property
    def num_finished(self) -> int:
        """Units that are finished."""
        return sum(len(output.records) for output in self.outputs)

    @property
    def is_staged(self) -> bool:
        """Whether only the publication is left to do; ``staged`` are the reports then."""
        return bool(self.staged)

    def take_staged(self, reports: Sequence[Mapping[str, Any] | None]) -> None:
        """Take reports of an earlier start, if all outputs have one that is about all their shards."""
        found = [
            dict(report)
            for output, report in zip(self.outputs, reports, strict=True)
            if report is not None and has_these_shards(report, output.plan, output.records)
        ]
        self.staged = found if len(found) == len(self.outputs) else []

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

    def reports(self, started: datetime, seconds: float) -> list[dict[str, Any]]:
        """The report of every output, once all units are finished.

        Args:
            seconds: Since ``started``.
        """
        self.history.moved_cells = self.crew.moved_cells
        self.history.exchanges = self.crew.exchanges
        self.history.exchange_fallbacks = self.crew.exchange_fallbacks
        telemetry = self.crew.telemetry()
        return [
            build_report(
                plan=output.plan,
                memory=dataclasses.asdict(self.memory),
                records=output.records,
                history=dataclasses.asdict(output.history_of(self.history)),
                figures=output.figures,
                block_errors=output.errors,
                block_seconds=self.seconds,
                excluded_rows=sorted(output.excluded_rows().union(self.excluded_rows)),
                telemetry=telemetry,
                number=number,
                made_with=[other.plan.output for other in self.outputs if other is not output],
                packed_with=[plan.output for plan in self.bundle.packed_with(number)],
                started=started,
                seconds=seconds,
            )
            for number, output in enumerate(self.outputs)
        ]

    def name_of(self, block: int, kind: str) -> str:
        """What people read of a stage of a block."""
        return f"block {block + 1}/{len(self.plan.blocks)}: {kind}"

    def name_of_unit(self, unit: UnitPlan) -> str:
        """What people read of a unit that is converted by itself."""
        if unit.block is not None:
            return self.name_of(unit.block, "convert")
        return f"what stands {'before' if unit.stage == 'prelude' else 'behind'} the blocks"

    def tell_finished(self, block: int, linears: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
        """Every output has gone through a block; its shard may still be on its way.

        Args:
            linears: Output -> report rows, of those that quantized it now; the others have a record.
        """
        finished = []
        for number, output in enumerate(self.outputs):
            unit = output.plan.block_units[block].name
            rows = linears[number] if number in linears else output.records[unit].linears
            row = block_row(block, rows, output.errors.get(block, {}), self.seconds.get(block, {}))
            finished.append(FinishedBlock(output=output.plan.output, row=row))
        self._tell(self.name_of(block, "finished"), finished)

    def tell_converted(self, unit: UnitPlan, record: DoneRecord) -> None:
        """The only output, which takes no streams, has a unit more."""
        (output,) = self.outputs
        finished = []
        if unit.block is not None:
            row = block_row(unit.block, record.linears, {}, record.seconds)
            finished.append(FinishedBlock(output=output.plan.output, row=row))
        self._tell(self.name_of_unit(unit), finished)

    def _tell(self, label: str, finished: Sequence[FinishedBlock]) -> None:
        for block in finished:
            log_block(block, len(self.plan.blocks), len(self.outputs))
        self.on_progress(Progress(done=self.done, total=self.total, label=label, finished=tuple(finished)))

    def finish_writing(self) -> None:
        """Wait for the shards that are being written."""
        for number, output in enumerate(self.outputs):
            if output.writing is not None:
                self.note(number, output.writing.result())
                output.writing = None

    def note(self, number: int, *records: DoneRecord) -> None:
        """Units of an output are finished."""
        self.outputs[number].records.update({record.unit: record for record in records})

    def settle(self, timeout: float | None = None) -> None:
        """Let what was begun come to its end: what was solved is not to be solved again."""
        self.crew.drop_waiting()
        begun = [(0, future) for _, future in self.units]
        for number, output in enumerate(self.outputs):
            begun += [] if output.writing is None else [(number, output.writing)]
            output.writing = None
        ahead, self.units, self.ahead = self.ahead, [], None
        deadline = None if timeout is None else time.monotonic() + timeout

        def left_s() -> float | None:
            return None if deadline is None else max(0.0, deadline - time.monotonic())

        for number, future in begun:
            with suppress(QuantError, TimeoutError):
                self.note(number, future.result(left_s()))
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
            log_retry(name)
        return function(*arguments)

    return counted
