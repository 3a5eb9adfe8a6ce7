"""Small floats as compressed-tensors stores them.

The layouts are ``naive-quantized``, ``mxfp8-quantized`` and ``mxfp4-pack-quantized``; beside rounded inputs
the first is called ``float-quantized``.

Per linear (R out features, C in features, G groups along C):
8-bit floats are a float8 ``weight`` [R, C]; 4-bit floats uint8 ``weight_packed`` [R, C / 2], the code of the
even column in the low nibble, a sign above three bits. ``weight_scale`` is [R, G]: a number in the model's
dtype for whole rows, or, as a power of two, uint8 with 127 more than its exponent (E8M0) for groups of 32.

Left out: one scale for a whole tensor or a block, ``nvfp4-pack-quantized``.

Source: compressed-tensors 0.20.0, compressors/{naive_quantized,mxfp4,mxfp8,nvfp4}; OCP Microscaling Formats
(MX) 1.0, sections 5.3 and 5.4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantlib.errors import PackingError
from quantlib.grids.formats import INTEGER, POWER_SCALES
from quantlib.grids.stored_scale import POWERS_DTYPE
from quantlib.packing.checks import require_shape, take_tensor
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WHOLE_ROW, ActivationScheme, WeightScheme, scheme_from_name

_EXPONENT_BIAS = 127
# No exponent: E8M0 has one code for what is no number.
_NAN_EXPONENT = 255
# What tells schemes apart in config_groups.
_DECISIVE = ("num_bits", "type", "symmetric", "strategy", "group_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatLayout:
    """One of the layouts.

    Attributes:
        name: As ``format`` in config.json.
        scheme: Of weights and inputs.
        codes: The last part of the name of the tensor with the codes.
    """

    name: str
    scheme: WeightScheme
    codes: str


LAYOUTS = (
    FloatLayout(name="naive-quantized", scheme=scheme_from_name("FP8A16"), codes="weight"),
    FloatLayout(name="mxfp8-quantized", scheme=scheme_from_name("MXFP8A16"), codes="weight"),
    FloatLayout(name="mxfp4-pack-quantized", scheme=scheme_from_name("MXFP4A16"), codes="weight_packed"),
    FloatLayout(name="float-quantized", scheme=scheme_from_name("FP8_DYNAMIC"), codes="weight"),
    FloatLayout(name="mxfp8-quantized", scheme=scheme_from_name("MXFP8"), codes="weight"),
    FloatLayout(name="mxfp4-pack-quantized", scheme=scheme_from_name("MXFP4"), codes="weight_packed"),
)


def layout_of(scheme: WeightScheme) -> FloatLayout | None:
    """The layout that holds a scheme; None for integers."""
    return next((layout for layout in LAYOUTS if layout.scheme == scheme), None)


def pack_floats(name: str, quantized: QuantizedLinear, layout: FloatLayout) -> dict[str, torch.Tensor]:
    """The two tensors of a linear; also on the meta device."""
    codes_RC, scale_RG = quantized.codes_RC, quantized.scale_RG
    if layout.codes == "weight":
        stored = codes_RC.contiguous().view(torch.float8_e4m3fn)
    else:
        stored = codes_RC[:, 0::2] | (codes_RC[:, 1::2] << 4)
    if layout.scheme.scales == POWER_SCALES:
        scale_RG = _exponents_of(name, scale_RG)
    return {f"{name}.{layout.codes}": stored, f"{name}.weight_scale": scale_RG.contiguous()}


def unpack_floats(name: str, tensors: Mapping[str, torch.Tensor], layout: FloatLayout) -> QuantizedLinear:
    """The linear that was packed.

    Raises:
        PackingError: A tensor is missing or has another dtype or shape, or an exponent or code is no number.
    """
    is_float8 = layout.codes == "weight"
    kind = torch.float8_e4m3fn if is_float8 else torch.uint8
    stored = take_tensor(tensors, f"{name}.{layout.codes}", kind)
    scale_RG = take_tensor(tensors, f"{name}.weight_scale")
    if is_float8:
        codes_RC = stored.contiguous().view(torch.uint8)
        if bool(((codes_RC & 0x7F) == 0x7F).any()):
            raise PackingError(f"{name}.weight holds values that are no numbers", linear=name)
    else:
        codes_RC = torch.stack((stored & 0xF, stored >> 4), dim=-1).flatten(1)
    rows, columns = codes_RC.shape
    require_shape(f"{name}.weight_scale", scale_RG, (rows, layout.scheme.num_groups(columns)))
    if layout.scheme.scales == POWER_SCALES:
        scale_RG = _powers_of(name, take_tensor(tensors, f"{name}.weight_scale", torch.uint8))
    return QuantizedLinear(
        codes_RC=codes_RC, scale_RG=scale_RG.contiguous(), zero_RG=None, scheme=layout.scheme
    )


def scheme_from_values(
    layout: str, weights: Mapping[str, object], inputs: ActivationScheme | None, name: str
) -> WeightScheme:
    """What a group of config_groups means that is stored in one of the layouts.

    Args:
        inputs: What its ``input_activations`` say.

    Raises:
        PackingError: It means something else than the one scheme that is read.
    """
    for found in LAYOUTS:
        expected = weights_values(found.scheme)
        is_alike = (found.name, found.scheme.inputs) == (layout, inputs)
        if is_alike and all(weights.get(key) == expected[key] for key in _DECISIVE):
            return found.scheme
    read = "; ".join(f"{x.name} of {x.scheme}" for x in LAYOUTS)
    raise PackingError(
        f"{name} is stored as {layout!r} with {dict(weights)!r} and inputs"
        f" {'as they are' if inputs is None else inputs}; of floats these are read: {read}",
        linear=name,
    )


def weights_values(scheme: WeightScheme) -> dict[str, object]:
    """``weights`` of a group of config_groups, of floats and of integers."""
    whole_row = scheme.group_size == WHOLE_ROW
    values: dict[str, object] = {
        "num_bits": scheme.bits,
        "type": INTEGER if scheme.number == INTEGER else "float",
        "symmetric": scheme.is_symmetric,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else scheme.group_size,
        "dynamic": False,
    }
    if scheme.scales == POWER_SCALES:
        values |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return values


def _exponents_of(name: str, scale_RG: torch.Tensor) -> torch.Tensor:
    mantissa_RG, exponent_RG = torch.frexp(scale_RG.float())
    if not scale_RG.is_meta and bool((mantissa_RG != 0.5).any()):
        raise PackingError(f"{name}: a scale is no power of two", linear=name)
    return (exponent_RG + (_EXPONENT_BIAS - 1)).to(torch.uint8)


def _powers_of(name: str, exponent_RG: torch.Tensor) -> torch.Tensor:
    if bool((exponent_RG == _NAN_EXPONENT).any()):
        raise PackingError(f"{name}.weight_scale holds an exponent that is no number", linear=name)
    exponents = exponent_RG.to(torch.int32) - _EXPONENT_BIAS
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents).to(POWERS_DTYPE)
