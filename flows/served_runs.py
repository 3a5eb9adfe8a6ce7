"""Runs whose processes end with the `quantmill serve` that executes them.

Prefect's runner ends them and tells nobody, so that they would stand there as running for ever. Each leaves a
note when it begins to run; what is not over when serving ends is called crashed, and a retry goes on with it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.states import Cancelled, Crashed

_VARIABLE = "QUANTMILL_SERVED_RUNS"
_MESSAGE = "quantmill serve was stopped; a retry goes on from what is finished"


def note_run(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001 - Prefect's names
    """Leave a note of a run that begins; nothing where nobody serves it."""
    folder = os.environ.get(_VARIABLE)
    if folder:
        (Path(folder) / str(flow_run.id)).touch()


@contextmanager
def crashed_when_served_no_more() -> Iterator[None]:
    """Call runs crashed that were begun while this lasted and are not over at its end."""
    with TemporaryDirectory() as folder:
        os.environ[_VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[_VARIABLE]
            with get_client(sync_client=True) as client:
                for note in Path(folder).iterdir():
                    _end(client, UUID(note.name))


def _end(client: SyncPrefectClient, run_id: UUID) -> None:
    # One that was deleted meanwhile wants no state.
    with suppress(ObjectNotFound):
        state = client.read_flow_run(run_id).state
        if state is not None and state.type in (StateType.RUNNING, StateType.PENDING):
            client.set_flow_run_state(run_id, Crashed(message=_MESSAGE), force=True)
        elif state is not None and state.type == StateType.CANCELLING:
            client.set_flow_run_state(run_id, Cancelled(), force=True)
