"""The runs that passes over a prefix begin: from a claimed attempt to a run, and from a run to its outcome.

An attempt is claimed in its record first and begun then. Who dies in between leaves a claim without a run,
which the next pass begins with the key of the claim.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quantlib.errors import RecipeError
from quantlib.job.conversion_records import (
    Attempt,
    ConversionRecord,
    StoredRecord,
    read_again,
    read_records,
    record_uri,
    store_record,
)
from quantlib.job.made_outputs import is_published
from quantlib.job.options import JobOptions, options_from
from quantlib.storage import Store, open_store


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenRun:
    """What is known of a run.

    Attributes:
        state: In one word, for people.
        is_final: It has ended.
        is_completed: It has ended well.
        message: What is said of its end.
    """

    state: str
    is_final: bool
    is_completed: bool
    message: str = ""


class Runs(Protocol):
    """Who carries runs out."""

    def begin(self, requests: Sequence[JobOptions], key: str) -> str:
        """Have outputs of one source made; returns the id of the run.

        The same key again gives the same run, from however many threads and processes.

        Raises:
            RecipeError: The run is refused.
        """
        ...

    def look(self, run_id: str) -> SeenRun | None:
        """What is known of a run; None when it is known no more."""
        ...


class BegunRuns:
    """The records below one address, as they were last seen, and the runs that they are about."""

    def __init__(self, state: str, engine: str, runs: Runs) -> None:
        """Read all records.

        Args:
            state: Normalized address below which they lie.
            engine: Client library for S3.
            runs: Who carries runs out.
        """
        self._state = state
        self._engine = engine
        self._store: Store = open_store(state, engine)
        self._runs = runs
        self._records = read_records(self._store, state)

    @property
    def num_open(self) -> int:
        """How many runs have not ended."""
        records = [stored.record for stored in self._records.values()]
        return sum(len(record.open_attempts) for record in records if record is not None)

    def record_of(self, source: str) -> StoredRecord:
        """The record of a checkpoint, by its address; an empty one where there is none."""
        uri = record_uri(self._state, source)
        empty = StoredRecord(uri=uri, etag=None, record=ConversionRecord(source=source))
        return self._records.get(uri, empty)

    def follow(self) -> None:
        """Begin what was claimed only, and note the outcome of runs that have ended."""
        for uri, stored in self._records.items():
            record = stored.record
            if record is None or not record.open_attempts:
                continue
            changed = record
            for attempt in record.open_attempts:
                changed = changed.replaced(self._ended(self._begun(attempt)))
            if changed != record:
                self._records[uri] = self._stored(stored, changed)

    def begin(self, before: StoredRecord, record: ConversionRecord) -> Attempt | None:
        """Claim the last attempt of a record, and begin its run.

        Args:
            before: The record as it was read.
            record: With the new attempt.

        Returns:
            The attempt; None when another pass changed the record meanwhile, and nothing was begun.
        """
        claimed = store_record(self._store, before, record)
        if claimed is None:
            self._records[before.uri] = read_again(self._store, before, record.source)
            return None
        begun = self._begun(record.attempts[-1])
        self._records[before.uri] = self._stored(claimed, record.replaced(begun))
        return begun

    def _stored(self, before: StoredRecord, record: ConversionRecord) -> StoredRecord:
        """The record as it stands after it was to be stored; another pass may have been first."""
        return store_record(self._store, before, record) or read_again(self._store, before, record.source)

    def _begun(self, attempt: Attempt) -> Attempt:
        if attempt.run_id is not None:
            return attempt
        try:
            requests = [options_from(values) for values in attempt.requests]
            return dataclasses.replace(attempt, run_id=self._runs.begin(requests, attempt.key))
        except RecipeError as error:
            return dataclasses.replace(attempt, outcome="failed", reason=error.message)

    def _ended(self, attempt: Attempt) -> Attempt:
        """With its outcome, if its run has ended."""
        if attempt.outcome is not None or attempt.run_id is None:
            return attempt
        seen = self._runs.look(attempt.run_id)
        if seen is None:
            return dataclasses.replace(attempt, outcome="gone")
        if not seen.is_final:
            return attempt
        if not seen.is_completed:
            return dataclasses.replace(attempt, outcome="failed", reason=f"{seen.state}: {seen.message}")
        absent = [uri for uri in attempt.outputs if not is_published(open_store(uri, self._engine), uri)]
        if absent:
            reason = f"the run completed, and no checkpoint lies at {', '.join(absent)}"
            return dataclasses.replace(attempt, outcome="failed", reason=reason)
        return dataclasses.replace(attempt, outcome="made")
