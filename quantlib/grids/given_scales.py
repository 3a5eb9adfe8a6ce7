"""What the scales of a weight owe to the whole of it, or to the weights that engines fuse with it.

R rows (out features), C columns (in features), G groups. Rows are solved in tiles, which know nothing of each
other: what more than one of them shares is found here, before any code is chosen.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from quantlib.grids.affine import AffineGrid
from quantlib.grids.fit import extremes, grid_over
from quantlib.grids.formats import DIVIDED_SCALES, FLOAT_FORMATS, INTEGER, NESTED_SCALES
from quantlib.grids.nested_scales import nest, scales_of
from quantlib.grids.stored_scale import held_dtype
from quantlib.quantized import NestedScales
from quantlib.schemes import WHOLE_TENSOR, WeightScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenScales:
    """Of a weight or some of its rows.

    Attributes:
        grid: All scales, where no row has one of its own; else None.
        divisor_R1: fp32 [R, 1], of scales that are quotients; else None.
        nested: What the scales of ``grid`` are made of where they are quantized; else None.
    """

    grid: AffineGrid | None = None
    divisor_R1: torch.Tensor | None = None
    nested: NestedScales | None = None

    def rows(self, part: slice) -> "GivenScales":
        """Those of some rows."""
        return GivenScales(
            grid=None if self.grid is None else self.grid.rows(part),
            divisor_R1=None if self.divisor_R1 is None else self.divisor_R1[part],
            nested=None if self.nested is None else self.nested.rows(part),
        )


# To rows whose scales owe nothing to others.
NOTHING_GIVEN: Mapping[str, GivenScales] = MappingProxyType({})


def given_scales(
    weights: Mapping[str, torch.Tensor],
    fused_sets: Iterable[Sequence[str]],
    scheme: WeightScheme,
    *,
    scale_dtype: torch.dtype,
    cuts_half_step: bool = True,
) -> dict[str, GivenScales]:
    """Name -> what is given to its rows; nothing where the scheme's groups know nothing of each other.

    One divisor serves a fused set, and one scale for whole weights of floats, as engines have one number for
    the matrix that they make of it. Integers with one scale a weight keep a scale each.

    Shapes:
        weights: Name -> floating [R, C], finite; taken as fp32.

    Args:
        fused_sets: Names of the weights of each; every weight is in one, perhaps alone.
        scheme: Of all of them.
        scale_dtype: Dtype in which the output format stores scales.
        cuts_half_step: As `quantlib.grids.fit.fit_to_extremes`.

    Source: of the divisor compressed-tensors 0.20.0, quantization/utils (generate_gparam): 448 * 6 over the
        largest magnitude.
    """
    if not scheme.owes_to_whole:
        return {}
    dtype = held_dtype(scheme.scales, scale_dtype)
    found: dict[str, GivenScales] = {}
    for names in fused_sets:
        bounds = {name: extremes(weights[name], scheme) for name in names}
        if scheme.scales == DIVIDED_SCALES:
            largest = max(_magnitude(*pair) for pair in bounds.values())
            divisor = _divisor(largest, FLOAT_FORMATS[scheme.number].largest)
            rows = {name: len(weights[name]) for name in names}
            found |= {
                name: GivenScales(divisor_R1=weights[name].new_full((count, 1), divisor, dtype=torch.float32))
                for name, count in rows.items()
            }
        elif scheme.scales == NESTED_SCALES:
            found |= {name: _nested(*pair, scheme) for name, pair in bounds.items()}
        else:
            shared = _by_block(bounds, scheme)
            found |= {
                name: GivenScales(grid=grid_over(*pair, scheme, dtype, cuts_half_step))
                for name, pair in shared.items()
            }
    return found


def stacked(parts: Sequence[GivenScales]) -> GivenScales:
    """What is given to rows that are stacked; how their scales are stored is left out."""
    grids = [part.grid for part in parts if part.grid is not None]
    divisors = [part.divisor_R1 for part in parts if part.divisor_R1 is not None]
    grid = grids[0] if len(grids) == 1 else None
    if len(grids) > 1:
        zeros = [grid.zero_RG for grid in grids if grid.zero_RG is not None]
        grid = AffineGrid(
            scheme=grids[0].scheme,
            scale_RG=torch.cat([grid.scale_RG for grid in grids]),
            zero_RG=torch.cat(zeros) if zeros else None,
            is_bounded_RG=torch.cat([grid.is_bounded_RG for grid in grids]),
        )
    return GivenScales(grid=grid, divisor_R1=torch.cat(divisors) if divisors else None)


Extremes = tuple[torch.Tensor, torch.Tensor]


def _by_block(bounds: Mapping[str, Extremes], scheme: WeightScheme) -> dict[str, Extremes]:
    """The extremes of every row as those of its block, or of its weight or fused set."""
    if scheme.group_size != WHOLE_TENSOR:
        return {name: _of_blocks(*pair, scheme.block_rows) for name, pair in bounds.items()}
    lowest = {name: lowest_RG.amin() for name, (lowest_RG, _) in bounds.items()}
    highest = {name: highest_RG.amax() for name, (_, highest_RG) in bounds.items()}
    if scheme.number != INTEGER:
        lowest = dict.fromkeys(lowest, torch.stack(list(lowest.values())).amin())
        highest = dict.fromkeys(highest, torch.stack(list(highest.values())).amax())
    return {
        name: (
            torch.full_like(lowest_RG, lowest[name].item()),
            torch.full_like(highest_RG, highest[name].item()),
        )
        for name, (lowest_RG, highest_RG) in bounds.items()
    }


def _of_blocks(lowest_RG: torch.Tensor, highest_RG: torch.Tensor, height: int) -> Extremes:
    parts = zip(lowest_RG.split(height), highest_RG.split(height), strict=True)
    pairs = [
        (low.amin(0, keepdim=True).expand_as(low), high.amax(0, keepdim=True).expand_as(high))
        for low, high in parts
    ]
    return torch.cat([low for low, _ in pairs]), torch.cat([high for _, high in pairs])


def _magnitude(lowest_RG: torch.Tensor, highest_RG: torch.Tensor) -> float:
    return max(-lowest_RG.amin().item(), highest_RG.amax().item())


def _divisor(largest: float, reach: float) -> float:
    """In fp32: the largest magnitude becomes the largest E4M3 number times the largest value."""
    quotient = torch.tensor(FLOAT_FORMATS["e4m3"].largest * reach) / torch.tensor(largest)
    if not bool(quotient.isfinite()):
        # Nothing but zeros, or so little that no scale can be told from zero.
        return 1.0
    return quotient.item()


def _nested(lowest_RG: torch.Tensor, highest_RG: torch.Tensor, scheme: WeightScheme) -> GivenScales:
    wanted_RG = torch.maximum(-lowest_RG, highest_RG)
    nested, is_moved_RG = nest(wanted_RG)
    grid = AffineGrid(scheme=scheme, scale_RG=scales_of(nested), zero_RG=None, is_bounded_RG=is_moved_RG)
    return GivenScales(grid=grid, nested=nested)
