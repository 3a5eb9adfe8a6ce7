"""Scales as the output file will hold them.

A scale is rounded to its stored dtype before anything is computed with it, so that the levels a solver works
with are the levels a reader of the file gets. Zero, subnormal and infinite scales never leave this file: some
readers flush subnormals to zero, which would erase the group.
"""

import torch


def round_to_stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round scales to a stored dtype, kept inside its positive normal numbers.

    Args:
        scale: fp32, not negative, any shape.
        dtype: bf16, fp16 or fp32.

    Returns:
        fp32, every value exactly representable in ``dtype``.

    >>> round_to_stored(torch.tensor([0.1, 1e-7, 1e6]), torch.float16).tolist()
    [0.0999755859375, 6.103515625e-05, 65504.0]
    """
    limits = torch.finfo(dtype)
    return scale.to(dtype).float().clamp_(limits.smallest_normal, limits.max)


def is_outside_stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Which scales `round_to_stored` had to move to a bound; zeros are not meant.

    >>> is_outside_stored(torch.tensor([0.0, 0.1, 1e-7, 1e6]), torch.float16).tolist()
    [False, False, True, True]
    """
    limits = torch.finfo(dtype)
    return (scale > 0) & ((scale < limits.smallest_normal) | (scale > limits.max))
