"""Workers lost, late or failing in one exact place of a job: it ends, and with the bytes of one process."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.errors import (
    NumericsError,
    PlanMismatchError,
    QuantError,
    TransientStorageError,
    WorkerLostError,
)
from quantlib.inprocess import quantize
from quantlib.job import failures
from quantlib.job.failures import Policy
from quantlib.job.options import JobOptions
from quantlib.job.stages import Progress
from tests.support.thread_cluster import ThreadCluster, convert_on
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source, tiny_text

pytestmark = pytest.mark.slow

Fault = Callable[[ThreadCluster, int, str, tuple[Any, ...]], None]
_WAYS = ("original", "quantized")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tiny_source(folder / "deep", num_hidden_layers=4)
    tiny_options(folder)
    for seed, name in enumerate(("calibration", "evaluation")):
        tiny_text(folder / f"{name}.jsonl", seed=seed, documents=800)
    return folder


@pytest.fixture(scope="module")
def calm(root) -> dict[str, tuple[dict[str, str], list[float]]]:
    """Way of propagation -> shards and errors of the blocks of an undisturbed run."""
    found = {}
    for way in _WAYS:
        options = _options(root, f"calm-{way}", propagation=way)
        report = quantize(options)
        found[way] = (shard_digests(Path(options.output)), _errors(report))
    return found


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    torch.set_num_threads(1)
    retry = Policy(action="retry", attempts=4, first_delay_s=0.2)
    renew = dataclasses.replace(failures.policy_for(WorkerLostError("x")), first_delay_s=0.0)
    sooner = ((TransientStorageError, retry), (WorkerLostError, renew))
    monkeypatch.setattr(failures, "POLICIES", (*sooner, *failures.POLICIES))


def _options(root: Path, name: str, **changes: Any) -> JobOptions:
    """Three cells of either corpus."""
    given = {
        "sequences": 300,
        "evaluation_sequences": 300,
        "checkpoint_every": 0,
        "source": str(root / "deep"),
    }
    return tiny_options(root, output=str(root / name), **{**given, **changes})


def _errors(report: dict[str, Any]) -> list[float]:
    return [block["relative_error"] for block in report["blocks"]]


def _run(
    options: JobOptions,
    fault: Fault,
    workers: int = 3,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """A job that may not hang; gives its report or raises its error."""
    cluster = ThreadCluster(workers)
    cluster.before = lambda *call: fault(cluster, *call)
    return convert_on(cluster, options, on_progress)


def _once(
    when: Callable[[int, str, tuple[Any, ...]], bool], act: Callable[[ThreadCluster, int], None]
) -> Fault:
    """Acts at the first call that fits."""
    lock, done = threading.Lock(), []

    def fault(cluster: ThreadCluster, worker: int, method: str, arguments: tuple[Any, ...]) -> None:
        with lock:
            is_it = not done and when(worker, method, arguments)
            done.extend([1] * is_it)
        if is_it:
            act(cluster, worker)

    return fault


def _kill_it(cluster: ThreadCluster, worker: int) -> None:
    cluster.kill(worker)


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize(
    ("method", "block"),
    [("observe", 1), ("totals", 1), ("solve", 1), ("load", 2), ("forward", 2), ("load_quantized", 1)]
    + [("advance", 1), ("advance", 3), ("score", 4), ("read", None), ("embed", None), ("open", None)],
)
def test_worker_lost_at_a_call_changes_no_byte_and_no_error(root, calm, way, method, block):
    def fits(_: int, called: str, arguments: tuple[Any, ...]) -> bool:
        return called == method and (block is None or arguments[0] == block)

    options = _options(root, f"{way}-{method}-{block}", propagation=way)
    report = _run(options, _once(fits, _kill_it))
    digests, errors = calm[way]
    assert shard_digests(Path(options.output)) == digests
    assert _errors(report) == pytest.approx(errors, rel=1e-12)
    assert len(report["history"]["renewals"]) == 1


@pytest.mark.parametrize("way", _WAYS)
def test_writer_lost_while_others_have_evaluated_the_block(root, calm, way):
    evaluated = threading.Event()

    def fault(cluster: ThreadCluster, worker: int, method: str, arguments: tuple[Any, ...]) -> None:
        if method == "write" and arguments[1].endswith("00001") and not cluster.dead:
            evaluated.wait(timeout=5)
            cluster.kill(worker)
        elif method == "advance" and arguments[0] == 2 or (method == "totals" and arguments[0] == 2):
            evaluated.set()

    options = _options(root, f"writer-{way}", propagation=way)
    _run(options, fault)
    assert shard_digests(Path(options.output)) == calm[way][0]


class _SlowToLetGo(ThreadCluster):
    """Takes long to be told that a block is not needed any more."""

    def __init__(self, num_workers: int, block: int) -> None:
        super().__init__(num_workers)
        self.letting_go, self._block = threading.Event(), block

    def submit(self, worker: int, method: str, *arguments: Any) -> Any:
        handle = super().submit(worker, method, *arguments)
        if method == "unload" and arguments[0] == self._block and not self.letting_go.is_set():
            self.letting_go.set()
            # Whoever wants to change what is live meanwhile has to wait: for that there is no event.
            time.sleep(0.5)
        return handle


def test_worker_lost_in_a_solve_while_the_next_block_is_let_go_of(root, calm):
    cluster = _SlowToLetGo(3, block=2)

    def die_late(_: ThreadCluster, worker: int) -> None:
        cluster.letting_go.wait(timeout=5)
        cluster.kill(worker)

    fault = _once(lambda _, method, arguments: method == "solve" and arguments[0] == 1, die_late)
    cluster.before = lambda *call: fault(cluster, *call)
    # Without evaluation the streams of the next block wait for nothing of this one.
    options = _options(root, "let-go", evaluation=None)
    report = convert_on(cluster, options)
    assert cluster.letting_go.is_set()
    assert shard_digests(Path(options.output)) == calm["original"][0]
    assert len(report["history"]["renewals"]) == 1


def test_worker_lost_while_activations_are_restored(root, calm):
    options = _options(root, "restored", checkpoint_every=2)

    def stop(progress: Progress) -> None:
        if progress.label == "block 4/4: capture":
            raise NumericsError("stop here")

    with pytest.raises(NumericsError, match="stop here"):
        _run(options, lambda *_: None, on_progress=stop)
    others = threading.Event()

    def fault(cluster: ThreadCluster, worker: int, method: str, _: tuple[Any, ...]) -> None:
        if method == "restore_activations" and not cluster.dead:
            if worker == 1:
                others.wait(timeout=5)
                time.sleep(0.2)
                cluster.kill(1)
            others.set()

    report = _run(options, fault)
    assert shard_digests(Path(options.output)) == calm["original"][0]
    assert report["history"]["from_checkpoint"] == 2


def test_all_workers_lost_and_one_more_while_they_are_begun_anew(root, calm):
    def fault(cluster: ThreadCluster, worker: int, method: str, arguments: tuple[Any, ...]) -> None:
        if method == "observe" and arguments[0] == 1 and worker in (0, 1):
            cluster.kill(0)
            cluster.kill(1)
        if method == "open" and worker == 3:
            cluster.kill(3)

    options = _options(root, "all-lost")
    _run(options, fault, workers=2)
    assert shard_digests(Path(options.output)) == calm["original"][0]


def test_stage_that_is_tried_again_after_another_failed_for_good_ends(root):
    loaded = threading.Event()

    def fault(_: ThreadCluster, worker: int, method: str, arguments: tuple[Any, ...]) -> None:
        if method == "solve" and arguments[0] == 0:
            loaded.wait(timeout=5)
            raise NumericsError("no good")
        if method == "load" and arguments[0] == 1 and not loaded.is_set():
            loaded.set()
            raise TransientStorageError("a moment, please")

    with pytest.raises(QuantError, match="no good"):
        _run(_options(root, "for-good"), fault)


def test_newcomer_takes_part_and_one_that_cannot_is_sent_away(root, calm):
    came: list[int] = []

    def fault(cluster: ThreadCluster, worker: int, method: str, arguments: tuple[Any, ...]) -> None:
        if method == "observe" and arguments[0] in (0, 1) and len(came) == arguments[0]:
            came.append(cluster.come())
        if method == "open" and came[:1] == [worker]:
            raise PlanMismatchError("it is of another kind")

    options = _options(root, "came")
    history = _run(options, fault, workers=2)["history"]
    assert shard_digests(Path(options.output)) == calm["original"][0]
    assert history["refused_workers"] == ["it is of another kind"]
    assert history["joined_workers"] == 1
    assert not history["renewals"]


def test_newcomer_is_not_refused_for_good_because_an_old_worker_died(root, calm):
    came: list[int] = []

    def fault(cluster: ThreadCluster, worker: int, method: str, arguments: tuple[Any, ...]) -> None:
        if method == "observe" and arguments[0] == 0 and not came:
            came.append(cluster.come())
        if method == "embed" and came == [worker]:
            cluster.kill(0)
            raise WorkerLostError("worker 0 had what it was to embed with")

    options = _options(root, "came-again")
    history = _run(options, fault, workers=2)["history"]
    assert shard_digests(Path(options.output)) == calm["original"][0]
    assert len(history["refused_workers"]) == 1
    assert history["joined_workers"] == 1
    assert len(history["renewals"]) == 1
