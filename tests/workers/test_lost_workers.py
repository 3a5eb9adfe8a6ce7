"""Workers and nodes that vanish in the middle of a job on three nodes: it goes on, to the same bytes."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from quantlib.errors import RecipeError, WorkerError, WorkerLostError
from quantlib.inprocess import DirectStages, quantize
from quantlib.job import dispatch, failures
from quantlib.job.conversion import convert
from quantlib.job.crew import Crew
from quantlib.job.options import JobOptions
from quantlib.job.stages import Progress
from quantlib.storage.local_files import open_part
from tests.support.ray_nodes import RayNodes
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source, tiny_text
from workers import pool as pool_module
from workers import transport as transport_module
from workers.pool import WorkerPool
from workers.transport import RayTransport

pytestmark = pytest.mark.slow

_WAYS: dict[str, dict[str, Any]] = {
    "original": {"propagation": "original"},
    "quantized": {"propagation": "quantized"},
    "corrected": {"propagation": "quantized", "correct_targets": True},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    tiny_source(folder / "deep", num_hidden_layers=5)
    tiny_options(folder)
    for seed, name in enumerate(_TEXTS):
        tiny_text(folder / f"{name}.jsonl", seed=seed, documents=600)
    return folder


_TEXTS = ("calibration", "evaluation")


def _options(root: Path, name: str, **changes: Any) -> JobOptions:
    """A job of four calibration cells and two of evaluation, the last of either not full."""
    given = {"sequences": 400, "evaluation_sequences": 200, "source": str(root / "deep")}
    return tiny_options(root, output=str(root / name), **{**given, **changes})


@pytest.fixture(scope="module")
def expected(root) -> dict[str, dict[str, str]]:
    """Way of propagation -> digests of an undisturbed run in one process."""
    found = {}
    for name, given in _WAYS.items():
        options = _options(root, f"alone-{name}", **given)
        quantize(options)
        found[name] = shard_digests(Path(options.output))
    return found


def _convert(
    options: JobOptions, pool: WorkerPool, disturb: Callable[[WorkerPool, str], None] = lambda *_: None
) -> dict:
    def on_progress(progress: Progress) -> None:
        disturb(pool, progress.label)

    crew = Crew(RayTransport(pool), pool.threads)
    return convert([options], crew, DirectStages(), on_progress)[0]


def _where(pool: WorkerPool, place: int) -> dict[str, Any]:
    """Process and node of the worker in this place among those there are now."""
    actors = list(pool.actors.values())
    return ray.get(actors[place % len(actors)].ready.remote())


def _is_dead(pid: int) -> bool:
    # A killed child stays in the table of processes until its parent looks.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _at(actions: dict[str, Callable[[WorkerPool], None]]) -> Callable[[WorkerPool, str], None]:
    """Does each action the first time its stage begins."""
    left = dict(actions)

    def disturb(pool: WorkerPool, label: str) -> None:
        if label in left:
            left.pop(label)(pool)

    return disturb


def _kill(number: int) -> Callable[[WorkerPool], None]:
    return lambda pool: os.kill(_where(pool, number)["pid"], signal.SIGKILL)


def _kill_one_without_a_cell(pool: WorkerPool) -> None:
    # Whoever had nothing to do may have taken the cell of one that was solving.
    has_bytes = [ray.get(actor.compute.remote("activation_bytes", ())) for actor in pool.actors.values()]
    _kill(has_bytes.index(0))(pool)


def _kill_while_it_writes(number: int, options: JobOptions) -> Callable[[WorkerPool], None]:
    def kill(pool: WorkerPool) -> None:
        # What a process leaves that dies in the middle of a write.
        open_part(Path(options.output) / "model-00003-of-00007.safetensors")[1].close()
        _kill(number)(pool)

    return kill


@pytest.mark.parametrize("workers", [3, 5])
def test_workers_on_three_nodes_write_the_bytes_of_one_process(root, expected, ray_cluster, workers):
    with WorkerPool(_options(root, "unused", workers=workers)) as pool:
        for name, digests in expected.items():
            options = _options(root, f"ray{workers}-{name}", **_WAYS[name])
            report = _convert(options, pool)
            assert report["workers"] == workers
            assert shard_digests(Path(options.output)) == digests, name


def test_cells_of_a_worker_that_stands_still_are_done_by_the_others(root, expected, ray_cluster):
    options = _options(root, "unequal", workers=3)

    def stop_for_a_while(pool: WorkerPool) -> None:
        slow = _where(pool, 1)["pid"]
        os.kill(slow, signal.SIGSTOP)
        threading.Timer(3.0, os.kill, (slow, signal.SIGCONT)).start()

    with WorkerPool(options) as pool:
        report = _convert(options, pool, _at({"block 2/5: solve": stop_for_a_while}))
    assert shard_digests(Path(options.output)) == expected["original"]
    assert report["history"]["moved_cells"] > 0
    assert not report["history"]["renewals"]


def test_node_removed_without_grace_costs_only_its_workers(
    root, expected, ray_cluster: RayNodes, monkeypatch
):
    monkeypatch.setattr(pool_module, "RENEWAL_TIMEOUT_S", 2.0)
    # Two CPUs each, so that every node holds one worker.
    options = _options(root, "node", workers=3, threads_per_worker=2, checkpoint_every=2)
    alone = _options(root, "node-alone", threads_per_worker=2)
    quantize(alone)

    def remove_a_node(pool: WorkerPool) -> None:
        homes = [_where(pool, number)["node"] for number in range(3)]
        ray_cluster.remove(next(node for home in homes if (node := ray_cluster.node_of(home))))

    with WorkerPool(options) as pool:
        report = _convert(options, pool, _at({"block 3/5: capture": remove_a_node}))
    assert shard_digests(Path(options.output)) == shard_digests(Path(alone.output))
    assert report["workers"] == 2
    renewal = report["history"]["renewals"][0]
    assert (renewal["workers"], renewal["keeps_others"]) == (2, True)


def test_worker_without_a_cell_takes_only_what_it_solved_with_it(root, ray_cluster):
    # One calibration cell: of three workers two have none, and the stream is past the block that is lost.
    given = {"sequences": 20, "evaluation": None, "propagation": "original"}
    options, alone = _options(root, "idle", workers=3, **given), _options(root, "idle-alone", **given)
    quantize(alone)
    with WorkerPool(options) as pool:
        report = _convert(options, pool, _at({"block 3/5: solve": _kill_one_without_a_cell}))
    assert shard_digests(Path(options.output)) == shard_digests(Path(alone.output))
    assert [renewal["keeps_others"] for renewal in report["history"]["renewals"]] == [True]
    assert not report["history"]["replayed_blocks"]


@pytest.mark.parametrize("way", _WAYS)
def test_tiny_budgets_change_no_byte_even_when_a_worker_is_killed(root, expected, ray_cluster, way):
    given = {**_WAYS[way], "workers": 3}
    with WorkerPool(_options(root, "unused", workers=3)) as pool:
        refused = _options(root, f"refused-{way}", object_store_memory="1", **given)
        with pytest.raises(RecipeError, match="object_store_memory must be at least") as found:
            _convert(refused, pool)
        assert not Path(refused.output).exists()
    least = str(found.value.facts["needed_bytes"])
    options = _options(root, f"tiny-{way}", object_store_memory=least, **given)
    with WorkerPool(options) as pool:
        report = _convert(options, pool, _at({"block 2/5: solve": _kill(2)}))
    assert shard_digests(Path(options.output)) == expected[way]
    assert report["memory"]["most_slices"] > 1
    assert len(report["history"]["renewals"]) == 1


def test_node_that_joins_is_used_from_the_next_block_on(root, expected, ray_cluster: RayNodes):
    options = _options(root, "grown", threads_per_worker=2)

    def add_a_node(pool: WorkerPool) -> None:
        added.append(ray_cluster.add())
        deadline = time.monotonic() + 120
        while not pool.has_newcomers:
            assert time.monotonic() < deadline, "no worker came to the new node"
            time.sleep(0.1)

    added: list[Any] = []
    alone = _options(root, "grown-alone", threads_per_worker=2)
    quantize(alone)
    try:
        with WorkerPool(options) as pool:
            assert len(pool.actors) == 3
            report = _convert(options, pool, _at({"block 2/5: capture": add_a_node}))
    finally:
        for node in added:
            ray_cluster.remove(node)
    assert shard_digests(Path(options.output)) == shard_digests(Path(alone.output))
    assert report["workers"] == 4
    assert report["history"]["joined_workers"] == 1
    # Who came late had nothing of its own: what it did was at home elsewhere.
    assert report["history"]["moved_cells"] > 0


def test_worker_that_is_lost_again_and_again_ends_the_run_resumably(root, expected, ray_cluster, monkeypatch):
    once = dataclasses.replace(failures.policy_for(WorkerLostError("x")), attempts=1, first_delay_s=0.0)
    monkeypatch.setattr(failures, "POLICIES", ((WorkerLostError, once), *failures.POLICIES))
    options = _options(root, "unlucky", workers=1)

    def disturb(pool: WorkerPool, label: str) -> None:
        if label == "block 2/5: capture":
            _kill(0)(pool)

    with WorkerPool(options) as pool:
        with pytest.raises(WorkerLostError, match="a worker was lost") as caught:
            _convert(options, pool, disturb)
        assert not caught.value.before_work
        pool.renew()
        report = _convert(options, pool)
    assert shard_digests(Path(options.output)) == expected["original"]
    assert "block-00000" in report["history"]["reused_units"]


def test_workers_that_can_never_be_placed_fail_in_time_and_say_what_is_missing(
    root, ray_cluster, monkeypatch
):
    monkeypatch.setattr(pool_module, "PLACEMENT_TIMEOUT_S", 2.0)
    given = {"workers": 1, "ray_address": ray_cluster.address, "threads_per_worker": 4}
    with (
        pytest.raises(WorkerError, match=r"1 of 1 workers could not be placed within 2 s: each needs 4 CPU"),
        WorkerPool(_options(root, "never", **given)),
    ):
        pass


@pytest.fixture(scope="module")
def two_workers(root, running_nodes) -> Iterator[WorkerPool]:
    """Two workers that serve several tests: starting one takes seconds of imports."""
    with WorkerPool(_options(root, "unused", workers=2)) as pool:
        yield pool


@pytest.mark.parametrize(
    ("propagation", "labels"),
    [("original", ["block 3/5: solve", "head"]), ("quantized", ["block 4/5: evaluate"])],
)
def test_worker_killed_is_replaced_and_the_bytes_are_the_same(
    root, expected, ray_cluster, two_workers, propagation, labels
):
    options = _options(root, f"killed-{propagation}", propagation=propagation, checkpoint_every=2)
    actions = {label: _kill_while_it_writes(n % 2, options) for n, label in enumerate(labels)}
    report = _convert(options, two_workers, _at(actions))
    assert report["history"]["aborted_uploads"] == len(labels)
    assert not list(Path(options.output).rglob("*part"))
    assert shard_digests(Path(options.output)) == expected[propagation]
    history = report["history"]
    assert len(history["renewals"]) == len(labels)
    assert history["renewals"][0]["keeps_others"]
    assert history["from_checkpoint"] is not None


def test_worker_that_hangs_is_found_by_its_pulse(root, expected, ray_cluster, two_workers, monkeypatch):
    monkeypatch.setattr(dispatch, "PULSE_S", 0.3)
    # Loading torch holds the interpreter for seconds, more on a busy machine.
    monkeypatch.setattr(transport_module, "SILENCE_LIMIT_S", 20.0)
    options = _options(root, "hanging")
    frozen = []

    def freeze(pool: WorkerPool) -> None:
        frozen.append(_where(pool, 1)["pid"])
        os.kill(frozen[0], signal.SIGSTOP)

    report = _convert(options, two_workers, _at({"block 2/5: capture": freeze}))
    assert shard_digests(Path(options.output)) == expected["original"]
    assert "has not answered" in report["history"]["renewals"][0]["because"]
    # Ray asks first and kills whoever has not answered for `kill_worker_timeout_milliseconds`, 5 s.
    deadline = time.monotonic() + 60
    while not _is_dead(frozen[0]):
        assert time.monotonic() < deadline, "the frozen worker was left alive"
        time.sleep(0.2)
