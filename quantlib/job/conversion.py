"""The one loop over blocks: the same whether it runs in this process or as a Prefect flow.

Every step is a stage with a name a person understands, handed to a `StageRunner`: in process it is called at
once, in a flow it becomes a Prefect task. The loop contains calls and no arithmetic; what happens inside a
stage is `quantlib.job.crew`, what happens on a worker `quantlib.block_runner`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from quantlib.errors import QuantError
from quantlib.job.crew import Crew
from quantlib.job.manifest import DoneRecord
from quantlib.job.options import JobOptions
from quantlib.job.plan import BlockPlan, Plan, UnitPlan
from quantlib.job.report import build_report

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# Share of a block's time; they only shape the progress bar.
_WEIGHTS = {"capture": 0.5, "forward": 0.4, "solve": 0.25, "evaluate": 0.25}


class StageFuture(Protocol[T_co]):
    """A stage that was started."""

    def result(self) -> T_co:
        """Wait for the stage; raises what it raised."""
        ...


class StageRunner(Protocol):
    """Runs stages: directly, or as tasks of an orchestrator."""

    def submit(self, name: str, function: Callable[..., T], *arguments: Any) -> StageFuture[T]:
        """Start a stage. ``name`` is for people."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a job is: ``done`` of ``total`` blocks' worth of work, and what comes next."""

    done: float
    total: float
    label: str


@dataclass(slots=True)
class _Run:
    """What the loop keeps while it runs."""

    plan: Plan
    crew: Crew
    stages: StageRunner
    on_progress: Callable[[Progress], None]
    records: dict[str, DoneRecord]
    total: float = 1.0
    done: float = 0.0
    excluded_rows: list[int] = field(default_factory=list)
    seconds: dict[int, dict[str, float]] = field(default_factory=dict)
    errors: dict[int, dict[str, Any]] = field(default_factory=dict)
    writing: StageFuture[DoneRecord] | None = None

    def stage(self, block: int, kind: str, function: Callable[..., T], *arguments: Any) -> T:
        name = f"block {block + 1}/{len(self.plan.blocks)}: {kind}"
        self.on_progress(Progress(done=self.done, total=self.total, label=name))
        started = time.monotonic()
        outcome = self.stages.submit(name, function, *arguments).result()
        self.seconds.setdefault(block, {})[kind] = time.monotonic() - started
        self.done += _WEIGHTS[kind]
        return outcome

    def finish_writing(self) -> None:
        if self.writing is not None:
            record = self.writing.result()
            self.records[record.unit] = record
            self.writing = None

    def settle(self) -> None:
        """Let a write that was begun come to its end: what was solved is not to be solved again."""
        if self.writing is not None:
            with suppress(QuantError):
                self.writing.result()


