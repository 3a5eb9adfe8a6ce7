"""Coalescing of ranges, against slices of the content itself."""

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import StorageError, TransientStorageError
from quantlib.storage import ObjectInfo, ranges

CONTENT = bytes(range(256)) * 4
INFO = ObjectInfo(uri="file:///object", size_bytes=len(CONTENT), etag="1")
_RANGE = st.tuples(st.integers(0, len(CONTENT)), st.integers(0, 300)).map(
    lambda pair: (pair[0], min(pair[0] + pair[1], len(CONTENT)))
)


class Server:
    """Hands out slices of CONTENT and remembers what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.lock = threading.Lock()

    def fetch(self, start: int, end: int) -> memoryview:
        with self.lock:
            self.asked.append((start, end))
        return memoryview(CONTENT)[start:end]


def _fetch(server: Server, asked, *, max_request=100, gap=8):
    with (
        ThreadPoolExecutor(3) as executor,
        patch.object(ranges, "MAX_REQUEST_BYTES", max_request),
        patch.object(ranges, "MAX_GAP_BYTES", gap),
    ):
        return ranges.fetch_ranges(INFO, asked, server.fetch, executor)


@settings(max_examples=200, deadline=None)
@given(st.lists(_RANGE, max_size=12), st.integers(1, 200), st.integers(0, 50))
def test_any_ranges_are_answered_exactly_by_requests_of_bounded_size(asked, max_request, gap):
    server = Server()
    views = _fetch(server, asked, max_request=max_request, gap=gap)
    assert [bytes(v) for v in views] == [CONTENT[a:b] for a, b in asked]
    assert all(0 < end - start <= max_request for start, end in server.asked)


def test_neighbours_share_a_request_and_its_memory():
    server = Server()
    views = _fetch(server, [(10, 20), (0, 10), (25, 40)])
    assert server.asked == [(0, 40)]
    assert {id(v.obj) for v in views} == {id(CONTENT)}


def test_distant_ranges_do_not_fetch_what_lies_between():
    server = Server()
    _fetch(server, [(0, 10), (19, 30)])
    assert sorted(server.asked) == [(0, 10), (19, 30)]


def test_large_range_is_split_evenly():
    server = Server()
    _fetch(server, [(0, 201)])
    assert sorted(server.asked) == [(0, 67), (67, 134), (134, 201)]


def test_short_answer_is_an_error_that_may_pass():
    with ThreadPoolExecutor(1) as executor, pytest.raises(TransientStorageError, match="file:///object"):
        ranges.fetch_ranges(
            INFO, [(0, 10)], lambda start, end: memoryview(CONTENT)[start : end - 1], executor
        )


def test_error_of_one_request_ends_the_call_without_leaving_requests_behind():
    started = []

    def fetch(start: int, end: int) -> memoryview:
        started.append(start)
        if start == 0:
            raise StorageError("refused")
        return memoryview(CONTENT)[start:end]

    with ThreadPoolExecutor(1) as executor, patch.object(ranges, "MAX_GAP_BYTES", 0):
        with pytest.raises(StorageError, match="refused"):
            ranges.fetch_ranges(INFO, [(100 * n, 100 * n + 1) for n in range(10)], fetch, executor)
        count = len(started)
        executor.submit(int).result()
        assert len(started) == count < 10
