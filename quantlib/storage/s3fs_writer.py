"""Streams one object through s3fs as a multipart upload."""

import hashlib
import re
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from quantlib.errors import CheckpointError, ObjectNotFoundError, StorageError
from quantlib.storage.contracts import ObjectInfo
from quantlib.storage.s3_errors import check_upload_gone

if TYPE_CHECKING:
    from quantlib.storage.s3fs_engine import S3fsStore

# S3 allows 10 000 parts: objects of up to 320 GB.
PART_BYTES = 32 << 20
PARTS_IN_FLIGHT = 4
_MD5 = re.compile(r"^[0-9a-f]{32}$")


class S3fsWriter:
    """`contracts.ObjectWriter`: a multipart upload with PARTS_IN_FLIGHT parts of PART_BYTES on the way."""

    info: ObjectInfo

    def __init__(self, store: "S3fsStore", uri: str) -> None:
        self._store = store
        self._uri = uri
        self._buffer = bytearray()
        self._size_bytes = 0
        self._upload_id: str | None = None
        self._parts: list[dict[str, Any]] = []
        self._pending: deque[Future[dict[str, Any]]] = deque()

    def __enter__(self) -> Self:
        return self

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append; parts are sent as they fill."""
        view = memoryview(data).cast("B")
        self._size_bytes += len(view)
        while len(view):
            room = PART_BYTES - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == PART_BYTES:
                self._send_part()

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._abort()
            return
        try:
            self._finish()
        except StorageError as failed:
            self._abort()
            check_upload_gone(failed, self._uri)
            raise
        except CheckpointError:
            self._abort()
            raise

    def _send_part(self) -> None:
        if self._upload_id is None:
            begun = self._store._call("create_multipart_upload", self._uri, "write")
            self._upload_id = begun["UploadId"]
        if len(self._pending) == PARTS_IN_FLIGHT:
            self._collect()
        number = len(self._parts) + len(self._pending) + 1
        content, self._buffer = self._buffer, bytearray()
        self._pending.append(self._store._executor.submit(self._upload, number, content))

    def _upload(self, number: int, content: bytearray) -> dict[str, Any]:
        answer = self._store._call(
            "upload_part",
            self._uri,
            "write",
            UploadId=self._upload_id,
            PartNumber=number,
            Body=content,
        )
        self._store.traffic.count(written=len(content), requests=0)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _collect(self) -> None:
        self._parts.append(self._pending.popleft().result())

    def _finish(self) -> None:
        if self._upload_id is None:
            self.info = self._store.write(self._uri, bytes(self._buffer))
            return
        if self._buffer:
            self._send_part()
        while self._pending:
            self._collect()
        self.info = self._complete()

    def _complete(self) -> ObjectInfo:
        """Have the parts put together; an answer that was lost is settled by looking at the object."""
        try:
            done = self._store._call(
                "complete_multipart_upload",
                self._uri,
                "write",
                UploadId=self._upload_id,
                MultipartUpload={"Parts": self._parts},
            )
        except StorageError as error:
            etag = _multipart_etag(part["ETag"] for part in self._parts)
            if error.facts.get("code") != "NoSuchUpload" or self._present_etag() != etag:
                raise
            return ObjectInfo(uri=self._uri, size_bytes=self._size_bytes, etag=etag)
        return ObjectInfo(uri=self._uri, size_bytes=self._size_bytes, etag=done["ETag"])

    def _present_etag(self) -> str:
        try:
            return self._store.head(self._uri).etag
        except ObjectNotFoundError:
            return ""

    def _abort(self) -> None:
        for future in self._pending:
            future.cancel()
        for future in self._pending:
            # A part that lands after the abort would be kept, and paid for.
            if not future.cancelled():
                future.exception()
        if self._upload_id is not None:
            with suppress(StorageError):
                self._store._abort_upload(self._uri, self._upload_id)


def _multipart_etag(part_etags: Iterable[str]) -> str:
    """The etag that S3 gives to an object of parts: the MD5 of their MD5s, and how many there are.

    ``unknown`` when the etags of the parts are no MD5s.
    """
    digests = [etag.strip('"') for etag in part_etags]
    if not all(_MD5.match(digest) for digest in digests):
        return "unknown"
    joined = hashlib.md5(bytes.fromhex("".join(digests)), usedforsecurity=False).hexdigest()
    return f'"{joined}-{len(digests)}"'
