"""Blocks of 4 bits, NF4 and FP4, as bitsandbytes stores them; their scales quantized once more or not.

Per linear (R out features, C in features, G blocks of 64 columns a row, N = ceil(R*G/256)):
``weight`` uint8 [R*C/2, 1], codes row by row, two a byte, the first in the higher nibble;
``weight.quant_map`` fp32 [16], the values of codes; ``weight.absmax`` fp32 [R*G], scales row by row;
``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``) uint8 [L], JSON with sizes and the dtype of the weight.
The level of a code is ``quant_map[code] * absmax``.

Nested scales: ``weight.absmax`` uint8 [R*G] are codes of ``weight.nested_quant_map`` fp32 [256];
``weight.nested_absmax`` fp32 [N] is a factor of 256 of them each, to which ``nested_offset`` of the JSON is
added.

The JSON ends in spaces: an offset has as many digits as it needs, and how long every tensor is has to be
known before it. In features are multiples of 64, so that no block goes on in the next row, which
bitsandbytes 0.50 misreads on a CPU.

Left out: other sizes of blocks, and codes in words of another dtype than bytes (``quant_storage``).

Source: bitsandbytes 0.50.2, functional.py (``QuantState``, ``quantize_4bit``).
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from quantlib.errors import PackingError
from quantlib.grids.formats import CODEBOOKS, NESTED_SCALES
from quantlib.grids.nested_scales import BLOCK_SCALES, scales_of, values_like
from quantlib.packing.checks import require_consistent, require_shape, take_tensor
from quantlib.quantized import NestedScales, QuantizedLinear
from quantlib.schemes import WeightScheme, scheme_from_name

SCHEMES = {name: scheme_from_name(name) for name in ("NF4", "NF4_DQ", "FP4", "FP4_DQ")}
BLOCK = 64
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)}
_STATE = "quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# No fp64 number is longer in JSON.
_LONGEST_NUMBER = 24


def check_four_bit(name: str, columns: int) -> None:
    """Refuse rows that are no whole blocks.

    Raises:
        PackingError: Says what would fit.
    """
    if columns % BLOCK:
        raise PackingError(
            f"{name}: bitsandbytes output of 4 bits needs in features in multiples of {BLOCK}, got {columns};"
            " keep this linear as it is, or use scheme W8A16 with group_size -1, or another format",
            linear=name,
            features=columns,
        )


def pack_four_bit(name: str, quantized: QuantizedLinear) -> dict[str, torch.Tensor]:
    """The tensors of a linear: four, or six with nested scales.

    Raises:
        PackingError: Its parts contradict each other, a code is out of range, or the dtype of its weight is
            not known.
    """
    require_consistent(name, quantized, (torch.float32,))
    codes_RC, scheme, nested = quantized.codes_RC, quantized.scheme, quantized.nested
    _require_codes(name, codes_RC)
    _require_nested(name, quantized)
    like = quantized.scale_RG
    packed = {
        "": (codes_RC[:, 0::2] << 4 | codes_RC[:, 1::2]).reshape(-1, 1),
        ".absmax": (quantized.scale_RG if nested is None else nested.code_RG).reshape(-1).contiguous(),
        ".quant_map": _table(scheme).to(like.device),
    }
    if nested is not None:
        packed[".nested_absmax"] = nested.absmax_N
        packed[".nested_quant_map"] = values_like(like)
    packed[f".{_STATE}{scheme.number}"] = _state_bytes(name, quantized)
    return {f"{name}.weight{part}": tensor for part, tensor in packed.items()}


def packed_names_four_bit(name: str) -> tuple[str, ...]:
    """Full names of all tensors `pack_four_bit` may make."""
    states = dict.fromkeys(f"{_STATE}{scheme.number}" for scheme in SCHEMES.values())
    return (f"{name}.weight", *(f"{name}.weight.{part}" for part in (*_PARTS, *states)))


def unpack_four_bit(name: str, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme) -> QuantizedLinear:
    """The linear that was packed.

    Raises:
        PackingError: A tensor is missing or has another dtype, shape or table, or contradicts the scheme.
    """
    weight = f"{name}.weight"
    state = _state(f"{weight}.{_STATE}{scheme.number}", tensors, scheme)
    rows, columns = state["shape"]
    check_four_bit(name, columns)
    stored = take_tensor(tensors, weight, torch.uint8)
    require_shape(weight, stored, (rows * columns // 2, 1))
    codes_RC = torch.stack((stored >> 4, stored & 0xF), dim=-1).reshape(rows, columns)
    is_nested = scheme.scales == NESTED_SCALES
    absmax = take_tensor(tensors, f"{weight}.absmax", torch.uint8 if is_nested else torch.float32)
    groups = columns // BLOCK
    require_shape(f"{weight}.absmax", absmax, (rows * groups,))
    _require_table(f"{weight}.quant_map", tensors, _table(scheme))
    nested, scale_RG = None, absmax.reshape(rows, groups)
    if is_nested:
        nested = _nested(weight, tensors, scale_RG, state["nested_offset"])
        scale_RG = scales_of(nested)
    return QuantizedLinear(
        codes_RC=codes_RC,
        scale_RG=scale_RG,
        zero_RG=None,
        scheme=scheme,
        model_dtype=_DTYPES[state["dtype"]],
        nested=nested,
    )


def _table(scheme: WeightScheme) -> torch.Tensor:
    # Of FP4 the zero with a sign becomes the one without, which is what bitsandbytes writes.
    return torch.tensor(CODEBOOKS[scheme.number]) + 0.0


def _require_codes(name: str, codes_RC: torch.Tensor) -> None:
    if not codes_RC.is_meta and codes_RC.numel() and int(codes_RC.max()) > 0xF:
        raise PackingError(f"{name}: a code is {int(codes_RC.max())}, more than 4 bits hold", linear=name)


def _require_nested(name: str, quantized: QuantizedLinear) -> None:
    nested, is_wanted = quantized.nested, quantized.scheme.scales == NESTED_SCALES
    if (nested is not None) != is_wanted:
        raise PackingError(
            f"{name}: its scales must{'' if is_wanted else ' not'} be quantized by its scheme", linear=name
        )
    if nested is None:
        return
    num_scales = quantized.scale_RG.numel()
    shapes = (tuple(nested.code_RG.shape), tuple(nested.absmax_N.shape), tuple(nested.offset.shape))
    wanted = (tuple(quantized.scale_RG.shape), (-(-num_scales // BLOCK_SCALES),), ())
    if shapes != wanted:
        raise PackingError(f"{name}: nested scales must be {wanted}, got {shapes}", linear=name)
    if not quantized.scale_RG.is_meta and not torch.equal(scales_of(nested), quantized.scale_RG):
        raise PackingError(f"{name}: its scales are not those that their codes mean", linear=name)


def _state_bytes(name: str, quantized: QuantizedLinear) -> torch.Tensor:
    """The JSON, always of the same length for a shape, a dtype and a scheme."""
    dtype = next((word for word, known in _DTYPES.items() if known == quantized.model_dtype), None)
    if dtype is None:
        raise PackingError(
            f"{name}: bitsandbytes output of 4 bits states the dtype of the weight, which has to be one of"
            f" {', '.join(_DTYPES)}, got {quantized.model_dtype}",
            linear=name,
        )
    nested, device = quantized.nested, quantized.codes_RC.device
    state: dict[str, Any] = {
        "quant_type": quantized.scheme.number,
        "blocksize": BLOCK,
        "dtype": dtype,
        "shape": list(quantized.codes_RC.shape),
    }
    if nested is not None:
        state |= {"nested_blocksize": BLOCK_SCALES, "nested_dtype": "float32", "nested_offset": 0}
    length = len(json.dumps(state)) + (0 if nested is None else _LONGEST_NUMBER)
    if device.type == "meta":
        return torch.empty(length, dtype=torch.uint8, device=device)
    if nested is not None:
        state["nested_offset"] = nested.offset.item()
    text = json.dumps(state).ljust(length).encode()
    return torch.tensor(list(text), dtype=torch.uint8, device=device)


def _state(name: str, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme) -> dict[str, Any]:
    content = take_tensor(tensors, name, torch.uint8)
    try:
        state = json.loads(bytes(content.flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise PackingError(f"tensor {name} must hold JSON; {error}", tensor=name) from error
    if not isinstance(state, dict):
        raise PackingError(f"tensor {name} must hold a JSON object, got {state!r}", tensor=name)
    wanted: dict[str, Any] = {"quant_type": scheme.number, "blocksize": BLOCK}
    if scheme.scales == NESTED_SCALES:
        wanted |= {"nested_blocksize": BLOCK_SCALES, "nested_dtype": "float32"}
    shape, offset = state.get("shape"), state.get("nested_offset")
    is_shape = isinstance(shape, list) and [type(size) for size in shape] == [int, int] and min(shape) > 0
    is_offset = isinstance(offset, float) and math.isfinite(offset)
    if (
        any(state.get(key) != value for key, value in wanted.items())
        or state.get("dtype") not in list(_DTYPES)
        or not is_shape
        or is_offset != (scheme.scales == NESTED_SCALES)
    ):
        raise PackingError(f"tensor {name} must hold {wanted} and sizes, got {state}", tensor=name)
    return state


def _nested(
    weight: str, tensors: Mapping[str, torch.Tensor], code_RG: torch.Tensor, offset: float
) -> NestedScales:
    absmax_N = take_tensor(tensors, f"{weight}.nested_absmax", torch.float32)
    require_shape(f"{weight}.nested_absmax", absmax_N, (-(-code_RG.numel() // BLOCK_SCALES),))
    _require_table(f"{weight}.nested_quant_map", tensors, values_like(absmax_N))
    offset_ = torch.tensor(offset, dtype=torch.float32, device=absmax_N.device)
    return NestedScales(code_RG=code_RG, absmax_N=absmax_N, offset=offset_)


def _require_table(name: str, tensors: Mapping[str, torch.Tensor], table: torch.Tensor) -> None:
    found = take_tensor(tensors, name, torch.float32)
    if not torch.equal(found, table.to(found.device)):
        raise PackingError(f"tensor {name} is another table than the one that is written", tensor=name)
