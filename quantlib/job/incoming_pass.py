"""One pass over a prefix: begins a run for every new checkpoint, all its recipes together.

A pass keeps nothing in memory. What is made it sees from the outputs, what was begun from the records
(`quantlib.job.conversion_records`), what became of it from whoever carries runs out (`Runs`). So passes may
come as often as one likes, overlap, and be cut off anywhere.
"""

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from quantlib.errors import CheckpointError, RecipeError, StorageError, TransientStorageError
from quantlib.job.bundle import refuse_other_values
from quantlib.job.conversion_records import Attempt, ConversionRecord, StoredRecord, wanted_digest
from quantlib.job.conversion_runs import BegunRuns, Runs
from quantlib.job.incoming import Incoming, Row
from quantlib.job.made_outputs import look_at_output
from quantlib.job.new_checkpoints import (
    CheckpointFolder,
    checkpoint_folders,
    fault_of,
    settles_in_s,
    source_files,
)
from quantlib.job.options import JobOptions, options_from
from quantlib.job.several_formats import requests_of_formats
from quantlib.storage import join_uri, normalize_uri, open_store

_STATE_FOLDER = ".quantmill/incoming"


def convert_incoming(incoming: Incoming, runs: Runs, *, now_s: float) -> list[Row]:
    """One pass.

    Args:
        incoming: What to look for.
        runs: Who carries runs out.
        now_s: Seconds since the epoch.

    Returns:
        A row for every checkpoint that was found.

    Raises:
        RecipeError: A recipe is wrong, or the recipes cannot be made from one reading; with ``before_work``.
        StorageError: The store does not answer, or refuses the prefix, the outputs or the records.
    """
    try:
        _refuse_wrong_recipes(incoming)
    except (RecipeError, StorageError) as error:
        error.before_work = True
        raise
    one = _Pass(incoming, runs, now_s)
    return [one.row_of(folder) for folder in one.folders()]


def _refuse_wrong_recipes(incoming: Incoming) -> None:
    if not incoming.recipes:
        raise RecipeError("a pass needs a recipe and none was given; name one", option="recipes")
    prefix, outputs = normalize_uri(incoming.prefix), normalize_uri(incoming.outputs)
    first, *others = _requests(incoming.recipes, prefix, outputs)
    for other in others:
        refuse_other_values(dataclasses.asdict(first), dataclasses.asdict(other))


def _requests(recipes: Mapping[str, Mapping[str, Any]], source: str, outputs: str) -> list[JobOptions]:
    """One request for each output of a checkpoint."""
    given = ({**recipes[name], "source": source, "output": join_uri(outputs, name)} for name in recipes)
    return [request for values in given for request in requests_of_formats(options_from(values))]


