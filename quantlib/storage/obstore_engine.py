"""S3 through obstore (a Rust client): the default engine.

Requests are retried with backoff for RETRY_TIMEOUT_S, which rides out a restarted server; what obstore
itself gives up too early is repeated by `retries`. The first contact with a bucket is retried only briefly,
so that a mistyped endpoint is told at once. Left to s3fs: listing unfinished uploads, which obstore cannot.
"""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store

from quantlib.errors import CheckpointError, StorageError, TransientStorageError
from quantlib.storage import s3_settings
from quantlib.storage.contracts import ObjectInfo
from quantlib.storage.ranges import MAX_IN_FLIGHT, fetch_ranges
from quantlib.storage.retries import read_undamaged, repeated, store_conditionally
from quantlib.storage.s3_errors import check_upload_gone, s3_error, unreachable
from quantlib.storage.traffic import Traffic
from quantlib.storage.uris import bucket_and_key

if TYPE_CHECKING:
    from obstore import PutMode
    from obstore.store import ClientConfig, RetryConfig

_T = TypeVar("_T")
# S3 allows 10 000 parts: objects of up to 320 GB.
PART_BYTES = 32 << 20
PARTS_IN_FLIGHT = 4
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
# An answer that does not parse was damaged or cut off on its way.
_DAMAGED = re.compile(r"Got invalid \w+ response")
_CAUSE = re.compile(r'message: "([^"]+)"')


