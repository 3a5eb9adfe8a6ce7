"""Passes over a prefix: what is begun, what is left alone, and what is said of it.

Runs are kept in memory, and a test says how they end; outputs are written as a conversion records them.
"""

import dataclasses
import json
import os
import shutil
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from quantlib.checkpoint.index import list_folder
from quantlib.errors import QuantError, RecipeError, StorageError, TransientStorageError
from quantlib.inprocess import quantize_all
from quantlib.job import incoming_pass
from quantlib.job.conversion_runs import Runs
from quantlib.job.incoming import STATES, Incoming, Row, summary_of
from quantlib.job.incoming_pass import convert_incoming
from quantlib.job.new_checkpoints import CheckpointFolder, source_files
from quantlib.job.options import JobOptions, options_from
from quantlib.job.planner import build_plan
from quantlib.storage import open_store
from quantlib.storage.local_engine import LocalStore
from tests.support.checkpoints import write_checkpoint
from tests.support.keyed_runs import COMPLETED, CRASHED, KeyedRuns
from tests.support.tiny_jobs import tiny_source

FAR = 1e10  # Seconds since the epoch at which everything has settled.
RTN = {"method": "rtn", "group_size": 8}


@pytest.fixture
def incoming(tmp_path) -> Incoming:
    return Incoming(
        prefix=str(tmp_path / "in"),
        outputs=str(tmp_path / "out"),
        recipes={"w4": RTN, "w8": {**RTN, "scheme": "W8A16"}},
        state=None,
        depth=1,
        settle_s=600.0,
        runs_at_a_time=8,
        attempts=3,
        retry_parked=False,
    )


def checkpoint(incoming: Incoming, name: str = "m") -> Path:
    folder = Path(incoming.prefix) / name
    write_checkpoint(folder)
    return folder


def states(incoming: Incoming, runs: Runs, now_s: float = FAR, **changed: Any) -> dict[str, str]:
    return {row.checkpoint: row.state for row in rows(incoming, runs, now_s, **changed)}


def rows(incoming: Incoming, runs: Runs, now_s: float = FAR, **changed: Any) -> list[Row]:
    found = convert_incoming(dataclasses.replace(incoming, **changed), runs, now_s=now_s)
    assert {row.state for row in found} <= STATES.keys()
    return found


def publish(request: JobOptions) -> None:
    """As far as a pass asks a completed run for: the last object that it writes."""
    output = Path(request.output.removeprefix("file://"))
    output.mkdir(parents=True)
    (output / "config.json").write_text("{}")


def test_new_checkpoint_begins_one_run_for_all_its_recipes_once(incoming):
    checkpoint(incoming)
    runs = KeyedRuns()
    (row,) = rows(incoming, runs)
    assert (row.state, row.run_id) == ("started", "run-1")
    outputs = [f"file://{incoming.outputs}/m/{name}" for name in ("w4", "w8")]
    assert list(row.outputs) == outputs
    (requests,) = runs.requests.values()
    assert [request.output for request in requests] == outputs
    assert {request.source for request in requests} == {f"file://{incoming.prefix}/m"}
    assert [request.scheme for request in requests] == ["W4A16", "W8A16"]
    assert states(incoming, runs) == {"m": "running"}
    assert len(runs.requests) == 1


def test_checkpoint_that_came_a_short_while_ago_settles_first(incoming):
    folder = checkpoint(incoming)
    newest = max(path.stat().st_ctime for path in folder.iterdir())
    runs = KeyedRuns()
    assert states(incoming, runs, newest + 599) == {"m": "settling"}
    assert not runs.requests
    assert states(incoming, runs, newest + 600) == {"m": "started"}


def test_checkpoint_that_is_not_whole_is_left_alone_until_it_is(incoming):
    folder = checkpoint(incoming)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.rename(folder.parent / "away")
    runs = KeyedRuns()
    (row,) = rows(incoming, runs)
    assert row.state == "incomplete"
    assert shard.name in row.reason
    (folder.parent / "away").rename(shard)
    assert states(incoming, runs) == {"m": "started"}


def test_checkpoint_with_a_broken_header_is_not_begun(incoming):
    folder = checkpoint(incoming)
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"\xff" * 40)
    runs = KeyedRuns()
    assert states(incoming, runs) == {"m": "incomplete"}
    assert not runs.requests


