"""A slow decoder of the AWQ layout, from its definition on paper: integers and lists only."""

from collections.abc import Mapping, Sequence

import torch

# Which of the eight columns of a word each nibble holds, the lowest first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def codes_of_awq(words: Sequence[int]) -> list[int]:
    """Codes in the order of columns, of words signed or not."""
    columns = [0] * (8 * len(words))
    for number, word in enumerate(words):
        for nibble, column in enumerate(ORDER):
            columns[8 * number + column] = (word & 0xFFFFFFFF) >> 4 * nibble & 15
    return columns


def words_of_awq(codes: Sequence[int]) -> list[int]:
    """Unsigned words of codes in the order of columns, as many as fill them."""
    return [
        sum(codes[first + column] << 4 * nibble for nibble, column in enumerate(ORDER))
        for first in range(0, len(codes), 8)
    ]


def decoded_levels(tensors: Mapping[str, torch.Tensor], name: str) -> list[list[float]]:
    """Levels [out][in] as Python floats."""
    codes = [codes_of_awq(words) for words in tensors[f"{name}.qweight"].tolist()]
    zeros = [codes_of_awq(words) for words in tensors[f"{name}.qzeros"].tolist()]
    scales = tensors[f"{name}.scales"].tolist()
    width = len(codes) // len(zeros)
    return [
        [scales[i // width][o] * (codes[i][o] - zeros[i // width][o]) for i in range(len(codes))]
        for o in range(len(scales[0]))
    ]
