"""Where messages of HTTP/1.1 begin and end, for a proxy that passes their bytes through unchanged."""

import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

_PIECE_BYTES = 64 << 10
_HEAD_LIMIT_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The first lines of a request or response.

    Attributes:
        raw: Exactly as it came, with the empty line.
        first: The three words of the first line.
        fields: Header fields, names in lower case.
    """

    raw: bytes
    first: tuple[str, str, str]
    fields: dict[str, str]

    @property
    def method(self) -> str:
        """Of a request."""
        return self.first[0]

    @property
    def target(self) -> str:
        """Of a request: path and query as they came."""
        return self.first[1]

    @property
    def status(self) -> int:
        """Of a response."""
        return int(self.first[1])

    @property
    def keeps_connection(self) -> bool:
        """Whether another message may follow."""
        return "close" not in self.fields.get("connection", "").lower()


class Peer:
    """One TCP connection with a read buffer."""

    def __init__(self, connection: socket.socket, idle_limit_s: float) -> None:
        connection.settimeout(idle_limit_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._buffer = b""

    def send(self, content: bytes | bytearray) -> None:
        """Send everything."""
        self._socket.sendall(content)

    def some(self, limit: int = _PIECE_BYTES) -> bytes:
        """At least one byte, at most ``limit``; nothing at the end of the stream."""
        if not self._buffer:
            self._buffer = self._socket.recv(_PIECE_BYTES)
        piece, self._buffer = self._buffer[:limit], self._buffer[limit:]
        return piece

    def until(self, mark: bytes) -> bytes:
        """Everything up to and including a mark; nothing when the stream ended before the first byte."""
        while mark not in self._buffer:
            more = self._socket.recv(_PIECE_BYTES)
            if not more and not self._buffer:
                return b""
            if not more or len(self._buffer) > _HEAD_LIMIT_BYTES:
                raise EOFError
            self._buffer += more
        end = self._buffer.index(mark) + len(mark)
        found, self._buffer = self._buffer[:end], self._buffer[end:]
        return found

    def has_input(self, *, beside: "Peer") -> bool:
        """Wait until this side or the other has something (also its end) to say; whether it was this one."""
        if self._buffer:
            return True
        try:
            ready, _, _ = select.select([self._socket, beside._socket], [], [], self._socket.gettimeout())
        except ValueError:
            # Closed by another thread meanwhile.
            return False
        return self._socket in ready

    def cut(self) -> None:
        """End the connection at once, also for a thread that waits for it; what was sent still arrives."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._socket.close()


def read_head(peer: Peer) -> Head | None:
    """The next head, or None when the connection ended between two messages."""
    raw = peer.until(b"\r\n\r\n")
    if not raw:
        return None
    lines = raw.decode("latin-1").split("\r\n")
    words = [*lines[0].split(" ", 2), "", ""]
    fields = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon:
            fields[name.strip().lower()] = value.strip()
    return Head(raw=raw, first=(words[0], words[1], words[2]), fields=fields)


def next_request(client: Peer, server: Peer | None) -> Head | None:
    """The head of the next request, or None once either side of the kept connection has ended it."""
    if server is not None and not client.has_input(beside=server):
        return None
    return read_head(client)


def has_body(answer: Head, method: str) -> bool:
    """Whether a body follows a response's head."""
    return method != "HEAD" and answer.status >= 200 and answer.status not in (204, 304)


def body_pieces(head: Head, peer: Peer) -> Iterator[tuple[bytes, bool]]:
    """The body of a message as it comes: bytes, and whether they are content (else the framing of chunks).

    Raises:
        EOFError: The connection ended before the body did.
    """
    if "chunked" in head.fields.get("transfer-encoding", "").lower():
        yield from _chunks(peer)
    elif "content-length" in head.fields:
        yield from _content(peer, int(head.fields["content-length"]))
    elif head.first[0].startswith("HTTP/"):
        # A response without a length lasts until its connection ends.
        while piece := peer.some():
            yield piece, True
        raise EOFError


def _content(peer: Peer, remaining: int) -> Iterator[tuple[bytes, bool]]:
    while remaining:
        piece = peer.some(min(remaining, _PIECE_BYTES))
        if not piece:
            raise EOFError
        remaining -= len(piece)
        yield piece, True


def _chunks(peer: Peer) -> Iterator[tuple[bytes, bool]]:
    while True:
        line = peer.until(b"\r\n")
        yield line, False
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        yield from _content(peer, size)
        yield peer.until(b"\r\n"), False
    while True:
        trailer = peer.until(b"\r\n")
        yield trailer, False
        if trailer in (b"\r\n", b""):
            return