class RefusingStore(LocalStore):
    """A store that may not read some objects."""

    def __init__(self, refused: str, error: type[StorageError]) -> None:
        super().__init__()
        self._refused = refused
        self._error = error

    def read(self, uri):
        return super().read(self._checked(uri))

    def read_ranges(self, info, ranges):
        self._checked(info.uri)
        return super().read_ranges(info, ranges)

    def _checked(self, uri: str) -> str:
        if uri.endswith(self._refused):
            raise self._error(f"reading {uri} is refused", uri=uri)
        return uri


@pytest.mark.parametrize("refused", ["/a/config.json", "/a/model-00002-of-00003.safetensors"])
def test_checkpoint_that_may_not_be_read_keeps_no_other_from_being_converted(incoming, monkeypatch, refused):
    for name in "ab":
        checkpoint(incoming, name)
    monkeypatch.setattr(incoming_pass, "open_store", lambda *_: RefusingStore(refused, StorageError))
    first, second = rows(incoming, KeyedRuns())
    assert (first.state, second.state) == ("incomplete", "started")
    assert f"{refused} is refused" in first.reason


@pytest.mark.parametrize("refused", ["/a/config.json", "/a/model-00002-of-00003.safetensors"])
def test_store_that_does_not_answer_ends_the_pass(incoming, monkeypatch, refused):
    checkpoint(incoming, "a")
    monkeypatch.setattr(incoming_pass, "open_store", lambda *_: RefusingStore(refused, TransientStorageError))
    with pytest.raises(TransientStorageError):
        rows(incoming, KeyedRuns())


def test_no_more_runs_at_a_time_than_allowed(incoming):
    for name in "abc":
        checkpoint(incoming, name)
    runs = KeyedRuns()
    assert states(incoming, runs, runs_at_a_time=2) == {"a": "started", "b": "started", "c": "waiting"}
    assert states(incoming, runs, runs_at_a_time=2) == {"a": "running", "b": "running", "c": "waiting"}
    runs.states["run-1"] = CRASHED
    # The one that failed comes first again, as nothing says that it should not.
    assert states(incoming, runs, runs_at_a_time=2) == {"a": "started", "b": "running", "c": "waiting"}
    assert states(incoming, runs, runs_at_a_time=3) == {"a": "running", "b": "running", "c": "started"}


def test_runs_of_a_checkpoint_that_is_gone_count_too(incoming):
    folder = checkpoint(incoming, "a")
    runs = KeyedRuns()
    rows(incoming, runs, runs_at_a_time=1)
    shutil.rmtree(folder)
    checkpoint(incoming, "b")
    assert states(incoming, runs, runs_at_a_time=1) == {"b": "waiting"}
    runs.states["run-1"] = CRASHED
    assert states(incoming, runs, runs_at_a_time=1) == {"b": "started"}


def test_checkpoint_that_fails_is_begun_again_and_then_parked_with_the_reason(incoming):
    checkpoint(incoming)
    runs = KeyedRuns()
    for number in (1, 2, 3):
        assert states(incoming, runs) == {"m": "started"}
        assert len(runs.requests) == number
        runs.states[f"run-{number}"] = CRASHED
    (row,) = rows(incoming, runs)
    assert (row.state, row.run_id) == ("parked", "run-3")
    assert "3 attempt(s) failed" in row.reason
    assert "Crashed: exit 9" in row.reason
    assert states(incoming, runs) == {"m": "parked"}
    assert len(runs.requests) == 3


def parked(incoming: Incoming) -> KeyedRuns:
    runs = KeyedRuns()
    for number in (1, 2, 3):
        rows(incoming, runs)
        runs.states[f"run-{number}"] = CRASHED
    assert states(incoming, runs) == {"m": "parked"}
    return runs


def test_parked_checkpoint_is_begun_again_when_told(incoming):
    checkpoint(incoming)
    runs = parked(incoming)
    assert states(incoming, runs, retry_parked=True) == {"m": "started"}
    runs.states["run-4"] = CRASHED
    assert states(incoming, runs) == {"m": "started"}, "what failed before counts no more"


