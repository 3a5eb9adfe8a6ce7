"""Runs that somebody suspends in Prefect, where Prefect itself does not see to it.

The engine ends a suspended run of a deployment where the next task begins or ends, and resuming starts it
again. Runs that a command called are not watched, though the UI offers to pause these too: here they ask the
server themselves.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.context import FlowRunContext
from prefect.exceptions import Pause

_ASK_EVERY_S = 10.0


class SuspensionWatch:
    """Ends the run in which it was made, once that is suspended."""

    def __init__(self) -> None:
        self._asked_at = float("-inf")

    def end_if_suspended(self) -> None:
        """Ask the server, unless that was done a moment ago or Prefect watches this run.

        Raises:
            Pause: The run is suspended; for Prefect's engine, which leaves it in that state.
        """
        context = FlowRunContext.get()
        if context is None or context.flow_run is None or context.flow_run.deployment_id is not None:
            return
        if time.monotonic() - self._asked_at < _ASK_EVERY_S:
            return
        self._asked_at = time.monotonic()
        # Our flows are no coroutines.
        assert isinstance(context.client, SyncPrefectClient)
        try:
            state = context.client.read_flow_run(context.flow_run.id).state
        except httpx.HTTPError:
            # Without its server a run goes on.
            return
        if state is not None and state.is_paused():
            raise Pause(state=state)


@contextmanager
def suspension_interrupts() -> Iterator[None]:
    """Turn the end of a suspended run into the interrupt of the command that called it.

    Raises:
        KeyboardInterrupt: The run was suspended. Prefect resumes runs of deployments only; this one goes on
            when the same command is started again.
    """
    try:
        yield
    except Pause as signal:
        raise KeyboardInterrupt from signal
