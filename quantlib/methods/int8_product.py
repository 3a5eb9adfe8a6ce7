"""The product that an int8 kernel takes of a quantized linear, with or without the outlier features apart.

N tokens, C columns (in features), R rows (out features). Inputs are rounded, too, each token with a scale of
its own. Features that are large for some token would make that scale coarse for all others of the token; as
LLM.int8 has it, they are taken out and multiplied by the weight's levels instead. This is arithmetic to
compare with: no output of this project depends on it.
"""

import torch

from quantlib.errors import NumericsError
from quantlib.grids.formats import INTEGER
from quantlib.outlier_columns import OUTLIER_THRESHOLD, outlier_columns
from quantlib.quantized import QuantizedLinear

_LARGEST_INT8 = 127.0


def int8_product(
    x_NC: torch.Tensor, quantized: QuantizedLinear, *, threshold: float = OUTLIER_THRESHOLD
) -> torch.Tensor:
    """What a linear of int8 codes gives when its inputs are int8 codes as well.

    Shapes:
        x_NC: floating [N, C], finite; taken as fp32.

    Args:
        quantized: Symmetric integers with one scale a row.
        threshold: Of `quantlib.outlier_columns`; infinity for none.

    Returns:
        fp32 [N, R].

    Raises:
        NumericsError: The linear has other codes, several scales a row, or another number of columns.

    Numerics: a token's scale is its largest magnitude below the threshold over 127, also where that is of an
        outlier feature; codes are rounded half to even. The sum over codes is exact, all else is fp32.

    Cost: N * R * C multiply-adds in fp64, which holds such sums exactly.

    Source: LLM.int8 (arXiv 2208.07339), section 3; bitsandbytes 0.50 for the threshold, which counts as
        reached at equality, for the scales, and for outliers that meet the weight's levels, not the weights
        before them.

    >>> from quantlib.schemes import scheme_from_name
    >>> quantized = QuantizedLinear(
    ...     codes_RC=torch.tensor([[128 + 127, 128 - 64]], dtype=torch.uint8),
    ...     scale_RG=torch.tensor([[1 / 127]]),
    ...     zero_RG=None,
    ...     scheme=scheme_from_name("W8A16", -1),
    ... )
    >>> quantized.dequantize()
    tensor([[ 1.0000, -0.5039]])
    >>> x_NC = torch.tensor([[100.0, 0.3]])
    >>> int8_product(x_NC, quantized, threshold=float("inf"))  # 0.3 is below half a step of 100 / 127
    tensor([[100.]])
    >>> int8_product(x_NC, quantized)
    tensor([[99.8488]])
    """
    _check(x_NC, quantized)
    exact_NC = x_NC.float()
    is_outlier_C = outlier_columns(exact_NC, threshold)
    inside_NC = exact_NC.masked_fill(exact_NC.abs() >= threshold, 0.0)
    scale_N1 = inside_NC.abs().amax(1, keepdim=True) / _LARGEST_INT8
    # A token of zeros has no scale; any will do.
    code_NC = torch.round(inside_NC / torch.where(scale_N1 > 0, scale_N1, 1.0))
    code_NC[:, is_outlier_C] = 0.0
    offset_RC = quantized.offsets(out=torch.empty(quantized.codes_RC.shape, dtype=torch.float64))
    sum_NR = (code_NC.double() @ offset_RC.T).float()
    y_NR = sum_NR * (scale_N1 * quantized.scale_RG.float().T)
    return y_NR + exact_NC[:, is_outlier_C] @ quantized.dequantize()[:, is_outlier_C].T


def _check(x_NC: torch.Tensor, quantized: QuantizedLinear) -> None:
    scheme, columns = quantized.scheme, quantized.codes_RC.shape[1]
    if scheme.number != INTEGER or not scheme.is_symmetric or quantized.scale_RG.shape[1] != 1:
        raise NumericsError(
            f"an int8 product takes symmetric integers with one scale a row, found {scheme}; quantize with"
            " W8A16 and group size -1"
        )
    if x_NC.ndim != 2 or x_NC.shape[1] != columns:
        raise NumericsError(
            f"a linear of {columns} in features takes inputs [N, {columns}], found {tuple(x_NC.shape)}"
        )