def test_parked_checkpoint_is_begun_again_when_its_record_is_removed(incoming):
    checkpoint(incoming)
    runs = parked(incoming)
    (record,) = (Path(incoming.outputs) / ".quantmill" / "incoming").iterdir()
    record.unlink()
    assert states(incoming, runs) == {"m": "started"}
    assert len(runs.requests) == 4


def test_parked_checkpoint_is_begun_again_when_a_file_or_a_recipe_is_another(incoming):
    folder = checkpoint(incoming)
    runs = parked(incoming)
    other = dataclasses.replace(incoming, recipes={"w4": {**RTN, "scheme": "W4A16_ASYM"}})
    assert states(other, runs) == {"m": "started"}
    runs.states["run-4"] = CRASHED
    assert states(incoming, runs) == {"m": "parked"}
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    for number in (5, 6, 7):
        assert states(incoming, runs) == {"m": "started"}
        runs.states[f"run-{number}"] = CRASHED
    assert states(incoming, runs) == {"m": "parked"}
    (record,) = (Path(incoming.outputs) / ".quantmill" / "incoming").iterdir()
    kept = json.loads(record.read_text())["attempts"]
    assert [attempt["run_id"] for attempt in kept] == ["run-5", "run-6", "run-7"]


def test_run_that_the_server_forgot_does_not_count(incoming):
    checkpoint(incoming)
    runs = KeyedRuns()
    for number in range(1, 6):
        assert states(incoming, runs) == {"m": "started"}
        runs.states[f"run-{number}"] = None
    assert states(incoming, runs) == {"m": "started"}


def test_files_that_change_under_a_run_wait_for_its_end(incoming):
    folder = checkpoint(incoming)
    runs = KeyedRuns()
    rows(incoming, runs)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (row,) = rows(incoming, runs)
    assert row.state == "running"
    assert "former files" in row.reason
    runs.states["run-1"] = CRASHED
    assert states(incoming, runs) == {"m": "started"}


def test_completed_run_without_its_outputs_is_a_failure(incoming):
    checkpoint(incoming)
    runs = KeyedRuns()
    rows(incoming, runs, attempts=1)
    runs.states["run-1"] = COMPLETED
    (row,) = rows(incoming, runs, attempts=1)
    assert row.state == "parked"
    assert f"no checkpoint lies at file://{incoming.outputs}/m/w4" in row.reason


def test_address_that_holds_something_else_is_told_and_the_other_outputs_are_made(incoming):
    checkpoint(incoming)
    write_checkpoint(Path(incoming.outputs) / "m" / "w4")
    runs = KeyedRuns()
    (row,) = rows(incoming, runs)
    assert row.state == "started"
    assert f"{incoming.outputs}/m/w4 holds another checkpoint" in row.reason
    ((request,),) = runs.requests.values()
    assert request.output.endswith("/m/w8")
    runs.states["run-1"] = COMPLETED
    publish(request)
    (row,) = rows(incoming, runs)
    assert row.state == "occupied"
    assert len(runs.requests) == 1


class DyingRuns(KeyedRuns):
    """Runs whose beginner dies before or after the server heard of them."""

    def __init__(self, *, is_heard: bool) -> None:
        super().__init__()
        self.dies = True
        self._is_heard = is_heard

    def begin(self, requests, key):
        run_id = super().begin(requests, key) if self._is_heard or not self.dies else ""
        if self.dies:
            raise KeyboardInterrupt
        return run_id


@pytest.mark.parametrize("is_heard", [True, False])
def test_pass_that_dies_while_it_begins_a_run_leaves_it_to_the_next(incoming, is_heard):
    folder = checkpoint(incoming)
    runs = DyingRuns(is_heard=is_heard)
    with pytest.raises(KeyboardInterrupt):
        rows(incoming, runs)
    runs.dies = False
    # Even if there is nothing to be found any more: what was claimed counts as a run.
    shutil.rmtree(folder)
    assert rows(incoming, runs) == []
    ((first, second),) = runs.requests.values()
    assert (first.scheme, second.scheme) == ("W4A16", "W8A16")


class RefusedRuns(KeyedRuns):
    def begin(self, requests, key):
        raise RecipeError("the server refuses the run: scheme")


