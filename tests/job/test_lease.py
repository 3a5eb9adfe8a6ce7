"""One writer at a time: taken, renewed, watched, taken over, given back."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from quantlib.errors import LeaseError
from quantlib.job import lease
from quantlib.job.lease import Lease, read_lease, refuse_taken_over
from quantlib.storage import Store, join_uri, open_store

_HOLDER = """
import sys, time
from quantlib.job.lease import Lease
from quantlib.storage import open_store
work = sys.argv[1]
Lease.acquire(open_store(work), work)
print("held", flush=True)
time.sleep(600)
"""

_ANOTHER = lease.LeaseRecord(
    run_id="another", host="h", machine="m", pid=1, pid_started=1, started="2026-01-01T00:00:00+00:00"
)


@pytest.fixture
def work(tmp_path) -> str:
    return f"file://{tmp_path}/work"


@pytest.fixture
def store(work) -> Store:
    return open_store(work)


@pytest.fixture
def quick(monkeypatch):
    """A lease whose silence is noticed within a second."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.3)
    monkeypatch.setattr(lease, "SILENCE_S", 0.8)
    monkeypatch.setattr(lease, "_LOOK_AGAIN_S", 0.1)


def _forge(store: Store, work: str, **changes) -> None:
    """Make the lease that of another machine's run."""
    content, info = store.read_with_info(join_uri(work, "lease.json"))
    values = {**json.loads(content), **changes}
    assert store.replace_if_match(join_uri(work, "lease.json"), json.dumps(values).encode(), info.etag)


def test_lease_that_was_given_back_is_free(store, work):
    with Lease.acquire(store, work) as first:
        refuse_taken_over(store, work, first.run_id)
    with Lease.acquire(store, work) as second:
        assert second.run_id != first.run_id
        with pytest.raises(LeaseError, match=second.run_id):
            refuse_taken_over(store, work, first.run_id)


def test_attempt_after_a_failed_one_knows_its_own_lease(store, work):
    record, watched = lease.new_record(), []
    # What an attempt leaves whose answer was lost.
    store.put_if_absent(join_uri(work, "lease.json"), json.dumps(asdict(record)).encode())
    with Lease.acquire(store, work, watched.append, record) as held:
        assert held.run_id == record.run_id
    assert not watched


def test_lease_of_a_living_run_is_refused_with_who_and_since_when(store, work, quick):
    with Lease.acquire(store, work) as held:
        found = read_lease(store, work)
        assert found is not None
        with pytest.raises(LeaseError) as caught:
            Lease.acquire(store, work)
        assert caught.value.before_work
        for word in (held.run_id, f"process {os.getpid()}", found.host, found.started):
            assert word in str(caught.value)
        held.check()


def test_lease_of_a_process_killed_on_this_machine_is_taken_at_once(store, work):
    child = subprocess.Popen([sys.executable, "-c", _HOLDER, work], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    with Lease.acquire(store, work, lambda _: pytest.fail("nothing is to be waited for")):
        pass


def test_lease_of_a_silent_run_elsewhere_is_taken_over_after_watching_it(store, work, quick):
    watched = []
    ended = Lease.acquire(store, work)
    ended.release()
    _forge(store, work, released=False, machine="elsewhere", host="other-host")
    began = time.monotonic()
    with Lease.acquire(store, work, watched.append) as mine:
        assert time.monotonic() - began >= 0.8
        assert [record.host for record in watched] == ["other-host"]
        refuse_taken_over(store, work, mine.run_id)


def test_lease_of_a_run_elsewhere_that_shows_life_is_refused_while_watched(store, work, quick):
    ended = Lease.acquire(store, work)
    ended.release()
    _forge(store, work, released=False, machine="elsewhere", host="other-host")

    def show_life(_: object) -> None:
        _forge(store, work, beat=99)

    with pytest.raises(LeaseError, match="other-host"):
        Lease.acquire(store, work, show_life)


def test_lease_is_not_lost_to_an_outage_of_the_store(store, work, quick, monkeypatch):
    """While the store does not answer a living holder cannot renew: that time is no silence."""
    ended = Lease.acquire(store, work)
    ended.release()
    _forge(store, work, released=False, machine="elsewhere", host="other-host")
    real, looks = store.read_with_info, []

    def slow_once(uri: str):
        looks.append(uri)
        if len(looks) == 2:
            time.sleep(1.5)
        if len(looks) == 4:
            _forge(store, work, beat=99)
        return real(uri)

    class SlowStore:
        def __getattr__(self, name: str):
            return slow_once if name == "read_with_info" else getattr(store, name)

    with pytest.raises(LeaseError, match="other-host"):
        Lease.acquire(SlowStore(), work)  # pyright: ignore[reportArgumentType]


def test_lease_that_vanishes_while_it_is_watched_is_free(store, work, quick):
    ended = Lease.acquire(store, work)
    ended.release()
    _forge(store, work, released=False, machine="elsewhere")
    with Lease.acquire(store, work, lambda _: store.delete(join_uri(work, "lease.json"))) as mine:
        refuse_taken_over(store, work, mine.run_id)


def test_lease_holder_notices_that_it_was_taken_over(store, work, quick):
    with Lease.acquire(store, work) as held:
        _replace_by_another(store, work)
        deadline = time.monotonic() + 20
        with pytest.raises(LeaseError, match="no longer holds"):
            while time.monotonic() < deadline:
                held.check()
                time.sleep(0.02)
    assert read_lease(store, work) == _ANOTHER, "a lost lease is not given back"


def test_lease_holder_notices_that_the_object_is_no_lease_any_more(store, work, quick):
    with Lease.acquire(store, work) as held:
        store.write(join_uri(work, "lease.json"), b"{}")
        deadline = time.monotonic() + 20
        with pytest.raises(LeaseError, match="no lease"):
            while time.monotonic() < deadline:
                held.check()
                time.sleep(0.02)


def _replace_by_another(store: Store, work: str) -> None:
    store.write(join_uri(work, "lease.json"), json.dumps(asdict(_ANOTHER)).encode())


def test_lease_is_won_by_one_of_many_that_ask_together(store, work, quick):
    winners, losers = [], []
    start = threading.Barrier(6)

    def ask() -> None:
        start.wait()
        try:
            winners.append(Lease.acquire(store, work))
        except LeaseError as error:
            losers.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for winner in winners:
        winner.release()
    assert (len(winners), len(losers)) == (1, 5)


def test_lease_of_another_schema_is_refused_by_name(store, work):
    store.write(join_uri(work, "lease.json"), b'{"schema": 99}')
    with pytest.raises(LeaseError, match=r"lease\.json"):
        Lease.acquire(store, work)
