"""Documents of text from storage: parquet, jsonl or txt, one object or a folder of them.

``.parquet`` and ``.jsonl`` / ``.ndjson`` / ``.json`` (one JSON object a line) hold a document in each row's
text column; in ``.txt`` documents are separated by blank lines. All but parquet may end in ``.gz``. Empty
documents are passed over. Reading goes through fsspec and pyarrow, a piece at a time. S3 addresses and
credentials come from the standard AWS_* environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...), which the S3
client reads itself.

Left out: chat messages, and mixes of several corpora.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any

import botocore.exceptions
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from quantlib.errors import CorpusError, StorageError, TransientStorageError

_PARQUET_ROWS_AT_ONCE = 1024
_PASSING_FAULTS = (
    TimeoutError,
    ConnectionError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
)


def read_documents(uri: str, text_column: str = "text") -> Iterator[str]:
    """The documents of a corpus, in file order, read as they are asked for.

    Args:
        uri: ``s3://``, ``file://`` or a path: one file, or a folder whose files are taken in name order
            (files of other kinds, and those whose name begins with ``.`` or ``_``, are passed over).
        text_column: Column of the text in parquet and jsonl.

    Returns:
        Documents with at least one character that is not white space. The address is looked up before this
        returns; faults inside a file show when it is read.

    Raises:
        CorpusError: No such object, unknown kind of file, missing column, a text that is no string, damaged
            content, no usable document.
        StorageError: Credentials were refused or the request failed.
    """
    with _our_errors(uri):
        filesystem, path = _filesystem_of(uri)
        paths = _corpus_files(filesystem, path, uri)
    return _documents_of_files(filesystem, paths, text_column, uri)


def _filesystem_of(uri: str) -> tuple[Any, str]:
    if uri.startswith("s3://"):
        # An S3 client remembers listings and the environment it was made in; neither may outlive this read.
        return fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False), uri[5:]
    path = uri.removeprefix("file://")
    if "://" in path:
        raise CorpusError(f"text is read from s3://, file:// or a path, not from {uri}", uri=uri)
    return fsspec.filesystem("file"), path


def _corpus_files(filesystem: Any, path: str, uri: str) -> list[str]:
    endings = f"{', '.join(_READERS)} (all but .parquet also with .gz)"
    if filesystem.info(path)["type"] != "directory":
        if _kind_of(path) is None:
            raise CorpusError(f"{uri} has an unknown ending; text is read from {endings}", uri=uri)
        return [path]
    found = [file for file in sorted(filesystem.find(path)) if _kind_of(file) is not None]
    paths = [file for file in found if not PurePosixPath(file).name.startswith((".", "_"))]
    if not paths:
        raise CorpusError(f"folder {uri} holds no text; it is read from {endings}", uri=uri)
    return paths


def _documents_of_files(filesystem: Any, paths: list[str], text_column: str, uri: str) -> Iterator[str]:
    num_documents = 0
    for path in paths:
        compression = "gzip" if path.lower().endswith(".gz") else None
        read = _READERS[_kind_of(path) or ""]
        with _our_errors(path), filesystem.open(path, "rb", compression=compression) as file:
            for document in read(file, text_column, path):
                if document.strip():
                    num_documents += 1
                    yield document
    if num_documents == 0:
        raise CorpusError(f"{uri} holds no usable text: there is no document, or all are empty", uri=uri)


def _kind_of(path: str) -> str | None:
    name = path.lower()
    kind = PurePosixPath(name.removesuffix(".gz")).suffix
    return None if kind not in _READERS or (kind == ".parquet" and name.endswith(".gz")) else kind


def _documents_of_parquet(file: IO[bytes], text_column: str, path: str) -> Iterator[str]:
    parquet = pq.ParquetFile(file)
    schema = parquet.schema_arrow
    if text_column not in schema.names:
        raise _missing_column(path, text_column, schema.names)
    column_type = schema.field(text_column).type
    values_type = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
    if not any(is_text(values_type) for is_text in _ARROW_TEXT):
        raise CorpusError(
            f"column {text_column!r} of {path} holds {column_type}, text is wanted;"
            " choose another --text-column",
            path=path,
            column=text_column,
        )
    for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE, columns=[text_column]):
        yield from (document for document in batch.column(0).to_pylist() if document is not None)


def _documents_of_json_lines(file: IO[bytes], text_column: str, path: str) -> Iterator[str]:
    for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorpusError(
                f"line {number} of {path} is no JSON: {error}", path=path, line=number
            ) from error
        if not isinstance(row, dict):
            raise CorpusError(
                f"line {number} of {path} is a JSON {type(row).__name__}; every line must be an object with"
                f" a {text_column!r} key",
                path=path,
                line=number,
            )
        if text_column not in row:
            raise _missing_column(f"line {number} of {path}", text_column, list(row))
        text = row[text_column]
        if isinstance(text, str):
            yield text
        elif text is not None:
            raise CorpusError(
                f"{text_column!r} in line {number} of {path} is a JSON {type(text).__name__}, text is wanted;"
                " choose another --text-column",
                path=path,
                line=number,
            )


def _documents_of_plain_text(file: IO[bytes], text_column: str, path: str) -> Iterator[str]:  # noqa: ARG001
    lines: list[str] = []
    for line in io.TextIOWrapper(file, encoding="utf-8-sig"):
        if line.strip():
            lines.append(line.rstrip("\n"))
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


_READERS: dict[str, Callable[[IO[bytes], str, str], Iterator[str]]] = {
    ".parquet": _documents_of_parquet,
    ".jsonl": _documents_of_json_lines,
    ".ndjson": _documents_of_json_lines,
    ".json": _documents_of_json_lines,
    ".txt": _documents_of_plain_text,
}
_ARROW_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def _missing_column(where: str, text_column: str, present: list[str]) -> CorpusError:
    return CorpusError(
        f"{where} has no column {text_column!r}, it has {', '.join(present) or 'none'};"
        " choose with --text-column",
        column=text_column,
        present=present,
    )


@contextmanager
def _our_errors(where: str) -> Iterator[None]:
    """Errors of fsspec, its clients and pyarrow as ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise CorpusError(f"there is no text at {where}; check the address", uri=where) from error
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise CorpusError(f"{where} is damaged or not what its ending says: {error}", uri=where) from error
    except _PASSING_FAULTS as error:
        raise TransientStorageError(f"reading {where} failed: {error}", uri=where) from error
    except PermissionError as error:
        raise StorageError(
            f"access to {where} was refused: {error}; check the credentials and permissions", uri=where
        ) from error
    except (OSError, botocore.exceptions.BotoCoreError) as error:
        raise StorageError(f"{where} cannot be read: {error}", uri=where) from error
