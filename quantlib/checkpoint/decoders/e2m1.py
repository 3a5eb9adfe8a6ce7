"""4-bit floats, two a byte: a sign, two bits of exponent and one of mantissa.

Source: OCP Microscaling Formats (MX) 1.0, section 5.3.3.
"""

import torch

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def values_of(packed: torch.Tensor) -> torch.Tensor:
    """fp32 values of uint8 bytes, the last dim twice as long; the lower nibble comes first.

    >>> values_of(torch.tensor([0xF2], dtype=torch.uint8)).tolist()
    [1.0, -6.0]
    """
    table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return table[nibbles.flatten(-2).int()]
