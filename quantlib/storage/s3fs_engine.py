"""S3 through s3fs: the engine for sites that standardise on fsspec.

s3fs gives the session and the event loop; the requests are those of its underlying client, because pinned
reads (If-Match), conditional puts (If-None-Match), aborted uploads and time limits need exact control.
Measured against obstore it needs about twice the CPU time and moves as many bytes a second or fewer.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import s3fs
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError
from fsspec.asyn import sync
from s3fs.core import S3_RETRYABLE_ERRORS

from quantlib.errors import CheckpointError, ChecksumError, StorageError, TransientStorageError
from quantlib.storage import s3_settings
from quantlib.storage.contracts import ObjectInfo
from quantlib.storage.ranges import MAX_IN_FLIGHT, fetch_ranges
from quantlib.storage.retries import read_undamaged, repeated, store_conditionally
from quantlib.storage.s3_errors import s3_error, unreachable
from quantlib.storage.s3fs_writer import S3fsWriter
from quantlib.storage.traffic import Traffic
from quantlib.storage.uris import bucket_and_key

# The most that S3 gives in one page of unfinished uploads.
UPLOADS_PER_PAGE = 1000
_T = TypeVar("_T")
_ERRORS = (ClientError, BotoCoreError, OSError, *S3_RETRYABLE_ERRORS)


class S3fsStore:
    """`contracts.Store` over S3 with s3fs."""

    def __init__(self, traffic: Traffic | None = None) -> None:
        self.traffic = traffic or Traffic()
        self._settings = s3_settings.read_s3_settings()
        self._executor = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="s3fs")
        self._fs = self._open()
        self._lock = threading.Lock()
        self._reached: set[str] = set()

    def head(self, uri: str) -> ObjectInfo:
        """Size, etag and time of one object."""
        found = self._call("head_object", uri, "read")
        return ObjectInfo(
            uri=uri,
            size_bytes=found["ContentLength"],
            etag=found["ETag"],
            modified_s=found["LastModified"].timestamp(),
        )

    def list(self, prefix_uri: str, *, recursive: bool = True) -> Sequence[ObjectInfo]:
        """All objects below a prefix, sorted by uri."""
        bucket, prefix = bucket_and_key(prefix_uri)
        more: dict[str, str] = {} if recursive else {"Delimiter": "/"}
        found: list[ObjectInfo] = []
        while True:
            page = self._call(
                "list_objects_v2", prefix_uri, "list", Prefix=f"{prefix}/" if prefix else "", **more
            )
            for item in page.get("Contents", []):
                # A "folder" made by a console is an empty object whose key ends in a slash.
                if not item["Key"].endswith("/"):
                    found.append(
                        ObjectInfo(
                            uri=f"s3://{bucket}/{item['Key']}",
                            size_bytes=item["Size"],
                            etag=item["ETag"],
                            modified_s=item["LastModified"].timestamp(),
                        )
                    )
            if not page.get("IsTruncated"):
                return sorted(found, key=lambda info: info.uri)
            more["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, uri: str) -> bytes:
        """A whole small object."""
        return self.read_with_info(uri)[0]

    def read_with_info(self, uri: str) -> tuple[bytes, ObjectInfo]:
        """A whole small object with the etag of that very version."""
        self._reach(uri)
        content, info = repeated(lambda: self._read_once(uri))
        self.traffic.count(read=len(content))
        return content, info

    def read_ranges(self, info: ObjectInfo, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview]:
        """Byte ranges of the very object that ``info`` describes."""
        self._reach(info.uri)

        def fetch(start: int, end: int) -> memoryview:
            asked = {"Range": f"bytes={start}-{end - 1}", "IfMatch": info.etag}
            content, etag = repeated(lambda: self._get(info.uri, **asked))
            self.traffic.count(read=len(content))
            # Some servers ignore the condition.
            if etag != info.etag:
                raise _changed(info.uri)
            return memoryview(content)

        return fetch_ranges(info, ranges, fetch, self._executor)

    def open_writer(self, uri: str) -> S3fsWriter:
        """Begin to stream an object."""
        return S3fsWriter(self, uri)

    def write(self, uri: str, data: bytes) -> ObjectInfo:
        """Store a small object, replacing what is there."""
        stored = self._call("put_object", uri, "write", Body=data)
        self.traffic.count(written=len(data), requests=0)
        return ObjectInfo(uri=uri, size_bytes=len(data), etag=stored["ETag"])

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Store a small object unless there is one already; says whether it was stored."""
        return self._store_conditionally(uri, data, etag=None) is not None

    def replace_if_match(self, uri: str, data: bytes, etag: str) -> ObjectInfo | None:
        """Store a small object only while the one that is there still has this etag."""
        return self._store_conditionally(uri, data, etag=etag)

    def abort_uploads(self, prefix_uri: str) -> int:
        """Give up unfinished multipart uploads below a prefix; how many there were."""
        bucket, prefix = bucket_and_key(prefix_uri)
        found: list[tuple[str, str]] = []
        more: dict[str, str] = {}
        while True:
            page = self._call(
                "list_multipart_uploads",
                prefix_uri,
                "list",
                Prefix=f"{prefix}/" if prefix else "",
                MaxUploads=UPLOADS_PER_PAGE,
                **more,
            )
            found += [(upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", [])]
            marks = {name: page.get(f"Next{name}") for name in ("KeyMarker", "UploadIdMarker")}
            more = {name: mark for name, mark in marks.items() if mark}
            if not page.get("IsTruncated") or not more:
                break
        return sum(self._abort_upload(f"s3://{bucket}/{key}", upload_id) for key, upload_id in found)

    def delete(self, uri: str) -> None:
        """Remove one object; no error when there is none."""
        self._call("delete_object", uri, "delete")

    def _open(self, *, first_contact: bool = False) -> s3fs.S3FileSystem:
        settings = self._settings
        timeout_s = s3_settings.CONTACT_TIMEOUT_S if first_contact else s3_settings.READ_TIMEOUT_S
        config: dict[str, Any] = {
            "retries": {"mode": "standard", "max_attempts": 2 if first_contact else s3_settings.MAX_RETRIES},
            "connect_timeout": s3_settings.CONNECT_TIMEOUT_S,
            "read_timeout": timeout_s,
        }
        if settings.endpoint:
            config["s3"] = {"addressing_style": "path"}
        return s3fs.S3FileSystem(
            anon=settings.credentials is None,
            endpoint_url=settings.endpoint,
            client_kwargs={"region_name": settings.region},
            config_kwargs=config,
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def _call(self, method: str, uri: str, action: str, **more: Any) -> dict[str, Any]:
        """One request without a streamed answer, repeated while its error may pass."""
        self._reach(uri)
        self.traffic.count()
        return repeated(lambda: self._send(method, uri, action, **more))

    def _send(self, method: str, uri: str, action: str, **more: Any) -> dict[str, Any]:
        bucket, key = bucket_and_key(uri)
        if action != "list":
            more["Key"] = key

        async def request() -> dict[str, Any]:
            client = await self._fs.set_session()
            return await getattr(client, method)(Bucket=bucket, **more)

        with self._translated(uri, action, has_body=method != "head_object"):
            return _in_time(self._fs, request, s3_settings.REQUEST_LIMIT_S)

    def _get(self, uri: str, **more: str) -> tuple[bytes, str]:
        """Content and etag of (a range of) an object, asked for once."""
        bucket, key = bucket_and_key(uri)

        async def get() -> tuple[bytes, str]:
            client = await self._fs.set_session()
            answer = await client.get_object(Bucket=bucket, Key=key, **more)
            async with answer["Body"] as body:
                content = await body.read()
            if len(content) != answer["ContentLength"]:
                raise TransientStorageError(
                    f"{uri} was to bring {answer['ContentLength']} bytes, {len(content)} came; try again",
                    uri=uri,
                )
            return content, answer["ETag"]

        with self._translated(uri, "read"):
            return _in_time(self._fs, get, s3_settings.REQUEST_LIMIT_S)

    def _read_once(self, uri: str) -> tuple[bytes, ObjectInfo]:
        content, etag = read_undamaged(lambda: self._get(uri), uri)
        return content, ObjectInfo(uri=uri, size_bytes=len(content), etag=etag)

    def _store_conditionally(self, uri: str, data: bytes, *, etag: str | None) -> ObjectInfo | None:
        self._reach(uri)
        self.traffic.count(written=len(data))
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}

        def put() -> ObjectInfo | None:
            try:
                stored = self._send("put_object", uri, "write", Body=data, **condition)
            except CheckpointError:
                return None
            return ObjectInfo(uri=uri, size_bytes=len(data), etag=stored["ETag"])

        return store_conditionally(put, lambda: self._read_once(uri), data, uri=uri, etag=etag)

    def _abort_upload(self, uri: str, upload_id: str) -> bool:
        """Give up one upload; False when it was gone already."""
        try:
            self._call("abort_multipart_upload", uri, "delete", UploadId=upload_id)
        except StorageError as error:
            if error.facts.get("code") not in ("NoSuchUpload", "NoSuchKey"):
                raise
            return False
        return True

    def _reach(self, uri: str) -> None:
        """On first contact find out at once when nobody answers; any answer will do."""
        bucket, _ = bucket_and_key(uri)
        with self._lock:
            if bucket in self._reached:
                return
        # Not under the lock: where nobody answers, threads would wait for each other one by one.
        probe = self._open(first_contact=True)

        async def request() -> None:
            client = await probe.set_session()
            await client.head_bucket(Bucket=bucket)

        try:
            _in_time(probe, request, s3_settings.CONTACT_LIMIT_S)
        except _ERRORS as error:
            if _code(error) is None:
                raise self._translate(error, uri, "read") from error
        with self._lock:
            self._reached.add(bucket)

    @contextmanager
    def _translated(self, uri: str, action: str, *, has_body: bool = True) -> Iterator[None]:
        try:
            yield
        except _ERRORS as error:
            code = _code(error)
            if not has_body and code is not None and code.isdigit():
                code = self._reason(uri) or code
            raise self._translate(error, uri, action, code) from error

    def _translate(
        self, error: Exception, uri: str, action: str, code: str | None = None
    ) -> StorageError | CheckpointError:
        place = self._settings.place
        if isinstance(error, FlexibleChecksumError):
            return ChecksumError(f"bytes of {uri} arrived damaged from {place}; try again", uri=uri)
        if code in ("PreconditionFailed", "412"):
            return _changed(uri)
        if code is not None:
            return s3_error(code, action=action, uri=uri, place=place)
        cause = type(error).__name__ if not isinstance(error, BotoCoreError) else str(error)
        return unreachable(action=action, uri=uri, place=place, cause=cause)

    def _reason(self, uri: str) -> str | None:
        """The code with which the server refuses a listing, which has a body; None when it does not."""
        bucket, key = bucket_and_key(uri)

        async def request() -> None:
            client = await self._fs.set_session()
            await client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)

        try:
            _in_time(self._fs, request, s3_settings.REQUEST_LIMIT_S)
        except _ERRORS as error:
            code = _code(error)
            return None if code in ("AccessDenied", "NoSuchKey") else code
        return None


def _in_time(fs: s3fs.S3FileSystem, request: Callable[[], Awaitable[_T]], limit_s: float) -> _T:
    """Run a request on the file system's event loop; cancelled, with a TimeoutError, at the limit."""

    async def limited() -> _T:
        return await asyncio.wait_for(request(), limit_s)

    answer: Any = sync(fs.loop, limited)
    return answer


def _code(error: Exception) -> str | None:
    """The S3 error code, or the HTTP status as text, or None when there was no answer.

    s3fs turns the client's errors into the operating system's and keeps the original as their cause.
    """
    answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return str(answer["Error"].get("Code")) if isinstance(answer, dict) and "Error" in answer else None


def _changed(uri: str) -> CheckpointError:
    return CheckpointError(f"{uri} was replaced while in use; begin again with the new object", uri=uri)
