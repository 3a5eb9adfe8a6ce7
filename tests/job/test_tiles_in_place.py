"""Jobs whose input groups are cut into row tiles: any number of workers, losses between tiles, same bytes."""

import threading
from pathlib import Path
from typing import Any

import pytest

from quantlib.inprocess import quantize
from quantlib.job.options import JobOptions
from tests.support.thread_cluster import ThreadCluster, convert_on
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_text, wide_source

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

_WAYS = ("original", "quantized")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    wide_source(folder / "wide")
    tiny_options(folder)
    for seed, name in enumerate(("calibration", "evaluation")):
        tiny_text(folder / f"{name}.jsonl", seed=seed, documents=800)
    return folder


@pytest.fixture(scope="module")
def calm(root) -> dict[str, tuple[dict[str, str], list[dict[str, Any]]]]:
    """Way of propagation -> shards and report rows of an undisturbed run in one process."""
    found = {}
    for way in _WAYS:
        options = _options(root, f"calm-{way}", propagation=way)
        rows = _rows(quantize(options))
        found[way] = (shard_digests(Path(options.output)), rows)
    return found


def _options(root: Path, name: str, **changes: Any) -> JobOptions:
    """Two cells of calibration text; what reads the many outputs of the wide linears stays as it is."""
    given = {
        "sequences": 150,
        "evaluation_sequences": 20,
        "checkpoint_every": 0,
        "source": str(root / "wide"),
        "rules": [{"match": "*.down_proj", "keep": True}],
    }
    return tiny_options(root, output=str(root / name), **{**given, **changes})


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for block in report["blocks"] for row in block["linears"]]


class _Losses:
    """Kills whoever makes the n-th call of a method for block 1; notes all calls."""

    def __init__(self, method: str, number: int, *, spares: int | None = None) -> None:
        self._method, self._number, self._spares = method, number, spares
        self._lock = threading.Lock()
        self.calls: list[tuple[int, str]] = []

    def __call__(self, cluster: ThreadCluster, worker: int, method: str, arguments: tuple) -> None:
        with self._lock:
            self.calls.append((worker, method))
            if method == self._method and arguments[0] == 1 and worker != self._spares:
                self._number -= 1
                if self._number == -1:
                    cluster.kill(worker)


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_tiles_over_any_number_of_workers_are_written_as_by_one_process(root, calm, way, workers):
    options = _options(root, f"{way}-{workers}", propagation=way)
    cluster, losses = ThreadCluster(workers), _Losses("none", 0)
    cluster.before = lambda *call: losses(cluster, *call)
    report = convert_on(cluster, options)
    assert shard_digests(Path(options.output)) == calm[way][0]
    assert _rows(report) == calm[way][1]
    methods = [method for _, method in losses.calls]
    # Gate and up: four tiles in each of two blocks.
    assert methods.count("solve_tile") == 8
    assert methods.count("pack") == 2
    assert "forget_prepared" in methods


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(("method", "number"), [("solve_tile", 0), ("solve_tile", 2), ("pack", 0)])
def test_worker_lost_between_tiles_changes_no_byte(root, calm, way, workers, method, number):
    options = _options(root, f"{way}-{workers}-{method}-{number}", propagation=way)
    cluster, losses = ThreadCluster(workers), _Losses(method, number)
    cluster.before = lambda *call: losses(cluster, *call)
    report = convert_on(cluster, options)
    assert shard_digests(Path(options.output)) == calm[way][0]
    assert _rows(report) == calm[way][1]
    assert len(report["history"]["renewals"]) == 1


def test_tiles_that_others_have_are_not_solved_again(root, calm):
    """Worker 1 is lost at the packing, which it cannot have begun before all four tiles were there."""
    options = _options(root, "kept")
    cluster, lock = ThreadCluster(2), threading.Lock()
    solved: list[int] = []

    def before(worker: int, method: str, arguments: tuple) -> None:
        with lock:
            if method == "solve_tile" and arguments[0] == 1:
                solved.append(worker)
            if method == "pack" and arguments[0] == 1 and not cluster.dead:
                cluster.kill(worker)

    cluster.before = before
    convert_on(cluster, options)
    (gone,) = cluster.dead
    assert shard_digests(Path(options.output)) == calm["original"][0]
    # What the lost one had is solved again, by the other one, and nothing else.
    assert len(solved) == 4 + solved[:4].count(gone)
    assert set(solved[4:]) <= {1 - gone}
