"""The work prefix: what a running job leaves in storage so that any machine can finish it.

``plan.json`` (the plan as first started), ``tokens/<digest>.npy`` (calibration and evaluation rows) and
``done/<unit>.json`` (one receipt a finished unit). Every key is written once, put-if-absent, and never
changed; a record that another plan wrote is refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlib.errors import ObjectNotFoundError, PlanMismatchError
from quantlib.job.plan import Plan, UnitPlan, plan_from_json, plan_to_json
from quantlib.storage import Store, join_uri


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
    """

    unit: str
    identity: str
    sha256: str
    size_bytes: int
    etag: str
    linears: tuple[Mapping[str, Any], ...]


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
    first = _record_from_json(json.loads(store.read(uri)))
    if (first.identity, first.sha256) != (record.identity, record.sha256):
        raise PlanMismatchError(
            f"{uri} was recorded by another run with other content; two runs must not share an output",
            uri=uri,
        )
    store.write(uri, content)
    return record


def finished_units(store: Store, output_store: Store, plan: Plan) -> dict[str, DoneRecord]:
    """Unit name -> record, for every unit whose shard is still what its record says.

    Raises:
        PlanMismatchError: A record belongs to another plan.
    """
    present = {info.uri for info in store.list(join_uri(plan.work, "done"))}
    identity = plan.identity()
    records = {}
    for unit in plan.units:
        uri = _record_uri(plan.work, unit.name)
        if uri not in present:
            continue
        record = _record_from_json(json.loads(store.read(uri)))
        if record.identity != identity:
            raise PlanMismatchError(
                f"{uri} was written by another plan ({record.identity[:12]}, this one is {identity[:12]});"
                " choose another output, or remove the work prefix to start over",
                uri=uri,
            )
        if _shard_is_intact(output_store, plan, unit, record):
            records[unit.name] = record
        else:
            store.delete(uri)
    return records


def _shard_is_intact(store: Store, plan: Plan, unit: UnitPlan, record: DoneRecord) -> bool:
    try:
        info = store.head(join_uri(plan.output, unit.shard))
    except ObjectNotFoundError:
        return False
    return (info.size_bytes, info.etag) == (record.size_bytes, record.etag)


def _record_uri(work: str, unit: str) -> str:
    return join_uri(work, "done", f"{unit}.json")


def _record_to_json(record: DoneRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in DoneRecord.__dataclass_fields__}


def _record_from_json(values: Mapping[str, Any]) -> DoneRecord:
    return DoneRecord(**{**values, "linears": tuple(values["linears"])})
