"""What was begun for new checkpoints: one small JSON object a checkpoint, in storage.

A record changes by conditional writes only, so that of two passes that want to begin a run one wins. The
winner's attempt holds the key of the run, drawn anew: whoever begins the run with that key, the winner, or a
later pass where the winner died, gets the same one. Removing a record forgets its attempts.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from quantlib.errors import ObjectNotFoundError
from quantlib.storage import Store, join_uri, uri_name

SCHEMA = 1
OUTCOMES = ("made", "failed", "gone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A run that was begun, or is about to be.

    Attributes:
        key: Which no other attempt has.
        fingerprint: Of the checkpoint's files.
        wanted: Digest of the recipes.
        requests: Option values of the outputs that the run makes.
        outputs: Their addresses.
        claimed: When a pass took this attempt, UTC.
        run_id: None until the run was begun.
        outcome: None while the run has not ended; ``made``; ``failed``; or ``gone``, when nobody knows of the
            run any more.
        reason: Of ``failed``.
    """

    key: str
    fingerprint: str
    wanted: str
    requests: tuple[Mapping[str, Any], ...]
    outputs: tuple[str, ...]
    claimed: str
    run_id: str | None = None
    outcome: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionRecord:
    """All attempts at a checkpoint, the oldest first.

    Attributes:
        source: Address of the checkpoint.
    """

    source: str
    attempts: tuple[Attempt, ...] = ()

    @property
    def open_attempts(self) -> list[Attempt]:
        """Those whose run has not ended."""
        return [attempt for attempt in self.attempts if attempt.outcome is None]

    def failures(self, fingerprint: str, wanted: str) -> list[Attempt]:
        """Those that failed with these files and recipes."""
        same = (a for a in self.attempts if (a.fingerprint, a.wanted) == (fingerprint, wanted))
        return [attempt for attempt in same if attempt.outcome == "failed"]

    def replaced(self, attempt: Attempt) -> "ConversionRecord":
        """With a newer version of one attempt, known by its key."""
        attempts = tuple(attempt if a.key == attempt.key else a for a in self.attempts)
        return dataclasses.replace(self, attempts=attempts)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """A record as it was read.

    Attributes:
        uri: Address of the object.
        etag: Of the version that was read; None where there is no object yet.
        record: None where the object is no record that this version knows.
    """

    uri: str
    etag: str | None
    record: ConversionRecord | None


def record_uri(state: str, source: str) -> str:
    """Where the record of a checkpoint lies.

    Args:
        state: Address below which all records lie.
        source: Address of the checkpoint.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return join_uri(state, f"{uri_name(source)}-{digest}.json")


def read_records(store: Store, state: str) -> dict[str, StoredRecord]:
    """Address -> record, of all below ``state``."""
    found = {}
    for info in store.list(state, recursive=False):
        # Somebody may remove one meanwhile.
        with suppress(ObjectNotFoundError):
            found[info.uri] = _read(store, info.uri)
    return found


def read_again(store: Store, before: StoredRecord, source: str) -> StoredRecord:
    """A record as it stands now; an empty one where there is none."""
    try:
        return _read(store, before.uri)
    except ObjectNotFoundError:
        return StoredRecord(uri=before.uri, etag=None, record=ConversionRecord(source=source))


def _read(store: Store, uri: str) -> StoredRecord:
    content, info = store.read_with_info(uri)
    return StoredRecord(uri=uri, etag=info.etag, record=_parsed(content))


def store_record(store: Store, before: StoredRecord, record: ConversionRecord) -> StoredRecord | None:
    """Put a record in the place of the one that was read.

    Returns:
        The record as it is stored now; None when another pass has changed it meanwhile, and nothing was
        stored.
    """
    content = json.dumps({"schema": SCHEMA, **dataclasses.asdict(record)}, indent=1).encode()
    if before.etag is not None:
        info = store.replace_if_match(before.uri, content, before.etag)
        return None if info is None else StoredRecord(uri=before.uri, etag=info.etag, record=record)
    if not store.put_if_absent(before.uri, content):
        return None
    stored = read_again(store, before, record.source)
    return stored if stored.record == _parsed(content) else None


def wanted_digest(recipes: Mapping[str, Mapping[str, Any]], outputs: str) -> str:
    """Digest of recipes and of where their outputs go.

    Args:
        recipes: Name -> option values.
        outputs: Address below which the outputs go.
    """
    return hashlib.sha256(json.dumps([outputs, recipes], sort_keys=True).encode()).hexdigest()


def _parsed(content: bytes) -> ConversionRecord | None:
    try:
        values = json.loads(content)
        if values.pop("schema") != SCHEMA:
            return None
        attempts = tuple(_attempt(found) for found in values.pop("attempts"))
        record = ConversionRecord(**values, attempts=attempts)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return record if _is_sound(record) else None


def _attempt(values: Mapping[str, Any]) -> Attempt:
    lists: dict[str, Sequence[Any]] = {name: tuple(values[name]) for name in ("requests", "outputs")}
    return Attempt(**{**values, **lists})


def _is_sound(record: ConversionRecord) -> bool:
    texts = [record.source]
    for attempt in record.attempts:
        texts += [attempt.key, attempt.fingerprint, attempt.wanted, attempt.claimed, attempt.reason]
        texts += [attempt.run_id or "", *attempt.outputs]
        if not all(isinstance(values, Mapping) for values in attempt.requests):
            return False
        if attempt.outcome is not None and attempt.outcome not in OUTCOMES:
            return False
    return all(isinstance(text, str) for text in texts)
