"""Packing of codes into words: values known by hand, ragged lengths, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import PackingError
from quantlib.packing.bits import num_words, pack_words, unpack_words


def unsigned_words(words: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.flatten().tolist()]


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (4, range(8), [0x76543210]),
        (4, [7] * 8, [2004318071]),
        (4, [8] * 8, [0x88888888]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8, 15], [0x87654321, 0x0000000F]),
        (8, [0x10, 0x32, 0x54, 0xF6], [0xF6543210]),
        (2, [3, 0, 1, 2] * 4, [0x93939393]),
    ],
)
def test_pack_known_codes_gives_known_words(bits, codes, expected):
    packed = pack_words(torch.tensor([list(codes)], dtype=torch.uint8), bits=bits, dim=1)
    assert unsigned_words(packed) == expected


def test_pack_along_rows_puts_the_first_row_in_the_lowest_bits():
    codes = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.uint8)
    packed = pack_words(codes, bits=4, dim=0)
    assert packed.shape == (1, 2)
    assert packed.is_contiguous()
    assert unsigned_words(packed) == [0x531, 0x642]


@settings(deadline=None, max_examples=80)
@given(
    bits=st.sampled_from([2, 4, 8]),
    rows=st.integers(1, 37),
    columns=st.integers(1, 70),
    dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**31),
)
def test_unpack_returns_the_packed_codes_and_meta_the_real_shape(bits, rows, columns, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    packed = pack_words(codes, bits=bits, dim=dim)
    length = (rows, columns)[dim]
    assert packed.shape[dim] == num_words(length, bits) == -(-length * bits // 32)
    assert torch.equal(unpack_words(packed, bits=bits, dim=dim, length=length), codes)
    meta = pack_words(codes.to("meta"), bits=bits, dim=dim)
    assert (meta.shape, meta.dtype, meta.stride()) == (packed.shape, packed.dtype, packed.stride())


def test_pack_field_by_field_equals_shifted_sum():
    codes = torch.randint(0, 16, (3, 21), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    packed = pack_words(codes, bits=4, dim=1)
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        whole = sum(code << 4 * i for i, code in enumerate(row))
        assert [word & 0xFFFFFFFF for word in words] == [whole >> 32 * i & 0xFFFFFFFF for i in range(3)]


def test_pack_code_out_of_range_is_refused():
    codes = torch.tensor([[3, 16]], dtype=torch.uint8)
    with pytest.raises(PackingError, match="16 does not fit 4 bits"):
        pack_words(codes, bits=4, dim=1)


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 7, 16])
def test_pack_width_that_crosses_bytes_is_refused(bits):
    with pytest.raises(PackingError, match=f"{bits} bits"):
        pack_words(torch.zeros(1, 8, dtype=torch.uint8), bits=bits, dim=1)


def test_pack_signed_codes_are_refused():
    with pytest.raises(PackingError, match="uint8"):
        pack_words(torch.zeros(1, 8, dtype=torch.int8), bits=4, dim=1)


def test_unpack_wrong_number_of_words_is_refused():
    with pytest.raises(PackingError, match="take 2 words, got 3"):
        unpack_words(torch.zeros(1, 3, dtype=torch.int32), bits=4, dim=1, length=9)
