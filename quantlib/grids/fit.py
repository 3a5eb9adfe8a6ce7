"""Fits scales (and zero points): by the extremes of a group, or by a search for least error.

R rows, C columns, G groups of consecutive columns, S columns of one group. Groups that are searched together
have the rows of one beside those of another: there R counts them all.
The search minimizes, for every group on its own, sum_j importance_j * (level(w_j) - w_j)**2 over scales
smaller and slightly larger than the one the extremes give. With importance = diag(H) this is the largest
cheap gain known for a solver that keeps its scales fixed; with importance = 1 it is plain squared error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from quantlib.grids.affine import AffineGrid, nearest_offsets, whole_vectors
from quantlib.grids.formats import DIVIDED_SCALES, FLOAT_FORMATS, POWER_SCALES
from quantlib.grids.levels import levels_of
from quantlib.grids.stored_scale import held_dtype, is_outside_stored, power_below, round_to_stored
from quantlib.grouping import by_group, row_parts
from quantlib.schemes import WeightScheme

# Multiples of the scale that covers the extremes. Above 1: at (2**b - 1) / (2**b - 2) the positive extreme of
# a symmetric group is no longer cut by half a step. Lowest: heavy tails under uneven importance reach down to
# 0.3 at 4 bit; at 5 and 6 bit few groups want less than 0.5 and 0.7, and a shorter range has finer steps; at
# 8 bit cutting a tail never pays below 0.9.
_LARGEST_MULTIPLE = 1.07
_SMALLEST_MULTIPLE = {2: 0.3, 3: 0.3, 4: 0.3, 5: 0.5, 6: 0.7, 8: 0.85}
_NUM_COARSE = 16
# Of powers of two: up to where nothing is cut, and down to where cutting a heavy tail seldom pays.
_POWER_MULTIPLES = (2.0, 0.5, 0.25, 0.125)
# Of 4-bit floats: the largest weight becomes 4 instead of 6, between which they have no value.
_WIDE_MULTIPLES = (1.25, 1.5)
# In steps of the coarse search, around its winner.
_FINE_STEPS = (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)
# On a CPU 256 KiB of fp32: the three such buffers stay in a cache while all candidates pass over them, and
# smaller ones pay more for calls than for arithmetic. Other devices want few large calls, of several groups.
_CPU_CHUNK_ELEMENTS = 1 << 16
_DEVICE_CHUNK_ELEMENTS = 1 << 24
_FEWEST_CHUNK_ROWS = 64
_ALL_BUT_SIGN = 0x7FFF


def fit_to_extremes(
    weight_RC: torch.Tensor,
    scheme: WeightScheme,
    *,
    scale_dtype: torch.dtype,
    cuts_half_step: bool = True,
    divisor_R1: torch.Tensor | None = None,
) -> AffineGrid:
    """Scales that cover the smallest and largest weight of every group.

    Symmetric integers: scale = 2 * absmax / (2**bits - 1), zero in the middle; the positive extreme is
    cut by half a step. Not cut: scale = absmax / (2**(bits - 1) - 1), which has no use for the lowest
    code. Asymmetric: the range is widened to hold 0, scale = range / (2**bits - 1), zero = round(-min /
    scale). Floats: absmax becomes the largest value; with powers of two, the power of two in absmax
    becomes that of the largest value, which cuts what lies beyond it (OCP Microscaling Formats 1.0,
    section 6.3).

    Shapes:
        weight_RC: floating [R, C], finite; taken as fp32. The last group may be ragged.
        divisor_R1: fp32 [R, 1], of scales that are quotients; else None.

    Args:
        scheme: Bits, symmetry and group size.
        scale_dtype: Dtype in which the output format stores scales.
        cuts_half_step: Whether a symmetric grid may cut the positive extreme; an asymmetric one is the same
            either way.

    Numerics: the scale is rounded to ``scale_dtype`` first and the zero point follows from the rounded one.
        A group of zeros gets scale 1.

    Cost: two passes in a cache; memory of a handful of rows.
    """
    scale_dtype = held_dtype(scheme.scales, scale_dtype)
    lowest_RG, highest_RG = extremes(weight_RC, scheme)
    return grid_over(lowest_RG, highest_RG, scheme, scale_dtype, cuts_half_step, divisor_R1)


def grid_over(
    lowest_RG: torch.Tensor,
    highest_RG: torch.Tensor,
    scheme: WeightScheme,
    scale_dtype: torch.dtype,
    cuts_half_step: bool,
    divisor_R1: torch.Tensor | None = None,
) -> AffineGrid:
    """The grid over these extremes; see `fit_to_extremes`.

    Shapes:
        lowest_RG, highest_RG: fp32 [R, G].

    Args:
        scale_dtype: In which scales are held.
    """
    fit, is_bounded_RG = _cover(lowest_RG, highest_RG, scheme, scale_dtype, cuts_half_step, divisor_R1)
    return AffineGrid(
        scheme=scheme,
        scale_RG=fit.scale_R.to(scale_dtype),
        zero_RG=None if scheme.is_symmetric else fit.zero_R.to(torch.uint8),
        is_bounded_RG=is_bounded_RG,
        divisor_R1=divisor_R1,
    )


def search_scales(
    weight_RC: torch.Tensor,
    scheme: WeightScheme,
    *,
    scale_dtype: torch.dtype,
    importance_C: torch.Tensor | None = None,
    divisor_R1: torch.Tensor | None = None,
    groups_at_once: int | None = None,
) -> AffineGrid:
    """Scales of least weighted squared error, group by group.

    Shapes:
        weight_RC: floating [R, C], finite; taken as fp32. The last group may be ragged.
        importance_C: fp32 [C], not negative; None for equal importance. Only ratios matter. A group whose
            importances are all zero is fitted with equal ones.
        divisor_R1: fp32 [R, 1], of scales that are quotients; else None.

    Args:
        scheme: Bits, symmetry and group size.
        scale_dtype: Dtype in which the output format stores scales.
        groups_at_once: How many groups an operation may work on; by default one on a CPU, elsewhere as many
            as it has use for.

    Numerics: every candidate is rounded to ``scale_dtype`` before its error is taken; the extremes' own
        scale is the first candidate and a later one must be strictly better, so the result is never worse
        and does not depend on anything but the group itself. Errors of several groups at once are summed in
        another order, which tells apart what is as good.

    Cost: about 23 passes of six elementwise operations over the matrix in chunks that fit a cache (26 when
        asymmetric); memory: a few chunks.
    """
    scale_dtype = held_dtype(scheme.scales, scale_dtype)
    if importance_C is None:
        importance_C = torch.ones(weight_RC.shape[1], device=weight_RC.device)
    # Division by the largest leaves equal importances exactly equal to 1, whatever their size was.
    largest = importance_C.max().clamp_min(torch.finfo(torch.float32).tiny)
    importance_C = _never_all_zero(
        importance_C.float() / largest, scheme.columns_per_group(weight_RC.shape[1])
    )
    return _search_all(weight_RC, scheme, scale_dtype, importance_C, divisor_R1, groups_at_once)


def extremes(weight_RC: torch.Tensor, scheme: WeightScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight of every group of columns, or of a symmetric scheme what covers them.

    Shapes:
        weight_RC: floating [R, C], finite.

    Returns:
        fp32 [R, G] each; 0 counts into a ragged group.
    """
    width = scheme.columns_per_group(weight_RC.shape[1])
    if scheme.is_symmetric and weight_RC.dtype in (torch.bfloat16, torch.float16):
        highest_RG = _largest_magnitudes(weight_RC, width)
        return -highest_RG, highest_RG
    return _extremes(weight_RC, width)


