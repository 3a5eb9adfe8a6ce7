"""The bias that makes up for what rounding did to the mean output of a linear.

R rows (out features), C columns (in features).
"""

import torch

from quantlib.quantized import QuantizedLinear


def corrected_bias(
    bias_R: torch.Tensor,
    weight_RC: torch.Tensor,
    quantized: QuantizedLinear,
    *,
    mean_C: torch.Tensor,
    reference_mean_C: torch.Tensor,
) -> torch.Tensor:
    """The bias with which the mean output on the inputs equals that of the weight on the reference inputs.

    Together with codes chosen for the centered inputs it is the exact minimum of the squared error over
    biases.

    Shapes:
        bias_R: floating [R].
        weight_RC: floating [R, C], the original weight.
        mean_C, reference_mean_C: fp64 [C].

    Returns:
        [R] in the dtype of ``bias_R``; computed in fp64.
    """
    wanted_R = weight_RC.double() @ reference_mean_C
    given_R = quantized.dequantize().double() @ mean_C
    return (bias_R.double() + wanted_R - given_R).to(bias_R.dtype)
