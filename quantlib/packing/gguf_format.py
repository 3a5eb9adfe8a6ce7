"""Blocks of GGUF, read by llama.cpp: Q4_0, Q4_1 and Q8_0, each of 32 columns with scales of its own.

Per linear (R out features, C in features): ``weight_blocks`` uint8 [R, C/32 * bytes of a block], the blocks
of a row one after the other. In a block:

- Q4_0, symmetric 4 bits, 18 bytes: scale fp16, 16 bytes of codes; the level is ``scale * (code - 8)``.
- Q4_1, asymmetric 4 bits, 20 bytes: scale fp16, minimum fp16, 16 bytes; ``scale * code + minimum``.
- Q8_0, symmetric 8 bits, 34 bytes: scale fp16, 32 signed bytes; ``scale * byte``.

Byte j of 4-bit codes holds column j in its lower half and column j + 16 in its upper one. The minimum of
Q4_1 is ``-scale * zero`` and has to be exact in fp16, or levels would not be those that the codes were chosen
for: its scales have 7 significant bits (`SHORT_SCALES`), so that the product with a zero point of 4 bits has
the 11 that fp16 holds. That moves a scale by at most one part in 128, before codes are chosen.

``weight_blocks`` is what a job calls the tensor; in the file it has the name that llama.cpp knows
(`quantlib.checkpoint.gguf_files.names`). Left out: Q5, K and IQ types, whose codes no scheme here makes.

Source: ggml of llama.cpp, ggml-common.h (block_q4_0, block_q4_1, block_q8_0) and ggml-quants.c
(dequantize_row_*).
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantlib.errors import PackingError
from quantlib.grids.formats import SHORT_SCALES
from quantlib.packing.checks import (
    quantized_linears,
    require_consistent,
    require_integers,
    require_shape,
    take_tensor,
)
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import GGUF_GROUP_SIZE, WeightScheme

NAME = "gguf"
FORMAT_VERSION = "gguf 1"
WIDTHS = (4, 8)
SUFFIX = ".weight_blocks"
_SCALE_BYTES = 2
# Type -> bits, symmetry.
_TYPES = {"Q4_0": (4, True), "Q4_1": (4, False), "Q8_0": (8, True)}
_SCHEMES_FOR_PEOPLE = "W4A16 (Q4_0), W4A16_ASYM (Q4_1) or W8A16 (Q8_0)"


def type_of(scheme: WeightScheme) -> str:
    """What GGUF calls blocks of such codes.

    >>> type_of(WeightScheme(bits=4, is_symmetric=False, group_size=32))
    'Q4_1'
    """
    return next(name for name, kind in _TYPES.items() if kind == (scheme.bits, scheme.is_symmetric))


def held_scheme(scheme: WeightScheme) -> WeightScheme:
    """A scheme with scales as the blocks hold them: short ones where there are minimums."""
    return scheme if scheme.is_symmetric else dataclasses.replace(scheme, scales=SHORT_SCALES)


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:  # noqa: ARG001 - same form in every format
    """fp16, whatever the model's dtype."""
    return torch.float16


def check(name: str, rows: int, columns: int, scheme: WeightScheme) -> None:  # noqa: ARG001 - as in every format
    """Refuse what no block holds.

    Raises:
        PackingError: Bits or symmetry, a group size other than 32, or columns that fill no whole blocks.
    """
    require_integers(name, scheme, format_name=NAME)
    if (scheme.bits, scheme.is_symmetric) not in _TYPES.values():
        # Q8_1 exists, for activations only.
        found = f"asymmetric codes of {scheme.bits}" if scheme.bits in WIDTHS else f"codes of {scheme.bits}"
        raise PackingError(
            f"{name}: gguf output holds codes of 4 bits and symmetric ones of 8 bits, not"
            f" {scheme.bits}; choose another scheme or format: {found} bits were asked for,"
            f" {_SCHEMES_FOR_PEOPLE} would do",
            linear=name,
            bits=scheme.bits,
        )
    if columns % GGUF_GROUP_SIZE:
        raise PackingError(
            f"{name}: gguf output stores rows in blocks of {GGUF_GROUP_SIZE} columns, found {columns}"
            " columns; keep this linear as it is, or use --format compressed-tensors",
            linear=name,
            columns=columns,
        )
    if scheme.group_size != GGUF_GROUP_SIZE:
        raise PackingError(
            f"{name}: gguf output has a scale for every {GGUF_GROUP_SIZE} columns, got a group size of"
            f" {scheme.group_size}; use --group-size {GGUF_GROUP_SIZE}, or leave it out",
            linear=name,
            columns=columns,
            group_size=scheme.group_size,
        )


