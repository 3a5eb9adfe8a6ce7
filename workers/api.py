"""What flows may call: a crew of workers on a Ray cluster, for as long as a job runs."""

from collections.abc import Iterator
from contextlib import contextmanager

from quantlib.job.crew import Crew
from quantlib.job.options import JobOptions
from workers.log_lines import actors_logged
from workers.pool import WorkerPool
from workers.resources import cluster
from workers.transport import RayTransport


@contextmanager
def open_crew(options: JobOptions) -> Iterator[Crew]:
    """Join or start Ray, place the workers, and free everything at the end, whatever happened.

    What the workers log appears in this process's log.

    Raises:
        RecipeError: More workers than the machine can hold.
        WorkerError: No cluster, or workers that could not be placed.
    """
    with (
        cluster(options.ray_address, options.object_store_memory),
        WorkerPool(options) as pool,
        actors_logged(lambda: pool.actors),
    ):
        yield Crew(RayTransport(pool), pool.threads)
