"""Grids of scaled groups: levels that are a scale times an offset, and the one rounding of this project.

R rows (out features), C columns (in features), G groups of consecutive columns, S columns of one group.
What an offset is and which is nearest depends on the number format (`levels.py`). Fitting scales is `fit.py`;
the bits of a stored file are the packers' business.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quantlib.fresh_bytes import fresh_bytes
from quantlib.grids.levels import Levels, levels_of
from quantlib.grouping import row_parts
from quantlib.quantized import NestedScales, QuantizedLinear
from quantlib.schemes import WeightScheme

_VECTOR_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineGrid:
    """Fitted scales of one linear: with the codes they make a `QuantizedLinear`.

    Shapes:
        scale_RG: [R, G] in the stored dtype; positive, finite, normal numbers.
        zero_RG: uint8 [R, G], the code that means zero; None when symmetric.
        is_bounded_RG: bool [R, G], True for groups (not all zero) whose scale did not fit the stored dtype
            and was moved to its smallest normal or its largest number.
        divisor_R1: fp32 [R, 1], of every row, where scales are quotients (``DIVIDED_SCALES``); else None.
    """

    scheme: WeightScheme
    scale_RG: torch.Tensor
    zero_RG: torch.Tensor | None
    is_bounded_RG: torch.Tensor
    divisor_R1: torch.Tensor | None = None

    def rows(self, part: slice | torch.Tensor) -> "AffineGrid":
        """The grid of some rows, by slice or index; a copy, so that it does not keep the whole alive."""
        return AffineGrid(
            scheme=self.scheme,
            scale_RG=self.scale_RG[part].clone(),
            zero_RG=None if self.zero_RG is None else self.zero_RG[part].clone(),
            is_bounded_RG=self.is_bounded_RG[part].clone(),
            divisor_R1=None if self.divisor_R1 is None else self.divisor_R1[part].clone(),
        )


def whole_vectors(num_rows: int, device: torch.device) -> torch.Tensor | None:
    """Row indices that repeat the last row up to a multiple of 16; None when ``num_rows`` is one already.

    Matrix products treat the rows that do not fill a vector register apart and may group their sums
    differently. Filled up, a row's bits depend neither on how many rows stand beside it nor on its place.
    """
    if num_rows % _VECTOR_ROWS == 0:
        return None
    num_filled = num_rows + -num_rows % _VECTOR_ROWS
    return torch.arange(num_filled, device=device).clamp_max_(num_rows - 1)


def nearest_offsets(
    values: torch.Tensor,
    scale,
    lowest,
    highest,
    levels: Levels,
    *,
    out: torch.Tensor,
    quotient: torch.Tensor | None = None,
) -> torch.Tensor:
    """The offsets of the nearest levels.

    Args:
        values: Floating, any shape.
        scale: Positive, broadcastable to ``values``.
        lowest: Smallest offset of integers: a number, or a tensor broadcastable to ``values``.
        highest: Largest offset, of the same kind as ``lowest``.
        levels: Of the number format.
        out: Receives the offsets in floating form; may be ``values``.
        quotient: Receives ``values / scale`` if given; may be ``values``, not ``out``.

    Returns:
        ``out``.

    Numerics: a true division, then round half to even, then saturation. All codes of this project come from
        here, so no two parts of it can disagree about a tie.
    """
    divided = torch.div(values, scale, out=out if quotient is None else quotient)
    return levels.nearest(divided, lowest, highest, out=out)


def offset_bounds(grid: AffineGrid, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest offset of every group.

    Returns:
        Two tensors [R, G] of ``dtype``.
    """
    if grid.zero_RG is None:
        lowest, highest = (
            torch.full_like(grid.scale_RG, bound, dtype=dtype) for bound in levels_of(grid.scheme).bounds
        )
        return lowest, highest
    zero_RG = grid.zero_RG.to(dtype)
    return -zero_RG, (grid.scheme.num_codes - 1) - zero_RG


