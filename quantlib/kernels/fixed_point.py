"""What a cell adds to a sum in fixed point: one launch, which reads either once.

P rows of a panel, L its columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# Entries of a row that a program adds: 8 a thread, and 20 bytes of traffic each.
_ENTRIES = 1024
# The exponent field of fp64 holds the power of two and this.
_EXPONENT_BIAS = 1023
# Added and taken off again it rounds to an integer, half to even. A product of fp32 and a power of two has 24
# bits: where it is too large to be rounded so it is an integer, and either operation is exact.
_ROUNDING = tl.constexpr(1.5 * 2.0**52)
# As `quantlib.calibration.fixed_point` has it; a test compares them.
_LIMIT = tl.constexpr(2**62)


def add_fixed_point_(
    total_PL: torch.Tensor, partial_PL: torch.Tensor, exponent: int, refused: torch.Tensor
) -> None:
    """See `quantlib.calibration.fixed_point.add_fixed_point_`; an entry that is refused adds nothing.

    Cost: 20 bytes of traffic an entry.
    """
    rows, columns = total_PL.shape
    entries = min(_ENTRIES, triton.next_power_of_2(columns))
    # One rounding for each operation, as torch and the interpreter have it.
    options: dict[str, Any] = {"ENTRIES": entries, "enable_fp_fusion": False}
    _add[(rows, triton.cdiv(columns, entries))](
        total_PL,
        total_PL.stride(0),
        partial_PL,
        partial_PL.stride(0),
        exponent + _EXPONENT_BIAS,
        refused,
        columns,
        **options,
    )


@triton.jit
def _add(total, total_p, partial, partial_p, power, refused, num_columns, ENTRIES: tl.constexpr):
    # 64 bits: a panel may have more than 2**31 entries.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = column < num_columns
    total += row * total_p + column
    partial += row * partial_p + column
    # 2**exponent by its bits: numbers are handed to kernels in fp32, which reaches less far.
    scale = (power.to(tl.int64) << 52).to(tl.float64, bitcast=True)
    scaled = tl.load(partial, mask=is_entry, other=0.0).to(tl.float64) * scale
    # So NaN does not fit.
    fits = tl.abs(scaled) < _LIMIT
    rounded = tl.where(fits, (scaled + _ROUNDING) - _ROUNDING, 0.0)
    sum_ = tl.load(total, mask=is_entry, other=0) + rounded.to(tl.int64)
    tl.store(total, sum_, mask=is_entry)
    is_refused = (fits == 0) | (sum_ >= _LIMIT) | (sum_ <= -_LIMIT)
    # All who have something to say say the same.
    tl.store(refused, 1, mask=tl.max(is_refused.to(tl.int32), axis=0) > 0)
