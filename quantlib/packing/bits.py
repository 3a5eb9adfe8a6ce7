"""Small unsigned codes in int32 words: the one bit layout all integer formats here share.

Codes follow each other without gaps along one dimension, the first code in the lowest bits of the first
word. Only widths that divide 8 are packed (2, 4, 8): they fill bytes without crossing one, so a word is its
four bytes in little-endian order, and every release of every reader agrees on them. Wider gaps between
conventions open at 3, 5, 6 and 7 bits, which are left out.

The bytes are reinterpreted as words in place, so packing needs no memory beyond its result; it relies on a
little-endian host, as safetensors files do.
"""

import torch

from quantlib.errors import PackingError

PACKED_BITS = (2, 4, 8)
BITS_PER_WORD = 32


def num_words(num_codes: int, bits: int) -> int:
    """Words that ``num_codes`` codes of ``bits`` bits take; the last may be partly filled.

    >>> num_words(9, 4)
    2
    """
    return -(-num_codes * bits // BITS_PER_WORD)


def pack_words(codes: torch.Tensor, *, bits: int, dim: int) -> torch.Tensor:
    """Pack codes along a dimension; unused bits of the last word are 0.

    Shapes:
        codes: uint8, two dims; on the meta device only shape and dtype are worked out.

    Args:
        codes: Values 0 .. 2**bits - 1.
        bits: Width of a code, 2, 4 or 8.
        dim: 0 or 1, the dimension that becomes words.

    Returns:
        int32, contiguous, `num_words` long in ``dim``.

    Raises:
        PackingError: The width is not packed here, the codes are not uint8, or one is out of range (values
            cannot be seen on the meta device).

    >>> pack_words(torch.arange(8, dtype=torch.uint8)[None], bits=4, dim=1).item() == 0x76543210
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
        bits: Width of a code, 2, 4 or 8.
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
    packed = lines.view(torch.uint8)
    if bits < 8:
        mask = (1 << bits) - 1
        packed = torch.stack([packed >> shift & mask for shift in range(0, 8, bits)], dim=-1).flatten(1)
    codes = packed[:, :length]
    return transposed(codes) if dim == 0 else codes.contiguous()


def transposed(matrix: torch.Tensor) -> torch.Tensor:
    """A transposed copy, row-major also where a side is 1."""
    return matrix.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _bytes_from_codes(lines: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes uint8 [lines, whole words * 4] of codes uint8 [lines, length]."""
    num_lines, length = lines.shape
    padded = lines.new_zeros(num_lines, num_words(length, bits) * BITS_PER_WORD // bits)
    padded[:, :length] = lines
    codes_per_byte = 8 // bits
    packed = padded[:, ::codes_per_byte].clone()
    for i in range(1, codes_per_byte):
        packed |= padded[:, i::codes_per_byte] << (i * bits)
    return packed.contiguous()


def _require_packed_bits(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise PackingError(
            f"codes of {bits} bits are not packed; use one of {', '.join(map(str, PACKED_BITS))} bits",
            bits=bits,
        )
