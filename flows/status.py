"""What `quantmill status` shows: the conversions that the Prefect server knows, the newest first."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
)
from prefect.client.schemas.objects import Artifact, FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort

from flows.artifacts import PROGRESS_KEY
from quantlib.job.report_figures import duration

CONVERSIONS = ("quantize-model", "quantize-recipes", "compare-schemes")
# What one request to the server may ask for.
MOST_RUNS = 200
# Their message says nothing that the state does not.
_PLAIN = (StateType.COMPLETED, StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED)


def read_conversions(limit: int) -> list[dict[str, Any]]:
    """The newest runs that have begun or should have; those that a schedule plans are left out.

    Args:
        limit: How many at most, up to `MOST_RUNS`.

    Returns:
        JSON values of each run: ``id``, ``name``, ``flow``, ``state`` (as the UI calls it), ``seconds`` of
        running, and, or None, ``progress_percent``, ``step`` (with the time that is left), ``started``
        (ISO 8601, UTC) and ``why``, the message of a state that calls for one.

    Raises:
        httpx.HTTPError: The server does not answer.
    """
    with get_client(sync_client=True) as client:
        flows = FlowFilter(name=FlowFilterName(any_=list(CONVERSIONS)))
        due = FlowRunFilterExpectedStartTime(before_=datetime.now(UTC))  # pyright: ignore[reportArgumentType]
        runs = client.read_flow_runs(
            flow_filter=flows,
            flow_run_filter=FlowRunFilter(expected_start_time=due),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=limit,
        )
        names = {flow.id: flow.name for flow in client.read_flows(flow_filter=flows)}
        bars = _progress_of(client, [run.id for run in runs])
    return [_row(run, names[run.flow_id], bars.get(run.id)) for run in runs]


def _progress_of(client: SyncPrefectClient, runs: list[UUID]) -> dict[UUID, Artifact]:
    if not runs:
        return {}
    wanted = ArtifactFilter(
        key=ArtifactFilterKey(any_=[PROGRESS_KEY]), flow_run_id=ArtifactFilterFlowRunId(any_=runs)
    )
    # A run that was resumed has one of each start; the newest decides.
    found = client.read_artifacts(artifact_filter=wanted, limit=MOST_RUNS)
    found.sort(key=lambda artifact: artifact.created or datetime.min.replace(tzinfo=UTC))
    return {artifact.flow_run_id: artifact for artifact in found if artifact.flow_run_id}


def _row(run: FlowRun, flow: str, bar: Artifact | None) -> dict[str, Any]:
    state = run.state
    says_why = state is not None and state.type not in _PLAIN
    return {
        "id": str(run.id),
        "name": run.name,
        "flow": flow,
        "state": run.state_name,
        "progress_percent": None if bar is None else bar.data,
        "step": None if bar is None else bar.description,
        "started": None if run.start_time is None else run.start_time.astimezone(UTC).isoformat(),
        "seconds": run.estimated_run_time.total_seconds(),
        "why": state.message if state is not None and says_why else None,
    }


def format_conversions(rows: Iterable[Mapping[str, Any]]) -> str:
    """The runs for people: a line of how far each is, and lines of why and which run."""
    return "\n".join(line for row in rows for line in _lines(row)) or "no conversions"


def _lines(row: Mapping[str, Any]) -> list[str]:
    percent = "" if row["progress_percent"] is None else f"{row['progress_percent']:.0f} %"
    times = "not started"
    if row["started"] is not None:
        started = datetime.fromisoformat(row["started"])
        times = f"started {started:%Y-%m-%d %H:%M} UTC, {duration(row['seconds'])}"
    step = f"; {row['step']}" if row["step"] and row["state"] == "Running" else ""
    why = [f"{'':17}{line}" for line in (row["why"] or "").splitlines()]
    return [
        f"{row['state']:<11}{percent:>5} {row['name']}",
        f"{'':17}{times}{step}",
        *why,
        f"{'':17}{row['flow']} {row['id']}",
    ]