def test_run_that_is_refused_is_a_failure(incoming):
    checkpoint(incoming)
    for _ in range(2):
        (row,) = rows(incoming, RefusedRuns(), attempts=2)
        assert (row.state, row.reason) == ("failed", "the server refuses the run: scheme")
    (row,) = rows(incoming, RefusedRuns(), attempts=2)
    assert row.state == "parked"
    assert "the server refuses the run: scheme" in row.reason


def test_passes_that_overlap_begin_one_run_for_each_checkpoint(incoming):
    for name in "abcd":
        checkpoint(incoming, name)
    runs = KeyedRuns()
    barrier = threading.Barrier(4)

    def one_pass(_: int) -> list[Row]:
        barrier.wait()
        return rows(incoming, runs)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one_pass, range(4)))
    begun = [requests[0].source.rpartition("/")[2] for requests in runs.requests.values()]
    assert sorted(begun) == ["a", "b", "c", "d"]
    for place, name in enumerate("abcd"):
        of_one = [told[place].state for told in found]
        assert {*of_one} <= {"started", "running"}, name
        assert of_one.count("started") == 1, name


def test_passes_that_overlap_keep_to_the_limit(incoming):
    for name in "abcd":
        checkpoint(incoming, name)
    runs = KeyedRuns()
    barrier = threading.Barrier(3)

    def one_pass(_: int) -> None:
        barrier.wait()
        rows(incoming, runs, runs_at_a_time=2)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one_pass, range(3)))
    begun = [requests[0].source.rpartition("/")[2] for requests in runs.requests.values()]
    assert sorted(begun) == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
def test_passes_over_a_bucket_that_overlap_begin_one_run(incoming, s3_environment, engine):
    root = f"passes-{uuid.uuid4().hex}"
    folder = checkpoint(incoming)
    shard = folder / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    prefix = s3_environment.put_folder(folder.parent, f"{root}/in")
    recipes = {name: {**values, "storage_engine": engine} for name, values in incoming.recipes.items()}
    changed = {"prefix": prefix, "outputs": s3_environment.uri(f"{root}/out"), "recipes": recipes}
    runs = KeyedRuns()
    (row,) = rows(incoming, runs, **changed)
    assert row.state == "incomplete"
    assert shard.name in row.reason
    s3_environment.put(f"{root}/in/m/{shard.name}", content)
    assert states(incoming, runs, time.time(), **changed) == {"m": "settling"}
    barrier = threading.Barrier(3)

    def one_pass(_: int) -> str:
        barrier.wait()
        return states(incoming, runs, **changed)["m"]

    with ThreadPoolExecutor(3) as pool:
        told = sorted(pool.map(one_pass, range(3)))
    assert set(told) <= {"running", "started"}
    assert told.count("started") == 1
    assert len(runs.requests) == 1
    runs.states["run-1"] = CRASHED
    assert states(incoming, runs, attempts=1, **changed) == {"m": "parked"}


@pytest.mark.parametrize(
    ("recipes", "told"),
    [
        ({}, "needs a recipe"),
        ({"w4": {}}, "gptq needs calibration text"),
        ({"w4": RTN, "w8": {**RTN, "seed": 1}}, "wants seed 1"),
        ({"w4": {**RTN, "bogus": 1}}, "bogus"),
    ],
)
def test_wrong_recipes_are_refused_before_anything(incoming, recipes, told):
    checkpoint(incoming)
    runs = KeyedRuns()
    with pytest.raises(RecipeError, match=told) as raised:
        rows(incoming, runs, recipes=recipes)
    assert raised.value.before_work
    assert not runs.requests
    assert not Path(incoming.outputs).exists()


def test_address_that_is_none_is_refused(incoming):
    with pytest.raises(QuantError, match="ftp") as raised:
        rows(incoming, KeyedRuns(), prefix="ftp://x/y")
    assert raised.value.before_work


def test_record_that_nobody_knows_parks_its_checkpoint_and_no_other(incoming):
    for name in "ab":
        checkpoint(incoming, name)
    runs = KeyedRuns()
    rows(incoming, runs, runs_at_a_time=1)
    (record,) = (Path(incoming.outputs) / ".quantmill" / "incoming").iterdir()
    record.write_text("{}")
    first, second = rows(incoming, runs)
    assert first.state == "parked"
    assert record.name in first.reason
    assert second.state == "started"


