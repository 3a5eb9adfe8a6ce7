"""Copies arrive with every byte, run beside what the GPU computes, and place no stream's bytes at risk."""

import pytest

torch = pytest.importorskip("torch")

from quantlib import device_copies  # noqa: E402
from quantlib.cells import Stream  # noqa: E402
from quantlib.device_copies import DeviceCopies  # noqa: E402
from quantlib.stream_shelf import Shelf  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.uint8, torch.bool)


def _bytes(tensor):
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)


def _tensors():
    """Of several dtypes, sizes around those of a slot, not contiguous, without values, of no dimension."""
    generator = torch.Generator().manual_seed(1)
    sizes = (
        0,
        1,
        999,
        device_copies.SLOT_BYTES,
        device_copies.SLOT_BYTES + 1,
        2 * device_copies.SLOT_BYTES + 5,
    )
    made = {
        f"bytes {size}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for size in sizes
    }
    for dtype in _DTYPES:
        made[f"{dtype}"] = torch.randint(0, 2, (37, 64), generator=generator).to(dtype)
    made["transposed"] = torch.randn(300, 70, generator=generator).t()
    made["scalar"] = torch.tensor(3.5)
    made["pinned"] = torch.randn(1000, 33, generator=generator).pin_memory()
    return made


def _busy(milliseconds=200):
    """Keep the current stream at work that long, at the least, on any GPU of below 5 GHz."""
    torch.cuda._sleep(5_000_000 * milliseconds)


def test_tensors_come_to_the_device_and_back_as_they_were():
    copies, tensors = DeviceCopies(torch.device("cuda")), _tensors()
    for _ in range(3):
        there = copies.begin(tensors).wait()
        assert all(found.device.type == "cuda" for found in there.values())
        back = copies.begin_back(there).wait()
        assert all(found.is_pinned() for found in back.values() if found.numel())
        for name, expected in tensors.items():
            assert back[name].dtype == expected.dtype and back[name].shape == expected.shape
            assert torch.equal(_bytes(back[name]), _bytes(expected)), name


def test_tensors_that_are_there_are_handed_through():
    copies, there = DeviceCopies(torch.device("cuda")), torch.ones(3, device="cuda")
    assert copies.begin({"a": there}).wait()["a"] is there
    here = torch.ones(3)
    assert copies.begin_back({"a": here}).wait()["a"] is here


def test_copy_ends_while_the_device_is_still_at_work():
    """Work begun after `begin` has not ended when the copy has: they ran side by side."""
    copies, host = DeviceCopies(torch.device("cuda")), torch.randn(4 << 20)
    copies.begin({"a": host}).wait()
    torch.cuda.synchronize()
    pending = copies.begin({"a": host})
    _busy()
    worked = torch.cuda.current_stream().record_event()
    assert copies._stream is not None
    copies._stream.synchronize()
    assert not worked.query()
    assert torch.equal(pending.wait()["a"].cpu(), host)
    assert worked.query()


def test_work_begun_after_wait_sees_the_copy():
    copies = DeviceCopies(torch.device("cuda"))
    for value in range(20):
        there = copies.begin({"a": torch.full((8 << 20,), float(value)).pin_memory()}).wait()["a"]
        assert there.sum().item() == value * (8 << 20)


def test_bytes_brought_back_are_those_made_before_though_their_memory_is_used_again():
    copies, found = DeviceCopies(torch.device("cuda")), []
    for value in range(20):
        made = torch.full((4 << 20,), float(value), device="cuda")
        found.append(copies.begin_back({"a": made}))
        del made  # the next one may lie where it was
    for value, pending in enumerate(found):
        assert bool((pending.wait()["a"] == value).all())


def test_copy_that_nobody_waited_for_does_not_write_into_what_comes_after():
    copies, host = DeviceCopies(torch.device("cuda")), torch.ones(16 << 20).pin_memory()
    for _ in range(20):
        copies.begin({"a": host})
        after = torch.zeros(16 << 20, device="cuda")
        assert not bool(after.any())


@pytest.mark.parametrize("room", [0, 3 * (1 << 20), 10 * (1 << 20), None])
def test_streams_are_the_same_wherever_they_wait(room):
    shelf, generator = Shelf(room), torch.Generator("cuda").manual_seed(2)
    shape = (4, 64, 1024)  # 1 MiB
    weights = [torch.randn(1024, 1024, device="cuda", generator=generator) / 32 for _ in range(3)]
    start = torch.randn(8, *shape, device="cuda", generator=generator)
    expected = start.clone()
    for weight in weights:
        expected = torch.stack([torch.tanh(cell @ weight) for cell in expected])
    streams = [Stream(cell.clone(), shelf) for cell in start]
    for block, weight in enumerate(weights):
        for number, stream in enumerate(streams):
            if number + 1 < len(streams):
                streams[number + 1].bring()
            stream.move(block, lambda hidden_BTD, weight=weight: torch.tanh(hidden_BTD @ weight))
    num_there = sum(stream.is_in_memory for stream in streams)
    assert num_there == (len(streams) if room is None else min(8, room >> 20))
    for found, wanted in zip(streams, expected, strict=True):
        assert found.hidden_BTD.device.type == "cuda"
        assert torch.equal(found.hidden_BTD, wanted)


def test_pinned_memory_of_streams_is_used_again():
    shelf = Shelf(0)
    streams = [Stream(torch.full((4, 64, 1024), float(n), device="cuda"), shelf) for n in range(4)]
    for block in range(5):
        for stream in streams:
            stream.move(block, lambda hidden_BTD: hidden_BTD + 1)
    assert shelf.pinned_bytes == 4 << 20
    assert [stream.hidden_BTD.mean().item() for stream in streams] == [5.0, 6.0, 7.0, 8.0]