def convert(
    options: JobOptions, crew: Crew, stages: StageRunner, on_progress: Callable[[Progress], None]
) -> dict[str, Any]:
    """Do the whole job, or finish it; gives the report.

    Raises:
        QuantError: With ``before_work`` set when the request was refused before anything was written.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    on_progress(Progress(done=0.0, total=1.0, label="plan"))
    with _before_work():
        prepared = stages.submit("plan", crew.prepare, options).result()
    if prepared["report"] is not None:
        on_progress(Progress(done=1.0, total=1.0, label="finished before, nothing to do"))
        return prepared["report"]
    plan: Plan = prepared["plan"]
    run = _Run(plan, crew, stages, on_progress, dict(prepared["finished"]))
    resumed = sorted(run.records)
    stages.submit("open workers", crew.open, plan).result()
    try:
        figures = _with_streams(run) if plan.has_streams else _without_streams(run)
    except BaseException:
        run.settle()
        raise
    report = build_report(
        plan=plan,
        records=run.records,
        resumed=resumed,
        figures=figures,
        block_errors=run.errors,
        block_seconds=run.seconds,
        excluded_rows=run.excluded_rows,
        telemetry=crew.telemetry(),
        started=started,
        seconds=time.monotonic() - clock,
    )
    stages.submit("publish", crew.publish, report).result()
    on_progress(Progress(done=run.total, total=run.total, label="done"))
    return report


@contextmanager
def _before_work() -> Iterator[None]:
    try:
        yield
    except QuantError as error:
        error.before_work = not error.retryable
        raise


def _with_streams(run: _Run) -> list[dict[str, float]] | None:
    """Blocks in order, activations flowing; gives the held-out figures of every cell."""
    plan, crew = run.plan, run.crew
    run.total = sum(_block_weight(run, block) for block in _blocks_to_run(run)) + 1.0
    crew.prefetch(0)
    records = run.stages.submit("embed", crew.prelude, _pending(run, "prelude")).result()
    run.records.update({record.unit: record for record in records})
    for block in _blocks_to_run(run):
        _convert_block(run, block)
    run.finish_writing()
    if plan.blocks:
        crew.release(len(plan.blocks) - 1)
    run.on_progress(Progress(done=run.done, total=run.total, label="head"))
    head = run.stages.submit("head", crew.head, _pending(run, "tail")).result()
    run.records.update({record.unit: record for record in head["records"]})
    return head["figures"]


def _convert_block(run: _Run, block: BlockPlan) -> None:
    plan, crew, index = run.plan, run.crew, block.index
    unit = plan.block_units[index]
    tokens = 0
    crew.prefetch(index)
    crew.prefetch(index + 1)
    if unit.name not in run.records and _needs_statistics(block):
        captured = run.stage(index, "capture", crew.capture, index)
        run.excluded_rows, tokens = captured["excluded_rows"], captured["tokens"]
    else:
        run.stage(index, "forward", crew.forward, index)
    run.finish_writing()
    if index > 0:
        crew.release(index - 1)
    if unit.name not in run.records:
        linears = run.stage(index, "solve", crew.solve, index, tokens)
        name = f"block {index + 1}/{len(plan.blocks)}: write"
        run.writing = run.stages.submit(name, crew.write, unit, linears)
    if _runs_quantized(plan):
        run.errors[index] = run.stage(index, "evaluate", crew.advance, index)


def _without_streams(run: _Run) -> None:
    """Every unit on its own, as many at a time as there are workers."""
    pending = [unit for unit in run.plan.units if unit.name not in run.records]
    run.total = float(max(1, len(pending)))
    waiting: list[StageFuture[DoneRecord]] = []
    for number, unit in enumerate(pending):
        if len(waiting) >= run.crew.num_workers:
            _note_unit(run, waiting.pop(0).result())
        worker = number % run.crew.num_workers
        waiting.append(run.stages.submit(f"unit {unit.name}", run.crew.convert_unit, unit, worker))
    for future in waiting:
        _note_unit(run, future.result())


def _note_unit(run: _Run, record: DoneRecord) -> None:
    run.records[record.unit] = record
    run.done += 1.0
    run.on_progress(Progress(done=run.done, total=run.total, label=f"unit {record.unit}"))


def _pending(run: _Run, stage: str) -> list[UnitPlan]:
    return [u for u in run.plan.units if u.stage == stage and u.name not in run.records]


def _blocks_to_run(run: _Run) -> Sequence[BlockPlan]:
    """With evaluation all blocks; otherwise those up to the last one that is not finished."""
    if run.plan.evaluation_digest is not None:
        return run.plan.blocks
    pending = [b.index for b in run.plan.blocks if run.plan.block_units[b.index].name not in run.records]
    return run.plan.blocks[: max(pending, default=-1) + 1]


def _needs_statistics(block: BlockPlan) -> bool:
    return any(linear.method == "gptq" for linear in block.linears)


def _runs_quantized(plan: Plan) -> bool:
    return plan.evaluation_digest is not None or plan.options["propagation"] == "quantized"


def _block_weight(run: _Run, block: BlockPlan) -> float:
    pending = run.plan.block_units[block.index].name not in run.records
    first = "capture" if pending and _needs_statistics(block) else "forward"
    evaluates = _WEIGHTS["evaluate"] if _runs_quantized(run.plan) else 0.0
    return _WEIGHTS[first] + (_WEIGHTS["solve"] if pending else 0.0) + evaluates