def nearest_codes(weight_RC: torch.Tensor, grid: AffineGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every weight to its nearest level, each on its own.

    Shapes:
        weight_RC: floating [R, C], not empty; bf16 and fp16 are taken as fp32.

    Returns:
        Codes, uint8 [R, C], and int64 [R], how many weights of each row lay more than half a step outside
        the grid.

    Cost: as `rounded_parts`.
    """
    codes_RC = fresh_bytes(weight_RC.shape, weight_RC.device)
    num_clipped = [part.num_clipped_R for part in rounded_parts(weight_RC, grid, codes_RC)]
    return codes_RC, torch.cat(num_clipped)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedPart:
    """A handful of rows that were rounded; the floating tensors are overwritten when the next is asked for.

    Attributes:
        rows: Which rows of the matrix.
        num_clipped_R: int64, how many weights of each lay more than half a step outside the grid.
        exact_RC: The weights in fp32, unless they are wider.
        work_RC: A buffer of that shape and dtype for whoever has a use for it.
    """

    rows: slice
    num_clipped_R: torch.Tensor
    exact_RC: torch.Tensor
    work_RC: torch.Tensor


def rounded_parts(weight_RC: torch.Tensor, grid: AffineGrid, codes_RC: torch.Tensor) -> Iterator[RoundedPart]:
    """Round every weight to its nearest level, a handful of rows at a time.

    What else is wanted of the rows costs least between two parts: they are in a cache, and in fp32.

    Shapes:
        weight_RC: floating [R, C], not empty; bf16 and fp16 are taken as fp32.
        codes_RC: uint8 [R, C], receives the codes of a part before the part is given.

    Cost: eleven passes in a cache; temporary memory of a handful of rows, the same for all.
    """
    dtype = torch.promote_types(weight_RC.dtype, torch.float32)
    parts = row_parts(weight_RC)
    buffers = _Buffers(weight_RC[parts[0]], grid.scheme, dtype)
    scale_RG1 = grid.scale_RG.to(dtype)[..., None]
    lowest_RG, highest_RG = offset_bounds(grid, dtype)
    levels, largest = levels_of(grid.scheme), grid.scheme.num_codes - 1
    # Numbers cost least; tensors are cheaper one after the other than both at once.
    bounds = levels.bounds if grid.zero_RG is None else (-largest, largest)
    for part in parts:
        rows_RC = weight_RC[part]
        if len(rows_RC) != len(buffers.exact_RC):  # the last part
            buffers = _Buffers(rows_RC, grid.scheme, dtype)
        buffers.exact_RC.copy_(rows_RC)
        exact_RGS, quotient_RGS, offset_RGS = buffers.exact_RGS, buffers.quotient_RGS, buffers.offset_RGS
        nearest_offsets(exact_RGS, scale_RG1[part], *bounds, levels, out=offset_RGS, quotient=quotient_RGS)
        zero = grid.scheme.middle_code
        if grid.zero_RG is not None:
            offset_RGS.clamp_min_(lowest_RG[part, :, None]).clamp_max_(highest_RG[part, :, None])
            zero = grid.zero_RG[part, :, None].to(torch.int16)
        num_clipped_R = num_clipped_(quotient_RGS, offset_RGS, levels, dim=(1, 2))
        # By way of int16: from floating numbers to uint8 takes four times as long.
        levels.encode(offset_RGS, zero, out=buffers.code_RGS)
        codes_RC[part] = buffers.code_RC
        yield RoundedPart(
            rows=part, num_clipped_R=num_clipped_R, exact_RC=buffers.exact_RC, work_RC=buffers.work_RC
        )


class _Buffers:
    """For rows like these, by columns and by groups."""

    def __init__(self, like_RC: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype) -> None:
        rows, columns = like_RC.shape
        shape = (rows, scheme.num_groups(columns), scheme.columns_per_group(columns))
        # Zeros fill up a ragged group.
        floating = torch.zeros((3, *shape), dtype=dtype, device=like_RC.device)
        self.exact_RGS, self.quotient_RGS, self.offset_RGS = floating
        self.code_RGS = torch.empty(shape, dtype=torch.int16, device=like_RC.device)
        self.exact_RC, self.work_RC, self.code_RC = (
            grouped.flatten(1)[:, :columns] for grouped in (self.exact_RGS, self.offset_RGS, self.code_RGS)
        )


def num_clipped_(
    quotient: torch.Tensor, offset: torch.Tensor, levels: Levels, dim: int | tuple[int, ...]
) -> torch.Tensor:
    """How many quotients lay more than half a step outside the grid, int64; overwrites ``quotient``.

    Args:
        dim: What is summed over, at most 2**24 entries: they are counted in floating form, which is faster.
    """
    return quotient.sub_(offset).abs_().gt_(levels.half_step).sum(dim).long()


def with_codes(
    grid: AffineGrid, codes_RC: torch.Tensor, nested: NestedScales | None = None
) -> QuantizedLinear:
    """The linear that these codes mean on this grid."""
    return QuantizedLinear(
        codes_RC=codes_RC,
        scale_RG=grid.scale_RG,
        zero_RG=grid.zero_RG,
        scheme=grid.scheme,
        divisor_R1=grid.divisor_R1,
        nested=nested,
    )
