"""Hooks of runs on a Prefect server: commands of this machine, and runs of deployments."""

import threading
import time
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from quantlib.errors import HookError, RecipeError
from quantlib.job.command_hooks import CommandHooks
from quantlib.job.hook import command_of, deployment_in
from quantlib.job.staged_output import STAGED_FOLDER, StagedOutput
from quantlib.storage import join_uri

_LOOK_S = 5.0


class FlowHooks:
    """Carries out hooks of both kinds; a `quantlib.job.publishing.Hooks`.

    A deployment is run with the parameters ``output``, the address of the shards, and ``staged``, that of
    config, index, tokenizer and report; it agrees by a run that completes.

    Args:
        named: Commands that the operator wrote down, by name.
    """

    def __init__(self, named: Mapping[str, str]) -> None:
        self._named = dict(named)
        self._commands = CommandHooks(named)
        self._stopped = threading.Event()

    def refuse_unknown(self, hook: str) -> None:
        """See `quantlib.job.publishing.Hooks.refuse_unknown`."""
        name = self._deployment(hook)
        if name is None:
            self._commands.refuse_unknown(hook)
        else:
            _id_of(name)

    def run(self, hook: str, timeout_s: int, staged: StagedOutput) -> dict[str, Any]:
        """See `quantlib.job.publishing.Hooks.run`."""
        name = self._deployment(hook)
        if name is None:
            return self._commands.run(hook, timeout_s, staged)
        started = time.monotonic()
        places = {"output": staged.output, "staged": join_uri(staged.work, STAGED_FOLDER)}
        with get_client(sync_client=True) as client:
            run = client.create_flow_run_from_deployment(_id_of(name), parameters=places)
            while not (state := client.read_flow_run(run.id).state) or not state.is_final():
                is_late = time.monotonic() - started > timeout_s
                if is_late or self._stopped.wait(_LOOK_S):
                    client.set_flow_run_state(run.id, Cancelling())
                    if not is_late:
                        reason = "its hook was stopped with the run"
                        raise HookError(f"{reason}; the output stays staged", reason=reason)
                    break
        code = None if state is None or not state.is_final() else int(not state.is_completed())
        said = f"{state.name}: {state.message}" if state is not None else ""
        return {
            "hook": hook,
            "exit_code": code,
            "seconds": time.monotonic() - started,
            "output_end": f"run {run.name} ({run.id}) of {name}: {said}",
        }

    def stop(self) -> None:
        """See `quantlib.job.publishing.Hooks.stop`."""
        self._stopped.set()
        self._commands.stop()

    def _deployment(self, hook: str) -> str | None:
        return deployment_in(command_of(hook, self._named))


def _id_of(name: str) -> UUID:
    with get_client(sync_client=True) as client:
        try:
            return client.read_deployment_by_name(name).id
        except (ObjectNotFound, ValueError) as error:
            raise RecipeError(
                f"hook deployment:{name} names no deployment of the Prefect server; deploy it, or correct the"
                " name (FLOW/DEPLOYMENT)",
                option="hook",
            ) from error
