"""What one worker of the cluster does for a flow: a function of the library, watched as a conversion is."""

from collections.abc import Mapping
from typing import Any

from flows.checkpoint_params import OneWorkerParams
from flows.credentials import storage_credentials
from flows.params import validated
from flows.run_log import logs_in_run
from flows.run_view import RunView


def done_by_one_worker(
    params: OneWorkerParams, function: str, arguments: Mapping[str, Any], *, tells_progress: bool = True
) -> Any:
    """Run a function on a worker, and show how far it is.

    Args:
        params: Which cluster, what the worker takes there, and with whose keys it reaches storage.
        function: Dotted name.
        arguments: Its arguments, by name.
        tells_progress: Whether it takes ``on_progress`` too.

    Raises:
        QuantError: See `workers.errands.run_errand`.
    """
    # Ray loads with the first run, not when a deployment is registered or a form is drawn.
    from workers.api import run_errand

    options = validated(params.worker_options)
    with storage_credentials(params.credentials) as environment, logs_in_run(), RunView() as view:
        on_progress = view.show if tells_progress else None
        return run_errand(options, function, arguments, environment, on_progress)
