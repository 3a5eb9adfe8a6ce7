"""Documents of text from storage: parquet, jsonl or txt, one object or a folder of them.

``.parquet`` and ``.jsonl`` / ``.ndjson`` / ``.json`` (one JSON object a line) hold a document in each row's
text column, or a conversation in its column of chat messages; in ``.txt`` documents are separated by blank
lines. All but parquet may end in ``.gz``. Empty documents are passed over. Reading goes through fsspec and
pyarrow, a piece at a time. S3 addresses and credentials come from the standard AWS_* environment
(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...), which the S3 client reads itself.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, Any

import botocore.exceptions
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from quantlib.calibration.chat import Chat, chat_from
from quantlib.errors import CorpusError, StorageError, TransientStorageError

TEXT_COLUMN, CHAT_COLUMN, _TOOLS_COLUMN = "text", "messages", "tools"
# A text, or a conversation.
Document = str | Chat
_PARQUET_ROWS_AT_ONCE = 1024
_PASSING_FAULTS = (
    TimeoutError,
    ConnectionError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
)


class Documents(Iterator[Document]):
    """The documents of a corpus, in file order, read as they are asked for; `read_documents` makes it.

    Attributes:
        column: The column they come from, for all files of the corpus; None before the first document, and
            where there are no columns.
        has_chats: Whether a conversation was among those read so far.
    """

    def __init__(self, filesystem: Any, paths: Sequence[str], text_column: str | None, uri: str) -> None:
        self.column: str | None = None
        self.has_chats = False
        self._wanted = text_column
        self._documents = _documents_of_files(filesystem, paths, self._settled_column, uri)

    def __next__(self) -> Document:
        document = next(self._documents)
        self.has_chats = self.has_chats or isinstance(document, Chat)
        return document

    def _settled_column(self, present: Sequence[str], where: str) -> str:
        """The column to read of a file or row; the first one that has columns settles it for all."""
        if self.column is None:
            usual = CHAT_COLUMN if CHAT_COLUMN in present and TEXT_COLUMN not in present else TEXT_COLUMN
            self.column = self._wanted or usual
        if self.column not in present:
            raise CorpusError(
                f"{where} has no column {self.column!r}, it has {', '.join(present) or 'none'};"
                " choose with --text-column",
                column=self.column,
                present=list(present),
            )
        return self.column


def read_documents(uri: str, text_column: str | None = None) -> Documents:
    """Open a corpus.

    Args:
        uri: ``s3://``, ``file://`` or a path: one file, or a folder whose files are taken in name order
            (files of other kinds, and those whose name begins with ``.`` or ``_``, are passed over).
        text_column: Column of the text, or of chat messages, in parquet and jsonl; by default ``text``, or
            ``messages`` where the first row has no ``text``.

    Returns:
        Documents with at least one character that is not white space, and conversations with at least one
        message. The address is looked up before this returns; faults inside a file show when it is read.

    Raises:
        CorpusError: No such object, unknown kind of file, missing column, a text that is neither text nor
            chat messages, damaged content, no usable document.
        StorageError: Credentials were refused or the request failed.
    """
    with _our_errors(uri):
        filesystem, path = _filesystem_of(uri)
        paths = _corpus_files(filesystem, path, uri)
    return Documents(filesystem, paths, text_column, uri)


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


def _documents_of_files(
    filesystem: Any, paths: Sequence[str], settled_column: "_SettledColumn", uri: str
) -> Iterator[Document]:
    num_documents = 0
    for path in paths:
        compression = "gzip" if path.lower().endswith(".gz") else None
        read = _READERS[_kind_of(path) or ""]
        with _our_errors(path), filesystem.open(path, "rb", compression=compression) as file:
            for document in read(file, settled_column, path):
                if isinstance(document, Chat) or document.strip():
                    num_documents += 1
                    yield document
    if num_documents == 0:
        raise CorpusError(f"{uri} holds no usable text: there is no document, or all are empty", uri=uri)


def _kind_of(path: str) -> str | None:
    name = path.lower()
    kind = PurePosixPath(name.removesuffix(".gz")).suffix
    return None if kind not in _READERS or (kind == ".parquet" and name.endswith(".gz")) else kind


def _documents_of_parquet(file: IO[bytes], settled_column: "_SettledColumn", path: str) -> Iterator[Document]:
    parquet = pq.ParquetFile(file)
    schema = parquet.schema_arrow
    column = settled_column(schema.names, path)
    column_type = schema.field(column).type
    if not _is_text(column_type) and not _is_chat(column_type):
        raise CorpusError(
            f"column {column!r} of {path} holds {column_type}, text is wanted, or chat messages;"
            " choose another --text-column",
            path=path,
            column=column,
        )
    has_tools = _is_chat(column_type) and _TOOLS_COLUMN in schema.names
    columns = [column, _TOOLS_COLUMN] if has_tools else [column]
    number = 0
    for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE, columns=columns):
        for row in batch.to_pylist():
            number += 1
            document = _document_of(row, column, f"row {number} of {path}")
            if document is not None:
                yield document


def _is_text(found: pa.DataType) -> bool:
    values = found.value_type if pa.types.is_dictionary(found) else found
    return any(is_text(values) for is_text in _ARROW_TEXT)


def _is_chat(found: pa.DataType) -> bool:
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
    return is_list and pa.types.is_struct(found.value_type)


def _document_of(row: dict[str, Any], column: str, where: str) -> Document | None:
    value = row[column]
    if value is None or isinstance(value, str):
        return value
    return chat_from(value, row.get(_TOOLS_COLUMN), where)


def _documents_of_json_lines(
    file: IO[bytes], settled_column: "_SettledColumn", path: str
) -> Iterator[Document]:
    for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{where} is no JSON: {error}", path=path, line=number) from error
        if not isinstance(row, dict):
            raise CorpusError(
                f"{where} is a JSON {type(row).__name__}; every line must be an object with a column of text"
                " or of chat messages",
                path=path,
                line=number,
            )
        column = settled_column(list(row), where)
        if not isinstance(row[column], str | list | None):
            raise CorpusError(
                f"{column!r} in {where} is a JSON {type(row[column]).__name__}, text is wanted, or chat"
                " messages; choose another --text-column",
                path=path,
                line=number,
            )
        document = _document_of(row, column, where)
        if document is not None:
            yield document


def _documents_of_plain_text(
    file: IO[bytes],
    settled_column: "_SettledColumn",  # noqa: ARG001
    path: str,  # noqa: ARG001
) -> Iterator[Document]:
    lines: list[str] = []
    for line in io.TextIOWrapper(file, encoding="utf-8-sig"):
        if line.strip():
            lines.append(line.rstrip("\n"))
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


# (columns that are present, where) -> the one to read.
_SettledColumn = Callable[[Sequence[str], str], str]
_READERS: dict[str, Callable[[IO[bytes], _SettledColumn, str], Iterator[Document]]] = {
    ".parquet": _documents_of_parquet,
    ".jsonl": _documents_of_json_lines,
    ".ndjson": _documents_of_json_lines,
    ".json": _documents_of_json_lines,
    ".txt": _documents_of_plain_text,
}
_ARROW_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


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
