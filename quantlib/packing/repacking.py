"""A quantized linear from one layout into another: equal codes and zero points, equal values of scales."""

import dataclasses
from collections.abc import Mapping

import torch

from quantlib.errors import PackingError
from quantlib.grids.stored_scale import held_dtype
from quantlib.packing.contracts import PackingFormat
from quantlib.packing.outliers import pack_linear, unpack_linear
from quantlib.schemes import WeightScheme


def repacked(
    name: str,
    scheme: WeightScheme,
    tensors: Mapping[str, torch.Tensor],
    packer: PackingFormat,
    other: PackingFormat,
    model_dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The tensors of a linear in another layout, and its bias where it has one.

    Args:
        name: Of the linear.
        tensors: What ``packer`` made of it, perhaps among those of other linears.
        packer: The layout they are in.
        other: The layout that is wanted.
        model_dtype: Of the weight in the source.

    Raises:
        PackingError: A scale would have to be rounded, or see `PackingFormat.unpack` and ``pack``.
    """
    quantized = unpack_linear(packer, name, tensors, scheme)
    scale_RG = quantized.scale_RG.to(held_dtype(scheme.scales, other.scale_dtype(model_dtype)))
    if not torch.equal(scale_RG.float(), quantized.scale_RG.float()):
        raise PackingError(
            f"{name}: a scale in {quantized.scale_RG.dtype} is not exact in {scale_RG.dtype};"
            " the same codes can be in both layouts with portable scales only",
            linear=name,
        )
    made = pack_linear(other, name, dataclasses.replace(quantized, scale_RG=scale_RG))
    bias = f"{name}.bias"
    return made | ({bias: tensors[bias]} if bias in tensors else {})
