"""The work prefix: what a running job leaves in storage so that any machine can finish it.

``plan.json`` (the plan as first started), ``tokens/<digest>.npy`` (calibration and evaluation rows),
``done/<unit>.json`` (one receipt a finished unit), ``devices/<kind>.json`` (kinds of device that took part
beside the plan's), ``activations/`` (`quantlib.job.activations`) and ``lease.json`` (`quantlib.job.lease`).
Plan, rows and receipts are written once, put-if-absent. A record that another plan, another schema or nobody
we know wrote is refused by name; one whose shard is not what it says is removed, and its unit is done again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantlib.errors import ObjectNotFoundError, PlanMismatchError
from quantlib.job.plan import Plan, plan_from_json, plan_to_json
from quantlib.storage import Store, join_uri, uri_name

RECORD_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneRecord:
    """Proof that a unit is finished.

    Attributes:
        unit: Name of the unit.
        identity: Identity of the plan that made it.
        sha256: Of the whole shard object.
        size_bytes: Of the shard object.
        etag: The store's, at the time of writing.
        linears: Report rows of its linears (`LinearReport` as JSON values).
        excluded_rows: Calibration rows left out when it was solved, in this block or before.
        seconds: Wall seconds of the stages that led to it.
    """

    schema: int = RECORD_SCHEMA
    unit: str
    identity: str
    sha256: str
    size_bytes: int
    etag: str
    linears: tuple[Mapping[str, Any], ...]
    excluded_rows: tuple[int, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


def read_plan(store: Store, work: str) -> Plan | None:
    """The plan stored at the first start, or None.

    Raises:
        PlanMismatchError: It was written under another schema, or is no plan at all.
    """
    uri = join_uri(work, "plan.json")
    try:
        text = store.read(uri)
    except ObjectNotFoundError:
        return None
    try:
        values = json.loads(text)
    except ValueError as error:
        raise PlanMismatchError(f"{uri} is not JSON; remove {work} to start over", uri=uri) from error
    return plan_from_json(values)


def store_plan(store: Store, plan: Plan) -> None:
    """Keep the plan for later starts; the first one stays.

    Raises:
        PlanMismatchError: Another run stored another plan meanwhile.
    """
    uri = join_uri(plan.work, "plan.json")
    if store.put_if_absent(uri, json.dumps(plan_to_json(plan)).encode()):
        return
    first = read_plan(store, plan.work)
    if first is None or first.identity() != plan.identity():
        raise PlanMismatchError(
            f"another run began another job on {plan.output} at the same time; choose another output", uri=uri
        )


def record_device_kind(store: Store, plan: Plan, kind: str) -> None:
    """Note before its first work that a worker's device is of another kind than the plan's."""
    if kind != plan.device_kind:
        content = json.dumps({"device_kind": kind}).encode()
        store.put_if_absent(join_uri(plan.work, "devices", f"{kind}.json"), content)


def device_kinds(store: Store, plan: Plan) -> list[str]:
    """All kinds of device that took part in a job so far, in this start or an earlier one."""
    noted = store.list(join_uri(plan.work, "devices"))
    return sorted({plan.device_kind, *(uri_name(info.uri).removesuffix(".json") for info in noted)})


def tokens_uri(work: str, digest: str) -> str:
    """Where token rows of this digest are kept."""
    return join_uri(work, "tokens", f"{digest}.npy")


def store_record(store: Store, work: str, record: DoneRecord) -> DoneRecord:
    """Record a finished unit, once; gives the record that stands.

    A write that is tried again finds its own record: only the etag may differ then, and the newer one counts.

    Raises:
        PlanMismatchError: Another plan, or a run with other bytes, recorded this unit.
    """
    uri = _record_uri(work, record.unit)
    content = json.dumps(_record_to_json(record)).encode()
    if store.put_if_absent(uri, content):
        return record
    first = _parsed(store.read(uri), uri)
    if (first.identity, first.sha256) != (record.identity, record.sha256):
        raise PlanMismatchError(
            f"{uri} was recorded by another run with other content; two runs must not share an output",
            uri=uri,
        )
    store.write(uri, content)
    return record


def read_records(store: Store, plan: Plan) -> dict[str, DoneRecord]:
    """Unit name -> record of every unit that an earlier start finished, in the plan's order.

    Raises:
        PlanMismatchError: A record belongs to another plan, another schema, or to no unit of this plan.
    """
    present = {info.uri for info in store.list(join_uri(plan.work, "done"))}
    known = {_record_uri(plan.work, unit.name): unit.name for unit in plan.units}
    strange = sorted(present - known.keys())
    if strange:
        raise PlanMismatchError(
            f"{strange[0]} is no record of this job; choose another output, or remove {plan.work} to"
            " start over",
            uri=strange[0],
        )
    return {name: _read_record(store, uri, plan) for uri, name in known.items() if uri in present}


def remove_record(store: Store, work: str, unit: str) -> None:
    """Forget that a unit was finished, because its shard is not what the record says."""
    store.delete(_record_uri(work, unit))


def _read_record(store: Store, uri: str, plan: Plan) -> DoneRecord:
    record = _parsed(store.read(uri), uri)
    if record.identity != plan.identity():
        raise PlanMismatchError(
            f"{uri} was written by another plan ({record.identity[:12]}, this one is {plan.identity()[:12]});"
            " choose another output, or remove the work prefix to start over",
            uri=uri,
        )
    if record.unit != uri_name(uri).removesuffix(".json"):
        raise PlanMismatchError(f"{uri} is the record of another unit, {record.unit}; remove it", uri=uri)
    return record


def _record_uri(work: str, unit: str) -> str:
    return join_uri(work, "done", f"{unit}.json")


def _record_to_json(record: DoneRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in DoneRecord.__dataclass_fields__}


def _parsed(content: bytes, uri: str) -> DoneRecord:
    try:
        values = json.loads(content)
        schema = values["schema"]
        if schema == RECORD_SCHEMA:
            lists = {name: tuple(values[name]) for name in ("linears", "excluded_rows")}
            return DoneRecord(**{**values, **lists})
    except (ValueError, TypeError, KeyError) as error:
        raise PlanMismatchError(
            f"{uri} is no record of a finished unit; remove it to have the unit done again", uri=uri
        ) from error
    raise PlanMismatchError(
        f"{uri} has schema {schema!r}, this version reads {RECORD_SCHEMA}; finish the job with the"
        " version that began it, or choose another output",
        uri=uri,
    )
