"""A message when a run ends, through a notification block of Prefect's: Slack, Teams, e-mail, any webhook.

QUANTMILL_NOTIFY, in the environment of the process that executes runs, names the block by its slug, such as
``slack-webhook/team``. Without it nothing is sent. Flows take part by `run_hooks`.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from prefect.blocks.abstract import NotificationBlock, NotificationError
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import MissingResult, PrefectException
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger
from prefect.utilities.urls import url_for

from flows.summary import report_uri
from quantlib.job import report_figures as figures
from quantlib.job.comparison_text import format_comparison

VARIABLE = "QUANTMILL_NOTIFY"


def notify(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Say how a run ended, and where to look; that nobody could be told is a warning in its log.

    Prefect calls it with these names, in the flow's process or, when that is gone, in the worker's.
    """
    slug = os.environ.get(VARIABLE)
    if not slug:
        return
    log = flow_run_logger(flow_run, flow)
    try:
        if state.is_crashed() and _is_cancelled(flow_run):
            return
        block = Block.load(slug)
    except (httpx.HTTPError, ValueError, PrefectException) as error:
        log.warning("nobody was told how the run ended: %s=%s cannot be loaded: %r", VARIABLE, slug, error)
        return
    if not isinstance(block, NotificationBlock):
        log.warning("nobody was told how the run ended: %s=%s is no notification block", VARIABLE, slug)
        return
    subject = f"{flow.name} {flow_run.name}: {state.name}"
    try:
        with block.raise_on_failure():
            # Typed as a coroutine; outside an event loop it has been sent when the call returns.
            block.notify(message(state, _place(flow_run)), subject)  # pyright: ignore[reportUnusedCoroutine]
    except (httpx.HTTPError, OSError, ValueError, NotificationError) as error:
        # What the error says may name the address of a webhook, which is a secret.
        failed = type(error).__name__
        log.warning("nobody was told how the run ended: %s=%s failed: %s", VARIABLE, slug, failed)


def _is_cancelled(flow_run: FlowRun) -> bool:
    """Whether a process only ended as it was told to: it calls that a crash, until the run is cancelled."""
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(flow_run.id)
    return any(state.type == StateType.CANCELLING for state in states)


NOTIFIED: dict[str, Any] = {
    "on_completion": [notify],
    "on_failure": [notify],
    "on_crashed": [notify],
    "on_cancellation": [notify],
}


# Of what runs every few minutes, and is worth a word only when it goes wrong.
NOTIFIED_OF_TROUBLE = {
    name: hooks for name, hooks in NOTIFIED.items() if name in ("on_failure", "on_crashed")
}


def message(state: State[Any], place: str) -> str:
    """The verdict of a run that completed, the reason of another, and where more can be read."""
    lines = list(_verdict(_result(state))) if state.is_completed() else [state.message or ""]
    return "\n".join(line for line in (*lines, place) if line)


def _result(state: State[Any]) -> Any:
    try:
        return state.result(raise_on_failure=False)
    except MissingResult:
        return None


def _verdict(result: Any) -> Iterator[str]:
    if isinstance(result, list):
        for one in result:
            yield from _verdict(one)
    elif isinstance(result, Mapping) and "blocks" in result:
        yield f"{figures.model_name(result)}: {figures.request(result)}"
        for headline in figures.headlines(result):
            yield f"{headline.name}: {headline.value}" + (f" ({headline.note})" if headline.note else "")
        yield report_uri(result)
    elif isinstance(result, Mapping) and "rows" in result:
        yield format_comparison(result)


def _place(flow_run: FlowRun) -> str:
    return url_for("flow-run", flow_run.id) or f"flow run {flow_run.id}"
