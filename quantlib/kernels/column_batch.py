"""The columns of a batch, one after the other, with the rows on chip: one launch instead of ten a column.

E linears, R rows (out features), B positions of a column batch, G groups of all linears. A program holds the
targets of some rows for all positions of the batch in registers, goes from the last position to the first,
and takes of each column only what is its own from memory: scale, weight, feedback.

Numerics: every operation is rounded by itself (multiplication and addition are not fused, division is true),
so a GPU and Triton's interpreter give the same bits, and those of torch where it works entry by entry.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from quantlib.grids.levels import CodebookLevels, FloatLevels, IntegerLevels, Levels
from quantlib.kernels.contracts import GroupScales, KeptEntries

# Rows of a program of one warp: two threads share a row, whose 128 targets then fit their registers.
_ROWS = 16
# The interpreter takes as long for a program of few rows as for one of many.
_INTERPRETED_ROWS = 1024
_INTEGER, _FLOAT, _CODEBOOK = 0, 1, 2
# Added and taken off again it rounds what is below 2**22 to an integer, half to even.
_ROUNDING = tl.constexpr(1.5 * 2.0**23)
_EXPONENT_BITS = tl.constexpr(0x7F800000)


def solve_columns(
    target_EBR: torch.Tensor,
    error_EBR: torch.Tensor,
    offset_EBR: torch.Tensor,
    feedback_EBB: torch.Tensor,
    scales: GroupScales,
    group_EB: torch.Tensor,
    levels: Levels,
    kept: KeptEntries | None = None,
) -> None:
    """See `contracts.ColumnKernel`.

    Cost: B**2 * R multiply-adds and twice as many selections; every operand is read once.
    """
    linears, batch, rows = target_EBR.shape
    height = _ROWS if target_EBR.is_cuda else _INTERPRETED_ROWS
    # Triton's types know nothing of the options of a launch.
    launch: Any = _columns[(triton.cdiv(rows, height), linears)]
    launch(
        target_EBR, target_EBR.stride(0), target_EBR.stride(1),
        error_EBR, error_EBR.stride(0), error_EBR.stride(1),
        offset_EBR, offset_EBR.stride(0), offset_EBR.stride(1),
        feedback_EBB, *feedback_EBB.stride(),
        scales.scale_GR, scales.lowest_GR, scales.highest_GR, group_EB.contiguous(),
        *_kept_operands(kept),
        *_entries(levels, target_EBR.device),
        rows, batch,
        **_number(levels),
        **_kept_dtype(kept),
        WIDTH=triton.next_power_of_2(batch),
        ROWS=height,
        num_warps=1,
        # One rounding for each operation, as torch and the interpreter have it.
        enable_fp_fusion=False,
    )  # fmt: skip


def _number(levels: Levels) -> dict[str, Any]:
    """What the kernel is compiled for: the number format."""
    if isinstance(levels, FloatLevels):
        format_ = levels.format
        return {
            "NUMBER": _FLOAT,
            "STEP": 2.0**-format_.mantissa_bits,
            "SMALLEST": 2.0**format_.smallest_exponent,
            "LARGEST": format_.largest,
            "MIDDLES": 0,
        }
    none = {"STEP": 0.0, "SMALLEST": 0.0, "LARGEST": 0.0}
    if isinstance(levels, CodebookLevels):
        return {"NUMBER": _CODEBOOK, **none, "MIDDLES": len(levels.middles)}
    assert isinstance(levels, IntegerLevels), "a number format without a device function"
    return {"NUMBER": _INTEGER, **none, "MIDDLES": 0}


def _entries(levels: Levels, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not isinstance(levels, CodebookLevels):
        return None, None
    return levels.middles.on(device), levels.ascending.on(device)


def _kept_operands(kept: KeptEntries | None) -> tuple[Any, ...]:
    if kept is None:
        return None, None, 0, 0
    assert kept.is_kept_EBR.is_contiguous() and kept.value_EBR.is_contiguous()
    return kept.is_kept_EBR.view(torch.uint8), kept.value_EBR, *kept.value_EBR.stride()[:2]


def _kept_dtype(kept: KeptEntries | None) -> dict[str, Any]:
    if kept is None:
        return {"HAS_KEPT": False, "KEPT_STEP": 0.0, "KEPT_SMALLEST": 0.0, "KEPT_LARGEST": 0.0}
    info = torch.finfo(kept.dtype)
    # A step of 0 stands for fp32, which the targets are in.
    step = 0.0 if kept.dtype == torch.float32 else info.eps
    return {
        "HAS_KEPT": True,
        "KEPT_STEP": step,
        "KEPT_SMALLEST": info.tiny,
        "KEPT_LARGEST": info.max,
    }


@triton.jit
def _rounded(value):
    return (value + _ROUNDING) - _ROUNDING


@triton.jit
def _nearest_float(value, STEP: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """Half to even in the steps of each value's power of two, saturating."""
    # What is beyond the largest saturates whether it is rounded before or after.
    bounded = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
    power = (bounded.to(tl.int32, bitcast=True) & _EXPONENT_BITS).to(tl.float32, bitcast=True)
    step = tl.maximum(power, SMALLEST) * STEP
    return tl.minimum(tl.maximum(_rounded(tl.div_rn(bounded, step)) * step, -LARGEST), LARGEST)


