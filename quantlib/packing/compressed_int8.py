"""8-bit integers by rows as compressed-tensors stores them for engines that round inputs: ``int-quantized``.

Per linear (R out features, C in features): ``weight`` int8 [R, C], 128 less than the codes; ``weight_scale``
[R, 1] in the model's dtype. The level of a stored value is ``weight_scale`` times it.

Source: compressed-tensors 0.20.0, compressors/naive_quantized.
"""

from collections.abc import Mapping

import torch

from quantlib.errors import PackingError
from quantlib.packing.checks import require_shape, take_tensor
from quantlib.packing.compressed_floats import weights_values
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import ActivationScheme, WeightScheme, scheme_from_name

NAME = "int-quantized"
# The only one it holds here, and what tells it from others.
SCHEME = scheme_from_name("W8A8")
_DECISIVE = ("num_bits", "type", "symmetric", "strategy")


def pack_int8(name: str, quantized: QuantizedLinear) -> dict[str, torch.Tensor]:
    """The two tensors of a linear; also on the meta device."""
    # The highest bit turned is 128 taken away, in two's complement.
    stored_RC = (quantized.codes_RC ^ SCHEME.middle_code).view(torch.int8)
    return {f"{name}.weight": stored_RC, f"{name}.weight_scale": quantized.scale_RG.contiguous()}


def unpack_int8(name: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedLinear:
    """The linear that was packed.

    Raises:
        PackingError: A tensor is missing or has another dtype or shape.
    """
    stored_RC = take_tensor(tensors, f"{name}.weight", torch.int8).contiguous()
    scale_RG = take_tensor(tensors, f"{name}.weight_scale")
    require_shape(f"{name}.weight_scale", scale_RG, (len(stored_RC), 1))
    return QuantizedLinear(
        codes_RC=stored_RC.view(torch.uint8) ^ SCHEME.middle_code,
        scale_RG=scale_RG.contiguous(),
        zero_RG=None,
        scheme=SCHEME,
    )


def scheme_of_int8(weights: Mapping[str, object], inputs: ActivationScheme | None, name: str) -> WeightScheme:
    """What a group of config_groups in this layout means.

    Raises:
        PackingError: It means something else than the one scheme that is read.
    """
    expected = weights_values(SCHEME)
    if inputs == SCHEME.inputs and all(weights.get(key) == expected[key] for key in _DECISIVE):
        return SCHEME
    raise PackingError(
        f"{name} is stored as {NAME!r} with {dict(weights)!r} and inputs"
        f" {'as they are' if inputs is None else inputs}; read is {SCHEME}",
        linear=name,
    )
