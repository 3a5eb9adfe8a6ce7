"""One writer: the lease that a run holds on its work prefix while it works.

``lease.json`` says who works on an output. It is taken by conditional put and renewed every `HEARTBEAT_S`
seconds; a lease that nobody renews may be taken over. Whether its holder lives is judged by watching it for
`SILENCE_S` seconds on one's own clock, so that clocks need not agree; a holder that was a process of this
very machine and is gone is known to be dead at once. Whoever took over is a new run id: the old holder's
next heartbeat, and its next finished unit, notice it and stop (fencing). Left out: fairness between runs
that wait.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from quantlib.errors import LeaseError, ObjectNotFoundError, StorageError
from quantlib.storage import ObjectInfo, Store, join_uri

LEASE_NAME = "lease.json"
SCHEMA = 1
HEARTBEAT_S = 10.0
SILENCE_S = 60.0
_LOOK_AGAIN_S = 1.0
_RELEASE_LIMIT_S = 2.0
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """What the lease object says.

    Attributes:
        run_id: Of the run that holds it; new at every start.
        host: Name of its machine.
        machine: Boot and process namespace of the machine, within which a process id means something.
        pid: Process id of the run.
        pid_started: When the kernel started that process, in clock ticks since boot.
        started: When the lease was taken, UTC.
        beat: Renewals so far; every one changes the object.
        released: The run has ended; the lease is free.
    """

    schema: int = SCHEMA
    run_id: str
    host: str
    machine: str
    pid: int
    pid_started: int
    started: str
    beat: int = 0
    released: bool = False

    @property
    def holder(self) -> str:
        """Who and since when, for messages."""
        return f"run {self.run_id} (process {self.pid} on {self.host}) since {self.started}"


def new_record() -> LeaseRecord:
    """This process as a holder, under a new run id."""
    pid = os.getpid()
    return LeaseRecord(
        run_id=uuid.uuid4().hex[:12],
        host=socket.gethostname(),
        machine=_machine(),
        pid=pid,
        pid_started=_start_of(pid) or 0,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def read_lease(store: Store, work: str) -> LeaseRecord | None:
    """The lease on a work prefix as it stands, or None.

    Raises:
        LeaseError: The object is not a lease this version knows.
    """
    try:
        return _record_from(store.read(_uri(work)), work)
    except ObjectNotFoundError:
        return None


def refuse_taken_over(store: Store, work: str, run_id: str) -> None:
    """Make sure that a run still holds the lease.

    Raises:
        LeaseError: Another run has taken over.
    """
    found = read_lease(store, work)
    if found is None or found.run_id != run_id:
        raise _taken_over(work, found)


class Lease:
    """A lease that is held; renewed by a thread until it is released. Use as a context manager."""

    def __init__(self, store: Store, work: str, record: LeaseRecord, info: ObjectInfo) -> None:
        self._store = store
        self._work = work
        self._record = record
        self._etag = info.etag
        self._lost: LeaseError | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        store: Store,
        work: str,
        on_wait: Callable[[LeaseRecord], None] = lambda _: None,
        record: LeaseRecord | None = None,
    ) -> "Lease":
        """Take the lease, waiting at most `SILENCE_S` seconds to see whether an earlier holder lives.

        Args:
            on_wait: Told once whose lease is being watched.
            record: Who takes it, from `new_record`. A caller that tries again after a failure gives the same
                one, so as not to wait for the silence of its own first attempt.

        Raises:
            LeaseError: Another run holds it and is alive; says who and since when.
        """
        uri, mine = _uri(work), record or new_record()
        # A lease may vanish while it is looked at, when somebody cleans up: then it is free.
        for _ in range(_ATTEMPTS):
            with suppress(ObjectNotFoundError):
                if not store.put_if_absent(uri, _bytes_of(mine)):
                    _take_over(store, work, mine, on_wait)
                content, info = store.read_with_info(uri)
                found = _record_from(content, work)
                if found.run_id != mine.run_id:
                    raise _held(work, found)
                return cls(store, work, mine, info)
        raise LeaseError(
            f"{uri} comes and goes; see who else works on this output, then start again", uri=uri
        )

    @property
    def run_id(self) -> str:
        """Id of this run."""
        return self._record.run_id

    def check(self) -> None:
        """Raises LeaseError once another run has taken over."""
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Stop renewing and give the lease back; a store that fails now leaves it to be found silent."""
        self._ended.set()
        # A run that is stopped must end within seconds, whatever the store does.
        self._thread.join(_RELEASE_LIMIT_S)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            # While the store is away nobody can take over either: they must see it unchanged (`_watch`).
            with suppress(StorageError):
                self._renew(is_released=False)
            if self._lost is not None:
                return
        with suppress(StorageError):
            self._renew(is_released=True)

    def _renew(self, *, is_released: bool) -> None:
        try:
            self._replace(replace(self._record, beat=self._record.beat + 1, released=is_released))
        except LeaseError as error:
            # What lies there is no lease any more.
            self._lost = error

    def _replace(self, record: LeaseRecord) -> None:
        uri = _uri(self._work)
        stored = self._store.replace_if_match(uri, _bytes_of(record), self._etag)
        if stored is not None:
            self._record, self._etag = record, stored.etag
            return
        # An answer that was lost on the way looks like this too: then what is stored is ours.
        try:
            content, info = self._store.read_with_info(uri)
        except ObjectNotFoundError:
            self._lost = _taken_over(self._work, None)
            return
        found = _record_from(content, self._work)
        if found.run_id == self.run_id:
            self._record, self._etag = found, info.etag
        else:
            self._lost = _taken_over(self._work, found)