@triton.jit
def _nearest_entry(value, middles, entries, MIDDLES: tl.constexpr):
    place = (value > tl.load(middles)).to(tl.int32)
    for number in range(1, MIDDLES):
        place += (value > tl.load(middles + number)).to(tl.int32)
    return tl.load(entries + place)


@triton.jit
def _nearest(
    quotient, lowest, highest, middles, entries,
    NUMBER: tl.constexpr, STEP: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
    MIDDLES: tl.constexpr,
):  # fmt: skip
    """All that differs between number formats: the nearest offset."""
    if NUMBER == 0:
        # Bounds are integers: what is bounded first is small enough to be rounded.
        found = _rounded(tl.minimum(tl.maximum(quotient, lowest), highest))
    elif NUMBER == 1:
        found = _nearest_float(quotient, STEP, SMALLEST, LARGEST)
    else:
        found = _nearest_entry(quotient, middles, entries, MIDDLES)
    return found


@triton.jit
def _columns(
    target, target_e, target_b, error, error_e, error_b, offset, offset_e, offset_b,
    feedback, feedback_e, feedback_j, feedback_i,
    scale, lowest, highest, group,
    is_kept, kept, kept_e, kept_b,
    middles, entries,
    num_rows, batch,
    NUMBER: tl.constexpr, STEP: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
    MIDDLES: tl.constexpr,
    HAS_KEPT: tl.constexpr, KEPT_STEP: tl.constexpr, KEPT_SMALLEST: tl.constexpr, KEPT_LARGEST: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # 64 bits: a batch of experts has more than 2**31 entries.
    linear = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    place = tl.arange(0, WIDTH)
    target += linear * target_e + row
    error += linear * error_e + row
    offset += linear * offset_e + row
    feedback += linear * feedback_e
    group += linear * batch
    is_tile = (place < batch)[:, None] & is_row[None, :]
    unsolved = tl.load(target[None, :] + place[:, None] * target_b, mask=is_tile, other=0.0)
    for step in range(0, batch):
        here = batch - 1 - step
        # All others are zero, so that this is no rounding.
        target_here = tl.sum(tl.where((place == here)[:, None], unsolved, 0.0), axis=0)
        of_group = tl.load(group + here) * num_rows + row
        scale_here = tl.load(scale + of_group, mask=is_row, other=1.0)
        lowest_here = tl.load(lowest + of_group, mask=is_row, other=0.0)
        highest_here = tl.load(highest + of_group, mask=is_row, other=0.0)
        quotient = tl.div_rn(target_here, scale_here)
        found = _nearest(
            quotient, lowest_here, highest_here, middles, entries, NUMBER, STEP, SMALLEST, LARGEST, MIDDLES
        )
        weight = tl.load(error + here * error_b, mask=is_row, other=0.0)
        left = weight - found * scale_here
        if HAS_KEPT:
            entry = linear * kept_e + here * kept_b + row
            is_kept_here = tl.load(is_kept + entry, mask=is_row, other=0) != 0
            if KEPT_STEP == 0.0:
                kept_here = target_here
            else:
                kept_here = _nearest_float(target_here, KEPT_STEP, KEPT_SMALLEST, KEPT_LARGEST)
            left = tl.where(is_kept_here, weight - kept_here, left)
            # Nothing is clipped where the code is not what counts.
            quotient = tl.where(is_kept_here, found, quotient)
            tl.store(kept + entry, kept_here, mask=is_row & is_kept_here)
        tl.store(error + here * error_b, left, mask=is_row)
        tl.store(offset + here * offset_b, found, mask=is_row)
        tl.store(target + here * target_b, quotient, mask=is_row)
        share = tl.load(feedback + here * feedback_j + place * feedback_i, mask=place < here, other=0.0)
        unsolved += share[:, None] * left[None, :]
