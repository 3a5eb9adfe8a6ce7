"""Publishes an output that was staged, long after its run: nothing is converted, and no source is read."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from quantlib.checkpoint.index import CONFIG_NAME
from quantlib.errors import CheckpointError, PlanMismatchError, QuantError
from quantlib.job.failures import policy_for, retrying
from quantlib.job.finished import check_unit
from quantlib.job.gates import refuse_unmeasured
from quantlib.job.lease import Leases, new_record
from quantlib.job.manifest import read_plan, read_records
from quantlib.job.plan import Plan
from quantlib.job.publishing import Hooks, publish_all
from quantlib.job.report import REPORT_NAME
from quantlib.job.staged_output import (
    PUBLICATION_OPTIONS,
    WHEN_PASSED,
    StagedOutput,
    has_these_shards,
    read_staged_report,
)
from quantlib.job.stages import Progress
from quantlib.storage import Store, join_uri, normalize_uri, open_store


def publish_later(
    output: str,
    *,
    work: str | None,
    storage_engine: str,
    wishes: Mapping[str, Any],
    hooks: Hooks,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Check a staged output, and publish it if it passes; gives its report.

    Args:
        output: Address of the output.
        work: Address of its work prefix, where it was named.
        storage_engine: Client library for S3.
        wishes: Values of `PUBLICATION_OPTIONS` that are to hold in place of those of the run.
        hooks: Carries out the hook.

    Raises:
        PlanMismatchError: Nothing is staged there, or it is published already.
        CheckpointError: A shard is not what the run wrote.
        LeaseError: A run is at work on it.
        QuantError: See `publish_all`. Whatever is raised before anything was written has ``before_work`` set.

    Cost: reads every byte of the shards.
    """
    uri = normalize_uri(output)
    work_uri = normalize_uri(work) if work else f"{uri}.quantmill"
    store = open_store(work_uri, storage_engine)
    is_begun = False
    try:
        _planned(store, uri, work_uri)
        with Leases.acquire([(store, work_uri)], lambda _: None, new_record()) as lease:
            plan = _planned(store, uri, work_uri)
            staged = _staged(store, plan, wishes, storage_engine)
            if staged.options["hook"] is not None:
                hooks.refuse_unknown(staged.options["hook"])
            _check_shards(staged, store, plan, on_progress)
            is_begun = True

            num_units = float(len(plan.units))

            def call(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
                lease.check()
                on_progress(Progress(done=num_units, total=num_units + 1.0, label=name))
                return retrying(time.sleep, function, *arguments)

            (report,) = publish_all([staged], hooks, call, lease.run_id)
    except QuantError as error:
        error.before_work = not is_begun and policy_for(error).action == "stop"
        raise
    on_progress(Progress(done=1.0, total=1.0, label="done"))
    return report


def _planned(store: Store, output: str, work: str) -> Plan:
    plan = read_plan(store, work)
    if plan is None:
        raise PlanMismatchError(
            f"{work} holds no job for {output}: nothing is staged there; name the output as the job did, and"
            " --work if it had one",
            work=work,
        )
    if plan.output != output:
        raise PlanMismatchError(
            f"{work} holds the job for {plan.output}, not for {output}; name that output, or start quantize"
            " again with this one, which computes nothing again",
            work=work,
        )
    return plan


def _staged(store: Store, plan: Plan, wishes: Mapping[str, Any], engine: str) -> StagedOutput:
    names = {info.uri for info in open_store(plan.output, engine).list(plan.output, recursive=False)}
    if join_uri(plan.output, CONFIG_NAME) in names:
        raise PlanMismatchError(
            f"{plan.output} is published already; {join_uri(plan.output, REPORT_NAME)} tells what it passed",
            uri=plan.output,
        )
    report = read_staged_report(store, plan.work)
    if report is None or report.get("identity") != plan.identity():
        raise PlanMismatchError(
            f"{plan.output} is not staged: its conversion is not finished; start quantize again",
            uri=plan.output,
        )
    of_the_run = {name: report["options"][name] for name in PUBLICATION_OPTIONS}
    options = {**of_the_run, **wishes, "publish": WHEN_PASSED, "storage_engine": engine}
    refuse_unmeasured({**options, "evaluation": report["evaluation"]})
    return StagedOutput(output=plan.output, work=plan.work, options=options, report=report)


def _check_shards(
    staged: StagedOutput, work_store: Store, plan: Plan, on_progress: Callable[[Progress], None]
) -> None:
    """Make sure that all shards are those of the report, byte for byte."""
    records = read_records(work_store, plan)
    if not has_these_shards(staged.report, plan, records):
        raise PlanMismatchError(
            f"{plan.output} is staged, and not all of its shards are recorded; start quantize again",
            uri=plan.output,
        )
    for number, unit in enumerate(plan.units):
        on_progress(Progress(done=float(number), total=len(plan.units) + 1.0, label=f"check {unit.shard}"))
        standing, problem = check_unit(staged.output_store, plan, unit, records[unit.name])
        if standing is None:
            raise CheckpointError(
                f"{unit.shard} of {plan.output} is not what was staged: {problem}; start quantize again,"
                " which makes it anew",
                uri=plan.output,
                shard=unit.shard,
            )
