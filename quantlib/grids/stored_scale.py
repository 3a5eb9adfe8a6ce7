"""Scales as the output file will hold them.

A scale is rounded to its stored dtype before anything is computed with it, so that the levels a solver works
with are the levels a reader of the file gets. Zero, subnormal and infinite scales never leave this file: some
readers flush subnormals to zero, which would erase the group. Powers of two travel in a dtype that holds them
exactly and become bytes when they are packed; E4M3 numbers over a divisor, whose subnormals every reader has,
travel as their quotient in fp32. Portable scales have the 8 significant bits of bf16 and lie within the
normal numbers of fp16: both dtypes have them, and so has fp32.
"""

import math

import torch

from quantlib.grids.formats import (
    FLOAT_FORMATS,
    PLAIN_SCALES,
    PORTABLE_SCALES,
    POWER_SCALES,
    SHORT_SCALES,
)
from quantlib.grids.levels import FloatLevels

# It holds every power of two that a byte can mean, exactly.
POWERS_DTYPE = torch.bfloat16
# The smallest normal number of fp16, and the largest of bf16 that is not above fp16's.
_PORTABLE_BOUNDS = (2.0**-14, 65280.0)
_SHORT_BITS = 7
_E4M3 = FLOAT_FORMATS["e4m3"]
_E4M3_LEVELS = FloatLevels(_E4M3)
_SMALLEST_E4M3 = _E4M3.magnitudes[1]
# What would round to nothing, or to more than the largest.
_E4M3_BOUNDS = (_SMALLEST_E4M3 / 2, _E4M3.largest + _E4M3_LEVELS.half_step)


def held_dtype(kind: str, stored_dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales in memory.

    Args:
        kind: Of scales, as in a `WeightScheme`.
        stored_dtype: That of plain ones.
    """
    if kind == POWER_SCALES:
        return POWERS_DTYPE
    has_own_dtype = kind in (PLAIN_SCALES, PORTABLE_SCALES, SHORT_SCALES)
    return stored_dtype if has_own_dtype else torch.float32


def round_to_stored(
    scale: torch.Tensor,
    dtype: torch.dtype,
    kind: str = PLAIN_SCALES,
    divisor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round scales to a stored dtype, kept inside its positive normal numbers.

    Args:
        scale: fp32, not negative, any shape.
        dtype: bf16, fp16 or fp32.
        kind: ``POWER_SCALES`` for the nearest power of two, of two as near ones the larger;
            ``PORTABLE_SCALES`` for values that bf16, fp16 and fp32 have all; ``SHORT_SCALES`` for the nearest
            number of 7 significant bits, half to even.
        divisor: fp32, broadcastable to ``scale``, of ``DIVIDED_SCALES``: they are quotients of the nearest
            positive E4M3 numbers and this.

    Returns:
        fp32, every value exactly representable in ``dtype``.

    >>> round_to_stored(torch.tensor([0.1, 1e-7, 1e6]), torch.float16).tolist()
    [0.0999755859375, 6.103515625e-05, 65504.0]
    >>> round_to_stored(torch.tensor([0.7, 0.75, 3.1]), torch.bfloat16, POWER_SCALES).tolist()
    [0.5, 1.0, 4.0]
    >>> round_to_stored(torch.tensor([0.1, 1e-7, 1e6]), torch.float16, PORTABLE_SCALES).tolist()
    [0.10009765625, 6.103515625e-05, 65280.0]
    >>> round_to_stored(torch.tensor([0.1, 1.0, 1e6]), torch.float16, SHORT_SCALES).tolist()
    [0.099609375, 1.0, 65024.0]
    """
    limits = torch.finfo(dtype)
    if kind == PORTABLE_SCALES:
        return scale.to(torch.bfloat16).float().clamp_(*_PORTABLE_BOUNDS)
    if kind == POWER_SCALES:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa < 0.75).int())
        # Of a dtype the largest power of two is half of what comes after it.
        return scale.clamp_(limits.smallest_normal, 2.0 ** (math.frexp(limits.max)[1] - 1))
    if kind == SHORT_SCALES:
        mantissa, exponent = torch.frexp(scale)
        short = torch.ldexp(torch.round(mantissa * 2.0**_SHORT_BITS), exponent - _SHORT_BITS)
        largest = (2.0**_SHORT_BITS - 1) * 2.0 ** (math.frexp(limits.max)[1] - _SHORT_BITS)
        return short.clamp_(limits.smallest_normal, largest)
    if divisor is not None:
        return stored_dividends(scale, divisor).div_(divisor)
    return scale.to(dtype).float().clamp_(limits.smallest_normal, limits.max)


def stored_dividends(scale: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """The nearest positive E4M3 numbers, of which scales are quotients: fp32.

    >>> stored_dividends(torch.tensor([0.0, 1.0, 2.7, 1e6]), torch.tensor(2.0)).tolist()
    [0.001953125, 2.0, 5.5, 448.0]
    """
    dividend = scale * divisor
    return _E4M3_LEVELS.nearest(dividend, None, None, out=dividend).clamp_min_(_SMALLEST_E4M3)


def power_below(values: torch.Tensor) -> torch.Tensor:
    """The largest power of two that is not larger; 0 stays.

    >>> power_below(torch.tensor([0.0, 0.7, 4.0, 7.9])).tolist()
    [0.0, 0.5, 4.0, 4.0]
    """
    _, exponent = torch.frexp(values)
    return torch.where(values > 0, torch.ldexp(torch.ones_like(values), exponent - 1), 0.0)


def is_outside_stored(
    scale: torch.Tensor,
    dtype: torch.dtype,
    kind: str = PLAIN_SCALES,
    divisor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which scales `round_to_stored` had to move to a bound; zeros are not meant.

    >>> is_outside_stored(torch.tensor([0.0, 0.1, 1e-7, 1e6]), torch.float16).tolist()
    [False, False, True, True]
    """
    limits = torch.finfo(dtype)
    lowest, highest = limits.smallest_normal, limits.max
    if divisor is not None:
        lowest, highest = (bound / divisor for bound in _E4M3_BOUNDS)
    elif kind == PORTABLE_SCALES:
        lowest, highest = _PORTABLE_BOUNDS
    return (scale > 0) & ((scale < lowest) | (scale > highest))
