"""Hidden states come back from a shelf as they were put there, from memory as from disk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.cells import Stream
from quantlib.errors import WorkerError
from quantlib.stream_shelf import Shelf

_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=60, deadline=None)
@given(room=st.sampled_from([None, 0, 100, 1000]), data=st.data())
def test_shelf_gives_back_what_was_put_whatever_was_released_between(room, data):
    shelf, kept = Shelf(room), []
    for number in range(data.draw(st.integers(1, 12))):
        if kept and data.draw(st.booleans()):
            kept.pop(data.draw(st.integers(0, len(kept) - 1)))[0].release()
        shape = data.draw(st.sampled_from([(1, 2, 3), (2, 5, 4), (3, 3, 7)]))
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        hidden = hidden.to(data.draw(st.sampled_from(_DTYPES)))
        kept.append((shelf.put(hidden), hidden))
        for found, expected in kept:
            assert torch.equal(found.get(), expected)
            assert found.num_bytes == expected.nbytes
    in_memory = sum(found.num_bytes for found, _ in kept if found.is_in_memory)
    assert room is None or in_memory <= room


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    room=st.integers(0, 120),
    moves=st.lists(st.integers(0, 7), max_size=20),
)
def test_streams_in_memory_are_the_first_that_fit_however_they_move_on(lengths, room, moves):
    """In the order in which they came, each where there is room beside those before it."""
    shelf = Shelf(room)
    streams = [Stream(torch.full((1, length, 2), float(n)), shelf) for n, length in enumerate(lengths)]
    expected, used = [], 0
    for length in lengths:
        size = 4 * 2 * length
        expected.append(used + size <= room)
        used += size * expected[-1]
    for number in moves:
        stream = streams[number % len(streams)]
        stream.bring()
        stream.move(stream.position, lambda hidden: hidden + 1)
    assert [stream.is_in_memory for stream in streams] == expected
    for number, stream in enumerate(streams):
        assert torch.equal(
            stream.hidden_BTD, torch.full((1, lengths[number], 2), float(number + stream.position))
        )


def test_shelf_uses_places_in_the_file_again():
    shelf = Shelf(0)
    hidden = torch.ones(2, 3, 4)
    for _ in range(5):
        kept = shelf.put(hidden)
        kept.release()
    assert shelf.file_bytes == hidden.nbytes


def test_shelf_on_a_full_disk_says_what_to_do(monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(WorkerError, match="No space left on device; set TMPDIR"):
        Shelf(0).put(torch.ones(1, 1, 1))
