"""Records of what was begun: read back, changed by one at a time, and nothing else taken for one."""

import dataclasses
import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from quantlib.job.conversion_records import (
    Attempt,
    ConversionRecord,
    StoredRecord,
    read_again,
    read_records,
    record_uri,
    store_record,
)
from quantlib.storage import Store, open_store

SOURCE = "s3://models/incoming/m"


def attempt(**values) -> Attempt:
    known = {
        "key": uuid.uuid4().hex,
        "fingerprint": "f",
        "wanted": "w",
        "requests": ({"source": SOURCE, "rules": [{"match": "*"}]},),
        "outputs": ("s3://models/out/m/w4",),
        "claimed": "2026-01-01T00:00:00+00:00",
    }
    return Attempt(**{**known, **values})


@pytest.fixture(params=["local", *(pytest.param(e, marks=pytest.mark.slow) for e in ("obstore", "s3fs"))])
def place(request, tmp_path) -> tuple[Store, str]:
    if request.param == "local":
        return open_store("file:///"), f"file://{tmp_path}/state"
    state = request.getfixturevalue("s3_environment").uri(f"records-{uuid.uuid4().hex}")
    return open_store(state, request.param), state


def new(state: str) -> StoredRecord:
    return StoredRecord(uri=record_uri(state, SOURCE), etag=None, record=ConversionRecord(source=SOURCE))


def test_record_is_read_as_it_was_stored(place):
    store, state = place
    assert read_records(store, state) == {}
    record = ConversionRecord(source=SOURCE, attempts=(attempt(outcome="failed", reason="x"), attempt()))
    stored = store_record(store, new(state), record)
    assert stored is not None
    assert read_records(store, state) == {stored.uri: stored}
    changed = record.replaced(dataclasses.replace(record.attempts[1], run_id="r", outcome="made"))
    again = store_record(store, stored, changed)
    assert again is not None
    assert read_again(store, stored, SOURCE) == again
    assert again.record == changed
    assert not changed.open_attempts
    store.delete(stored.uri)
    assert read_again(store, stored, SOURCE) == new(state)


def test_whoever_read_a_former_version_stores_nothing(place):
    store, state = place
    first = store_record(store, new(state), ConversionRecord(source=SOURCE, attempts=(attempt(),)))
    assert first is not None
    late = ConversionRecord(source=SOURCE, attempts=(attempt(),))
    assert store_record(store, new(state), late) is None
    assert store_record(store, first, ConversionRecord(source=SOURCE)) is not None
    assert store_record(store, first, late) is None
    found = read_again(store, first, SOURCE)
    assert found.record == ConversionRecord(source=SOURCE)


@pytest.mark.parametrize("is_new", [True, False])
def test_of_many_that_claim_at_once_one_wins(place, is_new):
    store, state = place
    before = new(state)
    if not is_new:
        stored = store_record(store, before, ConversionRecord(source=SOURCE))
        assert stored is not None
        before = stored
    barrier = threading.Barrier(4)

    def claim(_: int) -> StoredRecord | None:
        mine = ConversionRecord(source=SOURCE, attempts=(attempt(),))
        barrier.wait()
        return store_record(store, before, mine)

    with ThreadPoolExecutor(4) as pool:
        won = [found for found in pool.map(claim, range(4)) if found is not None]
    assert won == [read_again(store, before, SOURCE)]


def test_failures_are_those_of_the_same_files_and_recipes():
    record = ConversionRecord(
        source=SOURCE,
        attempts=(
            attempt(outcome="failed", fingerprint="other"),
            attempt(outcome="failed", wanted="other"),
            attempt(outcome="gone"),
            attempt(outcome="made"),
            attempt(),
            attempt(outcome="failed", reason="this"),
        ),
    )
    assert [found.reason for found in record.failures("f", "w")] == ["this"]
    assert record.open_attempts == [record.attempts[4]]


def test_checkpoints_of_one_name_have_records_of_their_own():
    uris = {record_uri("s3://b/state", f"s3://{bucket}/m") for bucket in ("a", "b", "c")}
    assert len(uris) == 3
    assert all(uri.startswith("s3://b/state/m-") for uri in uris)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: b"",
        lambda values: b"[]",
        lambda values: b"\xff\xfe",
        lambda values: b"[" * 100_000,
        lambda values: {**values, "schema": 99},
        lambda values: {**values, "more": 1},
        lambda values: {**values, "source": 1},
        lambda values: {**values, "attempts": [{}]},
        lambda values: {**values, "attempts": "x"},
        lambda values: {**values, "attempts": [{**values["attempts"][0], "outcome": "lost"}]},
        lambda values: {**values, "attempts": [{**values["attempts"][0], "run_id": 3}]},
        lambda values: {**values, "attempts": [{**values["attempts"][0], "requests": [1]}]},
        lambda values: {**values, "attempts": [{**values["attempts"][0], "outputs": [None]}]},
    ],
)
def test_what_is_no_record_is_not_taken_for_one(tmp_path, change):
    store, state = open_store("file:///"), f"file://{tmp_path}/state"
    stored = store_record(store, new(state), ConversionRecord(source=SOURCE, attempts=(attempt(),)))
    assert stored is not None
    changed = change(json.loads(store.read(stored.uri)))
    store.write(stored.uri, changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    assert read_records(store, state)[stored.uri].record is None
