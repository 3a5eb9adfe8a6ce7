"""The flow that re-reads an output and compares it with its record, on one worker of the cluster."""

from typing import Any

from prefect import flow

from flows.artifacts import publish_lines
from flows.checkpoint_params import VerifyParams
from flows.one_worker import done_by_one_worker
from flows.run_hooks import RUN_HOOKS
from quantlib.errors import CheckpointError
from quantlib.job.verification_text import all_findings, format_verification

RESULT_KEY = "verify-output"
_FUNCTION = "quantlib.verification.verify_output"


@flow(name="verify-output", flow_run_name="{params.title}", persist_result=False, **RUN_HOOKS)
def verify_output(params: VerifyParams) -> dict[str, Any]:
    """Re-read every shard of an output and compare it with its record, its source, or another output.

    Args:
        params: What to verify.

    Returns:
        What `quantlib.verification.verify_output` gives.

    Raises:
        CheckpointError: Something is wrong with the output; all of it is in the run's artifact.
        QuantError: Something at one of the addresses cannot be read at all.
    """
    values = params.model_dump()
    arguments = {name: values[name] for name in ("output", "source", "against", "storage_engine")}
    result = done_by_one_worker(params, _FUNCTION, arguments)
    publish_lines(RESULT_KEY, "What was found", format_verification(result))
    if findings := all_findings(result):
        raise CheckpointError(
            f"{result['output']} is not as its record says: {len(findings)} finding(s), the first:"
            f" {findings[0]}",
            uri=result["output"],
        )
    return result
