"""Scales that are quantized themselves: "double quantization" of QLoRA (arXiv 2305.14314, section 3).

R rows (out features), G groups of a row, N blocks of 256 scales that follow each other row by row.
"""

import torch

from quantlib.grids.formats import dynamic_values
from quantlib.quantized import NestedScales

BLOCK_SCALES = 256
# So that a sum is grouped alike whatever the number of threads.
_SUMMED_ALONE = 1 << 12


def nest(scale_RG: torch.Tensor) -> tuple[NestedScales, torch.Tensor]:
    """Quantize scales by blocks of 256, about their mean.

    Shapes:
        scale_RG: fp32 [R, G], finite, not negative.

    Returns:
        The parts, and bool [R, G], which scales (that are not 0) were moved so that they mean more than 0.

    Numerics: the offset is the mean, summed in fp64; each difference to it goes to the nearest value of the
        dynamic map times the largest difference of its block.
    """
    flat_S = scale_RG.float().flatten()
    offset = _mean(flat_S).float()
    if offset == 0:  # nothing but zeros: any scale means them
        offset = torch.ones_like(offset)
    missing = -len(flat_S) % BLOCK_SCALES
    change_NB = torch.nn.functional.pad(flat_S - offset, (0, missing)).unflatten(0, (-1, BLOCK_SCALES))
    absmax_N = change_NB.abs().amax(1)
    value_V = values_like(flat_S)
    middle_V = (value_V[1:] + value_V[:-1]) / 2
    # Of a block without differences any code means the offset.
    unit_N1 = torch.where(absmax_N > 0, absmax_N, 1.0)[:, None]
    code_NB = torch.bucketize(change_NB / unit_N1, middle_V, out_int32=True)
    is_moved_NB = torch.zeros_like(code_NB, dtype=torch.bool)
    while bool((is_low_NB := value_V[code_NB] * absmax_N[:, None] + offset <= 0).any()):
        # A scale near 0 may have come out below it; readers want positive ones, and 0 belongs to the map.
        is_moved_NB |= is_low_NB
        code_NB += is_low_NB
    rows, groups = scale_RG.shape
    code_RG = code_NB.flatten()[: rows * groups].to(torch.uint8).unflatten(0, (rows, groups))
    is_moved_RG = is_moved_NB.flatten()[: rows * groups].unflatten(0, (rows, groups)) & (scale_RG > 0)
    return NestedScales(code_RG=code_RG, absmax_N=absmax_N, offset=offset), is_moved_RG


def scales_of(nested: NestedScales) -> torch.Tensor:
    """The scales that the parts of a whole weight mean, fp32 [R, G]."""
    code_S = nested.code_RG.flatten().int()
    absmax_S = nested.absmax_N.repeat_interleave(BLOCK_SCALES)[: len(code_S)]
    scale_S = values_like(nested.absmax_N)[code_S] * absmax_S + nested.offset
    return scale_S.unflatten(0, tuple(nested.code_RG.shape))


def values_like(other: torch.Tensor) -> torch.Tensor:
    """The dynamic map, fp32 [256], on the device of another tensor."""
    return torch.tensor(dynamic_values(), device=other.device)


def _mean(flat_S: torch.Tensor) -> torch.Tensor:
    missing = -len(flat_S) % _SUMMED_ALONE
    parts_NS = torch.nn.functional.pad(flat_S.double(), (0, missing)).unflatten(0, (-1, _SUMMED_ALONE))
    return parts_NS.sum(1).sum() / len(flat_S)
