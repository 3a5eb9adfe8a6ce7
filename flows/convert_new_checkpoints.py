"""The flow that looks for new checkpoints below a prefix and begins a run of `quantize_recipes` for each.

A pass takes seconds and waits for nothing; it is made by a schedule, by hand or by an event, as often as one
likes. What it decides is `quantlib.job.incoming_pass`'s.
"""

import time
from dataclasses import asdict
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger

from flows.artifacts import publish_new_checkpoints
from flows.credentials import storage_credentials
from flows.params import NewCheckpointsParams, validated
from flows.prefect_runs import PrefectRuns
from flows.run_hooks import PASS_HOOKS
from quantlib.job.incoming import summary_of
from quantlib.job.incoming_pass import convert_incoming


@flow(
    name="convert-new-checkpoints",
    flow_run_name="{params.title}",
    persist_result=False,
    **PASS_HOOKS,
)
def convert_new_checkpoints(params: NewCheckpointsParams) -> dict[str, Any]:
    """Begin a run for every checkpoint below a prefix that is whole and lacks an output.

    Safe to be called again at any time: what is made, under way or parked is left alone.

    Args:
        params: Where to look, what to make, where it goes.

    Returns:
        ``summary``, one sentence, and ``checkpoints``, what is said of each (`quantlib.job.incoming.Row`).

    Raises:
        RecipeError: With ``before_work`` set when the parameters are wrong.
        StorageError: The store does not answer, or refuses.
    """
    incoming = validated(params.to_incoming)
    with storage_credentials(params.credentials), get_client(sync_client=True) as client:
        runs = PrefectRuns(client, params.deployment, params.credentials)
        rows = convert_incoming(incoming, runs, now_s=time.time())
    summary = summary_of(rows, params.prefix)
    logger = get_run_logger()
    logger.info(summary)
    for row in rows:
        logger.info("%s: %s %s", row.checkpoint, row.state, row.reason)
    publish_new_checkpoints(rows, summary)
    return {"summary": summary, "checkpoints": [asdict(row) for row in rows]}
