"""Weights brought to a device ahead are those that are loaded; on a CPU the same calls copy nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.errors import TransientStorageError
from quantlib.inprocess import quantize
from quantlib.job import failures
from quantlib.job.crew import Crew
from quantlib.job.failures import Policy
from quantlib.weights_ahead import WeightsAhead
from tests.support.thread_cluster import ThreadCluster, convert_on
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source

_NUM_BLOCKS = 4


class _AheadCrew(Crew):
    """Brings weights ahead as with GPUs that have room for them."""

    def prepare(self, requests: Any) -> dict[str, Any]:
        prepared = super().prepare(requests)
        self._memory = dataclasses.replace(prepared["memory"], brings_ahead=True)
        return {**prepared, "memory": self._memory}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    tiny_source(folder / "deep", num_hidden_layers=_NUM_BLOCKS)
    return folder


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    torch.set_num_threads(1)
    retry = Policy(action="retry", attempts=4, first_delay_s=0.1)
    others = tuple(row for row in failures.POLICIES if row[0] is not TransientStorageError)
    monkeypatch.setattr(failures, "POLICIES", ((TransientStorageError, retry), *others))


def test_tensors_that_were_begun_are_taken_and_those_of_passed_blocks_let_go_of():
    weights = WeightsAhead(torch.device("cpu"))
    begun = {number: {"w": torch.full((2,), float(number))} for number in range(4)}
    other = {"w": torch.zeros(2), "late": torch.ones(1)}
    for number in (1, 2):
        weights.begin(number, begun[number])
    assert weights.take(0, other)["w"] is other["w"]
    weights.begin(3, begun[3])
    assert weights.take(1, other)["w"] is other["w"]
    found = weights.take(2, other)
    assert found["w"] is begun[2]["w"] and found["late"] is other["late"]
    assert weights.take(3, other)["w"] is begun[3]["w"]
    assert weights.take(3, other)["w"] is other["w"]


@pytest.mark.slow
@pytest.mark.parametrize("propagation", ["original", "quantized"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_block_but_the_first_is_brought_once_to_every_worker_and_loaded_then(
    root, propagation, num_workers
):
    options = tiny_options(root, source=str(root / "deep"), propagation=propagation)
    calm = dataclasses.replace(options, output=str(root / f"calm-{propagation}-{num_workers}"))
    quantize(calm)
    ahead = dataclasses.replace(options, output=str(root / f"ahead-{propagation}-{num_workers}"))
    calls: list[tuple[int, str, tuple[Any, ...]]] = []
    cluster = ThreadCluster(num_workers)
    cluster.before = lambda *call: calls.append(call)
    convert_on(cluster, ahead, crew=_AheadCrew)
    brought = [(worker, arguments[0]) for worker, method, arguments in calls if method == "bring_ahead"]
    assert sorted(brought) == [(w, b) for w in range(num_workers) for b in range(1, _NUM_BLOCKS)]
    loads = [(arguments[0], len(arguments)) for _, method, arguments in calls if method == "load"]
    assert loads
    assert all(count == (2 if block == 0 else 3) for block, count in loads)
    assert shard_digests(Path(ahead.output)) == shard_digests(Path(calm.output))


@pytest.mark.slow
@pytest.mark.parametrize("is_lost", [False, True])
def test_failure_to_bring_weights_ahead_changes_no_byte(root, is_lost):
    options = tiny_options(root, source=str(root / "deep"), propagation="original")
    calm = dataclasses.replace(options, output=str(root / f"calm-failing-{is_lost}"))
    quantize(calm)
    failing = dataclasses.replace(options, output=str(root / f"failing-{is_lost}"))
    cluster, failed = ThreadCluster(2), []

    def fail_once(worker: int, method: str, arguments: tuple[Any, ...]) -> None:
        if method == "bring_ahead" and arguments[0] == 2 and not failed:
            failed.append(worker)
            if is_lost:
                cluster.kill(worker)
            else:
                raise TransientStorageError("a part of the block did not come")

    cluster.before = fail_once
    convert_on(cluster, failing, crew=_AheadCrew)
    assert failed
    assert shard_digests(Path(failing.output)) == shard_digests(Path(calm.output))
