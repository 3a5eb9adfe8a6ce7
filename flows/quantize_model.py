"""The flows that convert a checkpoint: into one output, into several from one reading, or to compare them.

The flow's process is the Ray driver: Prefect tasks wait for Ray workers and get back small dicts. What is
done in which order is `quantlib.job.conversion`'s; here are only the Prefect run around it and what it shows.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows.artifacts import publish_comparison, publish_report
from flows.credentials import storage_credentials
from flows.flow_hooks import FlowHooks
from flows.params import CompareParams, QuantizeParams, common_credentials, validated
from flows.progress import tell_listener
from flows.run_hooks import RUN_HOOKS
from flows.run_log import logs_in_run
from flows.run_view import RunView
from flows.stages import PrefectStages
from quantlib.job.comparison_run import compare
from quantlib.job.conversion import convert
from quantlib.job.hook import HOOKS_VARIABLE, configured_hooks
from quantlib.job.options import JobOptions
from quantlib.job.several_formats import requests_of_formats
from quantlib.job.stages import Progress

# Tasks only wait, and the conversion starts no more stages at a time than there are workers, plus writes.
_TASK_RUNNER: Any = ThreadPoolTaskRunner(max_workers=64)  # Prefect types the parameter too narrowly


def _names_of_all() -> str:
    return ", ".join(params.title for params in flow_run.parameters["conversions"])


@flow(
    name="quantize-model",
    flow_run_name="{params.title}",
    task_runner=_TASK_RUNNER,
    persist_result=False,
    **RUN_HOOKS,
)
def quantize_model(params: QuantizeParams) -> dict[str, Any] | list[dict[str, Any]]:
    """Convert a checkpoint into a quantized one, from object storage to object storage.

    Starting it again with the same parameters finishes what an interrupted run left.

    Args:
        params: What to convert, and how.

    Returns:
        The report of the run, as JSON values; of several formats a list, the report of each.

    Raises:
        QuantError: With ``before_work`` set when the request was refused before anything was written.
    """
    with storage_credentials(params.credentials) as environment:
        reports = _convert(requests_of_formats(validated(params.to_options)), environment)
    return reports[0] if len(reports) == 1 else reports


@flow(
    name="quantize-recipes",
    flow_run_name=_names_of_all,
    task_runner=_TASK_RUNNER,
    persist_result=False,
    **RUN_HOOKS,
)
def quantize_recipes(conversions: list[QuantizeParams]) -> list[dict[str, Any]]:
    """Convert a checkpoint into several quantized ones; it is read once and runs once for all of them.

    Args:
        conversions: Of one source; they may differ in where their output goes and how its codes are found.

    Returns:
        The report of each, as JSON values.

    Raises:
        QuantError: With ``before_work`` set when a request was refused before anything was written.
    """
    with storage_credentials(common_credentials(conversions)) as environment:
        given = [validated(params.to_options) for params in conversions]
        return _convert([options for each in given for options in requests_of_formats(each)], environment)


@flow(
    name="compare-schemes",
    flow_run_name="{params.title}",
    task_runner=_TASK_RUNNER,
    persist_result=False,
    **RUN_HOOKS,
)
def compare_schemes(params: CompareParams) -> dict[str, Any]:
    """Convert a checkpoint by several schemes and methods from one reading, and compare what came of it.

    Args:
        params: What to compare, and whether the outputs are kept.

    Returns:
        The comparison, as JSON values.

    Raises:
        QuantError: With ``before_work`` set when the request was refused before anything was written.
    """
    with storage_credentials(params.credentials) as environment:
        comparison = compare(validated(params.to_request), partial(_convert, environment=environment))
    publish_comparison(comparison)
    return comparison


def _convert(requests: Sequence[JobOptions], environment: Mapping[str, str]) -> list[dict[str, Any]]:
    # Ray loads with the first run, not when a deployment is registered or a form is drawn.
    from workers.api import open_crew

    hooks = FlowHooks(validated(lambda: configured_hooks(os.environ.get(HOOKS_VARIABLE))))
    with logs_in_run(), RunView() as view:

        def on_progress(progress: Progress) -> None:
            tell_listener(progress)
            view.show(progress)

        with open_crew(requests[0], environment) as crew:
            reports = convert(requests, crew, PrefectStages(), on_progress, hooks)
        view.show_reports(reports)
    for report in reports:
        publish_report(report)
    return reports
