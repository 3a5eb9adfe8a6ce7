"""Makes what is compared, and keeps it or leaves nothing of it behind."""

import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantlib.errors import StorageError
from quantlib.job.comparison import build_comparison
from quantlib.job.comparison_request import ComparisonRequest
from quantlib.job.comparison_svg import comparison_picture
from quantlib.job.comparison_text import comparison_markdown
from quantlib.job.options import JobOptions
from quantlib.storage import join_uri, normalize_uri, open_store
from quantlib.storage.uris import file_path, uri_scheme

VALUES_NAME, PAGE_NAME, PICTURE_NAME = "comparison.json", "comparison.md", "comparison.svg"
# What was under way when a run was interrupted may still make a file while the others are removed.
_LOOKS = 5

# Makes outputs of one source from one reading, and gives the report of each.
Maker = Callable[[Sequence[JobOptions]], Sequence[dict[str, Any]]]


def compare(request: ComparisonRequest, make: Maker) -> dict[str, Any]:
    """Make all outputs of a comparison, and put their figures side by side.

    Outputs that are kept are finished by the same request after an interruption, and the comparison is
    written beside them.

    Args:
        request: What to compare.
        make: Converts, in whatever way: `quantlib.inprocess.quantize_all`, or a flow.

    Returns:
        See `quantlib.job.comparison.build_comparison`.

    Raises:
        QuantError: An output could not be made; or what was not to be kept could not be removed.
    """
    if request.output is not None:
        comparison = build_comparison(request, make(request.placed(request.output)))
        _store(normalize_uri(request.output), request.options.storage_engine, comparison)
        return comparison
    with _place_for_a_while(request.options) as place:
        return build_comparison(request, make(request.placed(place)))


def _store(place: str, engine: str, comparison: dict[str, Any]) -> None:
    store = open_store(place, engine)
    page = f"{comparison_markdown(comparison)}\n![KL divergence over bits a weight]({PICTURE_NAME})\n"
    for name, text in (
        (PICTURE_NAME, comparison_picture(comparison)),
        (PAGE_NAME, page),
        (VALUES_NAME, json.dumps(comparison, indent=1, allow_nan=False)),
    ):
        store.write(join_uri(place, name), text.encode())


@contextmanager
def _place_for_a_while(options: JobOptions) -> Iterator[str]:
    """An address that nobody else has; whatever lies below it is removed at the end."""
    try:
        above = normalize_uri(options.work or tempfile.gettempdir())
    except StorageError as error:
        error.before_work = True
        raise
    place = join_uri(above, f"quantmill-compare-{uuid.uuid4().hex}")
    try:
        yield place
    finally:
        remove = _remove_files if uri_scheme(place) == "file" else _remove_objects
        if not any(remove(place, options.storage_engine) for _ in range(_LOOKS)):
            raise StorageError(f"{place} could not be removed; it is not needed any more", uri=place)


def _remove_files(place: str, _engine: str) -> bool:
    folder = Path(file_path(place))
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _remove_objects(place: str, engine: str) -> bool:
    store = open_store(place, engine)
    store.abort_uploads(place)
    found = store.list(place)
    for info in found:
        store.delete(info.uri)
    return not found
