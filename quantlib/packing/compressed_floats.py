"""Small floats as compressed-tensors stores them.

The layouts are ``naive-quantized``, ``mxfp8-quantized``, ``mxfp4-pack-quantized`` and
``nvfp4-pack-quantized``; beside rounded inputs the first is called ``float-quantized``.

Per linear (R out features, C in features, G groups along C):
8-bit floats are a float8 ``weight`` [R, C]; 4-bit floats uint8 ``weight_packed`` [R, C / 2], the code of the
even column in the low nibble, a sign above three bits. ``weight_scale`` is, in the model's dtype, [R, 1] for
whole rows, [1] for the whole weight or [ceil(R / 128), ceil(C / 128)] for blocks, whose last ones may be
ragged; of ``mx`` layouts [R, G] for groups of 32, a power of two as uint8 with 127 more than its exponent
(E8M0); of ``nvfp4`` float8 [R, G] for groups of 16, to be divided by fp32 ``weight_global_scale`` [1].

Left out: inputs that are rounded beside ``nvfp4``.

Source: compressed-tensors 0.20.0, compressors/{naive_quantized,mxfp4,mxfp8,nvfp4}; OCP Microscaling Formats
(MX) 1.0, sections 5.3 and 5.4.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantlib.errors import PackingError
from quantlib.grids.formats import DIVIDED_SCALES, INTEGER, POWER_SCALES
from quantlib.grids.stored_scale import POWERS_DTYPE, stored_dividends
from quantlib.packing.checks import require_shape, take_tensor
from quantlib.packing.shared_scales import for_every_row, stored_once, stored_shape
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WHOLE_ROW, WHOLE_TENSOR, ActivationScheme, WeightScheme, scheme_from_name

_EXPONENT_BIAS = 127
# No exponent: E8M0 has one code for what is no number.
_NAN_EXPONENT = 255
_SCALE_DTYPES = {POWER_SCALES: "torch.uint8", DIVIDED_SCALES: "torch.float8_e4m3fn"}
# What tells schemes apart in config_groups.
_DECISIVE = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure")


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
    FloatLayout(name="naive-quantized", scheme=scheme_from_name("FP8A16_TENSOR"), codes="weight"),
    FloatLayout(name="naive-quantized", scheme=scheme_from_name("FP8A16_BLOCK"), codes="weight"),
    FloatLayout(name="mxfp8-quantized", scheme=scheme_from_name("MXFP8A16"), codes="weight"),
    FloatLayout(name="mxfp4-pack-quantized", scheme=scheme_from_name("MXFP4A16"), codes="weight_packed"),
    FloatLayout(name="nvfp4-pack-quantized", scheme=scheme_from_name("NVFP4A16"), codes="weight_packed"),
    FloatLayout(name="float-quantized", scheme=scheme_from_name("FP8_DYNAMIC"), codes="weight"),
    FloatLayout(name="float-quantized", scheme=scheme_from_name("FP8_DYNAMIC_TENSOR"), codes="weight"),
    FloatLayout(name="float-quantized", scheme=scheme_from_name("FP8_BLOCK"), codes="weight"),
    FloatLayout(name="mxfp8-quantized", scheme=scheme_from_name("MXFP8"), codes="weight"),
    FloatLayout(name="mxfp4-pack-quantized", scheme=scheme_from_name("MXFP4"), codes="weight_packed"),
)


def layout_of(scheme: WeightScheme) -> FloatLayout | None:
    """The layout that holds a scheme; None for integers."""
    return next((layout for layout in LAYOUTS if layout.scheme == scheme), None)


def pack_floats(name: str, quantized: QuantizedLinear, layout: FloatLayout) -> dict[str, torch.Tensor]:
    """The two or three tensors of a linear; also on the meta device.

    Raises:
        PackingError: Scales are not what the layout holds.
    """
    codes_RC, scale_RG = quantized.codes_RC, quantized.scale_RG
    if layout.codes == "weight":
        stored = codes_RC.contiguous().view(torch.float8_e4m3fn)
    else:
        stored = codes_RC[:, 0::2] | (codes_RC[:, 1::2] << 4)
    tensors = {f"{name}.{layout.codes}": stored}
    if layout.scheme.scales == POWER_SCALES:
        scale_RG = _exponents_of(name, scale_RG)
    elif layout.scheme.scales == DIVIDED_SCALES:
        divisor_R1 = quantized.divisor_R1
        if divisor_R1 is None:
            raise PackingError(
                f"{name}: scales that are quotients need their divisor, found none", linear=name
            )
        scale_RG = stored_dividends(scale_RG, divisor_R1).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_global_scale"] = divisor_R1[0].contiguous()
    else:
        scale_RG = stored_once(name, scale_RG, layout.scheme)
    return tensors | {f"{name}.weight_scale": scale_RG.contiguous()}


def unpack_floats(name: str, tensors: Mapping[str, torch.Tensor], layout: FloatLayout) -> QuantizedLinear:
    """The linear that was packed.

    Raises:
        PackingError: A tensor is missing or has another dtype or shape, or an exponent or code is no number.
    """
    is_float8 = layout.codes == "weight"
    kind = torch.float8_e4m3fn if is_float8 else torch.uint8
    stored = take_tensor(tensors, f"{name}.{layout.codes}", kind)
    scale = take_tensor(tensors, f"{name}.weight_scale")
    if is_float8:
        codes_RC = stored.contiguous().view(torch.uint8)
        if bool(((codes_RC & 0x7F) == 0x7F).any()):
            raise PackingError(f"{name}.weight holds values that are no numbers", linear=name)
    else:
        codes_RC = torch.stack((stored & 0xF, stored >> 4), dim=-1).flatten(1)
    rows, columns = codes_RC.shape
    require_shape(f"{name}.weight_scale", scale, stored_shape(layout.scheme, rows, columns))
    divisor_R1 = None
    if layout.scheme.scales == POWER_SCALES:
        scale_RG = _powers_of(name, take_tensor(tensors, f"{name}.weight_scale", torch.uint8))
    elif layout.scheme.scales == DIVIDED_SCALES:
        dividend_RG = take_tensor(tensors, f"{name}.weight_scale", torch.float8_e4m3fn).float()
        divisor = take_tensor(tensors, f"{name}.weight_global_scale", torch.float32)
        require_shape(f"{name}.weight_global_scale", divisor, (1,))
        divisor_R1 = divisor.expand(rows, 1).contiguous()
        scale_RG = dividend_RG / divisor_R1
    else:
        scale_RG = for_every_row(scale, layout.scheme, rows)
    return QuantizedLinear(
        codes_RC=codes_RC,
        scale_RG=scale_RG.contiguous(),
        zero_RG=None,
        scheme=layout.scheme,
        divisor_R1=divisor_R1,
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
        if is_alike and all(weights.get(key) == expected.get(key) for key in _DECISIVE):
            return found.scheme
    read = "; ".join(f"{x.name} of {x.scheme}" for x in LAYOUTS)
    raise PackingError(
        f"{name} is stored as {layout!r} with {dict(weights)!r} and inputs"
        f" {'as they are' if inputs is None else inputs}; of floats these are read: {read}",
        linear=name,
    )


def weights_values(scheme: WeightScheme) -> dict[str, object]:
    """``weights`` of a group of config_groups, of floats and of integers."""
    strategy, size = _strategy_of(scheme)
    values: dict[str, object] = {
        "num_bits": scheme.bits,
        "type": INTEGER if scheme.number == INTEGER else "float",
        "symmetric": scheme.is_symmetric,
        "strategy": strategy,
        "group_size": size,
        "dynamic": False,
    }
    if strategy == "block":
        values["block_structure"] = [scheme.block_rows, scheme.group_size]
    if scheme.scales in _SCALE_DTYPES:
        values |= dict.fromkeys(("scale_dtype", "zp_dtype"), _SCALE_DTYPES[scheme.scales])
    return values


def _strategy_of(scheme: WeightScheme) -> tuple[str, int | None]:
    if scheme.group_size == WHOLE_ROW:
        return "channel", None
    if scheme.group_size == WHOLE_TENSOR:
        return "tensor", None
    if scheme.block_rows > 1:
        return "block", None
    return "tensor_group" if scheme.scales == DIVIDED_SCALES else "group", scheme.group_size


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
