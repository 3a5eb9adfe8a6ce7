"""Sums of workers on three nodes, between which they travel in every way: to the bytes of one process."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

from quantlib.inprocess import DirectStages, quantize
from quantlib.job.conversion import convert
from quantlib.job.crew import Crew
from quantlib.job.options import JobOptions
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source, tiny_text
from workers.pool import WorkerPool
from workers.transport import RayTransport

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exchange")
    tiny_source(folder / "deep", num_hidden_layers=3, intermediate_size=288)
    tiny_options(folder)
    tiny_text(folder / "calibration.jsonl", seed=0, documents=1200)
    return folder


@pytest.fixture(scope="module")
def expected(root) -> dict[str, str]:
    """Shards of a run in one process."""
    options = _options(root, "alone")
    quantize(options)
    return shard_digests(Path(options.output))


def _options(root: Path, name: str) -> JobOptions:
    """Six calibration cells."""
    given = {"sequences": 600, "evaluation": None, "source": str(root / "deep")}
    return tiny_options(root, output=str(root / name), **given, workers=5)


class _WithoutPorts(RayTransport):
    """Workers that find no port at which members of a group could reach them."""

    def submit(self, worker: int, method: str, *arguments: Any) -> ray.ObjectRef:
        if method == "join_group":
            arguments = (None, *arguments[1:])
        return super().submit(worker, method, *arguments)


class _LosingOne(RayTransport):
    """The second time that sums are to be added in groups, one of their members is killed."""

    num_asked = 0

    def submit(self, worker: int, method: str, *arguments: Any) -> ray.ObjectRef:
        if method == "reduce_bands":
            self.num_asked += 1
            if self.num_asked == 5:
                answer: dict[str, Any] = ray.get(self._pool.actor(worker).ready.remote())
                os.kill(answer["pid"], signal.SIGKILL)
        return super().submit(worker, method, *arguments)


@pytest.mark.parametrize(
    ("transport", "path", "num_renewals"),
    [(RayTransport, "gloo", 0), (_WithoutPorts, "object store", 0), (_LosingOne, "gloo", 1)],
    ids=["gloo", "object-store", "member-lost"],
)
def test_sums_between_nodes_give_the_bytes_of_one_process(
    root, expected, ray_cluster, transport, path, num_renewals
):
    options = _options(root, f"{path}-{num_renewals}")
    with WorkerPool(options) as pool:
        assert len({pool.node_of(number) for number in pool.actors}) == 3
        crew = Crew(transport(pool), pool.threads)
        history = convert([options], crew, DirectStages(), lambda _: None)[0]["history"]
    assert shard_digests(Path(options.output)) == expected
    assert history["exchanges"][path] >= 1
    assert bool(history["exchange_fallbacks"]) == (path == "object store")
    assert len(history["renewals"]) == num_renewals
