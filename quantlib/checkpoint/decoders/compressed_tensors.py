"""What compressed-tensors stores: packed integers, plain integers, 8-bit floats and 4-bit floats.

Of a linear [R, C] with a scale for every group of columns, row, block or whole weight:
``weight_packed`` int32, codes of 2 to 6 or 8 bits along C, with ``weight_shape``; zero points are packed
along R, but that of a whole weight is int8, less 2**(b - 1); ``weight_g_idx`` is the group of each column
(``pack-quantized``).
``weight`` int8 or float8 (``int-quantized``, ``float-quantized``, ``naive-quantized``, ``mxfp8-quantized``).
``weight_packed`` uint8, two 4-bit floats a byte; ``weight_scale`` float8 times ``1 / weight_global_scale``
for 16 of them (``nvfp4-pack-quantized``), or E8M0 bytes for 32 (``mxfp4-pack-quantized``).

Left out: codes of 3, 5 and 6 bits of releases before June 2026, none of which crosses a word; 7 bits; sparse
weights; transforms, which change what a linear's input is.

Source: compressed-tensors 0.20.0, compressors/ and quantization/lifecycle/forward.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quantlib.checkpoint.decoded import DecodedTensor
from quantlib.checkpoint.decoders import fp8
from quantlib.checkpoint.decoders.contracts import Found, ReadStored
from quantlib.checkpoint.decoders.e2m1 import values_of
from quantlib.checkpoint.decoders.scale_grid import Block, block_of, groups_of_columns, scale_rows
from quantlib.checkpoint.header import TensorEntry
from quantlib.errors import CheckpointError
from quantlib.packing.bits import BITS_PER_WORD, num_words, unpack_words
from quantlib.packing.compressed_tensors_format import WIDTHS, group_of

_ROLES = {
    "scale": ".weight_scale",
    "zero": ".weight_zero_point",
    "shape": ".weight_shape",
    "g_idx": ".weight_g_idx",
    "global_scale": ".weight_global_scale",
}
_OF_ACTIVATIONS = (
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
    ".output_zero_point",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".k_zero_point",
    ".v_zero_point",
)
_NOT_NEEDED = "describes activations or a cache, which are not quantized here"


def find(quantization: Mapping[str, Any], stored: Mapping[str, TensorEntry], read: ReadStored) -> Found:
    """Every linear that has scales; see `quantlib.checkpoint.decoders.contracts.FindDecoded`."""
    _refuse_other_weights(quantization)
    decoded: dict[str, DecodedTensor] = {}
    packed: dict[str, _Packed] = {}
    for name, entry in stored.items():
        linear, _, last = name.rpartition(".")
        if last == "weight_packed" or (last == "weight" and entry.dtype in ("I8", *fp8.FLOAT8)):
            parts = {"codes": entry} | {
                role: stored[linear + ending] for role, ending in _ROLES.items() if linear + ending in stored
            }
            _refuse_incomplete(linear, parts)
            if entry.dtype == "I32":
                packed[linear] = _packed(linear, parts, quantization)
            elif last == "weight":
                decoded[f"{linear}.weight"] = _plain(linear, parts, quantization)
            else:
                decoded[f"{linear}.weight"] = _floats(linear, parts)
    decoded |= _integers(packed, read)
    dropped = {name: _NOT_NEEDED for name in stored if name.endswith(_OF_ACTIVATIONS)}
    return Found(decoded=decoded, dropped=dropped)


def _refuse_other_weights(quantization: Mapping[str, Any]) -> None:
    transforms = (quantization.get("transform_config") or {}).get("config_groups")
    sparsity = (quantization.get("sparsity_config") or {}).get("format") or "dense"
    if transforms or sparsity != "dense":
        raise CheckpointError(
            "compressed-tensors sources with transforms or sparse weights are not read;"
            " give the original checkpoint"
        )


def _refuse_incomplete(linear: str, parts: Mapping[str, TensorEntry]) -> None:
    codes = parts["codes"]
    if "scale" not in parts or len(codes.shape) != 2:
        raise CheckpointError(
            f"{codes.name} {list(codes.shape)} is stored in {codes.dtype}; wanted a matrix with its"
            f" {linear}.weight_scale; complete the checkpoint",
            tensor=codes.name,
        )


def _plain(linear: str, parts: dict[str, TensorEntry], quantization: Mapping[str, Any]) -> DecodedTensor:
    """One value an element."""
    rows, columns = parts["codes"].shape
    weights = (group_of(quantization, linear) or {}).get("weights") or {}
    block = block_of(
        f"{linear}.weight", (rows, columns), parts["scale"].shape, weights.get("block_structure")
    )
    make = _shifted_rows if "zero" in parts else fp8.make_rows
    return DecodedTensor(shape=(rows, columns), parts=parts, make_rows=partial(make, block))


def _shifted_rows(block: Block, parts: Mapping[str, torch.Tensor], start: int, end: int) -> torch.Tensor:
    codes_RC = parts["codes"]
    zero, scale = (
        scale_rows(parts[role], block, codes_RC.shape[1], start, end) for role in ("zero", "scale")
    )
    return (codes_RC[start:end].float() - zero) * scale


@dataclass(frozen=True, slots=True)
class _Packed:
    """Integers in words: bits of one, and columns of a group, None for whole rows."""

    parts: dict[str, TensorEntry]
    bits: int
    group_size: int | None


def _packed(linear: str, parts: dict[str, TensorEntry], quantization: Mapping[str, Any]) -> _Packed:
    weights = (group_of(quantization, linear) or {}).get("weights") or {}
    bits, size = weights.get("num_bits"), weights.get("group_size")
    rows, groups = parts["codes"].shape[0], (1, *parts["scale"].shape)[-1]
    if bits not in WIDTHS or "shape" not in parts or parts["scale"].shape not in ((rows, groups), (1,)):
        found = ", ".join(f"{role} {list(entry.shape)}" for role, entry in parts.items())
        raise CheckpointError(
            f"{linear} is stored packed; wanted codes of {', '.join(map(str, WIDTHS))} bits by"
            f" config_groups, scales by group or row, and a weight_shape; found {bits!r} bits, {found}",
            linear=linear,
        )
    return _Packed(parts, bits, size if isinstance(size, int) and size > 0 else None)


def _integers(packed: Mapping[str, _Packed], read: ReadStored) -> dict[str, DecodedTensor]:
    # Groups tell how many columns there are. Only of whole rows the stored shape is read: in a large model
    # these are many small reads far apart.
    ragged = [found.parts["shape"] for found in packed.values() if found.group_size is None]
    shapes = read(ragged) if ragged else {}
    decoded = {}
    for linear, found in packed.items():
        rows, groups = found.parts["codes"].shape[0], found.parts["scale"].shape[-1]
        stored = shapes.get(found.parts["shape"].name)
        size = found.group_size or 0
        columns = groups * size if stored is None else int(stored[-1])
        block = (1, size or columns)
        decoded[f"{linear}.weight"] = DecodedTensor(
            shape=(rows, columns),
            parts=found.parts,
            make_rows=partial(_unpacked_rows, linear, found.bits, (rows, columns), block),
        )
    return decoded


def _unpacked_rows(
    linear: str,
    bits: int,
    shape: tuple[int, int],
    block: Block,
    parts: Mapping[str, torch.Tensor],
    start: int,
    end: int,
) -> torch.Tensor:
    rows, columns = shape
    if parts["shape"].tolist() != list(shape):
        raise CheckpointError(
            f"{linear}.weight_shape is {parts['shape'].tolist()}, its codes of {bits} bits and its scales are"
            f" those of {list(shape)}; the checkpoint or its config.json is damaged",
            linear=linear,
        )
    codes_RC = unpack_words(parts["codes"][start:end], bits=bits, dim=1, length=columns).float()
    scale_RG = parts["scale"].float().reshape(-1, parts["scale"].shape[-1]).expand(rows, -1)[start:end]
    if "zero" in parts and parts["zero"].dtype == torch.int8:
        # One for the whole weight is signed and not packed.
        zero_RG = (parts["zero"].float() + (1 << bits - 1)).reshape(1, 1).expand_as(scale_RG)
    elif "zero" in parts:
        words = slice(start * bits // BITS_PER_WORD, num_words(end, bits))
        zero_RG = unpack_words(parts["zero"][words], bits=bits, dim=0, length=end - start).float()
    else:
        zero_RG = torch.full_like(scale_RG, float(1 << bits - 1))
    group_C = torch.arange(columns) // block[1]
    if "g_idx" in parts:
        group_C = groups_of_columns(parts["g_idx"], scale_RG.shape[1], linear)
    return (codes_RC - zero_RG[:, group_C]) * scale_RG[:, group_C]


def _floats(linear: str, parts: dict[str, TensorEntry]) -> DecodedTensor:
    rows, num_bytes = parts["codes"].shape
    block = block_of(f"{linear}.weight", (rows, 2 * num_bytes), parts["scale"].shape)
    return DecodedTensor(shape=(rows, 2 * num_bytes), parts=parts, make_rows=partial(_float4_rows, block))


def _float4_rows(block: Block, parts: Mapping[str, torch.Tensor], start: int, end: int) -> torch.Tensor:
    values_RC = values_of(parts["codes"][start:end])
    scale_RC = scale_rows(parts["scale"], block, values_RC.shape[1], start, end)
    if "global_scale" in parts:
        scale_RC = scale_RC / parts["global_scale"].float()
    return values_RC * scale_RC
