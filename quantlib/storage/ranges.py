"""Turns many small byte ranges into few large requests, run a bounded number at a time.

Tensors of a decoder block lie beside each other in their file, so that one request serves many of them; a
tensor larger than a request is fetched in pieces, concurrently. Each engine gives only a function that
fetches one span.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from quantlib.errors import CheckpointError, TransientStorageError
from quantlib.storage.contracts import ObjectInfo

# Large enough that a request's latency does not matter, small enough that several run side by side.
MAX_REQUEST_BYTES = 32 << 20
MAX_IN_FLIGHT = 8
# Bytes nobody asked for that are fetched rather than beginning another request.
MAX_GAP_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch [start, end) of the object and the positions of the asked ranges that lie within it."""

    start: int
    end: int
    members: tuple[int, ...]


def plan_spans(ranges: Sequence[tuple[int, int]]) -> list[Span]:
    """Merge ranges that are close together, in any order and possibly overlapping.

    A span is at most MAX_REQUEST_BYTES long unless it is a single longer range. Empty ranges belong to none.

    >>> [(s.start, s.end, s.members) for s in plan_spans([(8, 16), (0, 8), (1 << 40, (1 << 40) + 1)])]
    [(0, 16, (1, 0)), (1099511627776, 1099511627777, (2,))]
    """
    spans: list[Span] = []
    for position in sorted(range(len(ranges)), key=lambda p: ranges[p]):
        start, end = ranges[position]
        if start == end:
            continue
        last = spans[-1] if spans else None
        if (
            last
            and start <= last.end + MAX_GAP_BYTES
            and max(end, last.end) - last.start <= MAX_REQUEST_BYTES
        ):
            spans[-1] = Span(start=last.start, end=max(end, last.end), members=(*last.members, position))
        else:
            spans.append(Span(start=start, end=end, members=(position,)))
    return spans


def fetch_ranges(
    info: ObjectInfo,
    ranges: Sequence[tuple[int, int]],
    fetch: Callable[[int, int], memoryview],
    executor: ThreadPoolExecutor,
) -> list[memoryview]:
    """Fetch byte ranges of one object through an engine's ``fetch(start, end)``.

    Results of ranges that were fetched together are views of one response (no copy).

    Raises:
        CheckpointError: A range lies outside the object.
        TransientStorageError: A response was shorter than asked for.
    """
    _check_ranges(info, ranges)
    results = [memoryview(b"")] * len(ranges)
    pending: list[tuple[Span, memoryview | None, list[Future[memoryview | None]]]] = []
    try:
        for span in plan_spans(ranges):
            pending.append((span, *_submit(info, span, fetch, executor)))
        for span, whole, futures in pending:
            parts = [future.result() for future in futures]
            view = parts[0] if whole is None else whole
            assert view is not None
            for member in span.members:
                start, end = ranges[member]
                results[member] = view[start - span.start : end - span.start]
    finally:
        _settle(future for _, _, futures in pending for future in futures)
    return results


def _check_ranges(info: ObjectInfo, ranges: Sequence[tuple[int, int]]) -> None:
    for start, end in ranges:
        if not 0 <= start <= end <= info.size_bytes:
            raise CheckpointError(
                f"bytes {start} to {end} of {info.uri} were asked for, it has {info.size_bytes}",
                uri=info.uri,
                start=start,
                end=end,
            )


def _submit(
    info: ObjectInfo, span: Span, fetch: Callable[[int, int], memoryview], executor: ThreadPoolExecutor
) -> tuple[memoryview | None, list[Future[memoryview | None]]]:
    """Start fetching a span: in one request, or in pieces that are copied into one buffer."""

    def fetch_checked(start: int, end: int) -> memoryview:
        view = fetch(start, end)
        if len(view) != end - start:
            raise TransientStorageError(
                f"bytes {start} to {end} of {info.uri} were asked for, {len(view)} came back; try again",
                uri=info.uri,
            )
        return view

    if span.end - span.start <= MAX_REQUEST_BYTES:
        return None, [executor.submit(fetch_checked, span.start, span.end)]
    whole = np.empty(span.end - span.start, dtype=np.uint8).data

    def fetch_into(start: int, end: int) -> None:
        whole[start - span.start : end - span.start] = fetch_checked(start, end)

    num_pieces = -(-len(whole) // MAX_REQUEST_BYTES)
    piece_bytes = -(-len(whole) // num_pieces)
    return whole, [
        executor.submit(fetch_into, start, min(start + piece_bytes, span.end))
        for start in range(span.start, span.end, piece_bytes)
    ]


def _settle(futures: Iterable[Future[memoryview | None]]) -> None:
    """After an error: start nothing more of this call, and leave nothing running behind its back."""
    for future in [f for f in futures if not f.cancel()]:
        future.exception()
