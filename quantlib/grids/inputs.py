"""Inputs of linears, rounded as a model runs: scales come from the values themselves.

As compressed-tensors computes it, bit for bit in fp32 and bf16. The scale of a token or a group is
absmax / 127.5 (8-bit integers, -128 .. 127) or absmax / 448 (e4m3), found in the dtype of the inputs, in
which quotient and product are taken too. Groups with powers of two keep the exponent of absmax, one more from
1.75 times that power on. A token, or a group, of zeros stays zeros.

Left out: what compressed-tensors does with inputs of two dims, [N, C], to which it gives one scale for all
tokens. Engines have one a token there too, and so does this.

Source: compressed-tensors 0.20.0, quantization/utils/{helpers,mxfp_utils}.py and
quantization/lifecycle/forward_helpers.py.
"""

import math

import torch

from quantlib.grids.formats import FLOAT_FORMATS, POWER_SCALES
from quantlib.grids.levels import levels_of
from quantlib.schemes import WHOLE_ROW, ActivationScheme

# Values that are rounded at a time, so that this takes one buffer of the size of the inputs and little more.
_PIECE_VALUES = 1 << 20
# An exponent is a byte with 127 more than it.
_LOWEST_POWER = -127
# Of a group of values below two: from here on absmax counts as the next power of two.
_ROUNDED_UP = 1.75 / 2


def rounded_inputs(x: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """What a linear multiplies in place of its inputs.

    Args:
        x: floating [..., C]; the group size of the scheme divides C.
        scheme: What they are rounded to.

    Returns:
        Shape and dtype of ``x``. What becomes of a token depends on no other one.

    Numerics: of groups with powers of two all is exact but the rounding itself. A rounded value that fp16
        does not hold becomes an infinity there.
    """
    width = x.shape[-1] if scheme.group_size == WHOLE_ROW else scheme.group_size
    levels = levels_of(scheme)
    rounded = torch.empty_like(x, memory_format=torch.contiguous_format)
    num_groups = max(1, _PIECE_VALUES // width)
    pieces = zip(
        x.reshape(-1, width).split(num_groups), rounded.view(-1, width).split(num_groups), strict=True
    )
    for piece_GS, out_GS in pieces:
        lowest_G1, highest_G1 = torch.aminmax(piece_GS, dim=1, keepdim=True)
        largest_G1 = torch.maximum(-lowest_G1, highest_G1)
        if scheme.scales == POWER_SCALES:
            scale_G1 = _powers(largest_G1, scheme)
            quotient_GS = piece_GS.float().div(scale_G1)
        else:
            scale_G1 = _plain(largest_G1, scheme)
            quotient_GS = piece_GS.div(scale_G1).float()
        levels.nearest(quotient_GS, *levels.bounds, out=quotient_GS)
        out_GS.copy_(quotient_GS.to(scale_G1.dtype).mul_(scale_G1))
    return rounded


def _plain(largest_G1: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    scale_G1 = largest_G1 / levels_of(scheme).reach
    # Of zeros, and of what is so small that its scale is zero.
    return scale_G1.masked_fill_(scale_G1 == 0, torch.finfo(scale_G1.dtype).eps)


def _powers(largest_G1: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """fp32, whatever the dtype of the inputs."""
    mantissa_G1, exponent_G1 = torch.frexp(largest_G1.float())
    offset = 1 + round(math.log2(FLOAT_FORMATS[scheme.number].largest_power))
    power_G1 = exponent_G1 + (mantissa_G1 >= _ROUNDED_UP).int() - offset
    scale_G1 = torch.ldexp(torch.ones_like(mantissa_G1), power_G1.clamp_min_(_LOWEST_POWER))
    # An infinity must not come out as the largest value.
    return torch.where(mantissa_G1.isfinite(), scale_G1, mantissa_G1)
