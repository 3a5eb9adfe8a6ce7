"""Addresses as plain text: ``s3://bucket/key`` and ``file:///absolute/path``.

Nothing is percent-encoded: the text after the scheme is the bucket and key, or the path, as they are.
"""

import posixpath
import re
from pathlib import Path

from quantlib.errors import StorageError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
SUPPORTED = "s3://bucket/key, file:///path or a plain path"


def normalize_uri(text: str) -> str:
    """The one spelling of an address that all other functions take.

    Raises:
        StorageError: Empty, another scheme, no bucket, or a key with empty, ``.`` or ``..`` parts.

    >>> normalize_uri("s3://bucket/models/llama/")
    's3://bucket/models/llama'
    >>> normalize_uri("/tmp/x/../model")
    'file:///tmp/model'
    """
    if not text or "\0" in text or "\n" in text:
        raise StorageError(f"an address is needed, found {text!r}; give {SUPPORTED}", uri=text)
    found = _SCHEME.match(text)
    if found is None:
        return f"file://{_absolute(text)}"
    scheme = found.group(1).lower()
    rest = text[found.end() :]
    if scheme == "file":
        return _normalize_file(text, rest)
    if scheme == "s3":
        return _normalize_s3(text, rest)
    raise StorageError(f"the scheme of {text!r} is not supported; give {SUPPORTED}", uri=text)


def _absolute(path: str) -> str:
    # Symbolic links stay as they are; a leading "//" would mean something of its own to POSIX.
    return "/" + posixpath.normpath(Path.cwd() / path).lstrip("/")


def _normalize_file(text: str, path: str) -> str:
    if not path.startswith("/"):
        raise StorageError(
            f"{text!r} names the host {path.partition('/')[0]!r}; write file:///absolute/path", uri=text
        )
    return f"file://{_absolute(path)}"


def _normalize_s3(text: str, rest: str) -> str:
    bucket, *key = rest.rstrip("/").split("/")
    if not bucket:
        raise StorageError(f"{text!r} names no bucket; write s3://bucket/key", uri=text)
    _check_parts(text, key)
    return "s3://" + "/".join([bucket, *key])


def _check_parts(text: str, parts: list[str]) -> None:
    wrong = [part for part in parts if part in ("", ".", "..")]
    if wrong:
        raise StorageError(f"{text!r} has the part {wrong[0]!r}, which no object name may have", uri=text)


def join_uri(base: str, *names: str) -> str:
    """An address below another one.

    Raises:
        StorageError: A name is absolute or has empty, ``.`` or ``..`` parts.

    >>> join_uri("s3://bucket/out", "done", "block-00001.json")
    's3://bucket/out/done/block-00001.json'
    """
    for name in names:
        _check_parts(name, name.split("/"))
    return "/".join([base.rstrip("/"), *names])


def uri_name(uri: str) -> str:
    """The last part of an address.

    >>> uri_name("s3://bucket/out/config.json")
    'config.json'
    """
    return uri.rpartition("/")[2]


def uri_scheme(uri: str) -> str:
    """``s3`` or ``file``, of a normalized address."""
    return uri.partition("://")[0]


def file_path(uri: str) -> str:
    """The path of a ``file://`` address.

    Raises:
        StorageError: The address is of another scheme.
    """
    if not uri.startswith("file:///"):
        raise StorageError(f"a file:///path was wanted, found {uri!r}", uri=uri)
    return uri.removeprefix("file://")


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Bucket and key of an ``s3://`` address; the key of a bare bucket is empty.

    Raises:
        StorageError: The address is of another scheme or names no bucket.

    >>> bucket_and_key("s3://bucket/out/config.json")
    ('bucket', 'out/config.json')
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise StorageError(f"an s3://bucket/key was wanted, found {uri!r}", uri=uri)
    return bucket, key.rstrip("/")
