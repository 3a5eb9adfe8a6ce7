"""What flows may call: a crew of workers for as long as a job runs, or one function on one worker."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from quantlib.job.crew import Crew
from quantlib.job.options import JobOptions
from workers.errands import run_errand
from workers.log_lines import actors_logged
from workers.pool import WorkerPool
from workers.resources import cluster
from workers.transport import RayTransport

__all__ = ["open_crew", "run_errand"]


@contextmanager
def open_crew(options: JobOptions, environment: Mapping[str, str] | None = None) -> Iterator[Crew]:
    """Join or start Ray, place the workers, and free everything at the end, whatever happened.

    What the workers log appears in this process's log.

    Args:
        options: The request.
        environment: Variables that workers set before they begin.

    Raises:
        RecipeError: More workers than the machine can hold.
        WorkerError: No cluster, or workers that could not be placed.
    """
    with (
        cluster(options.ray_address, options.object_store_memory),
        WorkerPool(options, environment) as pool,
        actors_logged(lambda: pool.actors),
    ):
        yield Crew(RayTransport(pool), pool.threads)
