"""Small unsigned codes in int32 words: the one bit layout all integer formats here share.

Codes follow each other without gaps along one dimension, the first code in the lowest bits of the first
word: read as one long little-endian number, a line is sum(code[i] << bits * i). At 2, 4 and 8 bits no code
crosses a byte. At b = 3 or 5 bits 8 codes fill b bytes, at 6 bits 4 codes 3 bytes, and 32 codes b words: at 3
bits code 10 has its highest bit and code 21 its two highest in the word after. This is the layout of
compressed-tensors since June 2026 and, up to 4 bits and at 8, of GPTQ since its first release.

Left out: 7 bits, and layouts that leave the rest of a word empty (10 codes of 3 bits a word, as
compressed-tensors had it before).

A word is its four bytes in little-endian order, so the work is done on bytes, one pass for each byte that a
code of the repeating pattern touches, and the bytes are reinterpreted as words in place: packing needs one
copy of the codes beyond its result. It relies on a little-endian host, as safetensors files do.
"""

import math

import torch

from quantlib.errors import PackingError
from quantlib.fresh_bytes import fresh_bytes
from quantlib.grouping import row_parts

# Of them every format names those that it holds.
PACKED_BITS = (2, 3, 4, 5, 6, 8)
BITS_PER_WORD = 32
_BITS_PER_BYTE = 8
_BYTES_PER_WORD = 4


