"""The flows that convert a checkpoint: into one output, into several from one reading, or to compare them.

The flow's process is the Ray driver: Prefect tasks wait for Ray workers and get back small dicts. What is
done in which order is `quantlib.job.conversion`'s; here are only the Prefect run around it and what it shows.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from prefect import flow
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows.artifacts import ProgressArtifact, publish_comparison, publish_report
from flows.params import CompareParams, QuantizeParams
from flows.progress import tell_listener
from flows.stages import PrefectStages
from quantlib.errors import RecipeError
from quantlib.job.command_hooks import CommandHooks
from quantlib.job.comparison_run import compare
from quantlib.job.conversion import convert
from quantlib.job.hook import HOOKS_VARIABLE, configured_hooks
from quantlib.job.options import JobOptions
from quantlib.job.several_formats import requests_of_formats
from quantlib.job.stages import Progress

T = TypeVar("T")

# Tasks only wait, and the conversion starts no more stages at a time than there are workers, plus writes.
_TASK_RUNNER: Any = ThreadPoolTaskRunner(max_workers=64)  # Prefect types the parameter too narrowly


def _names_of_all() -> str:
    return ", ".join(params.title for params in flow_run.parameters["conversions"])


@flow(
    name="quantize-model",
    flow_run_name="{params.title}",
    task_runner=_TASK_RUNNER,
    persist_result=False,
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
    reports = _convert(requests_of_formats(_validated(params.to_options)))
    return reports[0] if len(reports) == 1 else reports


@flow(
    name="quantize-recipes",
    flow_run_name=_names_of_all,
    task_runner=_TASK_RUNNER,
    persist_result=False,
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
    given = [_validated(params.to_options) for params in conversions]
    return _convert([options for each in given for options in requests_of_formats(each)])


@flow(
    name="compare-schemes",
    flow_run_name="{params.title}",
    task_runner=_TASK_RUNNER,
    persist_result=False,
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
    comparison = compare(_validated(params.to_request), _convert)
    publish_comparison(comparison)
    return comparison


def _convert(requests: Sequence[JobOptions]) -> list[dict[str, Any]]:
    # Ray loads with the first run, not when a deployment is registered or a form is drawn.
    from workers.api import open_crew

    named = _validated(lambda: configured_hooks(os.environ.get(HOOKS_VARIABLE)))
    bar, hooks = ProgressArtifact(), CommandHooks(named)

    def on_progress(progress: Progress) -> None:
        tell_listener(progress)
        bar.show(progress)

    with open_crew(requests[0]) as crew:
        reports = convert(requests, crew, PrefectStages(), on_progress, hooks)
    for report in reports:
        publish_report(report)
    return reports


def _validated(validate: Callable[[], T]) -> T:
    try:
        return validate()
    except RecipeError as error:
        error.before_work = True
        raise
