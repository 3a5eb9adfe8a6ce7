"""What a finished run leaves in the Prefect UI: a summary with its verdict, and a picture of its errors.

Artifacts are a view. A Prefect server that cannot be reached costs the view and not the conversion: such a
failure is logged and the run goes on.
"""

import base64
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from flows.summary import summary_markdown
from quantlib.job.comparison_text import comparison_markdown
from quantlib.job.incoming import Row
from quantlib.job.report_picture import error_picture

PROGRESS_KEY, BLOCKS_KEY, SUMMARY_KEY = "quantize-progress", "quantize-blocks", "quantize-summary"
ERRORS_KEY, COMPARISON_KEY, NEW_CHECKPOINTS_KEY = "quantize-errors", "compare-schemes", "new-checkpoints"

# What Prefect's client raises of a server that does not answer, or has forgotten the run.
OUTAGES = (httpx.HTTPError, PrefectException)


def publish_report(report: Mapping[str, Any]) -> None:
    """Leave the summary of a finished run with it, and the picture of its errors where they were measured."""
    with _view_only():
        create_markdown_artifact(
            summary_markdown(report), SUMMARY_KEY, "The verdict, what it rests on, and where the output is"
        )
    picture = error_picture(report)
    if picture is not None:
        url = f"data:image/svg+xml;base64,{base64.b64encode(picture.encode()).decode()}"
        with _view_only():
            create_image_artifact(url, ERRORS_KEY, "Relative error of the quantized stream behind each block")


def publish_comparison(comparison: Mapping[str, Any]) -> None:
    """Leave the table of a comparison with its run."""
    with _view_only():
        create_markdown_artifact(comparison_markdown(comparison), COMPARISON_KEY, "Schemes side by side")


def publish_lines(key: str, title: str, lines: str) -> None:
    """Leave a text for terminals with the run, as it is."""
    with _view_only():
        create_markdown_artifact(f"```\n{lines}\n```\n", key=key, description=title)


def publish_new_checkpoints(rows: Sequence[Row], summary: str) -> None:
    """Leave the table of checkpoints that a pass found with its run."""
    with _view_only():
        create_table_artifact(
            [{**asdict(row), "outputs": "\n".join(row.outputs)} for row in rows],
            key=NEW_CHECKPOINTS_KEY,
            description=summary,
        )


def made(created: UUID | Coroutine[Any, Any, UUID]) -> UUID:
    """What Prefect made; it gives a coroutine inside an event loop, which no flow here is."""
    assert isinstance(created, UUID)
    return created


def warn_of_outage(error: BaseException) -> None:
    """Say that the view stands still."""
    get_run_logger().warning("an artifact could not be shown, the conversion goes on: %r", error)


@contextmanager
def _view_only() -> Iterator[None]:
    try:
        yield
    except OUTAGES as error:
        warn_of_outage(error)
