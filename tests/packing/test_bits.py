"""Packing of codes into words: values known by hand, a slow packer, ragged lengths, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import PackingError
from quantlib.packing.bits import PACKED_BITS, num_words, pack_words, unpack_words
from tests.support.big_integers import words_of


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
        (3, range(8), [0o76543210]),
        (3, [3] * 32, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        # Code 10 has its highest bit in the second word, code 21 its two highest in the third.
        (3, [0] * 10 + [7] + [0] * 21, [0xC0000000, 0x1, 0]),
        (3, [0] * 21 + [7] + [0] * 10, [0, 0x80000000, 0x3]),
        (3, [0] * 31 + [7], [0, 0, 0xE0000000]),
        (3, [0] * 10 + [7], [0xC0000000, 0x1]),
        (3, [0] * 32 + [5], [0, 0, 0, 0x5]),
        # Eight codes are 0x398a418820, as base 32 digits.
        (5, range(8), [0x8A418820, 0x39]),
        # Code 6 has its three highest bits in the second word, code 12 its highest in the third.
        (5, [0] * 6 + [31] + [0] * 5 + [31], [0xC0000000, 0xF0000007, 0x1]),
        (5, [0] * 31 + [31], [0, 0, 0, 0, 0xF8000000]),
        # Four codes fill three bytes: 0o03020100 = 0x0c2040, 0o07060504 = 0x1c6144, and so on.
        (6, range(16), [0x440C2040, 0xA2481C61, 0x3CE34C2C]),
        (6, [0] * 5 + [63] + [0] * 4 + [63], [0xC0000000, 0xF000000F, 0x3]),
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
    bits=st.sampled_from(PACKED_BITS),
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


@settings(deadline=None, max_examples=80)
@given(data=st.data(), bits=st.sampled_from(PACKED_BITS), dim=st.sampled_from([0, 1]))
def test_pack_line_by_line_equals_one_big_integer(data, bits, dim):
    num_lines, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 100))
    code = st.integers(0, 2**bits - 1)
    lines = data.draw(
        st.lists(st.lists(code, min_size=length, max_size=length), min_size=num_lines, max_size=num_lines)
    )
    codes = torch.tensor(lines, dtype=torch.uint8)
    packed = pack_words(codes if dim == 1 else codes.T, bits=bits, dim=dim)
    found = packed if dim == 1 else packed.T
    assert [unsigned_words(line) for line in found] == [words_of(line, bits) for line in lines]


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("length", [1, 31, 33, 43])
def test_unpack_ignores_what_stands_in_unused_bits(bits, length):
    words = torch.full((2, num_words(length, bits)), -1, dtype=torch.int32)
    found = unpack_words(words, bits=bits, dim=1, length=length)
    assert torch.equal(found, torch.full((2, length), 2**bits - 1, dtype=torch.uint8))


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_pack_leaves_its_input_alone(bits):
    codes = torch.randint(0, 1 << bits, (3, 64), generator=torch.Generator().manual_seed(bits))
    codes = codes.to(torch.uint8)
    before = codes.clone()
    words = pack_words(codes, bits=bits, dim=1)
    words_before = words.clone()
    unpack_words(words, bits=bits, dim=1, length=64).zero_()
    assert torch.equal(codes, before)
    assert torch.equal(words, words_before)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_pack_code_out_of_range_is_refused(bits):
    codes = torch.tensor([[0, 2**bits]], dtype=torch.uint8)
    with pytest.raises(PackingError, match=f"{2**bits} does not fit {bits} bits"):
        pack_words(codes, bits=bits, dim=1)


@pytest.mark.parametrize("bits", [0, 1, 7, 16])
def test_width_that_is_not_packed_is_refused(bits):
    with pytest.raises(PackingError, match=f"{bits} bits are not packed; use one of 2, 3, 4, 5, 6, 8"):
        pack_words(torch.zeros(1, 8, dtype=torch.uint8), bits=bits, dim=1)
    with pytest.raises(PackingError, match=f"{bits} bits are not packed"):
        unpack_words(torch.zeros(1, 8, dtype=torch.int32), bits=bits, dim=1, length=8)


def test_pack_signed_codes_are_refused():
    with pytest.raises(PackingError, match="uint8"):
        pack_words(torch.zeros(1, 8, dtype=torch.int8), bits=4, dim=1)


@pytest.mark.parametrize(
    ("bits", "length", "needed"),
    [(4, 9, 2), (3, 32, 3), (3, 33, 4), (3, 10, 1), (5, 32, 5), (5, 33, 6), (6, 16, 3), (6, 17, 4)],
)
@pytest.mark.parametrize("too_many", [1, -1])
def test_unpack_wrong_number_of_words_is_refused(bits, length, needed, too_many):
    words = torch.zeros(1, needed + too_many, dtype=torch.int32)
    with pytest.raises(PackingError, match=f"take {needed} words, got {needed + too_many}"):
        unpack_words(words, bits=bits, dim=1, length=length)


def test_unpack_words_of_another_dtype_are_refused():
    with pytest.raises(PackingError, match="must be int32, got torch.int64"):
        unpack_words(torch.zeros(1, 3, dtype=torch.int64), bits=3, dim=1, length=32)
