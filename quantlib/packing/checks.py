"""Checks between a quantized linear, its scheme and its tensors that all formats make."""

import math
from collections.abc import Mapping

import torch

from quantlib.errors import PackingError
from quantlib.grids.formats import INTEGER
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WHOLE_ROW, WHOLE_TENSOR, WeightScheme


def require_whole_groups(
    name: str,
    columns: int,
    scheme: WeightScheme,
    *,
    format_name: str,
    widths: tuple[int, ...],
) -> None:
    """Refuse integers of widths that the layout does not have and groups that do not divide a row.

    Raises:
        PackingError: Says which, and which group sizes would fit.
    """
    if scheme.number == INTEGER and scheme.bits not in widths:
        raise PackingError(
            f"{name}: {format_name} output holds codes of {', '.join(map(str, widths))} bits,"
            f" not {scheme.bits}; choose another scheme or format",
            linear=name,
            bits=scheme.bits,
        )
    size = scheme.group_size
    if size == WHOLE_TENSOR:
        raise PackingError(
            f"{name}: {format_name} output has no single scale for a weight; use --format compressed-tensors,"
            " or a group size of -1 (whole row)",
            linear=name,
            group_size=size,
        )
    if size == WHOLE_ROW or (size > 0 and columns % size == 0):
        return
    if scheme.number != INTEGER:
        raise PackingError(
            f"{name}: floats with scales for {size} columns need a row of whole groups, found {columns}"
            " columns; keep this linear as it is, or choose another scheme for it",
            linear=name,
            columns=columns,
        )
    fitting = [str(g) for g in (256, 128, 64, 32, 16) if columns % g == 0]
    raise PackingError(
        f"{name}: {format_name} output needs a group size that divides its {columns} columns, got {size};"
        f" use {', '.join([*fitting, '-1 (whole row)'])}",
        linear=name,
        columns=columns,
        group_size=size,
    )


def require_integers(name: str, scheme: WeightScheme, *, format_name: str) -> None:
    """Refuse number formats other than integers, and inputs that are to be rounded.

    Raises:
        PackingError: Names the scheme.
    """
    if scheme.number != INTEGER:
        raise PackingError(
            f"{name}: {format_name} output holds integers, not {scheme}; use --format compressed-tensors,"
            " or a scheme of integers",
            linear=name,
        )
    if scheme.inputs is not None:
        raise PackingError(
            f"{name}: {format_name} output does not say what inputs are rounded to, as {scheme} wants it;"
            " use --format compressed-tensors, or a scheme that leaves inputs as they are",
            linear=name,
        )


def quantized_linears(schemes: Mapping[str, WeightScheme | None]) -> dict[str, WeightScheme]:
    """Those of all linears that are quantized, in order.

    Args:
        schemes: Linear -> how it is stored, None for one that is kept.

    Raises:
        PackingError: There are none.
    """
    quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    if not quantized:
        raise PackingError("no linear is quantized, so there is nothing to say in quantization_config")
    return quantized


def only_scheme(quantized: Mapping[str, WeightScheme], *, format_name: str) -> WeightScheme:
    """The scheme of all linears, for a layout that has one a checkpoint.

    Raises:
        PackingError: There are several.
    """
    scheme, *others = dict.fromkeys(quantized.values())
    if others:
        raise PackingError(
            f"{format_name} output has one scheme, and this one would have {scheme} as well as {others[0]};"
            " use one of them, or --format compressed-tensors"
        )
    return scheme


def require_multiples(name: str, sides: Mapping[str, int], multiple: int, *, format_name: str) -> None:
    """Refuse sides of which words are not filled.

    Args:
        sides: What they are called -> features.

    Raises:
        PackingError: Names the first that is no multiple.
    """
    for side, size in sides.items():
        if size % multiple:
            raise PackingError(
                f"{name}: {format_name} output needs {side} features in multiples of {multiple}, got {size};"
                " use --format compressed-tensors, or keep this linear as it is",
                linear=name,
                side=side,
                features=size,
            )


def require_consistent(name: str, quantized: QuantizedLinear, scale_dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a quantized linear whose parts contradict each other or its scheme.

    Raises:
        PackingError: Shapes, dtypes, presence of a zero point, or a scale that is not positive and finite.
    """
    scheme = quantized.scheme
    rows, columns = quantized.codes_RC.shape
    grid = (rows, scheme.num_groups(columns))
    scale_RG, zero_RG = quantized.scale_RG, quantized.zero_RG
    if tuple(scale_RG.shape) != grid:
        raise PackingError(f"{name}: scales must be {grid}, got {tuple(scale_RG.shape)}", linear=name)
    if scale_RG.dtype not in scale_dtypes:
        allowed = ", ".join(str(d) for d in scale_dtypes)
        raise PackingError(f"{name}: scales must be {allowed}, got {scale_RG.dtype}", linear=name)
    if (zero_RG is None) != scheme.is_symmetric:
        found = "none" if zero_RG is None else "some"
        raise PackingError(
            f"{name}: zero points belong to asymmetric schemes only; the scheme is"
            f" {'symmetric' if scheme.is_symmetric else 'asymmetric'} and there are {found}",
            linear=name,
        )
    if zero_RG is not None and tuple(zero_RG.shape) != grid:
        raise PackingError(f"{name}: zero points must be {grid}, got {tuple(zero_RG.shape)}", linear=name)
    if not scale_RG.is_meta and scale_RG.numel() and not _are_positive_and_finite(scale_RG):
        raise PackingError(
            f"{name}: a scale is zero, negative, infinite or NaN in {scale_RG.dtype}; the weight's values"
            " do not fit the dtype scales are stored in",
            linear=name,
        )


def take_tensor(
    tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A tensor of a checkpoint.

    Raises:
        PackingError: It is missing, or of another dtype.
    """
    if name not in tensors:
        raise PackingError(f"tensor {name} is missing; the checkpoint or its config is damaged", tensor=name)
    tensor = tensors[name]
    if dtype is not None and tensor.dtype != dtype:
        raise PackingError(f"tensor {name} must be {dtype}, got {tensor.dtype}", tensor=name)
    return tensor


def require_shape(tensor_name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        PackingError: Names both shapes.
    """
    if tuple(tensor.shape) != shape:
        raise PackingError(
            f"tensor {tensor_name} must be {shape}, got {tuple(tensor.shape)}", tensor=tensor_name
        )


def _are_positive_and_finite(scales: torch.Tensor) -> bool:
    # A NaN is both bounds, and no comparison with it holds.
    smallest, largest = (bound.item() for bound in torch.aminmax(scales))
    return smallest > 0 and largest < math.inf