def _extremes(weight_RC: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight of every group, fp32 [R, G] each; 0 counts into a ragged group."""
    lowest, highest = [], []
    parts = row_parts(weight_RC)
    exact_PC = torch.empty_like(weight_RC[parts[0]], dtype=torch.float32)
    for part in parts:
        rows_RC = weight_RC[part]
        weight_RGS = by_group(exact_PC[: len(rows_RC)].copy_(rows_RC), width)
        lowest.append(weight_RGS.amin(2))
        highest.append(weight_RGS.amax(2))
    return torch.cat(lowest), torch.cat(highest)


def _largest_magnitudes(weight_RC: torch.Tensor, width: int) -> torch.Tensor:
    """Of every group of 16-bit weights, fp32 [R, G].

    Without its sign such a number is the larger, the larger its bits are as an integer: half the bytes of
    fp32, and one reduction instead of two.
    """
    largest = []
    parts = row_parts(weight_RC)
    bits_PC = torch.empty_like(weight_RC[parts[0]], dtype=torch.int16)
    for part in parts:
        rows_RC = weight_RC[part].view(torch.int16)
        bits_RC = torch.bitwise_and(rows_RC, _ALL_BUT_SIGN, out=bits_PC[: len(rows_RC)])
        largest.append(by_group(bits_RC, width).amax(2))
    return torch.cat(largest).view(weight_RC.dtype).float()


def _search_all(
    weight_RC: torch.Tensor,
    scheme: WeightScheme,
    scale_dtype: torch.dtype,
    importance_C: torch.Tensor,
    divisor_R1: torch.Tensor | None,
    groups_at_once: int | None,
) -> AffineGrid:
    filled_rows = whole_vectors(len(weight_RC), weight_RC.device)
    if filled_rows is not None:
        filled_RC = weight_RC[filled_rows]
        filled_R1 = None if divisor_R1 is None else divisor_R1[filled_rows]
        filled = _search_all(filled_RC, scheme, scale_dtype, importance_C, filled_R1, groups_at_once)
        return filled.rows(slice(len(weight_RC)))
    rows, columns = weight_RC.shape
    width = scheme.columns_per_group(columns)
    shape = (rows, scheme.num_groups(columns))
    scale_RG = torch.empty(shape, dtype=scale_dtype, device=weight_RC.device)
    zero_RG = torch.empty(shape, dtype=torch.uint8, device=weight_RC.device)
    is_bounded_RG = torch.empty(shape, dtype=torch.bool, device=weight_RC.device)
    is_cpu = weight_RC.device.type == "cpu"
    chunk_elements = _CPU_CHUNK_ELEMENTS if is_cpu else _DEVICE_CHUNK_ELEMENTS
    chunk_rows = max(_FEWEST_CHUNK_ROWS, chunk_elements // width // 16 * 16)
    if groups_at_once is None:
        groups_at_once = 1 if is_cpu else max(1, chunk_elements // (width * min(rows, chunk_rows)))
    for row in range(0, rows, chunk_rows):
        part = slice(row, row + chunk_rows)
        # Transposed, the rows of a chunk lie side by side: scales and errors of all of them are one vector.
        weight_CR = weight_RC[part].T.contiguous().float()
        for run in _group_runs(columns, width, groups_at_once):
            here = slice(run.start * width, min(run.stop * width, columns))
            importance_GS = importance_C[here].unflatten(0, (run.stop - run.start, -1))
            weight_GSR = weight_CR[here].unflatten(0, (len(importance_GS), -1))
            weight_SR = weight_GSR.transpose(0, 1).flatten(1)
            divisor_R = None if divisor_R1 is None else divisor_R1[part, 0].repeat(len(weight_GSR))
            lowest_R, highest_R = weight_SR.amin(0), weight_SR.amax(0)
            fit, is_bounded_R = _cover(lowest_R, highest_R, scheme, scale_dtype, divisor_R=divisor_R)
            fit = _Search(weight_SR, importance_GS, scheme, scale_dtype, divisor_R).from_(fit)
            of_groups = (len(weight_GSR), -1)
            scale_RG[part, run] = fit.scale_R.unflatten(0, of_groups).T.to(scale_dtype)
            zero_RG[part, run] = fit.zero_R.unflatten(0, of_groups).T.to(torch.uint8)
            is_bounded_RG[part, run] = is_bounded_R.unflatten(0, of_groups).T
    return AffineGrid(
        scheme=scheme,
        scale_RG=scale_RG,
        zero_RG=None if scheme.is_symmetric else zero_RG,
        is_bounded_RG=is_bounded_RG,
        divisor_R1=divisor_R1,
    )


def _never_all_zero(importance_C: torch.Tensor, width: int) -> torch.Tensor:
    """Equal importances where no token reached a group: it still has weights to keep."""
    is_reached_G = by_group(importance_C[None], width)[0].any(1)
    is_reached_C = is_reached_G.repeat_interleave(width)[: len(importance_C)]
    return torch.where(is_reached_C, importance_C, 1.0)


def _group_runs(columns: int, width: int, most: int) -> Iterator[slice]:
    """Neighbouring groups of one width, so many at most.

    >>> list(_group_runs(22, 4, 3))
    [slice(0, 3, None), slice(3, 5, None), slice(5, 6, None)]
    """
    num_whole = columns // width
    for start in range(0, num_whole, most):
        yield slice(start, min(start + most, num_whole))
    if columns % width:
        yield slice(num_whole, num_whole + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """Scale and zero point of one group in several rows: fp32 [R] each, integers in ``zero_R``.

    Before a search of all groups: [R, G].
    """

    scale_R: torch.Tensor
    zero_R: torch.Tensor


def _cover(
    lowest_R: torch.Tensor,
    highest_R: torch.Tensor,
    scheme: WeightScheme,
    scale_dtype: torch.dtype,
    cuts_half_step: bool = True,
    divisor_R: torch.Tensor | None = None,
) -> tuple[_Fit, torch.Tensor]:
    """The fit that covers these extremes and 0, and which of its scales had to be bounded."""
    lowest_R, highest_R = lowest_R.clamp_max(0), highest_R.clamp_min(0)
    num_steps = scheme.num_codes - 1
    if scheme.scales == POWER_SCALES:
        largest_power = FLOAT_FORMATS[scheme.number].largest_power
        wanted_R = power_below(torch.maximum(-lowest_R, highest_R)) / largest_power
    elif scheme.is_symmetric:
        largest_R, levels = torch.maximum(-lowest_R, highest_R), levels_of(scheme)
        wanted_R = largest_R * (1 / levels.reach) if cuts_half_step else largest_R / levels.bounds[1]
    else:
        wanted_R = highest_R / num_steps - lowest_R / num_steps
    is_bounded_R = is_outside_stored(wanted_R, scale_dtype, scheme.scales, divisor_R)
    scale_R = torch.where(wanted_R == 0, 1.0, wanted_R)
    scale_R = round_to_stored(scale_R, scale_dtype, scheme.scales, divisor_R)
    if scheme.is_symmetric:
        zero_R = torch.full_like(scale_R, scheme.middle_code)
    else:
        zero_R = -nearest_offsets(lowest_R, scale_R, -num_steps, 0, levels_of(scheme), out=lowest_R)
    return _Fit(scale_R=scale_R, zero_R=zero_R), is_bounded_R


class _Search:
    """Looks for the best fit of groups in several rows; its two buffers serve all candidates.

    Coarse over multiples of the starting scale, then (asymmetric) the zero point one code up and down, then
    fine. Each stage keeps the best so far among its candidates.

    Shapes:
        weight_SR: fp32, the rows of all groups.
        importance_GS: fp32.
    """

    def __init__(
        self,
        weight_SR: torch.Tensor,
        importance_GS: torch.Tensor,
        scheme: WeightScheme,
        scale_dtype: torch.dtype,
        divisor_R: torch.Tensor | None,
    ) -> None:
        self._weight_SR = weight_SR
        self._importance_GS = importance_GS
        self._scheme, self._levels = scheme, levels_of(scheme)
        self._scale_dtype, self._divisor_R = scale_dtype, divisor_R
        self._exact_SR = torch.empty_like(weight_SR)
        self._offset_SR = torch.empty_like(weight_SR)

    def from_(self, start: _Fit) -> _Fit:
        """The best fit in the neighborhood of ``start``, which covers the extremes."""
        if self._scheme.scales == POWER_SCALES:
            multiples = [multiple - 1 for multiple in _POWER_MULTIPLES]
            return self._best_near(start, start.scale_R, multiples, (0,))
        smallest = _SMALLEST_MULTIPLE[self._scheme.bits]
        step = (_LARGEST_MULTIPLE - smallest) / (_NUM_COARSE - 1)
        coarse = [_LARGEST_MULTIPLE - 1 - step * i for i in range(_NUM_COARSE)]
        if self._scheme.scales == DIVIDED_SCALES:
            coarse += [multiple - 1 for multiple in _WIDE_MULTIPLES]
        best = self._best_near(start, start.scale_R, coarse, (0,))
        if not self._scheme.is_symmetric:
            best = self._best_near(best, start.scale_R * step, [-1.0, 0.0, 1.0], (-1, 1))
        return self._best_near(best, start.scale_R * step, _FINE_STEPS, (0,))

    def _best_near(
        self, center: _Fit, unit_R: torch.Tensor, multiples: Sequence[float], shifts: Sequence[int]
    ) -> _Fit:
        """The best of ``center`` and its neighbors: scale + multiple * unit, zero + shift.

        Of equally good ones the largest scale wins, then the largest zero point.
        """
        scales = [center.scale_R] + [center.scale_R + unit_R * m for m in multiples] * len(shifts)
        zeros = [(center.zero_R + shift).clamp_(0, self._scheme.num_codes - 1) for shift in shifts]
        scale_KR = round_to_stored(
            torch.stack(scales), self._scale_dtype, self._scheme.scales, self._divisor_R
        )
        zero_KR = torch.stack([center.zero_R] + [zero_R for zero_R in zeros for _ in multiples])
        error_KR = self._errors(scale_KR, zero_KR)
        # Not argmin: its reduction over the outer dimension is 50 times slower than amin's.
        is_best_KR = error_KR == error_KR.amin(0)
        scale_R = torch.where(is_best_KR, scale_KR, 0.0).amax(0)
        zero_R = torch.where(is_best_KR & (scale_KR == scale_R), zero_KR, 0.0).amax(0)
        return _Fit(scale_R=scale_R, zero_R=zero_R)

    def _errors(self, scale_KR: torch.Tensor, zero_KR: torch.Tensor) -> torch.Tensor:
        """Weighted squared errors [K, R] of K candidates a row, relative to the first one's scale squared.

        The unit keeps squares of tiny scales from underflowing.
        """
        lowest, highest = -zero_KR, (self._scheme.num_codes - 1) - zero_KR
        if self._scheme.is_symmetric:  # a bound that is a number costs half of one that is a tensor
            lowest, highest = ([bound] * len(scale_KR) for bound in self._levels.bounds)
        error_KR = torch.empty_like(scale_KR)
        for k in range(len(scale_KR)):
            nearest_offsets(
                self._weight_SR,
                scale_KR[k],
                lowest[k],
                highest[k],
                self._levels,
                out=self._offset_SR,
                quotient=self._exact_SR,
            )
            self._offset_SR.sub_(self._exact_SR).mul_(self._offset_SR)
            self._weigh(error_KR[k])
        return error_KR.mul_((scale_KR / scale_KR[0]).square_())

    def _weigh(self, error_R: torch.Tensor) -> None:
        """Sum the squares in ``_offset_SR`` over the columns of each group, by their importances."""
        groups = len(self._importance_GS)
        if groups == 1:
            torch.mv(self._offset_SR.T, self._importance_GS[0], out=error_R)
            return
        square_GSR = self._offset_SR.unflatten(1, (groups, -1)).transpose(0, 1)
        torch.bmm(self._importance_GS[:, None], square_GSR, out=error_R.view(groups, 1, -1))
