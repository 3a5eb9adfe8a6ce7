"""Second moments of a linear's input, some tokens at a time, as fp32 products.

C columns (in features), N tokens, S rows of a strip, L its columns. Of X^T X only the lower triangle is
computed, in strips of rows; of the product of two streams' inputs, X_ref^T X, all. How cells are summed is
`totals`.
"""

from collections.abc import Iterator, Sequence

import torch

from quantlib.panels import panels_of

# Part of what the output bits depend on, as the sum of a cell is taken over such pieces.
_CONVERTED_TOKENS = 1024


def add_gram_(strips: Sequence[torch.Tensor], x_NC: torch.Tensor) -> None:
    """Add X^T X of some tokens to the lower triangle of a sum.

    Shapes:
        strips: fp32 [S, L] as `panels.strip_shapes` has them, of C columns or more: what is beyond them is
            left alone. Above the diagonal some entries are not added to.
        x_NC: fp32, bf16 or fp16 [N, C].

    Numerics: products of bf16 or fp16 inputs are exact in fp32; sums are taken in fp32 on every device. On a
        CPU torch would return a product rounded to 16 bits: such inputs are converted, some tokens at a time.
        On a GPU products of fp32 inputs are in fp32 where `quantlib.machine.keep_fp32_products` was called.

    Cost: N * C**2 * (1/2 + 1/32) multiply-adds on a CPU from 2048 columns up, and memory of 1024 tokens in
        fp32; on a GPU N * C * (C + 2048) / 2 below 32768 columns, and no memory.
    """
    columns = x_NC.shape[1]
    for part_NC in _multipliable(x_NC):
        for strip_SL in strips:
            rows, end = strip_SL.shape
            start, stop = end - rows, min(end, columns)
            if start < stop:
                _add_product_(strip_SL[: stop - start, :stop], part_NC[:, start:stop], part_NC[:, :stop])


def add_cross_product_(sum_CC: torch.Tensor, reference_NC: torch.Tensor, x_NC: torch.Tensor) -> None:
    """Add X_ref^T X of some tokens to all of a sum, fp32 [C, C] or larger; otherwise as `add_gram_`."""
    columns = x_NC.shape[1]
    for its_NC, part_NC in zip(_multipliable(reference_NC), _multipliable(x_NC), strict=True):
        _add_product_(sum_CC[:columns, :columns], its_NC, part_NC)


def _multipliable(x_NC: torch.Tensor) -> Iterator[torch.Tensor]:
    """The inputs as they are, or in pieces of fp32 where a product of them would be rounded."""
    if x_NC.device.type == "cuda" or x_NC.dtype == torch.float32:
        yield x_NC
    else:
        yield from (piece_NC.float() for piece_NC in x_NC.split(_CONVERTED_TOKENS))


def _add_product_(sum_LC: torch.Tensor, left_NL: torch.Tensor, right_NC: torch.Tensor) -> None:
    if left_NL.dtype == torch.float32:
        sum_LC.addmm_(left_NL.T, right_NC)
    else:
        torch.addmm(sum_LC, left_NL.T, right_NC, out_dtype=torch.float32, out=sum_LC)


def mirror_(matrix_CC: torch.Tensor) -> None:
    """Make the upper triangle of a matrix [C, C] that of its transpose; temporary memory of a panel."""
    for start, end in panels_of(len(matrix_CC)):
        matrix_CC[:start, start:end] = matrix_CC[start:end, :start].T
        corner_PP = matrix_CC[start:end, start:end].tril()
        matrix_CC[start:end, start:end] = corner_PP + corner_PP.tril(-1).T
