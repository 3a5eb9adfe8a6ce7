"""Workers on a real Ray cluster stand where the options say, at the start and when nodes join.

Nodes with labels, custom resources or GPUs join the cluster of three plain nodes and leave it after each
test. The GPUs are such that only Ray believes in them: they decide where workers stand, the CPU works.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from quantlib.errors import RecipeError, WorkerError
from quantlib.inprocess import DirectStages, quantize
from quantlib.job.conversion import convert
from quantlib.job.crew import Crew
from quantlib.job.node_terms import GPU_MODEL_LABEL, labels_from
from quantlib.job.options import JobOptions
from quantlib.job.stages import Progress
from tests.support.ray_nodes import CPUS_PER_NODE, RayNodes
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_text
from workers import pool as pool_module
from workers.gang import Gang
from workers.placement import Need, capacity
from workers.pool import WorkerPool
from workers.transport import RayTransport

pytestmark = pytest.mark.slow

# Long enough for a worker on a busy machine; nobody waits so long for what works.
_LONG_S = 120.0


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("placed")
    tiny_options(folder)
    tiny_text(folder / "calibration.jsonl", seed=1, documents=600)
    return folder


@pytest.fixture
def join(ray_cluster: RayNodes) -> Iterator[Callable[..., str]]:
    """Has a node join and gives its id; all of them go at the end."""
    joined: list[Any] = []

    def join(**facts: Any) -> str:
        joined.append(ray_cluster.add(**facts))
        return joined[-1].node_id

    yield join
    for node in joined:
        ray_cluster.remove(node, is_graceful=True)


def _gpu(model: str) -> dict[str, Any]:
    return {"num_gpus": 1, "labels": {GPU_MODEL_LABEL: model}, "resources": {f"accelerator_type:{model}": 1}}


def _options(root: Path, cluster: RayNodes, **changes: Any) -> JobOptions:
    return tiny_options(root, **{"ray_address": cluster.address, **changes})


def _home(actor: Any) -> str:
    return ray.get(actor.ready.remote())["node"]


def _homes(pool: WorkerPool) -> list[str]:
    return [_home(actor) for actor in pool.actors.values()]


def _wait_until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + _LONG_S
    while not is_so():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)


def _replace(pool: WorkerPool, number: int) -> dict[str, Any]:
    """Kills a worker, and waits for another one; gives what was known of the first."""
    lost = ray.get(pool.actors[number].ready.remote())
    os.kill(lost["pid"], signal.SIGKILL)
    _wait_until(pool.drop_lost)
    _take_in(pool)
    return lost


def _take_in(pool: WorkerPool) -> None:
    _wait_until(lambda: pool.has_newcomers)
    pool.take_in(pool.newcomers())


def test_ray_has_as_many_places_as_we_count(ray_cluster, join):
    join(labels={"pool": "a"}, resources={"quant": 1})
    join(labels={"pool": "b"}, resources={"quant": 2}, num_gpus=1)
    needs = [
        (Need(cpus=1), "pack"),
        (Need(cpus=CPUS_PER_NODE), "strict-spread"),
        (Need(cpus=1), "strict-pack"),
        (Need(cpus=1, resources={"quant": 0.5}), "spread"),
        (Need(cpus=1, gpus=1), "pack"),
        *(
            (Need(cpus=1, labels=labels_from(f"pool={selector}")), "pack")
            for selector in ("a", "!a", "in(a, b)", "in(a,b)", "!in(a, b)", "!in(b)")
        ),
    ]
    for need, strategy in needs:
        room = capacity(ray.nodes(), need, strategy)
        for count, is_possible in ((room, True), (room + 1, False)):
            gang = Gang(need, count, strategy)
            assert gang.is_ready(_LONG_S if is_possible else 0.5) == is_possible, (need, strategy, count)
            gang.remove()


def test_job_stays_on_nodes_with_label_and_resource_and_takes_in_those_that_join(root, ray_cluster, join):
    given = {"sequences": 400, "evaluation": None, "threads_per_worker": 2}
    alone = tiny_options(root, output=str(root / "alone"), **given)
    quantize(alone)
    homes = [join(labels={"pool": "a"}, resources={"quant": 1})]
    terms = {"worker_labels": "pool=in(a,c),zone=!x", "worker_resources": "quant=1"}
    options = _options(root, ray_cluster, output=str(root / "labelled"), **given, **terms)

    def on_progress(progress: Progress) -> None:
        if progress.label == "block 2/3: capture":
            join(labels={"pool": "a", "zone": "x"}, resources={"quant": 1})
            join(labels={"pool": "a"})
            homes.append(join(labels={"pool": "c"}, resources={"quant": 1}))
            _wait_until(lambda: pool.has_newcomers)

    with WorkerPool(options) as pool:
        assert _homes(pool) == homes
        crew = Crew(RayTransport(pool), pool.threads)
        (report,) = convert([options], crew, DirectStages(), on_progress)
        assert _homes(pool) == homes
    assert (report["workers"], report["history"]["joined_workers"]) == (2, 1)
    assert shard_digests(Path(options.output)) == shard_digests(Path(alone.output))


def test_too_few_nodes_with_the_label_say_how_many_workers_are_missing(root, ray_cluster, join, monkeypatch):
    monkeypatch.setattr(pool_module, "PLACEMENT_TIMEOUT_S", 2.0)
    join(labels={"pool": "a"})
    options = _options(root, ray_cluster, worker_labels="pool=a", workers=5)
    with (
        pytest.raises(
            WorkerError,
            match=r"of 5 workers could not be placed within 2 s: each needs 1 CPU on one"
            r" node with pool=a; the living nodes have room for 2",
        ) as caught,
        WorkerPool(options),
    ):
        pass
    assert caught.value.facts["missing"] >= 3


def test_places_are_had_together_or_not_at_all(root, ray_cluster, monkeypatch):
    given = {"placement": "strict-spread", "threads_per_worker": CPUS_PER_NODE}
    said = r"1 of 4 workers could not be placed together \(strict-spread\) within 2 s: each needs 2 CPU"
    with monkeypatch.context() as patched:
        patched.setattr(pool_module, "PLACEMENT_TIMEOUT_S", 2.0)
        pool = WorkerPool(_options(root, ray_cluster, workers=4, **given))
        with pytest.raises(WorkerError, match=said) as caught, pool:
            pass
    assert caught.value.facts["missing"] == 1
    _wait_until(lambda: ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"])


def test_worker_in_place_of_a_lost_one_takes_its_reserved_place(root, ray_cluster):
    options = _options(root, ray_cluster, workers=3, placement="strict-spread", threads_per_worker=2)
    with WorkerPool(options) as pool:
        # No CPU of the cluster is free beside the reserved ones.
        assert ray.available_resources().get("CPU", 0) == 0
        lost = _replace(pool, 1)
        assert sorted(pool.actors) == [0, 2, 3]
        assert _home(pool.actors[3]) == lost["node"]
        # All of them again, in the same places.
        homes = sorted(_homes(pool))
        pool.renew()
        assert sorted(_homes(pool)) == homes


def test_several_models_of_gpu_are_refused_before_a_worker_is_started(root, ray_cluster, join):
    h100, a100 = join(**_gpu("H100")), join(**_gpu("A100"))
    free = ray.available_resources()
    for changes, said in (
        ({}, r"nodes that could host workers have (A100|H100) \(1 node\) and (A100|H100) \(1 node\); choose"),
        ({"gpu_model": "L4"}, "ray.io/accelerator-type=L4, which the cluster does not offer"),
    ):
        with pytest.raises(RecipeError, match=said) as caught:
            WorkerPool(_options(root, ray_cluster, device=None, **changes))
        assert caught.value.before_work
    assert ray.available_resources() == free
    for model, node in (("H100", h100), ("A100", a100)):
        with WorkerPool(_options(root, ray_cluster, device=None, gpu_model=model)) as pool:
            assert _homes(pool) == [node]
    with WorkerPool(_options(root, ray_cluster, device=None, mixed_gpus=True)) as pool:
        assert sorted(_homes(pool)) == sorted([h100, a100])


def test_job_on_one_model_of_gpu_keeps_away_from_others_that_join(root, ray_cluster, join):
    first = join(**_gpu("H100"))
    with WorkerPool(_options(root, ray_cluster, device=None)) as pool:
        assert _homes(pool) == [first]
        join(**_gpu("A100"))
        second = join(**_gpu("H100"))
        _take_in(pool)
        assert _homes(pool) == [first, second]
        _replace(pool, 0)
        assert sorted(_homes(pool)) == sorted([first, second])


def test_newcomer_that_is_sent_away_but_not_for_good_is_followed_by_another(root, ray_cluster):
    with WorkerPool(_options(root, ray_cluster, workers=2)) as pool:
        first = next(iter(pool.actors))
        os.kill(ray.get(pool.actors[first].ready.remote())["pid"], signal.SIGKILL)
        _wait_until(pool.drop_lost)
        _wait_until(lambda: pool.has_newcomers)
        pool.send_away(pool.newcomers(), for_good=False)
        assert pool.drop_lost() == []
        _take_in(pool)
        assert len(pool.actors) == 2