class ObstoreStore:
    """`contracts.Store` over S3 with obstore."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._settings = s3_settings.read_s3_settings()
        self._executor = ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="obstore-read")
        self._lock = threading.Lock()
        self._buckets: dict[str, S3Store] = {}

    def head(self, uri: str) -> ObjectInfo:
        """Size, etag and time of one object."""
        self.traffic.count()
        return _info(uri, self._call(uri, "read", obstore.head, probe=True))

    def list(self, prefix_uri: str, *, recursive: bool = True) -> Sequence[ObjectInfo]:
        """All objects below a prefix, sorted by uri."""
        self.traffic.count()
        name, prefix = bucket_and_key(prefix_uri)

        def list_all(bucket: S3Store, key: str) -> list[Any]:
            if not recursive:
                return list(obstore.list_with_delimiter(bucket, key or None)["objects"])
            return [item for page in obstore.list(bucket, key or None, chunk_size=1000) for item in page]

        found = self._call(prefix_uri, "list", list_all)
        # A "folder" made by a console is an empty object whose path is the prefix itself.
        kept = [_info(f"s3://{name}/{item['path']}", item) for item in found if item["path"] != prefix]
        return sorted(kept, key=lambda info: info.uri)

    def read(self, uri: str) -> bytes:
        """A whole small object."""
        return self.read_with_info(uri)[0]

    def read_with_info(self, uri: str) -> tuple[bytes, ObjectInfo]:
        """A whole small object with the etag of that very version."""
        self._locate(uri)
        content, info = repeated(lambda: self._read_once(uri))
        self.traffic.count(read=len(content))
        return content, info

    def read_ranges(self, info: ObjectInfo, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview]:
        """Byte ranges of the very object that ``info`` describes."""

        def fetch(start: int, end: int) -> memoryview:
            def get(bucket: S3Store, key: str) -> tuple[memoryview, str | None]:
                answer = obstore.get(bucket, key, options={"range": (start, end), "if_match": info.etag})
                return memoryview(answer.bytes()), answer.meta["e_tag"]

            content, etag = self._call(info.uri, "read", get)
            self.traffic.count(read=len(content))
            # Some servers ignore the condition.
            if etag != info.etag:
                raise _changed(info.uri)
            return content

        return fetch_ranges(info, ranges, fetch, self._executor)

    def open_writer(self, uri: str) -> "ObstoreWriter":
        """Begin to stream an object."""
        return ObstoreWriter(self, uri)

    def write(self, uri: str, data: bytes) -> ObjectInfo:
        """Store a small object, replacing what is there."""
        stored = self._call(uri, "write", lambda b, key: obstore.put(b, key, data, use_multipart=False))
        self.traffic.count(written=len(data))
        return ObjectInfo(uri=uri, size_bytes=len(data), etag=stored["e_tag"] or "")

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Store a small object unless there is one already; says whether it was stored."""
        return self._store_conditionally(uri, data, etag=None) is not None

    def replace_if_match(self, uri: str, data: bytes, etag: str) -> ObjectInfo | None:
        """Store a small object only while the one that is there still has this etag."""
        return self._store_conditionally(uri, data, etag=etag)

    def abort_uploads(self, prefix_uri: str) -> int:
        """Give up unfinished multipart uploads below a prefix; how many there were."""
        # Imported here: half a second that only this call needs.
        from quantlib.storage.s3fs_engine import S3fsStore

        return S3fsStore(self.traffic).abort_uploads(prefix_uri)

    def delete(self, uri: str) -> None:
        """Remove one object; no error when there is none."""
        self.traffic.count()
        self._call(uri, "delete", obstore.delete)

    def _read_once(self, uri: str) -> tuple[bytes, ObjectInfo]:
        bucket, key = self._locate(uri)

        def fetch() -> tuple[bytes, str]:
            with self._translated(uri, "read"):
                answer = obstore.get(bucket, key)
                content, size_bytes = answer.bytes().to_bytes(), answer.meta["size"]
            if len(content) != size_bytes:
                raise TransientStorageError(
                    f"{uri} has {size_bytes} bytes, {len(content)} came back; try again", uri=uri
                )
            return content, answer.meta["e_tag"] or ""

        content, etag = read_undamaged(fetch, uri)
        return content, ObjectInfo(uri=uri, size_bytes=len(content), etag=etag)

    def _store_conditionally(self, uri: str, data: bytes, *, etag: str | None) -> ObjectInfo | None:
        bucket, key = self._locate(uri)
        self.traffic.count(written=len(data))
        mode: PutMode = "create" if etag is None else {"e_tag": etag}

        def put() -> ObjectInfo | None:
            with self._translated(uri, "write"):
                try:
                    stored = obstore.put(bucket, key, data, mode=mode, use_multipart=False)
                except (AlreadyExistsError, PreconditionError):
                    return None
            return ObjectInfo(uri=uri, size_bytes=len(data), etag=stored["e_tag"] or "")

        return store_conditionally(put, lambda: self._read_once(uri), data, uri=uri, etag=etag)

    def _call(
        self, uri: str, action: str, request: Callable[[S3Store, str], _T], *, probe: bool = False
    ) -> _T:
        """One request, repeated while its error may pass."""
        bucket, key = self._locate(uri)

        def attempt() -> _T:
            with self._translated(uri, action, probe=probe):
                return request(bucket, key)

        return repeated(attempt)

    def _locate(self, uri: str) -> tuple[S3Store, str]:
        name, key = bucket_and_key(uri)
        with self._lock:
            bucket = self._buckets.get(name)
        if bucket is None:
            # Not under the lock: where nobody answers, threads would wait for each other one by one.
            self._reach(name, key, uri)
            bucket = self._open(name)
            with self._lock:
                bucket = self._buckets.setdefault(name, bucket)
        return bucket, key

    def _reach(self, bucket: str, key: str, uri: str) -> None:
        """Find out at once when nobody answers; any answer, even a refusal, is good enough here."""
        try:
            obstore.head(self._open(bucket, first_contact=True), key or "config.json")
        except (BaseError, OSError, ValueError) as error:
            if _code(error) is None:
                raise self._translate(error, uri, "read", probe=False) from error

    def _open(self, bucket: str, *, first_contact: bool = False) -> S3Store:
        settings = self._settings
        credentials = settings.credentials
        limit_s = s3_settings.CONTACT_TIMEOUT_S if first_contact else s3_settings.REQUEST_TIMEOUT_S
        client: ClientConfig = {
            "allow_http": (settings.endpoint or "").startswith("http://"),
            "connect_timeout": timedelta(seconds=s3_settings.CONNECT_TIMEOUT_S),
            "read_timeout": timedelta(seconds=s3_settings.READ_TIMEOUT_S),
            "timeout": timedelta(seconds=limit_s),
        }
        retry: RetryConfig = {
            "max_retries": 1 if first_contact else s3_settings.MAX_RETRIES,
            "retry_timeout": timedelta(seconds=s3_settings.RETRY_TIMEOUT_S),
            "backoff": {
                "init_backoff": timedelta(seconds=s3_settings.FIRST_BACKOFF_S),
                "max_backoff": timedelta(seconds=s3_settings.MAX_BACKOFF_S),
                "base": 2,
            },
        }
        more: dict[str, Any] = {"endpoint": settings.endpoint} if settings.endpoint else {}
        if credentials is not None:
            more["credential_provider"] = lambda: s3_settings.frozen_credentials(credentials)
        else:
            more["skip_signature"] = True
        if settings.sends_checksums:
            # Not every server compares the body with its signature; with a checksum they do.
            more["checksum_algorithm"] = "SHA256"
        return S3Store(bucket, region=settings.region, client_options=client, retry_config=retry, **more)

    @contextmanager
    def _translated(self, uri: str, action: str, *, probe: bool = False) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise self._translate(error, uri, action, probe=probe) from error

    def _translate(
        self, error: Exception, uri: str, action: str, *, probe: bool
    ) -> StorageError | CheckpointError:
        """Our error for one of obstore's.

        Args:
            error: What obstore raised; its message quotes the server's answer.
            uri: The object or prefix.
            action: What was attempted.
            probe: True when the answer had no body (HEAD), so that the reason must be asked for again.
        """
        if isinstance(error, PreconditionError):
            return _changed(uri)
        code = _code(error)
        if probe and code is not None and code.isdigit():
            code = self._reason(uri) or code
        if code is not None:
            return s3_error(code, action=action, uri=uri, place=self._settings.place)
        cause = _CAUSE.search(str(error))
        if "HTTP error" in str(error) or cause:
            return unreachable(
                action=action,
                uri=uri,
                place=self._settings.place,
                cause=cause.group(1) if cause else "no answer",
            )
        first_line = str(error).partition("\n")[0]
        kind = TransientStorageError if _DAMAGED.search(first_line) else StorageError
        return kind(f"{self._settings.place} would not {action} {uri}: {first_line}", uri=uri)

    def _reason(self, uri: str) -> str | None:
        """The code with which the server refuses a listing, which has a body; None when it does not."""
        bucket, key = self._locate(uri)
        try:
            next(iter(obstore.list(bucket, key, chunk_size=1)), None)
        except (BaseError, OSError) as error:
            code = _code(error)
            return None if code in ("AccessDenied", "NoSuchKey") else code
        return None