def test_outputs_below_the_prefix_are_not_converted(incoming):
    checkpoint(incoming)
    write_checkpoint(Path(incoming.prefix) / "quantized" / "old" / "w4")
    found = states(incoming, KeyedRuns(), outputs=f"{incoming.prefix}/quantized", depth=3)
    assert found == {"m": "started"}


def test_pass_that_finds_nothing_says_so(incoming):
    assert rows(incoming, KeyedRuns()) == []
    assert "no checkpoint was found" in summary_of([], incoming.prefix)


def test_summary_counts_states():
    found = [Row(checkpoint=name, state="made") for name in "ab"]
    assert summary_of([*found, Row(checkpoint="c", state="started")], "x") == (
        "3 checkpoint(s) below x: 2 made, 1 started"
    )


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Incoming:
    """A prefix with one checkpoint that was converted, one recipe in two layouts."""
    root = tmp_path_factory.mktemp("converted")
    tiny_source(root / "in" / "m", num_hidden_layers=1)
    recipes = {
        "w4": {"method": "rtn", "group_size": 32, "format": "gptq, compressed-tensors"},
        "w8": {"method": "rtn", "group_size": 32, "scheme": "W8A16"},
    }
    found = Incoming(
        prefix=str(root / "in"),
        outputs=str(root / "out"),
        recipes=recipes,
        state=str(root / "state"),
        depth=1,
        settle_s=0.0,
        runs_at_a_time=1,
        attempts=1,
        retry_parked=False,
    )
    runs = KeyedRuns()
    (row,) = rows(found, runs)
    assert [uri.removeprefix(f"file://{root}/out/m/") for uri in row.outputs] == [
        "w4/gptq",
        "w4/compressed-tensors",
        "w8",
    ]
    (requests,) = runs.requests.values()
    quantize_all([dataclasses.replace(r, runner="inprocess", threads_per_worker=1) for r in requests])
    runs.states["run-1"] = COMPLETED
    assert states(found, runs) == {"m": "made"}
    return found


def test_what_is_made_is_known_without_records_and_runs(converted):
    assert states(converted, KeyedRuns(), state=f"{converted.state}-new") == {"m": "made"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"group_size": 16}, "group_size 32"), ({"scheme": "W4A16"}, "scheme W8A16")],
)
def test_output_of_other_options_is_not_taken_for_the_one_wanted(converted, changed, told):
    recipes = {"w8": {**converted.recipes["w8"], **changed}}
    (row,) = rows(converted, KeyedRuns(), recipes=recipes)
    assert row.state == "occupied"
    assert told in row.reason


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_output_of_former_files_is_told(converted, name):
    path = Path(converted.prefix) / "m" / name
    content, times = path.read_text(), path.stat()
    try:
        path.write_text(json.dumps({**json.loads(content), "more": 5.0}))
        (row,) = rows(converted, KeyedRuns(), state=f"{converted.state}-former")
    finally:
        path.write_text(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert row.state == "occupied"
    assert f"with another {name}" in row.reason


def test_source_files_are_those_of_a_plan(converted, tmp_path):
    quantized = Path(converted.outputs) / "m" / "w4" / "compressed-tensors"
    for folder in (Path(converted.prefix) / "m", quantized):
        uri = f"file://{folder}"
        listing = list_folder(open_store(uri), uri)
        found = source_files(open_store(uri), CheckpointFolder(name="m", uri=uri, listing=listing))
        values = {"source": uri, "output": str(tmp_path / "out"), "method": "rtn", "group_size": 32}
        plan, _ = build_plan(options_from(values), 1)
        assert dict(found.objects) == plan.source_objects
        assert found.config_digest == plan.config_digest


def test_one_output_that_is_missing_is_made_alone(converted, tmp_path):
    shutil.copytree(converted.outputs, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "m" / "w4" / "gptq")
    runs = KeyedRuns()
    assert states(converted, runs, outputs=str(tmp_path / "out"), state=None) == {"m": "started"}
    ((request,),) = runs.requests.values()
    assert request.output.endswith("/m/w4/gptq")
    assert request.portable_scales
