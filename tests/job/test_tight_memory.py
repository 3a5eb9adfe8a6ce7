"""Jobs in little memory: slices, streams on disk, one block at a time; to the bytes of a roomy one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantlib.errors import RecipeError
from quantlib.inprocess import quantize
from quantlib.job.memory import Room
from quantlib.job.options import JobOptions
from tests.support.thread_cluster import ThreadCluster, convert_on
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source, tiny_text

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

_WAYS: dict[str, dict[str, Any]] = {
    "original": {"propagation": "original"},
    "quantized": {"propagation": "quantized", "rules": [{"match": "*.down_proj", "scheme": "FP8_DYNAMIC"}]},
    "corrected": {"propagation": "quantized", "correct_targets": True, "evaluation": None},
    "biases": {"propagation": "quantized", "source": "biased", "correct_biases": True},
}
# The tiny model has four input groups in a block.
_NUM_GROUPS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tight")
    tiny_source(folder / "deep", num_hidden_layers=3)
    tiny_source(folder / "biased", num_hidden_layers=3, attention_bias=True, mlp_bias=True)
    tiny_options(folder)
    for seed, name in enumerate(("calibration", "evaluation")):
        tiny_text(folder / f"{name}.jsonl", seed=seed, documents=800)
    return folder


@pytest.fixture(scope="module")
def roomy(root) -> dict[str, dict[str, str]]:
    """Way of propagation -> shards of a run in one process with all the memory it wants."""
    found = {}
    for way in _WAYS:
        options = _options(root, f"roomy-{way}", way)
        assert quantize(options)["memory"]["most_slices"] == 1
        found[way] = shard_digests(Path(options.output))
    return found


def _options(root: Path, name: str, way: str) -> JobOptions:
    """Three cells of either corpus."""
    given = {"sequences": 300, "evaluation_sequences": 300, "checkpoint_every": 0}
    values = {**given, "source": "deep", **_WAYS[way]}
    return tiny_options(root, output=str(root / name), **{**values, "source": str(root / values["source"])})


def _cluster(workers: int, room: Room) -> ThreadCluster:
    cluster = ThreadCluster(workers)
    cluster.room = room
    return cluster


def _tightest(options: JobOptions, workers: int, room: Callable[[int], Room]) -> Room:
    """The least with which the job is not refused, which the refusal names."""
    with pytest.raises(RecipeError, match="must be at least") as refused:
        convert_on(_cluster(workers, room(1)), options)
    assert refused.value.before_work
    assert not Path(options.output).exists()
    needed = refused.value.facts["needed_bytes"]
    assert isinstance(needed, int)
    with pytest.raises(RecipeError, match="must be at least"):
        convert_on(_cluster(workers, room(needed - 1)), options)
    return room(needed)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("way", _WAYS)
def test_tightest_worker_memory_changes_no_byte(root, roomy, way, workers):
    options = _options(root, f"worker-{way}-{workers}", way)
    room = _tightest(options, workers, lambda size: Room(worker_bytes=size))
    report = convert_on(_cluster(workers, room), options)
    assert shard_digests(Path(options.output)) == roomy[way]
    memory = report["memory"]
    assert not memory["planned"]["pipelines"]
    assert memory["planned"]["has_late_weights"]
    assert memory["most_slices"] >= 2
    assert sum(memory["planned"]["worker"].values()) <= room.worker_bytes


@pytest.mark.parametrize("way", _WAYS)
def test_tightest_object_store_changes_no_byte(root, roomy, way):
    options = _options(root, f"store-{way}", way)
    room = _tightest(options, 2, lambda size: Room(store_bytes=size, store_workers=2))
    report = convert_on(_cluster(2, room), options)
    assert shard_digests(Path(options.output)) == roomy[way]
    assert report["memory"]["most_slices"] >= 2


@pytest.mark.parametrize("way", ["original", "quantized"])
@pytest.mark.parametrize("method", ["observe", "totals", "add_bands", "solve", "forward", "advance", "write"])
@pytest.mark.parametrize("call", [2, 5])
def test_worker_lost_between_slices_changes_no_byte(root, roomy, way, method, call):
    """Sums are not kept from slice to slice: lost codes are made again from a new pass of all cells."""
    options = _options(root, f"lost-{way}-{method}-{call}", way)
    room = _tightest(options, 3, lambda size: Room(store_bytes=size, store_workers=3))
    cluster, calls = _cluster(3, room), []

    def kill(worker: int, called: str, _: tuple[Any, ...]) -> None:
        if called == method:
            calls.append(worker)
            if len(calls) == call:
                cluster.kill(worker)

    cluster.before = kill
    report = convert_on(cluster, options)
    assert shard_digests(Path(options.output)) == roomy[way]
    # Where a worker is so late that the others observe its cell, there is nothing to add up beforehand.
    assert len(report["history"]["renewals"]) == (len(calls) >= call)
    assert method == "add_bands" or len(calls) >= call


def test_streams_that_find_no_room_wait_on_disk(root, roomy):
    options = _options(root, "waiting", "quantized")
    room = _tightest(options, 1, lambda size: Room(worker_bytes=size))
    report = convert_on(_cluster(1, room), options)
    assert report["memory"]["worker_waiting_on_disk_bytes"][0] > 0
    assert shard_digests(Path(options.output)) == roomy["quantized"]


def test_finished_job_is_not_refused_for_memory_it_does_not_need(root):
    options = _options(root, "finished", "original")
    report = convert_on(_cluster(1, Room()), options)
    again = convert_on(_cluster(1, Room(worker_bytes=1)), options)
    assert (again["identity"], again["finished"]) == (report["identity"], report["finished"])