class Leases:
    """Leases on several work prefixes, of one run; held all or none. Use as a context manager."""

    def __init__(self, held: Sequence[Lease]) -> None:
        self._held = held

    @classmethod
    def acquire(
        cls,
        prefixes: Sequence[tuple[Store, str]],
        on_wait: Callable[[LeaseRecord], None],
        record: LeaseRecord,
    ) -> "Leases":
        """Take the lease of every prefix; see `Lease.acquire`.

        Raises:
            LeaseError: Another run holds one of them and is alive; none is held then.
        """
        held: list[Lease] = []
        try:
            # In one order, so that two runs that want the same do not each get some.
            for store, work in sorted(prefixes, key=lambda prefix: prefix[1]):
                held.append(Lease.acquire(store, work, on_wait, record))
        except BaseException:
            for lease in held:
                lease.release()
            raise
        return cls(held)

    @property
    def run_id(self) -> str:
        """Id of this run."""
        return self._held[0].run_id

    def check(self) -> None:
        """Raises LeaseError once another run has taken one of them over."""
        for lease in self._held:
            lease.check()

    def __enter__(self) -> "Leases":
        return self

    def __exit__(self, *_: object) -> None:
        for lease in self._held:
            lease.release()


def _take_over(store: Store, work: str, mine: LeaseRecord, on_wait: Callable[[LeaseRecord], None]) -> None:
    """Put one's own record in place of one that is free or whose holder is dead."""
    content, info = store.read_with_info(_uri(work))
    found = _record_from(content, work)
    if found.run_id == mine.run_id:
        return
    if not (found.released or _is_dead_here(found)):
        on_wait(found)
        _watch(store, work, info)
    if store.replace_if_match(_uri(work), _bytes_of(mine), info.etag) is None:
        raise _held(work, read_lease(store, work) or found)


def _watch(store: Store, work: str, info: ObjectInfo) -> None:
    """Return when the lease was silent long enough; raise as soon as its holder shows life.

    Only time in which the store answers promptly counts: while it does not, the holder cannot renew either.
    """
    silent_s = 0.0
    while silent_s < SILENCE_S:
        began = time.monotonic()
        time.sleep(min(_LOOK_AGAIN_S, SILENCE_S))
        content, now = store.read_with_info(_uri(work))
        if now.etag != info.etag:
            raise _held(work, _record_from(content, work))
        looked_s = time.monotonic() - began
        silent_s = silent_s + looked_s if looked_s < _LOOK_AGAIN_S + HEARTBEAT_S else 0.0


def _is_dead_here(record: LeaseRecord) -> bool:
    """True when the holder was a process of this machine and exists no more."""
    return record.machine == _machine() and _start_of(record.pid) != record.pid_started


def _machine() -> str:
    """Boot id and process namespace; a name of its own where the kernel tells neither."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return uuid.uuid4().hex


def _start_of(pid: int) -> int | None:
    """Start time of a living process in clock ticks since boot (field 22 of proc(5) stat)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state == "Z" else int(fields[18])


def _uri(work: str) -> str:
    return join_uri(work, LEASE_NAME)


def _bytes_of(record: LeaseRecord) -> bytes:
    return json.dumps(asdict(record), indent=1).encode()


def _record_from(content: bytes, work: str) -> LeaseRecord:
    try:
        values = json.loads(content)
        if values["schema"] == SCHEMA:
            return LeaseRecord(**values)
    except (ValueError, TypeError, KeyError):
        pass
    raise LeaseError(
        f"{_uri(work)} is no lease this version knows (schema {SCHEMA} was expected); when no other version"
        f" works on this output, remove that object",
        uri=_uri(work),
    )


def _held(work: str, record: LeaseRecord) -> LeaseError:
    error = LeaseError(
        f"{work} is held by {record.holder}, which is at work; wait for it, or choose another output",
        run_id=record.run_id,
        host=record.host,
        pid=record.pid,
        started=record.started,
    )
    error.before_work = True
    return error


def _taken_over(work: str, record: LeaseRecord | None) -> LeaseError:
    by = record.holder if record else "nobody: the lease is gone"
    return LeaseError(f"this run no longer holds {work}; it is held by {by}", work=work)
