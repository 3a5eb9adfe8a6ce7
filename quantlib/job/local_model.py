"""A staged output as a local folder that loads as any checkpoint, for as long as a hook wants it."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantlib.errors import NoSpaceError
from quantlib.job.report import REPORT_NAME
from quantlib.job.report_figures import size
from quantlib.job.staged_output import StagedOutput
from quantlib.storage import join_uri
from quantlib.storage.uris import file_path, uri_scheme

_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlaces:
    """What a hook is told of.

    Attributes:
        model: Folder of config, index, tokenizer and shards; empty where no model was wanted.
        report: JSON file.
    """

    model: Path
    report: Path


@contextmanager
def local_places(
    staged: StagedOutput, *, has_model: bool, refuse_if_stopped: Callable[[], None]
) -> Iterator[LocalPlaces]:
    """Lay out what a hook reads, in the folder for temporary files; it is removed at the end.

    Shards in a file system are links; others are fetched.

    Args:
        has_model: Whether the hook reads the model, too.
        refuse_if_stopped: Is asked before every piece that is fetched.

    Raises:
        NoSpaceError: There is no room for the shards.
    """
    with tempfile.TemporaryDirectory(prefix="quantmill-hook-") as folder:
        places = LocalPlaces(model=Path(folder) / "model", report=Path(folder) / REPORT_NAME)
        places.report.write_text(json.dumps(staged.report, indent=1, allow_nan=False), encoding="utf-8")
        places.model.mkdir()
        if has_model:
            _lay_out(staged, places.model, refuse_if_stopped)
        yield places


def _lay_out(staged: StagedOutput, folder: Path, refuse_if_stopped: Callable[[], None]) -> None:
    is_local = uri_scheme(staged.output) == "file"
    if not is_local:
        _refuse_if_full(staged, folder)
    for name in staged.file_names():
        (folder / name).write_bytes(staged.read_file(name))
    for shard in staged.report["shards"]:
        uri, target = join_uri(staged.output, shard["name"]), folder / shard["name"]
        if is_local:
            target.symlink_to(file_path(uri))
        else:
            _fetch(staged, uri, target, refuse_if_stopped)


def _refuse_if_full(staged: StagedOutput, folder: Path) -> None:
    needed = sum(shard["size_bytes"] for shard in staged.report["shards"])
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoSpaceError(
            f"the hook reads the model of {staged.output} in a local folder: that takes {size(needed)}, and"
            f" {tempfile.gettempdir()} has {size(free)}; name a larger place by TMPDIR, or a hook that reads"
            " {output}",
            uri=staged.output,
        )


def _fetch(staged: StagedOutput, uri: str, target: Path, refuse_if_stopped: Callable[[], None]) -> None:
    store = staged.output_store
    info = store.head(uri)
    with target.open("wb") as file:
        for start in range(0, info.size_bytes, _PIECE_BYTES):
            refuse_if_stopped()
            (piece,) = store.read_ranges(info, [(start, min(start + _PIECE_BYTES, info.size_bytes))])
            file.write(piece)
