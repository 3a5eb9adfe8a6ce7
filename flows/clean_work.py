"""The flow that removes what a job left behind, on one worker of the cluster."""

from typing import Any

from prefect import flow

from flows.artifacts import publish_lines
from flows.checkpoint_params import CleanParams
from flows.one_worker import done_by_one_worker
from flows.run_hooks import RUN_HOOKS

RESULT_KEY = "clean-work"
_FUNCTION = "quantlib.job.clean.clean_said"


@flow(name="clean-work", flow_run_name="{params.title}", persist_result=False, **RUN_HOOKS)
def clean_work(params: CleanParams) -> dict[str, Any]:
    """Abort what killed runs left unfinished, and remove the work prefix of a finished output.

    Args:
        params: What to clean.

    Returns:
        What was removed.

    Raises:
        QuantError: A run is at work there, there is nothing to clean, or it belongs to another job.
    """
    values = params.model_dump()
    arguments = {name: values[name] for name in ("output", "work", "storage_engine", "discard")}
    result = done_by_one_worker(params, _FUNCTION, arguments, tells_progress=False)
    publish_lines(RESULT_KEY, "What was removed", result["said"])
    return result
