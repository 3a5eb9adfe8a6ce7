"""The proxy of the fault tests against a plain HTTP server of the standard library."""

import http.client
import random
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.support.fault_proxy import Fault, Read, fault_proxy

CONTENT = random.Random(1).randbytes(200_000)


class Echo(BaseHTTPRequestHandler):
    """GET answers with CONTENT or a range of it, PUT with the body it was sent; both are told to `seen`."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, bytes]] = []

    def do_GET(self) -> None:
        status, body = 200, CONTENT
        fields = {}
        if "Range" in self.headers:
            first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
            status, body = 206, CONTENT[first : last + 1]
            fields = {"Content-Range": f"bytes {first}-{last}/{len(CONTENT)}"}
        self._answer(status, body, fields)

    def do_HEAD(self) -> None:
        self._answer(200, CONTENT, {})

    def do_PUT(self) -> None:
        body = b""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, body, {}, chunked=True)

    def _answer(self, status: int, body: bytes, fields: dict[str, str], *, chunked: bool = False) -> None:
        self.seen.append((self.command, self.headers["Host"], body))
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        if not chunked:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Transfer-Encoding", "chunked")
            half = len(body) // 2
            chunks = [chunk for chunk in (body[:half], body[half:]) if chunk]
            body = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def upstream():
    Echo.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    # Closing it waits for requests under way: one that was cut would tell the next test's list.
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def _client(proxy):
    connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=30)
    try:
        yield connection
    finally:
        connection.close()


def _ask(connection, method, path, body=None, **headers):
    connection.request(method, path, body=body, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def _once(fault, number=0):
    return lambda request, draw: fault if request.number == number else None


def test_many_requests_share_one_connection_and_keep_their_host_header(upstream):
    with fault_proxy(upstream) as proxy, _client(proxy) as connection:
        for _ in range(3):
            assert _ask(connection, "GET", "/bucket/a") == (200, CONTENT)
            assert _ask(connection, "HEAD", "/bucket/a") == (200, b"")
            assert _ask(connection, "PUT", "/bucket/a", b"hello") == (200, b"hello")
        local_port = connection.sock.getsockname()[1]
        assert _ask(connection, "GET", "/bucket/a")[0] == 200
        assert connection.sock.getsockname()[1] == local_port
    assert {host for _, host, _ in Echo.seen} == {urlsplit(proxy.endpoint).netloc}
    assert [r.number for r in proxy.requests] == list(range(10))


def test_chunked_bodies_pass_both_ways(upstream):
    pieces = [CONTENT[:10], CONTENT[10:70_000], CONTENT[70_000:]]
    with fault_proxy(upstream) as proxy, _client(proxy) as connection:
        assert _ask(connection, "PUT", "/b/k", iter(pieces)) == (200, CONTENT)
        assert _ask(connection, "PUT", "/b/k", b"again") == (200, b"again")


def test_client_that_waits_for_100_continue_is_served(upstream):
    with fault_proxy(upstream) as proxy, _client(proxy) as connection:
        connection.putrequest("PUT", "/b/k")
        connection.putheader("Content-Length", "5")
        connection.putheader("Expect", "100-continue")
        connection.endheaders()
        assert connection.sock.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 100"
        connection.send(b"hello")
        assert connection.getresponse().read() == b"hello"


def test_reads_tell_how_often_each_byte_left_the_server(upstream):
    with fault_proxy(upstream) as proxy, _client(proxy) as connection:
        _ask(connection, "GET", "/b/with%20space", Range="bytes=0-99")
        _ask(connection, "GET", "/b/with%20space", Range="bytes=50-149")
        _ask(connection, "HEAD", "/b/with%20space")
        _ask(connection, "GET", "/b?list-type=2")
        _ask(connection, "GET", "/b/other?uploads")
        assert proxy.reads == [
            Read(key="b/with space", start=0, end=100, sent=100),
            Read(key="b/with space", start=50, end=150, sent=100),
        ]
        assert proxy.times_read("b/with space", 0, 50) == (1, 1)
        assert proxy.times_read("b/with space", 50, 100) == (2, 2)
        assert proxy.times_read("b/with space", 0, 200) == (0, 2)
        assert proxy.times_read("b/never", 0, 10) == (0, 0)


def test_cut_response_brings_exactly_so_many_bytes_and_is_counted(upstream):
    rule = _once(Fault(kind="cut_response", at=70_001))
    with fault_proxy(upstream, rule=rule) as proxy:
        with _client(proxy) as connection, pytest.raises(http.client.IncompleteRead) as caught:
            _ask(connection, "GET", "/b/k")
        assert caught.value.partial == CONTENT[:70_001]
        assert proxy.reads == [Read(key="b/k", start=0, end=len(CONTENT), sent=70_001)]
        assert proxy.times_read("b/k", 0, len(CONTENT)) == (0, 1)
        assert proxy.faults == {"cut_response": 1}
        with _client(proxy) as connection:
            assert _ask(connection, "GET", "/b/k") == (200, CONTENT)


def test_cut_request_never_reaches_its_end(upstream):
    with (
        fault_proxy(upstream, rule=_once(Fault(kind="cut_request", at=3))) as proxy,
        _client(proxy) as connection,
        pytest.raises((ConnectionError, http.client.HTTPException)),
    ):
        _ask(connection, "PUT", "/b/k", b"hello")
    assert proxy.faults == {"cut_request": 1}
    assert ("PUT", urlsplit(proxy.endpoint).netloc, b"hello") not in Echo.seen


def test_lost_answer_comes_after_the_server_has_acted(upstream):
    with (
        fault_proxy(upstream, rule=_once(Fault(kind="lose_answer"))) as proxy,
        _client(proxy) as connection,
        pytest.raises((ConnectionError, http.client.HTTPException)),
    ):
        _ask(connection, "PUT", "/b/k", b"hello")
    assert [body for _, _, body in Echo.seen] == [b"hello"]
    assert proxy.faults == {"lose_answer": 1}


@pytest.mark.parametrize("side", ["request", "response"])
def test_one_bit_of_a_body_is_flipped_and_nothing_else(upstream, side):
    kind = f"corrupt_{side}"
    rule = _once(Fault(kind=kind, at=100_000))
    with fault_proxy(upstream, rule=rule) as proxy, _client(proxy) as connection:
        status, came = _ask(connection, "PUT", "/b/k", CONTENT)
        assert _ask(connection, "GET", "/b/k") == (200, CONTENT), "the connection goes on"
    sent_on = Echo.seen[0][2]
    assert status == 200
    wrong = [n for n in range(len(CONTENT)) if came[n] != CONTENT[n]]
    assert wrong == [100_000]
    assert came[100_000] ^ CONTENT[100_000] == 1
    assert (sent_on == CONTENT) is (side == "response")
    assert proxy.faults == {kind: 1}


def test_fault_beyond_the_end_of_a_body_does_not_happen_and_is_not_counted(upstream):
    def rule(request, draw):
        return Fault(kind=["cut_request", "corrupt_response"][request.number], at=5)

    with fault_proxy(upstream, rule=rule) as proxy, _client(proxy) as connection:
        assert _ask(connection, "PUT", "/b/k", b"hello") == (200, b"hello")
        assert _ask(connection, "PUT", "/b/k", b"hello") == (200, b"hello")
        assert not proxy.faults


def test_throttled_request_does_not_reach_the_server_and_the_connection_goes_on(upstream):
    rule = _once(Fault(kind="throttle"))
    with fault_proxy(upstream, rule=rule) as proxy, _client(proxy) as connection:
        status, body = _ask(connection, "PUT", "/b/k", b"hello")
        assert (status, b"<Code>SlowDown</Code>" in body) == (503, True)
        assert _ask(connection, "PUT", "/b/k", b"two") == (200, b"two")
    assert [body for _, _, body in Echo.seen] == [b"two"]
    assert proxy.faults == {"throttle": 1}


def test_delay_and_slow_response_change_no_byte(upstream):
    def rule(request, draw):
        return Fault(kind=["delay", "slow_response"][request.number], seconds=0.001)

    with fault_proxy(upstream, rule=rule) as proxy, _client(proxy) as connection:
        assert _ask(connection, "GET", "/b/k") == (200, CONTENT)
        assert _ask(connection, "GET", "/b/k", Range="bytes=0-99") == (206, CONTENT[:100])
        assert proxy.faults == {"delay": 1, "slow_response": 1}


def test_quiet_ends_all_faults(upstream):
    with fault_proxy(upstream, rule=lambda r, d: Fault(kind="throttle")) as proxy, _client(proxy) as c:
        assert _ask(c, "GET", "/b/k")[0] == 503
        proxy.quiet()
        assert _ask(c, "GET", "/b/k")[0] == 200


def test_refusing_cuts_and_refuses_until_it_ends_on_the_same_port(upstream):
    with fault_proxy(upstream) as proxy:
        with _client(proxy) as connection:
            assert _ask(connection, "GET", "/b/k")[0] == 200
            with proxy.refusing():
                with pytest.raises((ConnectionError, http.client.HTTPException)):
                    _ask(connection, "GET", "/b/k")
                with _client(proxy) as fresh, pytest.raises(ConnectionRefusedError):
                    _ask(fresh, "GET", "/b/k")
        with _client(proxy) as connection:
            assert _ask(connection, "GET", "/b/k")[0] == 200
        assert proxy.faults == {"refuse": 1}


def test_draws_depend_on_seed_and_number_alone(upstream):
    def drawn(seed, order):
        found = {}

        def rule(request, draw):
            found[request.number] = draw.random()

        with fault_proxy(upstream, rule=rule, seed=seed) as proxy, _client(proxy) as connection:
            for path in order:
                _ask(connection, "GET", path)
        return found

    assert drawn(1, ["/b/x", "/b/y"]) == drawn(1, ["/b/y", "/b/x"])
    assert drawn(1, ["/b/x"]) != drawn(2, ["/b/x"])
