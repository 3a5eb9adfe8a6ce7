"""What a run shows in the Prefect UI while it goes on: a progress bar and a table of blocks.

A thread of its own brings them up to date, because a Prefect server that is down or slow is waited for, for
minutes, by Prefect's client; the conversion is not to wait with it.
"""

import contextvars
import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from flows.artifacts import BLOCKS_KEY, OUTAGES, PROGRESS_KEY, made, warn_of_outage
from flows.summary import block_table
from quantlib.job.block_figures import BlockFigures, block_figures
from quantlib.job.stages import Progress
from quantlib.job.time_left import TimeLeft, with_time_left

_BAR_EVERY_S = 3.0
_TABLE_EVERY_S = 15.0
# The conversion has ended: a server that does not answer by then costs the last state of the view.
_LAST_S = 10.0

_TABLE_DESCRIPTION = (
    "Errors and seconds by block, counted as in the names of the tasks: relative error and cosine of the"
    " quantized stream on evaluation text, the largest error and damping among the linears, fallbacks"
)


class RunView:
    """The view of the flow run that is active where it is entered; a context manager."""

    def __init__(self) -> None:
        self._left = TimeLeft()
        self._lock = threading.Lock()
        self._now: tuple[float, str] | None = None
        self._blocks: dict[str, dict[int, BlockFigures]] = {}
        self._changes = 0
        self._bar, self._table = _Bar(), _Table()
        self._ended = threading.Event()
        self._has_outage = False
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._follow,), name="run-view", daemon=True)

    def __enter__(self) -> "RunView":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(_LAST_S)

    def show(self, progress: Progress) -> None:
        """Have the view show this soon; gives back at once."""
        description = with_time_left(progress, self._left.seconds(progress))
        with self._lock:
            self._now = (100.0 * min(1.0, progress.done / progress.total), description)
            for finished in progress.finished:
                self._note(finished.output, [finished.row])

    def show_reports(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Have the table hold all blocks, those too that an earlier start finished."""
        with self._lock:
            for report in reports:
                self._note(report["output"], report["blocks"])

    def _note(self, output: str, rows: Sequence[Mapping[str, Any]]) -> None:
        known = self._blocks.setdefault(output, {})
        for found in map(block_figures, rows):
            known[found.index] = found
            self._changes += 1

    def _follow(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ended.wait(_BAR_EVERY_S)
            try:
                self._bring_up_to_date(is_last=is_last)
                self._has_outage = False
            except OUTAGES as error:
                if not self._has_outage:
                    warn_of_outage(error)
                self._has_outage = True

    def _bring_up_to_date(self, *, is_last: bool) -> None:
        with self._lock:
            now, changes = self._now, self._changes
            blocks = {output: list(found.values()) for output, found in self._blocks.items()}
        if now is not None:
            self._bar.show(*now)
        if changes:
            self._table.show(changes, blocks, is_last=is_last)


class _Bar:
    """The progress artifact, as it was last shown."""

    def __init__(self) -> None:
        self._artifact: UUID | None = None
        self._shown: tuple[float, str] | None = None

    def show(self, percent: float, description: str) -> None:
        if (percent, description) == self._shown:
            return
        if self._artifact is None:
            self._artifact = made(create_progress_artifact(percent, PROGRESS_KEY, description))
        else:
            _update(self._artifact, percent, description)
        self._shown = (percent, description)


class _Table:
    """The table artifact, as it was last shown."""

    def __init__(self) -> None:
        self._artifact: UUID | None = None
        self._shown = 0
        self._shown_at = float("-inf")

    def show(self, changes: int, blocks: Mapping[str, Sequence[BlockFigures]], *, is_last: bool) -> None:
        is_early = time.monotonic() - self._shown_at < _TABLE_EVERY_S
        if changes == self._shown or (is_early and not is_last):
            return
        rows = block_table(blocks)
        if self._artifact is None:
            self._artifact = made(create_table_artifact(rows, BLOCKS_KEY, _TABLE_DESCRIPTION))
        else:
            _update(self._artifact, json.dumps(rows), _TABLE_DESCRIPTION)
        self._shown, self._shown_at = changes, time.monotonic()


def _update(artifact: UUID, data: Any, description: str) -> None:
    # For tables Prefect has no function of its own; what it stores of one is JSON text.
    get_client(sync_client=True).update_artifact(artifact, ArtifactUpdate(data=data, description=description))
