"""The order of 4-bit codes in the words of AWQ.

Nibble i of a word, lowest first, is column ``order[i]`` of its eight; the order is 0, 2, 4, 6, 1, 3, 5, 7.
Even columns lie in the lower half and odd ones in the upper, where a kernel takes one of each out at a time.
`quantlib.packing.bits` has them in plain order; here words of one kind become words of the other, without a
code being taken out.

Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py (``order_map``).
"""

import torch

# The lower of two nibbles, or bytes, that change places, and how far apart they lie in bits.
_INNER_NIBBLES = 0x00F0_00F0, 4
_INNER_BYTES = 0x0000_FF00, 8


def interleaved(words: torch.Tensor) -> torch.Tensor:
    """Words of AWQ from words in plain order.

    Shapes:
        words: int32, any dims.

    >>> f"{interleaved(torch.tensor([0x76543210], dtype=torch.int32)).item():x}"
    '75316420'
    """
    return _exchanged(_exchanged(words, *_INNER_NIBBLES), *_INNER_BYTES)


def in_plain_order(words: torch.Tensor) -> torch.Tensor:
    """Words in plain order from words of AWQ.

    Shapes:
        words: int32, any dims.

    >>> f"{in_plain_order(torch.tensor([0x75316420], dtype=torch.int32)).item():x}"
    '76543210'
    """
    return _exchanged(_exchanged(words, *_INNER_BYTES), *_INNER_NIBBLES)


def _exchanged(words: torch.Tensor, lower: int, shift: int) -> torch.Tensor:
    """With the bits of the mask ``lower`` and those ``shift`` above them exchanged."""
    # What a negative word's sign fills in lies above the mask.
    differing = ((words >> shift) ^ words) & lower
    return words ^ differing ^ (differing << shift)
