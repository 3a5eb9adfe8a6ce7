"""A TCP proxy in front of an S3 server that spoils chosen requests on purpose, and counts what was read.

It knows just enough HTTP/1.1 to see where a request and its response end (`http_framing`), passes heads
through untouched, so that signatures stay valid, and asks a rule of the test for every request. The rule
gets a random.Random that depends on the seed and on the running number of the request alone. Left out: TLS,
HTTP/2, and several requests on their way in one connection.
"""

import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.http_framing import Head, Peer, body_pieces, has_body, next_request, read_head

Kind = Literal[
    "throttle",
    "delay",
    "slow_response",
    "cut_request",
    "cut_response",
    "lose_answer",
    "corrupt_request",
    "corrupt_response",
]
# A peer that is silent for longer has gone; far above any delay a test asks for.
IDLE_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to one request.

    Attributes:
        kind: ``throttle``: answered by the proxy with ``status`` and ``code``. ``delay``: passed on after
            ``seconds``. ``slow_response``: the body comes byte by byte, ``seconds`` apart. ``cut_request``
            and ``cut_response``: both connections end once ``at`` bytes of that body were passed on.
            ``lose_answer``: the server acts, and the connection ends before its answer.
            ``corrupt_request`` and ``corrupt_response``: one bit of byte ``at`` of that body is flipped.
        at: Byte of the body. Nothing happens to a shorter body.
    """

    kind: Kind
    at: int = 0
    seconds: float = 0.0
    status: int = 503
    code: str = "SlowDown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a rule sees: ``path`` is decoded, ``number`` counts all requests from 0."""

    method: str
    path: str
    query: str
    number: int
    body_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Bytes [start, end) of an object that were asked for, of which the first ``sent`` went out."""

    key: str
    start: int
    end: int
    sent: int


Rule = Callable[[Request, random.Random], Fault | None]


class FaultProxy:
    """What a test sees of the running proxy.

    Attributes:
        endpoint: Where clients connect.
        rule: Asked for every request; may be replaced at any time.
        requests: Every request so far, in the order of their numbers.
        reads: One entry for every GET of an object that was answered with content; key is ``bucket/key``.
        faults: Faults that took place, by kind; ``refuse`` counts `refusing`.
    """

    def __init__(self, upstream: str, rule: Rule | None, seed: int) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port or 80)
        self._seed = seed
        self._lock = threading.Lock()
        self._peers: set[Peer] = set()
        self._closing = threading.Event()
        self.rule = rule
        self.requests: list[Request] = []
        self.reads: list[Read] = []
        self.faults: Counter[str] = Counter()
        self._listener = _bound_socket()
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._listen()

    def quiet(self) -> None:
        """From now on every request is passed on as it is."""
        self.rule = None

    def times_read(self, key: str, start: int, end: int) -> tuple[int, int]:
        """How often bytes [start, end) of ``bucket/key`` were sent: the fewest and the most of any byte."""
        edges = {start, end}
        spans = [(r.start, r.start + r.sent) for r in list(self.reads) if r.key == key]
        for span in spans:
            edges.update(edge for edge in span if start < edge < end)
        counts = [sum(a <= edge < b for a, b in spans) for edge in sorted(edges)[:-1]]
        return min(counts), max(counts)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Within the block open connections are cut and new ones refused, as while a server restarts."""
        self._stop_listening()
        with self._lock:
            self.faults["refuse"] += 1
        try:
            yield
        finally:
            self._listen()

    def refuse_for(self, seconds: float) -> threading.Thread:
        """Refuse connections for a while, in the background."""

        def refuse() -> None:
            with self.refusing():
                self._closing.wait(seconds)

        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Cut everything and stop."""
        self._closing.set()
        self._stop_listening()
        self._listener.close()

    def _listen(self) -> None:
        if self._closing.is_set():
            return
        self._listener.listen(128)
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _stop_listening(self) -> None:
        # On Linux this ends accept() and refuses connections, while the port stays ours.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        with self._lock:
            peers = list(self._peers)
        for peer in peers:
            peer.cut()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            client = Peer(connection, IDLE_LIMIT_S)
            with self._lock:
                self._peers.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: Peer) -> None:
        server: Peer | None = None
        try:
            while (head := next_request(client, server)) is not None:
                request, fault = self._judge(head)
                if fault is not None and fault.kind == "throttle":
                    if not _answer_instead(client, head, fault):
                        return
                    continue
                server = server or self._connect()
                if not _Exchange(self, client, server, head, request, fault).run():
                    return
        except (OSError, EOFError):
            # Either side went away; so does the other.
            return
        finally:
            for peer in (client, server):
                if peer is not None:
                    peer.cut()
                    with self._lock:
                        self._peers.discard(peer)

    def _connect(self) -> Peer:
        server = Peer(socket.create_connection(self._upstream, timeout=10), IDLE_LIMIT_S)
        with self._lock:
            self._peers.add(server)
        return server

    def _judge(self, head: Head) -> tuple[Request, Fault | None]:
        path, _, query = head.target.partition("?")
        with self._lock:
            number = len(self.requests)
            request = Request(
                method=head.method,
                path=unquote(path),
                query=query,
                number=number,
                body_bytes=int(head.fields.get("content-length", 0)),
            )
            self.requests.append(request)
        rule = self.rule
        fault = rule(request, random.Random(f"{self._seed}/{number}")) if rule is not None else None
        if fault is not None and fault.kind in ("throttle", "delay"):
            self._count(fault.kind)
        if fault is not None and fault.kind == "delay":
            self._closing.wait(fault.seconds)
        return request, fault

    def _count(self, kind: str) -> None:
        with self._lock:
            self.faults[kind] += 1

    def _begin_read(self, read: Read) -> Callable[[int], None]:
        """Enter a read; returns what adds to its bytes."""
        with self._lock:
            place = len(self.reads)
            self.reads.append(read)

        def add(count: int) -> None:
            with self._lock:
                present = self.reads[place]
                self.reads[place] = replace(present, sent=present.sent + count)

        return add


class _Exchange:
    """One request and its response on their way through."""

    def __init__(
        self,
        proxy: FaultProxy,
        client: Peer,
        server: Peer,
        head: Head,
        request: Request,
        fault: Fault | None,
    ) -> None:
        self.proxy, self.client, self.server = proxy, client, server
        self.head, self.request, self.fault = head, request, fault

    def run(self) -> bool:
        """Pass both on; False when the connections cannot be used again."""
        self.server.send(self.head.raw)
        answer = None
        if "100-continue" in self.head.fields.get("expect", "").lower():
            answer = self._next_answer()
            if answer.status == 100:
                self.client.send(answer.raw)
                answer = None
        body_was_sent = answer is None
        if body_was_sent and not self._pass(self.head, self.client, self.server, "request", _note_nothing):
            return False
        if answer is None:
            answer = self._next_answer()
            while answer.status == 100:
                answer = self._next_answer()
        return self._answer(answer) and body_was_sent

    def _next_answer(self) -> Head:
        head = read_head(self.server)
        if head is None:
            raise EOFError
        return head

    def _answer(self, answer: Head) -> bool:
        if self._is("lose_answer"):
            self.proxy._count("lose_answer")
            return False
        self.client.send(answer.raw)
        if not has_body(answer, self.request.method):
            return answer.keeps_connection and self.head.keeps_connection
        read = self._begun_read(answer)
        note = self.proxy._begin_read(read) if read is not None else _note_nothing
        whole = self._pass(answer, self.server, self.client, "response", note)
        return whole and answer.keeps_connection and self.head.keeps_connection

    def _is(self, kind: Kind) -> bool:
        return self.fault is not None and self.fault.kind == kind

    def _pass(
        self,
        head: Head,
        source: Peer,
        target: Peer,
        side: Literal["request", "response"],
        note: Callable[[int], None],
    ) -> bool:
        """Pass a body on, telling of each piece just before; False when it was cut."""
        place = 0
        fault = self.fault
        cut_at = fault.at if fault is not None and fault.kind == f"cut_{side}" else None
        spoil_at = fault.at if fault is not None and fault.kind == f"corrupt_{side}" else None
        pieces = body_pieces(head, source)
        if side == "response" and self._is("slow_response"):
            pieces = self._slowly(pieces)
        for raw, is_content in pieces:
            if cut_at is not None and is_content and place + len(raw) > cut_at:
                kept = raw[: cut_at - place]
                note(len(kept))
                self.proxy._count(f"cut_{side}")
                target.send(kept)
                return False
            if spoil_at is not None and is_content and place <= spoil_at < place + len(raw):
                raw = bytearray(raw)
                raw[spoil_at - place] ^= 1
                self.proxy._count(f"corrupt_{side}")
            if is_content:
                place += len(raw)
                note(len(raw))
            target.send(raw)
        return True

    def _slowly(self, pieces: Iterator[tuple[bytes, bool]]) -> Iterator[tuple[bytes, bool]]:
        assert self.fault is not None
        self.proxy._count("slow_response")
        for raw, is_content in pieces:
            for place in range(len(raw)):
                self.proxy._closing.wait(self.fault.seconds)
                yield raw[place : place + 1], is_content

    def _begun_read(self, answer: Head) -> Read | None:
        """What a response with content of an object is to bring; None for all others."""
        _, _, key = self.request.path.strip("/").partition("/")
        if self.request.method != "GET" or not key or answer.status not in (200, 206):
            return None
        if set(parse_qs(self.request.query, keep_blank_values=True)) - {"x-id", "versionId"}:
            return None
        start, end = 0, int(answer.fields.get("content-length", 0))
        if "content-range" in answer.fields:
            first, _, last = answer.fields["content-range"].split()[1].partition("/")[0].partition("-")
            start, end = int(first), int(last) + 1
        return Read(key=self.request.path.strip("/"), start=start, end=end, sent=0)


def _note_nothing(count: int) -> None:
    pass


def _answer_instead(client: Peer, head: Head, fault: Fault) -> bool:
    """Answer with an S3 error; True when the connection can be used again."""
    expects = "expect" in head.fields
    if not expects:
        for _ in body_pieces(head, client):
            pass
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{fault.code}</Code>'
        f"<Message>a fault of the test</Message></Error>"
    ).encode()
    fields = [
        f"HTTP/1.1 {fault.status} Fault",
        "Content-Type: application/xml",
        f"Content-Length: {len(body)}",
        f"Connection: {'close' if expects else 'keep-alive'}",
    ]
    client.send("\r\n".join([*fields, "", ""]).encode())
    if head.method != "HEAD":
        client.send(body)
    return not expects and head.keeps_connection


def _bound_socket() -> socket.socket:
    """A socket bound to a free port.

    The port is named when binding: only then does the system keep it while nobody listens.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound


@contextmanager
def fault_proxy(upstream: str, *, rule: Rule | None = None, seed: int = 0) -> Iterator[FaultProxy]:
    """A proxy on a free port of 127.0.0.1 in front of ``upstream`` (``http://host:port``)."""
    proxy = FaultProxy(upstream, rule, seed)
    try:
        yield proxy
    finally:
        proxy.close()
