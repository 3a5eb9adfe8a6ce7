"""One function on one worker: what needs a node of the cluster but no crew.

The function runs where a worker of a job with the same options would, with the same share of the node.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import ray
from ray import exceptions

from quantlib.errors import QuantError, WorkerError
from quantlib.job.options import JobOptions
from quantlib.job.stages import Progress
from workers.demand import demand
from workers.placement import Need
from workers.pool import PLACEMENT_TIMEOUT_S
from workers.resources import cluster
from workers.transport import LOST, lost_worker

_LOOK_S = 1.0
_PROGRESS_LANE = "progress"


class Errand:
    """The actor: it runs a function, and tells meanwhile how far that is."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def ready(self) -> None:
        """Answers once the actor has its place."""

    def run(
        self,
        function: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        *,
        tells_progress: bool,
    ) -> Any:
        """Call a function by its dotted name."""
        os.environ.update(environment)
        module, _, name = function.rpartition(".")
        listener = {"on_progress": self._note} if tells_progress else {}
        return getattr(import_module(module), name)(**arguments, **listener)

    @ray.method(concurrency_group=_PROGRESS_LANE)
    def progress(self) -> Progress | None:
        """What the function said last."""
        return self._progress

    def _note(self, progress: Progress) -> None:
        self._progress = progress


def run_errand(
    options: JobOptions,
    function: str,
    arguments: Mapping[str, Any],
    environment: Mapping[str, str],
    on_progress: Callable[[Progress], None] | None = None,
) -> Any:
    """Run a function on a worker of the cluster; ends it when the waiting is interrupted.

    Args:
        options: Which cluster, and what a worker of a job takes there; of the workers there is one.
        function: Dotted name.
        arguments: Its arguments, by name.
        environment: Variables that the worker sets first.
        on_progress: Hears of the function's progress once a second; the function takes ``on_progress`` then.

    Returns:
        What the function gives, which is to be small.

    Raises:
        QuantError: Of the function's own raising.
        WorkerError: No cluster, no place on it in time, or the worker was lost.
    """
    with cluster(options.ray_address, options.object_store_memory):
        need, _ = demand(replace(options, workers=1), ray.nodes())
        actor = _start(need)
        try:
            _wait_for_place(actor, need)
            call = (function, dict(arguments), dict(environment))
            answer = actor.run.remote(*call, tells_progress=on_progress is not None)
            return _result(actor, answer, on_progress)
        finally:
            ray.kill(actor)


def _start(need: Need) -> Any:
    errand: Any = ray.remote(concurrency_groups={_PROGRESS_LANE: 1})(Errand)  # pyright: ignore[reportCallIssue]
    return errand.options(
        num_cpus=need.cpus,
        num_gpus=need.gpus,
        resources=dict(need.resources),
        label_selector=dict(need.labels),
        max_restarts=0,
    ).remote()


def _wait_for_place(actor: Any, need: Need) -> None:
    answer = actor.ready.remote()
    if not ray.wait([answer], timeout=PLACEMENT_TIMEOUT_S)[0]:
        raise WorkerError(
            f"no node had room for a worker within {PLACEMENT_TIMEOUT_S:.0f} s: it needs {need}; add nodes,"
            " or ask for fewer threads_per_worker"
        )
    try:
        ray.get(answer)
    except exceptions.RayActorError as error:
        raise WorkerError(
            f"a worker did not start: {str(error).splitlines()[-1]}; is Quantmill installed on every node?"
        ) from error


def _result(actor: Any, answer: ray.ObjectRef, on_progress: Callable[[Progress], None] | None) -> Any:
    told: Progress | None = None
    try:
        while not ray.wait([answer], timeout=_LOOK_S)[0]:
            if on_progress is None:
                continue
            asked = actor.progress.remote()
            now: Any = ray.get(asked) if ray.wait([asked], timeout=_LOOK_S)[0] else told
            if now != told:
                on_progress(now)
                told = now
        return ray.get(answer)
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, QuantError):
            raise error.cause from None
        raise
    except LOST as error:
        raise lost_worker(error) from error
