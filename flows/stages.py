"""Stages of a conversion as Prefect tasks: one task a stage, retried by kind of error.

A stage's work happens on Ray workers; the task only waits for them, so a thread is enough. Results stay in
memory: what survives a crash are the shards and records in the job's storage, not Prefect's database.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff
from prefect.utilities.annotations import quote

from flows.suspension import SuspensionWatch
from quantlib.job.failures import JITTER, POLICIES, policy_for
from quantlib.job.stages import StageFuture

T = TypeVar("T")

_RETRYING = [policy for _, policy in POLICIES if policy.action == "retry"]
_RETRIES = max(policy.attempts for policy in _RETRYING)
_FIRST_DELAY_S = max(policy.first_delay_s for policy in _RETRYING)  # doubled each time: 2, 4, 8, 16 s


def can_retry_help(_task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """True when the table of policies lets the same stage be tried again.

    The parameters are those that Prefect gives to a ``retry_condition_fn``.
    """
    policy = policy_for(state.data)
    return policy.action == "retry" and task_run.run_count <= policy.attempts


@task(
    name="stage",
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=_RETRIES,
    retry_delay_seconds=exponential_backoff(_FIRST_DELAY_S),
    retry_jitter_factor=JITTER,
    retry_condition_fn=can_retry_help,
)
def run_stage(name: str, call: Any) -> Any:  # noqa: ARG001  (the name is the run's name)
    """One stage of a conversion."""
    return call()


class PrefectStages:
    """Starts stages as tasks of the running flow; a `quantlib.job.stages.StageRunner`."""

    def __init__(self) -> None:
        self._watch = SuspensionWatch()

    def submit(self, name: str, function: Callable[..., T], *arguments: Any) -> StageFuture[T]:
        """Start a stage; its future's ``result()`` raises the very error that the stage raised.

        Args:
            name: For people: ``block 17/80: solve``.
            function: What to call.
            *arguments: Its arguments. Prefect neither looks into them nor keeps them.

        Raises:
            Pause: Somebody has suspended the run.
        """
        self._watch.end_if_suspended()
        return run_stage.submit(name, quote(partial(function, *arguments)))
