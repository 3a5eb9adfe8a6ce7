"""The flow that measures the perplexity of a checkpoint, on one worker of the cluster."""

from typing import Any

from prefect import flow

from flows.artifacts import publish_lines
from flows.checkpoint_params import EvaluateParams
from flows.one_worker import done_by_one_worker
from flows.run_hooks import RUN_HOOKS
from quantlib.job.evaluation_text import format_evaluation

_FUNCTION = "quantlib.evaluation.evaluate_checkpoint"
RESULT_KEY = "evaluate-model"


@flow(name="evaluate-model", flow_run_name="{params.title}", persist_result=False, **RUN_HOOKS)
def evaluate_model(params: EvaluateParams) -> dict[str, Any]:
    """Measure the perplexity of an original or quantized checkpoint, block by block.

    Args:
        params: What to evaluate, and on which text.

    Returns:
        What `quantlib.evaluation.evaluate_checkpoint` gives.

    Raises:
        QuantError: The checkpoint or the text cannot be used.
    """
    values = params.model_dump()
    arguments = {
        "uri": values["model"],
        "text": values["text"],
        "text_column": values["text_column"],
        "sequences": values["evaluation_sequences"],
        "sequence_length": values["sequence_length"],
        "threads": values["threads_per_worker"],
        "device": values["device"],
        "storage_engine": values["storage_engine"],
    }
    result = done_by_one_worker(params, _FUNCTION, arguments)
    publish_lines(RESULT_KEY, "Perplexity of the checkpoint", format_evaluation(result))
    return result
