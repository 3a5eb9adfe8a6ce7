"""Where there is no GPU nothing is copied; how a tensor is cut for pinned slots is plain arithmetic."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.device_copies import DeviceCopies, pieces


@given(num_bytes=st.integers(0, 500), most=st.integers(1, 100))
def test_pieces_are_every_byte_once_in_order_and_none_is_too_long(num_bytes, most):
    found = list(pieces(num_bytes, most))
    assert [byte for start, end in found for byte in range(start, end)] == list(range(num_bytes))
    assert all(0 < end - start <= most for start, end in found)
    assert len(found) == -(-num_bytes // most)


def test_on_a_cpu_tensors_are_handed_through():
    copies, tensors = DeviceCopies(torch.device("cpu")), {"a": torch.ones(2, 3), "b": torch.tensor(1)}
    for pending in (copies.begin(tensors), copies.begin_back(tensors)):
        found = pending.wait()
        assert found.keys() == tensors.keys()
        assert all(found[name] is tensors[name] for name in tensors)
