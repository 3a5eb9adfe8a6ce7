"""The one loop over blocks: the same whether it runs in this process or as a Prefect flow.

Every step is a stage with a name a person understands, handed to a `StageRunner`: in process it is called at
once, in a flow it becomes a Prefect task. The loop contains calls and no arithmetic; what happens inside a
stage is `quantlib.job.crew`, what happens on a worker `quantlib.block_runner`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

from quantlib.errors import (
    ChecksumError,
    ObjectNotFoundError,
    PlanMismatchError,
    QuantError,
    WorkerLostError,
)
from quantlib.job.activations import ActivationCheckpoint
from quantlib.job.cadence import Cadence
from quantlib.job.command_hooks import CommandHooks
from quantlib.job.crew import Crew
from quantlib.job.expert_groups import TokenCounts
from quantlib.job.failures import delay_s, policy_for
from quantlib.job.history import History
from quantlib.job.lease import LeaseRecord, Leases, new_record
from quantlib.job.options import JobOptions
from quantlib.job.plan import BlockPlan, Groups, Plan
from quantlib.job.publishing import Hooks, publish_all
from quantlib.job.run import STAGE_WEIGHTS, Begun, OutputState, Run, counting
from quantlib.job.run_log import log_excluded, log_found, log_loss, log_newcomers, log_plan
from quantlib.job.staged_output import StagedOutput
from quantlib.job.stages import Progress, StageRunner
from quantlib.storage import open_store

T = TypeVar("T")

# A run that is stopped from outside waits this long for a write that is under way.
_LAST_WRITE_S = 3.0


def convert(
    requests: Sequence[JobOptions],
    crew: Crew,
    stages: StageRunner,
    on_progress: Callable[[Progress], None],
    hooks: Hooks | None = None,
) -> list[dict[str, Any]]:
    """Make outputs of one source, or finish them, and publish those that pass; gives the report of each.

    The source is read once and runs once for all of them; their options may differ in `OWN_OPTIONS` of
    `quantlib.job.bundle`.

    Args:
        hooks: Carries out hooks; by default commands, and none by a name.

    Raises:
        QuantError: With ``before_work`` set when a request was refused before anything was written. See also
            `quantlib.job.publishing.publish_all`.
    """
    history, hooks = History(), hooks or CommandHooks()
    on_progress(Progress(done=0.0, total=1.0, label="plan"))
    with _before_work(QuantError):
        for options in requests:
            if options.hook is not None:
                hooks.refuse_unknown(options.hook)
        prepared = stages.submit("plan", counting(history, "plan", crew.prepare), requests).result()
    reports, bundle = prepared["reports"], prepared["bundle"]
    if bundle is None:
        return _finished_before(reports, on_progress)

    def tell(holder: LeaseRecord) -> None:
        label = f"waiting to see whether {holder.holder} is alive"
        on_progress(Progress(done=0.0, total=1.0, label=label))

    with _before_work(QuantError):
        engine = requests[0].storage_engine
        prefixes = [(open_store(plan.work, engine), plan.work) for plan in bundle.outputs]
        acquire = counting(history, "claim the output", Leases.acquire)
        lease = stages.submit("claim the output", acquire, prefixes, tell, new_record()).result()
    with lease, closing(crew):
        outputs = [OutputState(plan) for plan in bundle.outputs]
        run = Run(bundle, prepared["memory"], crew, stages, on_progress, lease, history, outputs)
        # What an earlier start left is another job's: this one has not begun.
        with _before_work(PlanMismatchError):
            began = run.submit("prepare the work prefix", crew.begin).result()
        log_plan(len(bundle.shared.blocks), len(outputs), crew.num_workers, run.memory)
        made = None if any(began["reports"]) else iter(_carry_out(run, began, hooks))
    if made is None:
        # Another run finished some of them since they were planned.
        return convert(requests, crew, stages, on_progress, hooks)
    return [next(made) if report is None else report for report in reports]


@contextmanager
def _before_work(refusal: type[QuantError]) -> Iterator[None]:
    try:
        yield
    except refusal as error:
        error.before_work = policy_for(error).action == "stop"
        raise


def _finished_before(
    reports: list[dict[str, Any]], on_progress: Callable[[Progress], None]
) -> list[dict[str, Any]]:
    on_progress(Progress(done=1.0, total=1.0, label="finished before, nothing to do"))
    return reports


def _carry_out(run: Run, began: dict[str, Any], hooks: Hooks) -> list[dict[str, Any]]:
    """Everything that is done while the leases are held; gives the reports."""
    started, clock = datetime.now(UTC), time.monotonic()
    run.history.aborted_uploads = began["aborted_uploads"]
    run.checkpoint = began["checkpoint"]
    try:
        staged = _with_renewals(run, partial(_attempt, run, began, started, clock))
        reports = publish_all(staged, hooks, run.call, run.lease.run_id)
    except QuantError:
        run.settle()
        raise
    except BaseException:
        run.settle(_LAST_WRITE_S)
        raise
    run.on_progress(Progress(done=run.total, total=run.total, label="done"))
    return reports


def _attempt(run: Run, began: dict[str, Any], started: datetime, clock: float) -> list[StagedOutput]:
    """From finished units to staged outputs; what an earlier attempt came to is not done again."""
    if not run.is_taken_up:
        _take_up(run, began)
        run.is_taken_up = True
    if not run.is_converted and not run.is_staged:
        if run.bundle.has_streams:
            _with_streams(run)
        else:
            _without_streams(run)
        run.is_converted = True
    if not run.is_staged:
        reports = run.reports(started, time.monotonic() - clock)
        run.call("stage", run.crew.stage, reports)
        run.staged = reports
    return [StagedOutput.of(o.plan, report) for o, report in zip(run.outputs, run.staged, strict=True)]


def _take_up(run: Run, began: dict[str, Any]) -> None:
    """Check what an earlier start finished; what does not stand is done again."""
    for number, (output, found) in enumerate(zip(run.outputs, began["records"], strict=True)):
        if found:
            check = (run.crew.check_finished, number, list(found.values()))
            output.records, output.redone = run.call("check finished units", *check)
            output.reused = sorted(output.records)
            log_found(output.reused, output.redone)
    run.take_staged(began["staged"])


def _with_renewals(run: Run, work: Callable[[], T]) -> T:
    """Do the work, and go on after workers were lost as often as the table of policies allows."""
    attempts, finished = 0, 0
    lost: WorkerLostError | None = None
    while True:
        try:
            if lost is None:
                run.submit("open workers", run.crew.open, run.bundle, run.lease.run_id).result()
            else:
                _go_on_after(run, lost)
            return work()
        except WorkerLostError as error:
            run.settle()
            attempts = 1 if run.num_finished > finished else attempts + 1
            finished, lost = run.num_finished, error
            policy = policy_for(error)
            if attempts > policy.attempts:
                raise
            time.sleep(delay_s(policy, attempts))


def _go_on_after(run: Run, lost: WorkerLostError) -> None:
    """With the workers that are left if that can be done, else with all of them started anew."""
    # What one that hangs was doing is not known to have ended.
    keeps = "worker" not in lost.facts and run.call("go on with the workers left", run.crew.carry_on)
    if not keeps:
        run.call("start workers anew", run.crew.renew)
    run.history.aborted_uploads += run.call("give up unfinished uploads", run.crew.abort_uploads)
    log_loss(lost.message, run.crew.num_workers, keeps_others=keeps)
    renewal = {"because": lost.message, "workers": run.crew.num_workers, "keeps_others": keeps}
    run.history.renewals.append(renewal)


def _with_streams(run: Run) -> None:
    """Blocks in order, activations flowing."""
    plan, crew = run.plan, run.crew
    first = _place_streams(run)
    blocks = [block for block in _blocks_to_run(run) if block.index >= first]
    run.done, run.total = 0.0, sum(_block_weight(run, block) for block in blocks) + 1.0
    cadence = Cadence(plan.options["checkpoint_every"], crew.activation_bytes())
    for block, following in zip_longest(blocks, blocks[1:]):
        _welcome(run)
        crew.prefetch(block.index)
        keeps = following is not None and cadence.is_due(following.index)
        if following is not None and run.memory.pipelines:
            crew.prefetch(following.index)
            crew.bring_ahead(following.index)
        _convert_block(run, block, None if keeps else following)
        # After a loss some streams may be ahead of those that are brought up again.
        if keeps and crew.positions == {block.index + 1}:
            cadence.kept(_keep_activations(run, block.index + 1))
    run.finish_writing()
    if blocks:
        crew.release(blocks[-1].index)
    head = run.call("head", crew.head, [output.pending_units("tail") for output in run.outputs])
    for number, output in enumerate(run.outputs):
        run.note(number, *head["records"][number])
        output.figures = None if head["figures"] is None else head["figures"][number]


def _place_streams(run: Run) -> int:
    """Embed the cells that nobody has, or take them up where the last checkpoint left them.

    Returns:
        The first block that some stream has not passed, or whose shard is missing.
    """
    checkpoint = run.checkpoint if _can_start_from(run, run.checkpoint) else None
    first = checkpoint.block if checkpoint else 0
    if not run.crew.positions and any(block.index == first for block in _blocks_to_run(run)):
        run.crew.prefetch(first)
    written = run.call("embed", run.crew.prelude, [o.pending_units("prelude") for o in run.outputs])
    for number, records in enumerate(written):
        run.note(number, *records)
    run.excluded_rows = []
    if checkpoint is not None:
        try:
            run.call("restore activations", run.crew.restore_activations, checkpoint)
        except (ChecksumError, ObjectNotFoundError) as error:
            run.history.unusable_checkpoints.append(error.message)
            run.checkpoint = None
            run.crew.give_up_restoring()
            return _place_streams(run)
        run.history.from_checkpoint = checkpoint.block
        run.excluded_rows = list(checkpoint.excluded_rows)
        for output in run.outputs:
            kept = checkpoint.block_errors[output.plan.identity()]
            output.errors.update({block: dict(errors) for block, errors in kept.items()})
    pending = [block.index for block in run.plan.blocks if run.pending(block)]
    reached = min([*run.crew.positions, *pending])
    for block in run.plan.blocks[:reached]:
        _leave_out_as_recorded(run, block.index)
    return reached


def _leave_out_as_recorded(run: Run, block: int) -> None:
    """Rows that were left out when a block was solved stay so."""
    records = [output.records[output.plan.block_units[block].name] for output in run.outputs]
    recorded = {row for record in records for row in record.excluded_rows}
    run.excluded_rows = sorted(recorded.union(run.excluded_rows))


def _welcome(run: Run) -> None:
    """Let workers that came meanwhile take part."""
    if run.crew.awaits_workers:
        came, problems = run.submit("welcome workers", run.crew.welcome).result()
        log_newcomers(came, problems)
        run.history.joined_workers += came
        run.history.refused_workers += problems


def _can_start_from(run: Run, checkpoint: ActivationCheckpoint | None) -> bool:
    """A checkpoint serves when nothing before it is left to do."""
    if checkpoint is None:
        return False
    return not any(run.pending(block) for block in run.plan.blocks[: checkpoint.block])


def _keep_activations(run: Run, block: int) -> float:
    """Checkpoint the streams that stand before a block; gives the seconds it took."""
    started = time.monotonic()
    run.finish_writing()
    errors = {output.plan.identity(): dict(output.errors) for output in run.outputs}
    notes = {"block_errors": errors, "excluded_rows": tuple(run.excluded_rows)}
    name = run.name_of(block - 1, "keep activations")
    run.checkpoint = run.call(name, run.crew.save_activations, block, notes)
    run.history.checkpoints.append(block)
    return time.monotonic() - started


def _convert_block(run: Run, block: BlockPlan, following: BlockPlan | None) -> None:
    """One block, from the streams before it to its shard, or one shard for each output.

    Args:
        following: The next block, if it may be begun while workers are left over; `Run.ahead` is then its
            first stage.
    """
    crew, index = run.crew, block.index
    pending = run.pending(block)
    linears: dict[int, list[dict[str, Any]]] = {}
    passes = _passes(run, block)
    for groups in passes:
        tokens = _end_moving(run, block, groups)
        if pending:
            ahead = following if groups == passes[-1] and _overlaps(run) else None
            linears = _solve(run, block, groups, tokens, share=1.0 / len(passes), ahead=ahead)
    if not pending:
        run.history.replayed_blocks.append(index)
        _leave_out_as_recorded(run, index)
    for number in pending:
        unit = run.outputs[number].plan.block_units[index]
        notes = (linears[number], list(run.excluded_rows), dict(run.seconds[index]))
        write = run.submit(run.name_of(index, "write"), crew.write, number, unit, *notes)
        run.outputs[number].writing = write
    if _runs_quantized(run.plan):
        errors = run.stage(index, "evaluate", crew.advance, index)
        for output, found in zip(run.outputs, errors, strict=True):
            output.errors[index] = output.errors.get(index, {}) if found is None else found
    run.tell_finished(index, linears)
    if not run.memory.pipelines:
        run.finish_writing()
        crew.release(index)


def _end_moving(run: Run, block: BlockPlan, groups: Groups) -> TokenCounts:
    """Wait until the streams are through, and let go of the block before; gives the tokens counted."""
    moving, run.ahead = run.ahead or _move_streams(run, block, groups), None
    captured = run.end(moving)
    run.finish_writing()
    if block.index > 0:
        run.crew.release(block.index - 1)
    if captured is None:
        return TokenCounts()
    if captured["excluded_rows"] != run.excluded_rows:
        log_excluded(run.name_of(block.index, "capture"), captured["excluded_rows"])
    run.excluded_rows = captured["excluded_rows"]
    return captured["tokens"]


def _solve(
    run: Run,
    block: BlockPlan,
    groups: Groups,
    tokens: TokenCounts,
    *,
    share: float,
    ahead: BlockPlan | None,
) -> dict[int, list[dict[str, Any]]]:
    """Find the codes of some input groups.

    Returns:
        Output that lacks this block -> the report rows of all its linears that have codes by now.

    Args:
        share: Of the block's input groups.
        ahead: The next block, if workers that are left over are to begin it.
    """
    arguments = (block.index, run.pending(block), groups, tokens)
    solving = run.start(block.index, "solve", run.crew.solve, *arguments, share=share)
    if ahead is not None:
        run.ahead = _move_streams(run, ahead, _passes(run, ahead)[0], is_ahead=True)
    return run.end(solving)


def _passes(run: Run, block: BlockPlan) -> list[Groups]:
    """Input groups to go through a block for, one time after the other; the streams go on with the last."""
    passes = run.crew.passes(block.index, run.pending(block))
    if run.wants_statistics(block):
        return passes
    return [tuple(group for groups in passes for group in groups)]


def _move_streams(
    run: Run, block: BlockPlan, groups: Groups, *, is_ahead: bool = False
) -> Begun[dict[str, Any] | None]:
    """Start the first stage of a block: with statistics if codes are still to be found.

    Args:
        groups: Input groups whose statistics are wanted.
        is_ahead: Whether the block before is not evaluated yet.
    """
    after_evaluation = is_ahead and run.plan.evaluation_digest is not None
    if run.wants_statistics(block):
        arguments = (block.index, run.pending(block), groups, run.excluded_rows, after_evaluation)
        share = 1.0 / len(_passes(run, block))
        return run.start(block.index, "capture", run.crew.capture, *arguments, share=share)
    return run.start(block.index, "forward", run.crew.forward, block.index, after_evaluation)


def _overlaps(run: Run) -> bool:
    """Whether a block may be begun before the one before it is quantized."""
    is_original = run.plan.options["propagation"] == "original"
    return is_original and run.crew.num_workers > 1 and run.memory.pipelines


def _without_streams(run: Run) -> None:
    """Every unit on its own; a worker converts one while it still writes the one before."""
    (output,) = run.outputs
    pending = [unit for unit in output.plan.units if unit.name not in output.records]
    run.total = float(max(1, len(pending)))
    for unit in pending:
        _welcome(run)
        while len(run.units) >= 2 * run.crew.num_workers:
            _note_unit(run)
        converting = run.submit(run.name_of_unit(unit), run.crew.convert_unit, unit)
        run.units.append((unit, converting))
    while run.units:
        _note_unit(run)


def _note_unit(run: Run) -> None:
    unit, converting = run.units[0]
    record = converting.result()
    run.units.pop(0)
    run.note(0, record)
    run.done += 1.0
    run.tell_converted(unit, record)


def _blocks_to_run(run: Run) -> Sequence[BlockPlan]:
    """With evaluation all blocks; otherwise those up to the last one that is not finished."""
    if run.plan.evaluation_digest is not None:
        return run.plan.blocks
    pending = [block.index for block in run.plan.blocks if run.pending(block)]
    return run.plan.blocks[: max(pending, default=-1) + 1]


def _runs_quantized(plan: Plan) -> bool:
    return plan.evaluation_digest is not None or plan.options["propagation"] == "quantized"


def _block_weight(run: Run, block: BlockPlan) -> float:
    first = "capture" if run.wants_statistics(block) else "forward"
    evaluates = STAGE_WEIGHTS["evaluate"] if _runs_quantized(run.plan) else 0.0
    return STAGE_WEIGHTS[first] + (STAGE_WEIGHTS["solve"] if run.pending(block) else 0.0) + evaluates
