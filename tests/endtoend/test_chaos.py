"""Jobs under seeded faults: each ends with the undisturbed bytes, at once or when it is started again.

More draws: ``python tests/endtoend/chaos.py --draws 40``.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.chaos import StorageChaos, calm_digests, make_sources
from tests.support.chaos_draws import StorageDraw, WorkerDraw, draw_of
from tests.support.chaos_starts import Starter
from tests.support.s3_server import running_s3_server

pytestmark = pytest.mark.slow

DRAWS = [draw_of(seed) for seed in range(8)]


def _seed(draw: StorageDraw | WorkerDraw) -> str:
    return f"seed-{draw.seed}"


@pytest.fixture(scope="module")
def starter() -> Starter:
    return Starter()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    make_sources(folder)
    return folder


@pytest.fixture(scope="module")
def calm(starter, root) -> dict[str, dict[str, str]]:
    return calm_digests(starter, root)


@pytest.fixture(scope="module")
def storage_chaos(starter, root, calm, tmp_path_factory) -> Iterator[StorageChaos]:
    # A server of its own, for it is killed.
    with running_s3_server(tmp_path_factory.mktemp("chaos-s3")) as server:
        yield StorageChaos(server, starter, root, calm)


@pytest.fixture(scope="module")
def worker_chaos(root, calm, running_nodes) -> Iterator:
    # Here, because Ray takes a second to load.
    from tests.support.chaos_workers import WorkerChaos, two_workers

    with two_workers(root) as pool:
        yield WorkerChaos(root, calm, pool)


@pytest.mark.parametrize("draw", [d for d in DRAWS if isinstance(d, StorageDraw)], ids=_seed)
def test_chaos_of_storage_and_kills_ends_in_the_undisturbed_bytes(storage_chaos, draw):
    storage_chaos.run(draw)


@pytest.mark.parametrize("draw", [d for d in DRAWS if isinstance(d, WorkerDraw)], ids=_seed)
def test_chaos_of_lost_workers_ends_in_the_undisturbed_bytes(worker_chaos, ray_cluster, draw):
    worker_chaos.run(draw)
