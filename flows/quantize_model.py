"""The flow that converts a checkpoint.

The flow's process is the Ray driver: Prefect tasks wait for Ray workers and get back small dicts. What is
done in which order is `quantlib.job.conversion`'s; here are only the Prefect run around it and what it shows.
"""

from typing import Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.artifacts import ProgressArtifact, publish_report
from flows.params import QuantizeParams
from flows.progress import tell_listener
from flows.stages import PrefectStages
from quantlib.errors import RecipeError
from quantlib.job.conversion import convert
from quantlib.job.options import JobOptions
from quantlib.job.stages import Progress

# Tasks only wait, and the conversion starts no more stages at a time than there are workers, plus writes.
_TASK_RUNNER: Any = ThreadPoolTaskRunner(max_workers=64)  # Prefect types the parameter too narrowly


@flow(
    name="quantize-model",
    flow_run_name="{params.title}",
    task_runner=_TASK_RUNNER,
    persist_result=False,
)
def quantize_model(params: QuantizeParams) -> dict[str, Any]:
    """Convert a checkpoint into a quantized one, from object storage to object storage.

    Starting it again with the same parameters finishes what an interrupted run left.

    Args:
        params: What to convert, and how.

    Returns:
        The report of the run, as JSON values.

    Raises:
        QuantError: With ``before_work`` set when the request was refused before anything was written.
    """
    options = _validated(params)
    # Ray loads with the first run, not when a deployment is registered or a form is drawn.
    from workers.api import open_crew

    bar = ProgressArtifact()

    def on_progress(progress: Progress) -> None:
        tell_listener(progress)
        bar.show(progress)

    with open_crew(options) as crew:
        report = convert(options, crew, PrefectStages(), on_progress)
    publish_report(report)
    return report


def _validated(params: QuantizeParams) -> JobOptions:
    try:
        return params.to_options()
    except RecipeError as error:
        error.before_work = True
        raise
