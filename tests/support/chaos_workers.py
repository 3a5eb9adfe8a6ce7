"""Draws that kill Ray workers: jobs on local files and two workers, of which some die as a stage begins."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from quantlib.checkpoint.verify import verify_checkpoint
from quantlib.errors import WorkerLostError
from quantlib.inprocess import DirectStages
from quantlib.job.conversion import convert
from quantlib.job.crew import Crew
from quantlib.job.lease import read_lease
from quantlib.job.options import JobOptions, options_from
from quantlib.job.stages import Progress
from quantlib.storage import normalize_uri, open_store
from tests.support.chaos import Digests, Outcome, job_values, telling
from tests.support.chaos_draws import WorkerDraw
from tests.support.tiny_jobs import shard_digests
from workers.pool import WorkerPool
from workers.transport import RayTransport

WORKERS = 2


class WorkerChaos:
    """Two workers that serve all draws.

    Args:
        root: Folder of `tests.support.chaos.make_sources`.
        calm: Propagation -> digests of the undisturbed shards.
    """

    def __init__(self, root: Path, calm: Digests, pool: WorkerPool) -> None:
        self._root, self._calm, self._pool = root, calm, pool
        self._outputs = 0

    def run(self, draw: WorkerDraw) -> Outcome:
        """Carry a draw out.

        Raises:
            AssertionError: A start ended otherwise than it may.
        """
        self._outputs += 1
        outcome, left = Outcome(), dict(draw.kills)
        options = self._options(draw)
        with telling(draw):
            for _ in range(len(draw.kills) + 1):
                if self._start(options, left, outcome):
                    break
                self._pool.renew()
            assert outcome.ends[-1] == "undisturbed bytes", outcome.summary
            self._look(options, draw)
        return outcome

    def _options(self, draw: WorkerDraw) -> JobOptions:
        output = str(self._root / f"draw-{draw.seed}-{self._outputs}")
        given = {"propagation": draw.propagation, "checkpoint_every": draw.checkpoint_every}
        return options_from(
            job_values(self._root, str(self._root / "deep"), output, self._root, workers=WORKERS, **given)
        )

    def _start(self, options: JobOptions, left: dict[str, int], outcome: Outcome) -> bool:
        """One start; True when it completed."""

        def disturb(progress: Progress) -> None:
            if progress.label in left:
                self._kill(left.pop(progress.label))
                outcome.blows["worker killed"] += 1

        try:
            crew = Crew(RayTransport(self._pool), self._pool.threads)
            outcome.note(convert([options], crew, DirectStages(), disturb)[0]["history"])
        except WorkerLostError as error:
            outcome.failed("WorkerLostError", error.message)
            return False
        outcome.ends.append("undisturbed bytes")
        return True

    def _kill(self, number: int) -> None:
        actors = list(self._pool.actors.values())
        place: dict[str, Any] = ray.get(actors[number % len(actors)].ready.remote())
        os.kill(place["pid"], signal.SIGKILL)

    def _look(self, options: JobOptions, draw: WorkerDraw) -> None:
        output = Path(options.output)
        assert shard_digests(output) == self._calm[draw.propagation]
        assert (output / "config.json").exists()
        store, uri = open_store(normalize_uri(options.output)), normalize_uri(options.output)
        assert verify_checkpoint(store, uri).findings == ()
        lease = read_lease(store, f"{uri}.quantmill")
        assert lease is not None
        assert lease.released
        for folder in (output, Path(f"{output}.quantmill")):
            assert not list(folder.rglob("*part"))
        assert not list(Path(f"{output}.quantmill", "activations").rglob("*.*"))


@contextmanager
def two_workers(root: Path) -> Iterator[WorkerPool]:
    """The workers, on the cluster this process is connected to."""
    values = job_values(root, str(root / "deep"), str(root / "unused"), root, workers=WORKERS)
    with WorkerPool(options_from(values)) as pool:
        yield pool
