"""Quantized linears with random contents, for tests that do not care how codes were chosen."""

import torch

from quantlib.grids.formats import SHORT_SCALES
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WeightScheme


def random_quantized(
    rows: int, columns: int, scheme: WeightScheme, *, scale_dtype: torch.dtype, seed: int = 0
) -> QuantizedLinear:
    """Every code and, asymmetric, every zero point from 0 to 2**bits - 1 is equally likely."""
    generator = torch.Generator().manual_seed(seed)
    grid = (rows, scheme.num_groups(columns))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, scheme.num_codes, shape, generator=generator).to(torch.uint8)

    codes_RC = draw(rows, columns)
    scale_RG = torch.rand(grid, generator=generator) + 0.01
    if scheme.scales == SHORT_SCALES:
        scale_RG = (scale_RG * 64).ceil() / 64
    return QuantizedLinear(
        codes_RC=codes_RC,
        scale_RG=scale_RG.to(scale_dtype),
        zero_RG=None if scheme.is_symmetric else draw(*grid),
        scheme=scheme,
    )


def on_meta(quantized: QuantizedLinear) -> QuantizedLinear:
    """The same linear without contents."""
    return QuantizedLinear(
        codes_RC=quantized.codes_RC.to("meta"),
        scale_RG=quantized.scale_RG.to("meta"),
        zero_RG=None if quantized.zero_RG is None else quantized.zero_RG.to("meta"),
        scheme=quantized.scheme,
    )