def num_words(num_codes: int, bits: int) -> int:
    """Words that ``num_codes`` codes of ``bits`` bits take; the last may be partly filled.

    >>> num_words(9, 4), num_words(32, 3), num_words(33, 3)
    (2, 3, 4)
    """
    return -(-num_codes * bits // BITS_PER_WORD)


def pack_words(codes: torch.Tensor, *, bits: int, dim: int) -> torch.Tensor:
    """Pack codes along a dimension; unused bits of the last word are 0.

    Shapes:
        codes: uint8, two dims; on the meta device only shape and dtype are worked out.

    Args:
        codes: Values 0 .. 2**bits - 1.
        bits: Width of a code, one of `PACKED_BITS`.
        dim: 0 or 1, the dimension that becomes words.

    Returns:
        int32, contiguous, `num_words` long in ``dim``.

    Raises:
        PackingError: The width is not packed here, the codes are not uint8, or one is out of range (values
            cannot be seen on the meta device).

    Cost: memory: a copy of the codes, the words, and 1 / 8 of the words.

    >>> pack_words(torch.arange(8, dtype=torch.uint8)[None], bits=4, dim=1).item() == 0x76543210
    True
    >>> pack_words(torch.arange(8, dtype=torch.uint8)[None], bits=3, dim=1).item() == 0o76543210
    True
    """
    _require_packed_bits(bits)
    if codes.dtype != torch.uint8:
        raise PackingError(f"codes must be uint8 to be packed, got {codes.dtype}", dtype=str(codes.dtype))
    if not codes.is_meta and codes.numel() and int(codes.max()) >= 1 << bits:
        raise PackingError(
            f"code {int(codes.max())} does not fit {bits} bits (largest is {(1 << bits) - 1});"
            " clamp the codes to the grid before packing",
            bits=bits,
        )
    lines = codes.transpose(0, 1) if dim == 0 else codes
    words = _bytes_from_codes(lines, bits).view(torch.int32)
    return transposed(words) if dim == 0 else words


def unpack_words(words: torch.Tensor, *, bits: int, dim: int, length: int) -> torch.Tensor:
    """The codes that `pack_words` packed.

    Shapes:
        words: int32, two dims.

    Args:
        words: Packed codes.
        bits: Width of a code, one of `PACKED_BITS`.
        dim: 0 or 1, the dimension that is packed.
        length: Number of codes along ``dim``.

    Returns:
        uint8, contiguous, ``length`` long in ``dim``.

    Raises:
        PackingError: The width is not packed here, the words are not int32, or their number does not fit
            ``length``.
    """
    _require_packed_bits(bits)
    if words.dtype != torch.int32:
        raise PackingError(f"packed codes must be int32, got {words.dtype}", dtype=str(words.dtype))
    if words.shape[dim] != num_words(length, bits):
        raise PackingError(
            f"{length} codes of {bits} bits take {num_words(length, bits)} words, got {words.shape[dim]}",
            bits=bits,
            length=length,
        )
    # A copy even where torch calls a one-word line contiguous: its stride would forbid the byte view.
    lines = transposed(words) if dim == 0 else words.clone(memory_format=torch.contiguous_format)
    codes = _codes_from_bytes(lines.view(torch.uint8), bits, length)
    return transposed(codes) if dim == 0 else codes


def transposed(matrix: torch.Tensor) -> torch.Tensor:
    """A transposed copy, row-major also where a side is 1."""
    return matrix.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _pattern(bits: int) -> tuple[int, int]:
    """Codes, and bytes they fill, after which the layout repeats: (8, 3) at 3 bits, (2, 1) at 4."""
    common = math.gcd(bits, _BITS_PER_BYTE)
    return _BITS_PER_BYTE // common, bits // common


def _bytes_from_codes(lines: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes uint8 [lines, whole words * 4] of codes uint8 [lines, length]."""
    num_lines, length = lines.shape
    pattern_codes, pattern_bytes = _pattern(bits)
    num_bytes = num_words(length, bits) * _BYTES_PER_WORD
    if pattern_bytes == 1:
        packed = fresh_bytes((num_lines, num_bytes), lines.device)
        filled = num_bytes * pattern_codes
        # Strides and not is_contiguous: of a single line torch does not care how long it is.
        is_ready = lines.stride() == (filled, 1) and lines.storage_offset() == 0
        for part in row_parts(lines):
            codes = lines[part]
            if not is_ready:
                padded = torch.nn.functional.pad(codes, (0, filled - length))
                codes = padded.clone(memory_format=torch.contiguous_format)
            _fold(codes, bits, out=packed[part])
        return packed
    padded = lines.new_zeros(num_lines, -(-num_bytes // pattern_bytes) * pattern_codes)
    padded[:, :length] = lines
    packed = lines.new_zeros(num_lines, num_bytes)
    for i in range(pattern_codes):
        byte, shift = divmod(i * bits, _BITS_PER_BYTE)
        codes = padded[:, i::pattern_codes]
        target = packed[:, byte::pattern_bytes]
        # The last word may end within the pattern: what is cut off is padding.
        target |= codes[:, : target.shape[1]] << shift
        if shift + bits > _BITS_PER_BYTE:
            target = packed[:, byte + 1 :: pattern_bytes]
            target |= codes[:, : target.shape[1]] >> (_BITS_PER_BYTE - shift)
    return packed


def _fold(codes: torch.Tensor, bits: int, *, out: torch.Tensor) -> None:
    """Bytes of codes that fill them without a rest: neighbours are put together until a byte is full.

    Four times as fast as codes put in their place by strides.
    """
    while bits < _BITS_PER_BYTE:
        pairs = codes.view(torch.int16)  # the left one is the low byte
        codes = (pairs >> (_BITS_PER_BYTE - bits)).bitwise_or_(pairs)
        bits *= 2
        if bits < _BITS_PER_BYTE:
            codes = codes.to(torch.uint8)
    out.copy_(codes)


def _codes_from_bytes(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Codes uint8 [lines, length] of bytes uint8 [lines, at least length * bits / 8]."""
    pattern_codes, pattern_bytes = _pattern(bits)
    mask = (1 << bits) - 1
    codes = packed.new_empty(packed.shape[0], length)
    for i in range(min(pattern_codes, length)):
        byte, shift = divmod(i * bits, _BITS_PER_BYTE)
        target = codes[:, i::pattern_codes]
        found = packed[:, byte::pattern_bytes][:, : target.shape[1]] >> shift
        if shift + bits > _BITS_PER_BYTE:
            above = packed[:, byte + 1 :: pattern_bytes][:, : target.shape[1]]
            found |= above << (_BITS_PER_BYTE - shift)
        target.copy_(found.bitwise_and_(mask))
    return codes


def _require_packed_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise PackingError(
            f"codes of {bits} bits are not packed; use one of {', '.join(map(str, PACKED_BITS))} bits",
            bits=bits,
        )
