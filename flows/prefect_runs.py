"""Runs of a deployment on the Prefect server, as a pass over a prefix begins and follows them."""

from collections.abc import Sequence
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound

from flows.params import params_from
from quantlib.errors import RecipeError
from quantlib.job.conversion_runs import SeenRun
from quantlib.job.options import JobOptions

# With which the server refuses parameters.
_REFUSALS = (httpx.codes.CONFLICT, httpx.codes.UNPROCESSABLE_ENTITY)


class PrefectRuns:
    """Runs of one deployment of `quantize_recipes`; a `quantlib.job.conversion_runs.Runs`."""

    def __init__(self, client: SyncPrefectClient, deployment: str, credentials: str | None = None) -> None:
        """Find the deployment.

        Args:
            client: Of the server; used as long as this object is.
            deployment: ``FLOW/DEPLOYMENT``.
            credentials: Block with whose keys the runs reach object storage.

        Raises:
            RecipeError: With ``before_work`` set: there is none of this name.
        """
        self._client, self._credentials = client, credentials
        try:
            self._deployment = client.read_deployment_by_name(deployment).id
        except ObjectNotFound as absent:
            error = RecipeError(
                f"the Prefect server has no deployment {deployment}; register it (quantmill serve, or prefect"
                " deploy), or name another one",
                option="deployment",
            )
            error.before_work = True
            raise error from absent

    def begin(self, requests: Sequence[JobOptions], key: str) -> str:
        """Begin a run; the server gives the one that it has for this key, if any.

        Raises:
            RecipeError: The server refuses the parameters.
        """
        keys = {} if self._credentials is None else {"credentials": self._credentials}
        conversions = [
            {**params_from(options).model_dump(mode="json", exclude_unset=True), **keys}
            for options in requests
        ]
        try:
            run = self._client.create_flow_run_from_deployment(
                self._deployment, parameters={"conversions": conversions}, idempotency_key=key
            )
        except httpx.HTTPStatusError as error:
            if error.response.status_code not in _REFUSALS:
                raise
            raise RecipeError(f"the Prefect server refuses the run: {error.response.text}") from error
        return str(run.id)

    def look(self, run_id: str) -> SeenRun | None:
        """What the server says of a run; None when it does not know it."""
        try:
            run = self._client.read_flow_run(UUID(run_id))
        except (ObjectNotFound, ValueError):
            return None
        state = run.state
        if state is None:
            return SeenRun(state="without a state", is_final=False, is_completed=False)
        return SeenRun(
            state=state.name or state.type.value,
            is_final=state.is_final(),
            is_completed=state.is_completed(),
            message=state.message or "",
        )
