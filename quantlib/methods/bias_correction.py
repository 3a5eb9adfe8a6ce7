"""The bias that makes up for what rounding did to the mean output of a linear.

R rows (out features), C columns (in features).
"""

import torch

from quantlib.quantized import QuantizedLinear

# Rows at a time: they are held in fp64.
_TILE_ROWS = 512


def exact_bias(
    bias_R: torch.Tensor,
    weight_RC: torch.Tensor,
    quantized: QuantizedLinear,
    *,
    mean_C: torch.Tensor,
    reference_mean_C: torch.Tensor,
) -> torch.Tensor:
    """The bias with which the mean output on the inputs equals that of the weight on the reference inputs.

    With codes chosen for the centered inputs it minimizes the squared error over biases. What rounding it to
    a stored dtype costs is for the caller to see: a bias of 100 in bf16 has steps of a half.

    Shapes:
        bias_R: floating [R].
        weight_RC: floating [R, C], the original weight.
        mean_C, reference_mean_C: fp64 [C].

    Returns:
        fp64 [R].

    Cost: temporary memory of a few tiles of rows in fp64.
    """
    exact_R = bias_R.to(torch.float64, copy=True)
    for start in range(0, len(weight_RC), _TILE_ROWS):
        part = slice(start, start + _TILE_ROWS)
        exact_R[part] += weight_RC[part].double() @ reference_mean_C
        exact_R[part] -= quantized.rows(part).dequantize().double() @ mean_C
    return exact_R
