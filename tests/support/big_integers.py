"""A slow packer of its own: a line of codes as one big integer, by the definition of the layout."""

from collections.abc import Sequence


def words_of(codes: Sequence[int], bits: int) -> list[int]:
    """Unsigned 32-bit words of sum(code[i] * 2**(bits * i)), lowest first, as many as it takes."""
    whole = sum(code << bits * i for i, code in enumerate(codes))
    return [whole >> 32 * i & 0xFFFFFFFF for i in range((len(codes) * bits + 31) // 32)]


def codes_of(words: Sequence[int], bits: int) -> list[int]:
    """All whole codes in words, signed or not; those that only fill up the last word too."""
    whole = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
    return [whole >> bits * i & (1 << bits) - 1 for i in range(32 * len(words) // bits)]
