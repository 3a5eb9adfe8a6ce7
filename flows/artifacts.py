"""What a run shows in the Prefect UI: progress, a table of blocks, and a summary.

Artifacts are a view. A Prefect server that cannot be reached costs the view and not the conversion: such a
failure is logged and the run goes on.
"""

import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.logging import get_run_logger

from flows.summary import block_rows, summary_markdown
from quantlib.job.comparison_text import comparison_markdown
from quantlib.job.incoming import Row
from quantlib.job.stages import Progress

PROGRESS_KEY, BLOCKS_KEY, SUMMARY_KEY = "quantize-progress", "quantize-blocks", "quantize-summary"
COMPARISON_KEY, NEW_CHECKPOINTS_KEY = "compare-schemes", "new-checkpoints"
_MIN_INTERVAL_S = 3.0


class ProgressArtifact:
    """A progress bar in the UI, updated at most every few seconds."""

    def __init__(self) -> None:
        self._artifact: UUID | None = None
        self._shown_at = float("-inf")

    def show(self, progress: Progress) -> None:
        """Bring the bar up to date, unless that was done a moment ago; the end is always shown."""
        is_done = progress.done >= progress.total
        if not is_done and time.monotonic() - self._shown_at < _MIN_INTERVAL_S:
            return
        self._shown_at = time.monotonic()
        percent = 100.0 * min(1.0, progress.done / progress.total)
        with _view_only():
            if self._artifact is None:
                self._artifact = _outside_event_loop(
                    create_progress_artifact(percent, key=PROGRESS_KEY, description=progress.label)
                )
            else:
                update_progress_artifact(self._artifact, percent, description=progress.label)


def publish_report(report: Mapping[str, Any]) -> None:
    """Leave the table of blocks and the summary of a finished run with it."""
    with _view_only():
        create_table_artifact(
            block_rows(report), key=BLOCKS_KEY, description="Every block: error, time, damping, fallbacks"
        )
    with _view_only():
        create_markdown_artifact(
            summary_markdown(report), key=SUMMARY_KEY, description="What the conversion did"
        )


def publish_comparison(comparison: Mapping[str, Any]) -> None:
    """Leave the table of a comparison with its run."""
    with _view_only():
        create_markdown_artifact(
            comparison_markdown(comparison), key=COMPARISON_KEY, description="Schemes side by side"
        )


def publish_new_checkpoints(rows: Sequence[Row], summary: str) -> None:
    """Leave the table of checkpoints that a pass found with its run."""
    with _view_only():
        create_table_artifact(
            [{**asdict(row), "outputs": "\n".join(row.outputs)} for row in rows],
            key=NEW_CHECKPOINTS_KEY,
            description=summary,
        )


def _outside_event_loop(created: UUID | Coroutine[Any, Any, UUID]) -> UUID:
    # Prefect's functions give a coroutine when they are called inside an event loop; a flow's body is not.
    assert isinstance(created, UUID)
    return created


@contextmanager
def _view_only() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        get_run_logger().warning("an artifact could not be shown, the conversion goes on: %r", error)
