"""Weights that come to a GPU ahead are the bytes that were read; no room for them is no error."""

import pytest

torch = pytest.importorskip("torch")

from quantlib.weights_ahead import WeightsAhead  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_weights_brought_ahead_are_those_brought_when_they_are_taken():
    generator = torch.Generator().manual_seed(4)
    tensors = {
        "weight": torch.randn(3000, 4097, generator=generator).bfloat16(),
        "norm": torch.randn(4097, generator=generator),
    }
    weights = WeightsAhead(torch.device("cuda"))
    weights.begin(7, tensors)
    ahead = weights.take(7, tensors)
    late = weights.take(7, tensors)
    assert ahead["weight"] is not late["weight"]
    for name, expected in tensors.items():
        for found in (ahead[name], late[name]):
            assert found.device.type == "cuda"
            assert found.stride() == expected.stride()
            assert torch.equal(found.cpu(), expected)


def test_weights_without_room_are_brought_when_they_are_taken():
    tensors, weights = {"weight": torch.randn(4 << 20)}, WeightsAhead(torch.device("cuda"))
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    # Less is left than the 16 MiB that are wanted.
    filler = torch.empty(free - (12 << 20), dtype=torch.uint8, device="cuda")
    weights.begin(1, tensors)
    del filler
    torch.cuda.empty_cache()
    assert torch.equal(weights.take(1, tensors)["weight"].cpu(), tensors["weight"])
