"""Counts what a store moves, for the report."""

import threading


class Traffic:
    """Bytes and requests since the store was opened; safe to use from several threads.

    Units: bytes of object content as the caller asked for it or fetched beside it; headers, listings and the
    engine's own retries are not counted.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes_read = 0
        self._bytes_written = 0
        self._requests = 0

    @property
    def bytes_read(self) -> int:
        """Content bytes fetched."""
        return self._bytes_read

    @property
    def bytes_written(self) -> int:
        """Content bytes stored."""
        return self._bytes_written

    @property
    def requests(self) -> int:
        """Operations sent to the storage; a streamed object counts one a part."""
        return self._requests

    def count(self, *, read: int = 0, written: int = 0, requests: int = 1) -> None:
        """Add one operation's figures."""
        with self._lock:
            self._bytes_read += read
            self._bytes_written += written
            self._requests += requests
