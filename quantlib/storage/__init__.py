"""Object storage behind one small interface: local files and S3.

`open_store` is the only way in; nothing above this package names an engine.
"""

from quantlib.errors import StorageError
from quantlib.storage.contracts import ObjectInfo, ObjectWriter, Store
from quantlib.storage.uris import SUPPORTED, join_uri, normalize_uri, uri_name, uri_scheme

__all__ = ["ObjectInfo", "ObjectWriter", "Store", "join_uri", "normalize_uri", "open_store", "uri_name"]


def open_store(uri: str, engine: str = "obstore") -> Store:
    """The store in which an address lies; it accepts every address of the same scheme.

    Args:
        uri: Any normalized address (`normalize_uri`).
        engine: ``obstore`` or ``s3fs``: the client library for S3. Local files need none.

    Raises:
        StorageError: A scheme or engine that is not known, or no AWS credentials for ``s3://``.
    """
    # Imported here: an engine costs up to a second, and a run needs one of them.
    match uri_scheme(uri), engine:
        case "file", _:
            from quantlib.storage.local_engine import LocalStore

            return LocalStore()
        case "s3", "obstore":
            from quantlib.storage.obstore_engine import ObstoreStore

            return ObstoreStore()
        case "s3", "s3fs":
            from quantlib.storage.s3fs_engine import S3fsStore

            return S3fsStore()
        case "s3", _:
            raise StorageError(f"the storage engine {engine!r} is not known; use obstore or s3fs")
    raise StorageError(f"the scheme of {uri!r} is not supported; give {SUPPORTED}", uri=uri)