def pack(name: str, quantized: QuantizedLinear) -> dict[str, torch.Tensor]:
    """The blocks of a linear, on the device of its codes.

    Raises:
        PackingError: `check` refuses it, its parts contradict each other, or a minimum is not exact in fp16.
    """
    scheme, codes_RC = quantized.scheme, quantized.codes_RC
    rows, columns = codes_RC.shape
    check(name, rows, columns, scheme)
    require_consistent(name, quantized, (torch.float16,))
    zero_RG = quantized.zero_RG
    _require_codes_in_range(name, codes_RC, scheme)
    code_RGS = codes_RC.reshape(rows, -1, GGUF_GROUP_SIZE)
    parts = [_bytes_of(quantized.scale_RG)]
    if zero_RG is not None:
        _require_codes_in_range(name, zero_RG, scheme)
        parts.append(_bytes_of(_minimums(name, quantized.scale_RG, zero_RG)))
    if scheme.bits == 4:
        lower, upper = code_RGS.split(GGUF_GROUP_SIZE // 2, dim=2)
        parts.append(lower | (upper << 4))
    else:
        # The middle code, 128, means 0: with its highest bit turned a code is a signed byte.
        parts.append(code_RGS ^ scheme.middle_code)
    return {f"{name}{SUFFIX}": torch.cat(parts, dim=2).reshape(rows, -1).contiguous()}


def packed_names(name: str) -> tuple[str, ...]:
    """Full name of the one tensor `pack` makes."""
    return (f"{name}{SUFFIX}",)


def unpack(name: str, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme) -> QuantizedLinear:
    """The linear that was packed.

    Raises:
        PackingError: The tensor is missing or no whole blocks, or a minimum is no scale times a zero point,
            as in files of tools that choose minimums freely.
    """
    blocks = take_tensor(tensors, f"{name}{SUFFIX}", torch.uint8)
    size = block_bytes(scheme)
    rows, groups = blocks.shape[0], blocks.shape[-1] // size
    require_shape(f"{name}{SUFFIX}", blocks, (rows, groups * size))
    check(name, rows, groups * GGUF_GROUP_SIZE, scheme)
    block_RGB = blocks.reshape(rows, groups, size)
    scale_RG = _fp16_of(block_RGB[..., :_SCALE_BYTES])
    start, zero_RG = _SCALE_BYTES, None
    if not scheme.is_symmetric:
        start = 2 * _SCALE_BYTES
        zero_RG = _zeros(name, scale_RG, _fp16_of(block_RGB[..., _SCALE_BYTES:start]), scheme)
    stored = block_RGB[..., start:]
    if scheme.bits == 4:
        code_RGS = torch.cat((stored & 0xF, stored >> 4), dim=2)
    else:
        code_RGS = stored ^ scheme.middle_code
    return QuantizedLinear(
        codes_RC=code_RGS.reshape(rows, -1), scale_RG=scale_RG, zero_RG=zero_RG, scheme=scheme
    )


def block_bytes(scheme: WeightScheme) -> int:
    """Bytes of 32 columns of a row.

    >>> block_bytes(WeightScheme(bits=8, is_symmetric=True, group_size=32))
    34
    """
    return _SCALE_BYTES * (1 if scheme.is_symmetric else 2) + GGUF_GROUP_SIZE * scheme.bits // 8


def quantization_config(
    schemes: Mapping[str, WeightScheme | None], other_linears: Sequence[str] = ()
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, for whoever verifies an output: llama.cpp needs none.

    The most frequent type is the stated one; ``exceptions`` names linears of another type, or null for kept
    ones.

    Raises:
        PackingError: Nothing is quantized.
    """
    counted = Counter(map(type_of, quantized_linears(schemes).values()))
    types = {name: None if scheme is None else type_of(scheme) for name, scheme in schemes.items()}
    stated = counted.most_common(1)[0][0]
    bits, is_symmetric = _TYPES[stated]
    return {
        "quant_method": NAME,
        "format": stated,
        "bits": bits,
        "group_size": GGUF_GROUP_SIZE,
        "sym": is_symmetric,
        "exceptions": {
            **{name: kind for name, kind in types.items() if kind != stated},
            **dict.fromkeys(other_linears),
        },
    }


def scheme_of(quantization_config: Mapping[str, Any], name: str) -> WeightScheme | None:
    """How ``name`` is stored; None when it is kept.

    Raises:
        PackingError: The type is none that is written here.
    """
    kind = (quantization_config.get("exceptions") or {}).get(name, quantization_config.get("format"))
    if name in (quantization_config.get("exceptions") or {}) and kind is None:
        return None
    if kind not in _TYPES:
        raise PackingError(f"gguf blocks of {', '.join(_TYPES)} are read, quantization_config says {kind!r}")
    bits, is_symmetric = _TYPES[kind]
    return held_scheme(WeightScheme(bits=bits, is_symmetric=is_symmetric, group_size=GGUF_GROUP_SIZE))


def side_files(quantization_config: Mapping[str, Any]) -> dict[str, bytes]:  # noqa: ARG001 - as in every format
    """None."""
    return {}


def _require_codes_in_range(name: str, codes: torch.Tensor, scheme: WeightScheme) -> None:
    if scheme.bits == 8 or codes.is_meta or not codes.numel():
        return
    if int(codes.max()) >= scheme.num_codes:
        raise PackingError(
            f"{name}: a code or zero point is {int(codes.max())}, {scheme.bits} bits hold up to"
            f" {scheme.num_codes - 1}",
            linear=name,
        )


def _minimums(name: str, scale_RG: torch.Tensor, zero_RG: torch.Tensor) -> torch.Tensor:
    """What code 0 means, fp16 [R, G]; 0 rather than -0 where the zero point is 0."""
    exact_RG = 0 - scale_RG.float() * zero_RG.float()
    minimum_RG = exact_RG.half()
    if not minimum_RG.is_meta and not torch.equal(minimum_RG.float(), exact_RG):
        raise PackingError(
            f"{name}: a scale times its zero point is no number of fp16, in which Q4_1 stores it; the"
            " weight's values do not fit, keep this linear as it is or use scheme W4A16",
            linear=name,
        )
    return minimum_RG


def _zeros(name: str, scale_RG: torch.Tensor, minimum_RG: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    wanted_RG = -minimum_RG.float() / scale_RG.float()
    zero_RG = wanted_RG.round().clamp(0, scheme.num_codes - 1)
    if not torch.equal(zero_RG, wanted_RG):
        raise PackingError(
            f"{name}: a minimum of its Q4_1 blocks is not the scale times a zero point from 0 to"
            f" {scheme.num_codes - 1}; such files of other tools are read as sources only",
            linear=name,
        )
    return zero_RG.to(torch.uint8)


def _bytes_of(values_RG: torch.Tensor) -> torch.Tensor:
    """Little-endian bytes [R, G, 2] of fp16 values."""
    return values_RG.contiguous()[..., None].view(torch.uint8)


def _fp16_of(bytes_RGB: torch.Tensor) -> torch.Tensor:
    return bytes_RGB.contiguous().view(torch.float16)[..., 0]
