"""Weights in 8-bit floats with scales beside them, as DeepSeek publishes them and transformers writes them.

``<name>`` float8 [R, C] or, of fused experts, [E, R, C]; ``<name>_scale_inv`` (or ``<name>_scale``) holds one
number for the whole weight, for a row or for a block of ``weight_block_size``, cut at the edges. In spite of
its name the weight is their product with the values. Scales may be E8M0 bytes, and lie in another shard.

Source: transformers, integrations/finegrained_fp8.py (Fp8Dequantize) and integrations/fbgemm_fp8.py.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from quantlib.checkpoint.decoded import ROW_STEP, DecodedTensor
from quantlib.checkpoint.decoders.contracts import Found, ReadStored
from quantlib.checkpoint.decoders.scale_grid import Block, block_of, scale_rows
from quantlib.checkpoint.header import TensorEntry
from quantlib.errors import CheckpointError

FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALE_ENDINGS = ("_scale_inv", "_scale")
_ACTIVATION_ENDINGS = (".input_scale", ".activation_scale", ".input_scale_ub")
_NOT_NEEDED = "a scale of activations, which are not quantized here"


def find(quantization: Mapping[str, Any], stored: Mapping[str, TensorEntry], read: ReadStored) -> Found:  # noqa: ARG001 - one form
    """Every float8 tensor with its scales; see `quantlib.checkpoint.decoders.contracts.FindDecoded`."""
    declared = quantization.get("weight_block_size")
    _refuse_fused_rows(quantization, stored)
    decoded = {
        name: _decoded(entry, _scale_of(name, stored), declared)
        for name, entry in stored.items()
        if entry.dtype in FLOAT8
    }
    dropped = {name: _NOT_NEEDED for name in stored if name.endswith(_ACTIVATION_ENDINGS)}
    return Found(decoded=decoded, dropped=dropped)


def _refuse_fused_rows(quantization: Mapping[str, Any], stored: Mapping[str, TensorEntry]) -> None:
    # The scales of fused experts in this dialect lie along rows of one parameter and columns of the other.
    if quantization.get("quant_method") == "fbgemm_fp8":
        fused = [name for name, entry in stored.items() if entry.dtype in FLOAT8 and len(entry.shape) > 2]
        if fused:
            raise CheckpointError(f"{fused[0]}: fused experts are not read from fbgemm_fp8", tensor=fused[0])


def _scale_of(name: str, stored: Mapping[str, TensorEntry]) -> TensorEntry:
    for ending in _SCALE_ENDINGS:
        if name + ending in stored:
            return stored[name + ending]
    raise CheckpointError(
        f"{name} is stored in 8 bits, but no shard holds its scales ({name}{_SCALE_ENDINGS[0]});"
        " complete the checkpoint",
        tensor=name,
    )


def _decoded(codes: TensorEntry, scale: TensorEntry, declared: Sequence[int] | None) -> DecodedTensor:
    if len(codes.shape) not in (2, 3):
        raise CheckpointError(
            f"{codes.name} is stored in 8 bits as {list(codes.shape)}; wanted a matrix, or one an expert",
            tensor=codes.name,
        )
    is_fused = len(codes.shape) == 3
    rows, columns = codes.shape[-2:]
    scale_shape = scale.shape[1:] if is_fused else scale.shape
    if is_fused and scale.shape[:1] != codes.shape[:1]:
        raise CheckpointError(
            f"{codes.name} has {codes.shape[0]} experts and its scales are {list(scale.shape)};"
            " the checkpoint is damaged",
            tensor=codes.name,
        )
    block = block_of(codes.name, (rows, columns), scale_shape, declared)
    return DecodedTensor(
        shape=codes.shape,
        parts={"codes": codes, "scale": scale},
        make_rows=partial(_experts if is_fused else make_rows, block),
        row_step=1 if is_fused else ROW_STEP,
    )


def make_rows(block: Block, parts: Mapping[str, torch.Tensor], start: int, end: int) -> torch.Tensor:
    """value * scale, in fp32; integers likewise."""
    codes_RC = parts["codes"]
    return codes_RC[start:end].float() * scale_rows(parts["scale"], block, codes_RC.shape[1], start, end)


def _experts(block: Block, parts: Mapping[str, torch.Tensor], start: int, end: int) -> torch.Tensor:
    codes_ERC, scales = parts["codes"], parts["scale"]
    rows = codes_ERC.shape[1]
    return torch.stack(
        [make_rows(block, {"codes": codes_ERC[e], "scale": scales[e]}, 0, rows) for e in range(start, end)]
    )
