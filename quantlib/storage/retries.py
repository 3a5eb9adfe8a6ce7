"""The policies for faults that an engine's own retries leave over, the same for both S3 engines.

An engine repeats what got no answer or a 5xx. Left over are answers that broke off, bytes that arrived
damaged, and conditional writes whose answer was lost: repeated by the engine, such a write meets its own
success and looks like a lost race.
"""

import hashlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from quantlib.errors import ChecksumError, ObjectNotFoundError, TransientStorageError
from quantlib.storage import s3_settings
from quantlib.storage.contracts import ObjectInfo

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_MD5 = re.compile(r'^"[0-9a-f]{32}"$')


def repeated(attempt: Callable[[], _T]) -> _T:
    """Call until it ends without an error that may pass; none begins after s3_settings.RETRY_TIMEOUT_S."""
    deadline = time.monotonic() + s3_settings.RETRY_TIMEOUT_S
    for pause_s in _pauses():
        try:
            return attempt()
        except (TransientStorageError, ChecksumError) as error:
            if time.monotonic() + pause_s > deadline:
                raise
            _LOG.warning("tried again in %.1f s: %s", pause_s, error)
        time.sleep(pause_s)
    raise AssertionError("pauses never end")


def _pauses() -> Iterator[float]:
    pause_s = s3_settings.FIRST_BACKOFF_S
    while True:
        # Drawn, so that many workers that were refused at once do not come back at once.
        yield random.uniform(pause_s / 2, pause_s)
        pause_s = min(2 * pause_s, s3_settings.MAX_BACKOFF_S)


def store_conditionally(
    put: Callable[[], ObjectInfo | None],
    look: Callable[[], tuple[bytes, ObjectInfo]],
    data: bytes,
    *,
    uri: str,
    etag: str | None,
) -> ObjectInfo | None:
    """Store while a condition holds, and find out by reading when the answer does not say.

    Args:
        put: One conditional write; None when the server refused the condition.
        look: Content and etag of what is there now.
        data: What ``put`` stores.
        uri: The object.
        etag: The condition: the object has this etag, or, with None, there is no object.

    Returns:
        What was stored, or None when the condition does not hold.

    Raises:
        TransientStorageError: Still not known after s3_settings.RETRY_TIMEOUT_S.
    """

    def attempt() -> ObjectInfo | None:
        lost = TransientStorageError(f"{uri} was not stored, though nothing speaks against it", uri=uri)
        try:
            stored = put()
        except TransientStorageError as error:
            stored, lost = None, error
        except ObjectNotFoundError:
            # With an etag some servers say so when the object is gone; without one the bucket is missing.
            if etag is None:
                raise
            stored = None
        if stored is not None:
            return stored
        content, found = _look_or_none(look)
        if found is not None and content == data:
            return found
        if etag == (None if found is None else found.etag):
            raise lost
        return None

    return repeated(attempt)


def _look_or_none(look: Callable[[], tuple[bytes, ObjectInfo]]) -> tuple[bytes, ObjectInfo | None]:
    try:
        return look()
    except ObjectNotFoundError as error:
        if error.facts.get("code") == "NoSuchBucket":
            raise
        return b"", None


def read_undamaged(fetch: Callable[[], tuple[bytes, str]], uri: str) -> tuple[bytes, str]:
    """A whole object and its etag, read a second time when content and etag disagree.

    The etag of an object that was stored in one piece is mostly its MD5, but not with every kind of
    encryption: content that comes twice is taken for what is stored.

    Raises:
        ChecksumError: Both reads disagree with the etag and with each other.
    """
    content, etag = fetch()
    if _agree(content, etag):
        return content, etag
    again, etag_again = fetch()
    if _agree(again, etag_again) or (again, etag_again) == (content, etag):
        return again, etag_again
    raise ChecksumError(
        f"{uri} was read twice, and different bytes came; look for a faulty network or proxy on the way",
        uri=uri,
    )


def _agree(content: bytes, etag: str) -> bool:
    if not _MD5.match(etag):
        return True
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == etag.strip('"')