class _Pass:
    """A pass that is under way."""

    def __init__(self, incoming: Incoming, runs: Runs, now_s: float) -> None:
        """Read what was begun, and what became of it."""
        self._incoming = incoming
        self._now_s = now_s
        self._prefix, self._outputs = normalize_uri(incoming.prefix), normalize_uri(incoming.outputs)
        self._wanted = wanted_digest(incoming.recipes, self._outputs)
        engine = _requests(incoming.recipes, self._prefix, self._outputs)[0].storage_engine
        self._source_store = open_store(self._prefix, engine)
        self._output_store = open_store(self._outputs, engine)
        state = normalize_uri(incoming.state or join_uri(self._outputs, _STATE_FOLDER))
        self._begun = BegunRuns(state, engine, runs)
        self._begun.follow()

    def folders(self) -> list[CheckpointFolder]:
        """What lies below the prefix; not what lies below the outputs, if these are there too."""
        excluded = [self._outputs] if self._outputs.startswith(f"{self._prefix.rstrip('/')}/") else []
        depth = self._incoming.depth
        return checkpoint_folders(self._source_store, self._prefix, depth=depth, excluded=excluded)

    def row_of(self, folder: CheckpointFolder) -> Row:
        """Begin what is to be done about one checkpoint, and say how it stands."""
        stored = self._begun.record_of(folder.uri)
        if stored.record is None:
            reason = f"{stored.uri} is no record that this version knows; remove it to begin anew"
            return Row(checkpoint=folder.name, state="parked", reason=reason)
        if stored.record.open_attempts:
            return self._running(folder, stored.record.open_attempts[-1])
        run_id = stored.record.attempts[-1].run_id if stored.record.attempts else None
        row = Row(checkpoint=folder.name, state="made", run_id=run_id)
        try:
            source = source_files(self._source_store, folder)
        except TransientStorageError:
            raise
        except (CheckpointError, StorageError) as error:
            # What is wrong with one checkpoint must not keep the others from being looked at.
            return _in_state(row, "incomplete", error.message)
        try:
            requests = _requests(self._incoming.recipes, folder.uri, join_uri(self._outputs, folder.name))
        except StorageError as error:
            return _in_state(row, "incomplete", error.message)
        found = [look_at_output(self._output_store, request, source) for request in requests]
        lacking = [request for request, made in zip(requests, found, strict=True) if made.state == "absent"]
        occupied = "; ".join(made.reason for made in found if made.state == "other")
        row = dataclasses.replace(row, outputs=tuple(made.uri for made in found), reason=occupied)
        if not lacking:
            return _in_state(row, "occupied", occupied) if occupied else row
        return self._hindered(folder, stored.record, row) or self._begin(folder, stored, lacking, row)

    def _running(self, folder: CheckpointFolder, attempt: Attempt) -> Row:
        reason = ""
        if attempt.fingerprint != folder.fingerprint:
            reason = "the run is of former files; those of now are looked at once it has ended"
        elif attempt.wanted != self._wanted:
            reason = "the run is of other recipes; those of now are looked at once it has ended"
        return Row(
            checkpoint=folder.name,
            state="running",
            reason=reason,
            run_id=attempt.run_id,
            outputs=attempt.outputs,
        )

    def _hindered(self, folder: CheckpointFolder, record: ConversionRecord, row: Row) -> Row | None:
        """What speaks against a run now, the cheapest to find first."""
        failures = record.failures(folder.fingerprint, self._wanted)
        if len(failures) >= self._incoming.attempts and not self._incoming.retry_parked:
            reason = f"{len(failures)} attempt(s) failed, the last one: {failures[-1].reason}"
            return _in_state(row, "parked", reason)
        wait_s = settles_in_s(folder, settle_s=self._incoming.settle_s, now_s=self._now_s)
        if wait_s > 0:
            return _in_state(row, "settling", f"settled in {wait_s:.0f} s unless it changes again")
        fault = fault_of(self._source_store, folder)
        if fault is not None:
            return _in_state(row, "incomplete", fault)
        is_full = self._begun.num_open >= self._incoming.runs_at_a_time
        return _in_state(row, "waiting", row.reason) if is_full else None

    def _begin(
        self, folder: CheckpointFolder, stored: StoredRecord, lacking: Sequence[JobOptions], row: Row
    ) -> Row:
        """Begin a run for the outputs that a checkpoint lacks."""
        assert stored.record is not None
        failures = stored.record.failures(folder.fingerprint, self._wanted)
        forgotten = failures if len(failures) >= self._incoming.attempts else []
        attempt = Attempt(
            key=uuid.uuid4().hex,
            fingerprint=folder.fingerprint,
            wanted=self._wanted,
            requests=tuple(dataclasses.asdict(request) for request in lacking),
            outputs=tuple(normalize_uri(request.output) for request in lacking),
            claimed=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        # What failed with other files counts no more.
        same = [other for other in stored.record.attempts if other.fingerprint == folder.fingerprint]
        kept = [other for other in same if other not in forgotten]
        record = dataclasses.replace(stored.record, attempts=(*kept, attempt))
        begun = self._begun.begin(stored, record)
        if begun is None:
            return _in_state(row, "running", "another pass was first")
        if begun.outcome is not None:
            return _in_state(row, begun.outcome, begun.reason)
        return dataclasses.replace(row, state="started", run_id=begun.run_id)


def _in_state(row: Row, state: str, reason: str) -> Row:
    return dataclasses.replace(row, state=state, reason=reason)