class ObstoreWriter:
    """`contracts.ObjectWriter`: a multipart upload with PARTS_IN_FLIGHT parts of PART_BYTES on the way."""

    info: ObjectInfo

    def __init__(self, store: ObstoreStore, uri: str) -> None:
        self._store = store
        self._uri = uri
        self._size_bytes = 0

    def __enter__(self) -> Self:
        bucket, key = self._store._locate(self._uri)
        self._writer = obstore.open_writer(
            bucket, key, buffer_size=PART_BYTES, max_concurrency=PARTS_IN_FLIGHT
        )
        return self

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append; parts are sent as they fill."""
        with self._store._translated(self._uri, "write"):
            view = memoryview(data).cast("B")
            for start in range(0, len(view), PART_BYTES):
                # A copy: obstore keeps a reference, and the caller may reuse its memory.
                self._writer.write(bytes(view[start : start + PART_BYTES]))
        self._size_bytes += len(view)

    def __exit__(self, *error: object) -> None:
        requests = max(1, -(-self._size_bytes // PART_BYTES))
        self._store.traffic.count(written=self._size_bytes, requests=requests)
        if error[0] is not None:
            # obstore aborts the upload when its block ends with an error; it may complain about the upload.
            with suppress(BaseError, OSError):
                self._writer.__exit__(*error)
            return
        try:
            # On an error obstore gives up the upload by itself.
            with self._store._translated(self._uri, "write"):
                self._writer.close()
        except StorageError as failed:
            check_upload_gone(failed, self._uri)
            raise
        self.info = self._store.head(self._uri)
        if self.info.size_bytes != self._size_bytes:
            raise StorageError(
                f"{self._size_bytes} bytes of {self._uri} were sent, {self.info.size_bytes} are stored;"
                " somebody else writes the same object",
                uri=self._uri,
            )


def _code(error: Exception) -> str | None:
    """The S3 error code in obstore's message, or the HTTP status, or None when there was no answer."""
    text = str(error)
    found = _CODE.search(text) or _STATUS.search(text)
    return found.group(1) if found else None


def _info(uri: str, found: Any) -> ObjectInfo:
    return ObjectInfo(
        uri=uri,
        size_bytes=found["size"],
        etag=found["e_tag"] or "",
        modified_s=found["last_modified"].timestamp(),
    )


def _changed(uri: str) -> CheckpointError:
    return CheckpointError(f"{uri} was replaced while in use; begin again with the new object", uri=uri)
