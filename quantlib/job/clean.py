"""Removes what jobs leave behind: unfinished uploads, work prefixes of finished outputs, on request a job.

Done under the lease of the work prefix, so that nothing is taken from under a run that is at work. Only names
are removed that the stored plan accounts for; whatever else lies there stays and is counted.
"""

import dataclasses
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from quantlib.checkpoint.index import CONFIG_NAME, list_folder, read_json
from quantlib.errors import LeaseError, ObjectNotFoundError, PlanMismatchError, StorageError
from quantlib.job.lease import LEASE_NAME, Lease, read_lease
from quantlib.job.manifest import read_plan
from quantlib.job.plan import Plan
from quantlib.job.report import REPORT_NAME
from quantlib.job.staged_output import read_staged_report
from quantlib.job.staging import names_beside_shards
from quantlib.storage import ObjectInfo, Store, join_uri, normalize_uri, open_store, uri_name

PLAN_NAME = "plan.json"
# Token rows of another evaluation text, and checkpoints, have names that the stored plan does not list.
_WORK_NAMES = re.compile(
    r"tokens/[0-9a-f]{64}\.npy"
    r"|staged/[^/]+"
    r"|devices/[a-z0-9-]+\.json"
    r"|activations/block-\d{5}(\.json|/(calibration|evaluation)-\d{5}\.safetensors)"
)
_STATES = {
    "finished": "the output is finished and stays as it is",
    "discarded": "the job is gone, quantize starts it over",
    "unfinished": "the job stays as it is: quantize continues it, --discard removes it",
    "staged": "the output stays staged: publish or quantize publishes it, --discard removes it",
    "none": "there is no job",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned:
    """What was removed.

    Attributes:
        output: URI of the output.
        state: ``finished`` (only the work prefix is gone), ``discarded`` (shards and records too),
            ``unfinished`` and ``staged`` (only uploads were aborted) or ``none`` (there was no job).
        uploads: Unfinished uploads that were aborted.
        objects: Objects that were removed.
        size_bytes: Bytes of these objects.
        strange: URIs of objects beside them that are not of this job; they stay.
    """

    output: str
    state: str
    uploads: int
    objects: int
    size_bytes: int
    strange: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Where a job lies, and the stores to reach it."""

    output: str
    work: str
    output_store: Store
    work_store: Store

    def abort_uploads(self) -> int:
        return self.output_store.abort_uploads(self.output) + self.work_store.abort_uploads(self.work)


def clean_work(
    output: str, *, work: str | None = None, storage_engine: str = "obstore", discard: bool = False
) -> Cleaned:
    """Abort unfinished uploads, and remove the work prefix of an output that is finished.

    An unfinished job keeps everything else, so that it can go on, and a staged output all that its
    publication takes. A finished output itself is never touched.

    Args:
        output: Address of the output.
        work: Address of its work prefix, where it was named.
        storage_engine: Client library for S3.
        discard: Remove the shards and records of an unfinished job too, or of one that is staged.

    Raises:
        LeaseError: A run holds the work prefix (with ``before_work`` set), or took it over meanwhile.
        PlanMismatchError: There is nothing to clean, or what lies there belongs to another job.
    """
    places = _places(output, work, storage_engine)
    if _is_without_job(places):
        return _clean_without_job(places)
    lease = Lease.acquire(places.work_store, places.work)
    try:
        return _clean_held(places, lease, discard)
    finally:
        _give_up(places, lease)


def clean_said(output: str, **how: Any) -> dict[str, Any]:
    """`clean_work` in plain values: the fields of `Cleaned`, and ``said``, which tells them in a line."""
    cleaned = clean_work(output, **how)
    return {**dataclasses.asdict(cleaned), "said": format_cleaned(cleaned)}


def format_cleaned(cleaned: Cleaned) -> str:
    """One line for a terminal."""
    strange = ""
    if cleaned.strange:
        strange = f"; {len(cleaned.strange)} object(s) of something else stay, such as {cleaned.strange[0]}"
    return (
        f"{cleaned.output}: {cleaned.uploads} unfinished upload(s) aborted, {cleaned.objects} object(s) of"
        f" {cleaned.size_bytes:,} bytes removed; {_STATES[cleaned.state]}{strange}"
    )


def _places(output: str, work: str | None, storage_engine: str) -> _Places:
    output_uri = normalize_uri(output)
    work_uri = normalize_uri(work) if work else f"{output_uri}.quantmill"
    return _Places(
        output=output_uri,
        work=work_uri,
        output_store=open_store(output_uri, storage_engine),
        work_store=open_store(work_uri, storage_engine),
    )


def _is_without_job(places: _Places) -> bool:
    plan = read_plan(places.work_store, places.work)
    return plan is None and read_lease(places.work_store, places.work) is None


def _clean_without_job(places: _Places) -> Cleaned:
    """Abort uploads that outlived a work prefix removed by hand; a run at work would have its lease there."""
    inside = [info.uri for info in places.output_store.list(places.output)]
    folders = [uri for uri in inside if "/" in uri.removeprefix(f"{places.output}/")]
    if folders:
        # An output has no folders, and others may be writing below this one.
        raise PlanMismatchError(
            f"{places.output} is no output of a job: it holds folders, such as that of {folders[0]};"
            " name one output",
            uri=places.output,
        )
    uploads = places.abort_uploads()
    if not uploads:
        raise PlanMismatchError(
            f"there is nothing to clean: {places.work} holds no job for {places.output}, and no upload is"
            " unfinished; name the output as the job did, and --work if it had one",
            work=places.work,
        )
    return Cleaned(output=places.output, state="none", uploads=uploads, objects=0, size_bytes=0, strange=())


def _clean_held(places: _Places, lease: Lease, discard: bool) -> Cleaned:
    plan = read_plan(places.work_store, places.work)
    state = "none" if plan is None else _state_of(places, plan, discard)
    # All is looked at before the first change.
    condemned: list[tuple[Store, ObjectInfo]] = []
    strange: list[ObjectInfo] = []
    if plan is not None and state in ("finished", "discarded"):
        condemned, strange = _sorted_out(places, plan, with_output=state == "discarded")
    lease.check()
    uploads = places.abort_uploads()
    for store, info in condemned:
        lease.check()
        store.delete(info.uri)
    return Cleaned(
        output=places.output,
        state=state,
        uploads=uploads,
        objects=len(condemned),
        size_bytes=sum(info.size_bytes for _, info in condemned),
        strange=tuple(info.uri for info in strange),
    )


def _state_of(places: _Places, plan: Plan, discard: bool) -> str:
    if plan.output != places.output and places.work != f"{places.output}.quantmill":
        raise PlanMismatchError(
            f"{places.work} holds the job for {plan.output}, not for {places.output}; name that output",
            work=places.work,
        )
    if _is_finished(places, plan):
        return "finished"
    if discard:
        return "discarded"
    recorded = {uri_name(info.uri) for info in places.work_store.list(join_uri(places.work, "done"))}
    is_whole = recorded.issuperset(f"{unit.name}.json" for unit in plan.units)
    is_staged = is_whole and read_staged_report(places.work_store, places.work) is not None
    return "staged" if is_staged else "unfinished"


def _is_finished(places: _Places, plan: Plan) -> bool:
    try:
        names = list_folder(places.output_store, places.output)
    except ObjectNotFoundError:
        return False
    if CONFIG_NAME not in names:
        return False
    report = read_json(places.output_store, names[REPORT_NAME]) if REPORT_NAME in names else {}
    if report.get("identity") != plan.identity():
        raise PlanMismatchError(
            f"{places.output} holds another checkpoint than the one that {places.work} was for; nothing was"
            " removed: name the output of that job, or remove what is not needed by hand",
            uri=places.output,
        )
    return True


def _sorted_out(
    places: _Places, plan: Plan, *, with_output: bool
) -> tuple[list[tuple[Store, ObjectInfo]], list[ObjectInfo]]:
    """What the plan accounts for, and the rest; the lease, which is held, is in neither.

    The stored plan comes last, so that a clean that was cut off can be repeated.
    """
    condemned: list[tuple[Store, ObjectInfo]] = []
    strange: list[ObjectInfo] = []
    if with_output:
        shards = {unit.shard for unit in plan.units}.union(names_beside_shards(plan))
        for info in places.output_store.list(places.output):
            if info.uri.removeprefix(f"{places.output}/") in shards:
                condemned.append((places.output_store, info))
            else:
                strange.append(info)
    records = {f"done/{unit.name}.json" for unit in plan.units}
    plans = []
    for info in places.work_store.list(places.work):
        name = info.uri.removeprefix(f"{places.work}/")
        if name == PLAN_NAME:
            plans.append((places.work_store, info))
        elif name in records or _WORK_NAMES.fullmatch(name):
            condemned.append((places.work_store, info))
        elif name != LEASE_NAME:
            strange.append(info)
    return condemned + plans, strange


def _give_up(places: _Places, lease: Lease) -> None:
    """Remove the lease while it is held: once it is released, it may be another run's."""
    with suppress(LeaseError, StorageError):
        lease.check()
        places.work_store.delete(join_uri(places.work, LEASE_NAME))
    lease.release()
