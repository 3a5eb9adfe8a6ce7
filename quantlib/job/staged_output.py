"""A staged output: all shards are in their final place, and everything else waits in the work prefix.

``staged/`` in the work prefix holds the files that will lie beside the shards, and the report, which is
written last: who finds it finds them all. Publishing needs neither the source nor the plan. A small file
beside the shards tells readers that this is no checkpoint yet.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlib.checkpoint.index import STAGED_NAME
from quantlib.errors import ObjectNotFoundError, PlanMismatchError
from quantlib.job.gates import GATE_OPTIONS
from quantlib.job.manifest import DoneRecord
from quantlib.job.plan import Plan
from quantlib.job.report import REPORT_NAME
from quantlib.storage import Store, join_uri, open_store, uri_name

# What is decided between staging and publishing; none of it changes a byte of a shard.
PUBLICATION_OPTIONS = (*GATE_OPTIONS, "publish", "hook", "hook_timeout")
# Parts of a report that a publication reads.
_WANTED: dict[str, Any] = {
    "identity": str,
    "output": str,
    "shards": list,
    "blocks": list,
    "fallbacks": list,
    "options": dict,
    "evaluation": dict | None,
}
WHEN_PASSED, STAGED_ONLY = "when-passed", "staged"
# Below the work prefix.
STAGED_FOLDER = "staged"


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedOutput:
    """What has to be known to publish an output.

    Attributes:
        output: Address of the output.
        work: Address of its work prefix.
        options: Values of `PUBLICATION_OPTIONS`, and of ``storage_engine``.
        report: Of the run that staged it.
    """

    output: str
    work: str
    options: Mapping[str, Any]
    report: Mapping[str, Any]

    @classmethod
    def of(cls, plan: Plan, report: Mapping[str, Any]) -> "StagedOutput":
        """That of a plan, whose wishes hold from now on, whatever an earlier start wanted."""
        names = (*PUBLICATION_OPTIONS, "storage_engine")
        options = {name: plan.options[name] for name in names}
        wished = {**report, "options": {**report["options"], **options}}
        return cls(output=plan.output, work=plan.work, options=options, report=wished)

    @property
    def output_store(self) -> Store:
        """Where the output lies."""
        return open_store(self.output, self.options["storage_engine"])

    @property
    def work_store(self) -> Store:
        """Where its work prefix lies."""
        return open_store(self.work, self.options["storage_engine"])

    def file_names(self) -> list[str]:
        """Names of the files that wait, without the report."""
        found = self.work_store.list(join_uri(self.work, STAGED_FOLDER))
        return [name for name in (uri_name(info.uri) for info in found) if name != REPORT_NAME]

    def read_file(self, name: str) -> bytes:
        """One of the files that wait."""
        return self.work_store.read(staged_uri(self.work, name))


def staged_uri(work: str, name: str) -> str:
    """Where a file waits to be published."""
    return join_uri(work, STAGED_FOLDER, name)


def store_staged(
    output_store: Store, work_store: Store, plan: Plan, files: Mapping[str, bytes], report: Mapping[str, Any]
) -> None:
    """Have everything wait that is to lie beside the shards.

    Args:
        files: Name -> content.
        report: Of the run.
    """
    # Until all files are those of this report, there is none.
    work_store.delete(staged_uri(plan.work, REPORT_NAME))
    for name, content in files.items():
        work_store.write(staged_uri(plan.work, name), content)
    note = {"state": "staged, not published", "work": plan.work}
    output_store.write(join_uri(plan.output, STAGED_NAME), json.dumps(note).encode())
    store_staged_report(work_store, plan.work, report)


def store_staged_report(store: Store, work: str, report: Mapping[str, Any]) -> None:
    """Keep the report of a staged output."""
    store.write(staged_uri(work, REPORT_NAME), json.dumps(report, indent=1, allow_nan=False).encode())


def read_staged_report(store: Store, work: str) -> dict[str, Any] | None:
    """The report of a staged output, or None where nothing is staged.

    Raises:
        PlanMismatchError: It is no report.
    """
    uri = staged_uri(work, REPORT_NAME)
    try:
        values = json.loads(store.read(uri))
    except ObjectNotFoundError:
        return None
    except ValueError as error:
        raise PlanMismatchError(f"{uri} is not JSON; remove it to have it made again", uri=uri) from error
    if not _is_report(values):
        raise PlanMismatchError(f"{uri} is no report; remove it to have it made again", uri=uri)
    return values


def _is_report(values: Any) -> bool:
    """Whether JSON values have all that deciding on a publication takes."""
    if not isinstance(values, dict):
        return False
    if not all(isinstance(values.get(name, ...), kind) for name, kind in _WANTED.items()):
        return False
    shards = all(_has(shard, "name", "sha256", "size_bytes") for shard in values["shards"])
    blocks = all(_has(block, "relative_error", "linears") for block in values["blocks"])
    return shards and blocks and _has(values["options"], *PUBLICATION_OPTIONS)


def _has(values: Any, *names: str) -> bool:
    return isinstance(values, dict) and values.keys() >= set(names)


def measured_report(store: Store, plan: Plan) -> dict[str, Any] | None:
    """The report of a staged output, as long as it has what a plan wants measured; else None."""
    report = read_staged_report(store, plan.work)
    if report is None or (report.get("identity"), report.get("output")) != (plan.identity(), plan.output):
        return None
    evaluation = report.get("evaluation") or {}
    if plan.evaluation_digest not in (None, evaluation.get("digest")):
        return None
    return report


def has_these_shards(report: Mapping[str, Any], plan: Plan, records: Mapping[str, DoneRecord]) -> bool:
    """Whether a report is about the very shards that are recorded, and none is missing."""
    named = {shard["name"]: shard["sha256"] for shard in report["shards"]}
    return named == {
        unit.shard: records[unit.name].sha256 if unit.name in records else None for unit in plan.units
    }
