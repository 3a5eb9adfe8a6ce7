"""Sums that are added up on nodes and between them, in every way and with every loss: to the same bytes."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib import rail_group
from quantlib.errors import WorkerLostError
from quantlib.inprocess import quantize
from quantlib.job import failures
from quantlib.job.options import JobOptions
from tests.support.thread_cluster import ThreadCluster, convert_on
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source, tiny_text

pytestmark = pytest.mark.slow

_NUM_BLOCKS = 3
# Of the addresses that belong to nobody: https://www.rfc-editor.org/rfc/rfc5737
_NOBODY = "192.0.2.1"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reduction")
    # The last sum of a block is of three panels, each a band.
    tiny_source(folder / "deep", num_hidden_layers=_NUM_BLOCKS, intermediate_size=288)
    tiny_options(folder)
    tiny_text(folder / "calibration.jsonl", seed=0, documents=1200)
    return folder


@pytest.fixture(scope="module")
def calm(root) -> dict[bool, dict[str, str]]:
    """Whether targets are corrected -> shards of a run in one process."""
    found = {}
    for corrects in (False, True):
        options = _options(root, f"calm-{corrects}", corrects)
        quantize(options)
        found[corrects] = shard_digests(Path(options.output))
    return found


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    torch.set_num_threads(1)
    renew = dataclasses.replace(failures.policy_for(WorkerLostError("x")), first_delay_s=0.0)
    monkeypatch.setattr(failures, "POLICIES", ((WorkerLostError, renew), *failures.POLICIES))
    # A thread that is killed closes no connection: only time tells the others.
    monkeypatch.setattr(rail_group, "FORM_TIMEOUT_S", 2.0)
    monkeypatch.setattr(rail_group, "STEP_TIMEOUT_S", 2.0)


def _options(root: Path, name: str, corrects: bool = False) -> JobOptions:
    """Six calibration cells."""
    way = {"propagation": "quantized", "correct_targets": True} if corrects else {"propagation": "original"}
    given = {"sequences": 600, "evaluation": None, "checkpoint_every": 0, "source": str(root / "deep")}
    return tiny_options(root, output=str(root / name), **{**given, **way})


@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize(
    ("workers", "nodes", "host", "path"),
    [
        (2, 2, "127.0.0.1", "direct"),
        (4, 1, "127.0.0.1", "shared memory"),
        (3, 3, "127.0.0.1", "gloo"),
        (5, 2, "127.0.0.1", "gloo"),
        (5, 2, _NOBODY, "object store"),
    ],
)
def test_every_way_to_add_sums_gives_the_bytes_of_one_process(
    root, calm, corrects, workers, nodes, host, path
):
    options = _options(root, f"{path}-{workers}-{corrects}", corrects)
    history = convert_on(ThreadCluster(workers, nodes, host), options)["history"]
    assert shard_digests(Path(options.output)) == calm[corrects]
    # A worker that comes late finds its cells done by others, and then fewer have observed a block.
    assert history["exchanges"][path] >= 1
    assert sum(history["exchanges"].values()) == _NUM_BLOCKS
    assert bool(history["exchange_fallbacks"]) == (path == "object store")


def _lose(cluster: ThreadCluster, method: str, call: int, *, halts: bool) -> list[int]:
    """Have whoever gets the numbered call of a method be lost, with or without getting anything done.

    Returns:
        Who was called so far.
    """
    lock, calls = threading.Lock(), []

    def kill(worker: int, called: str, _: tuple[Any, ...]) -> None:
        with lock:
            calls.extend([worker] * (called == method))
            is_it = called == method and len(calls) == call
        if is_it:
            cluster.kill(worker)
            if halts:
                raise WorkerLostError("it is gone")

    cluster.before = kill
    return calls


@pytest.mark.parametrize("halts", [False, True])
@pytest.mark.parametrize(
    ("method", "call"),
    [("totals", 3), ("add_bands", 1), ("add_bands", 6), ("host_group", 1), ("join_group", 2)]
    + [("reduce_bands", 1), ("reduce_bands", 8), ("solve", 2), ("solve", 7)],
)
def test_worker_lost_while_sums_are_added_changes_no_byte(root, calm, method, call, halts):
    options = _options(root, f"lost-{method}-{call}-{halts}")
    cluster = ThreadCluster(5, 2)
    calls = _lose(cluster, method, call, halts=halts)
    history = convert_on(cluster, options)["history"]
    assert shard_digests(Path(options.output)) == calm[False]
    # Fewer calls than usual where few have observed a block.
    assert len(history["renewals"]) == (len(calls) >= call)
    assert history["exchanges"]["gloo"] >= 1


@pytest.mark.parametrize("call", [1, 4, 5, 8])
def test_worker_lost_on_the_way_through_the_object_store_changes_no_byte(root, calm, call):
    """Of each eight calls two rails on two nodes add what is there, then what is on both."""
    options = _options(root, f"store-{call}")
    cluster = ThreadCluster(5, 2, _NOBODY)
    calls = _lose(cluster, "add_bands", call, halts=True)
    history = convert_on(cluster, options)["history"]
    assert shard_digests(Path(options.output)) == calm[False]
    assert len(history["renewals"]) == (len(calls) >= call)


def test_group_that_fails_without_a_loss_is_given_up_and_nothing_else(root, calm, monkeypatch):
    """A member that stands still for too long: the others give up, and so does it."""
    options, stood = _options(root, "stands-still"), []

    def stand(_: int, method: str, __: tuple[Any, ...]) -> None:
        if method == "reduce_bands" and not stood:
            stood.append(1)
            threading.Event().wait(timeout=3.0)

    cluster = ThreadCluster(3, 3)
    cluster.before = stand
    history = convert_on(cluster, options)["history"]
    assert shard_digests(Path(options.output)) == calm[False]
    assert history["exchanges"]["object store"] >= 1
    assert history["exchange_fallbacks"]
    assert not history["renewals"]
