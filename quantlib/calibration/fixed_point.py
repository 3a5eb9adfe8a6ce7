"""Adding fp32 numbers to a sum in fixed point, which is exact but for their rounding.

P rows of a panel, L its columns. On a GPU nothing waits for the device: what does not fit is noted there.
"""

import torch

# Sums stay below 2**62: two of them added still fit an int64 and can be checked afterwards.
TOTAL_BITS = 62
LIMIT = 2**TOTAL_BITS


def add_fixed_point_(
    total_PL: torch.Tensor, partial_PL: torch.Tensor, exponent: int, refused: torch.Tensor
) -> None:
    """Add round(partial * 2**exponent), half to even and exact in fp64, to a sum.

    Shapes:
        total_PL: int64 [P, L], contiguous, below `LIMIT` without signs.
        partial_PL: fp32 [P, L], contiguous rows.
        refused: int32 []; becomes 1 where an entry is not finite or the sum leaves its range, and the sum
            then is of no use. Otherwise it stays.

    Cost: on a CPU temporary memory of two panels in 64 bits.
    """
    if total_PL.is_cuda:
        from quantlib.kernels import fixed_point  # Triton is there where CUDA is

        fixed_point.add_fixed_point_(total_PL, partial_PL, exponent, refused)
        return
    scaled_PL = partial_PL.double().mul_(2.0**exponent)
    # Both terms are below 2**62, so their sum cannot wrap around before it is checked.
    if largest(scaled_PL) < LIMIT:
        total_PL += scaled_PL.round_().to(torch.int64)
    else:
        refused.fill_(1)
    if largest(total_PL) >= LIMIT:
        refused.fill_(1)


def largest(values: torch.Tensor) -> float:
    """Of all entries without their signs; NaN where one is among them."""
    lowest, highest = (bound.item() for bound in torch.aminmax(values))
    return max(-lowest, highest)
