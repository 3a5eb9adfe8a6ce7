"""MXFP4 experts as GPT-OSS publishes them: 4-bit floats, a power of two for 32 of them.

Of a fused parameter ``<name>`` [E, in, out]: ``<name>_blocks`` uint8 [E, out, in / 32, 16], two values a byte
with the lower nibble first; ``<name>_scales`` uint8 [E, out, in / 32], exponents + 127. What is stored is the
transpose of the parameter.

Source: OCP Microscaling Formats (MX) 1.0, sections 5.3.3 and 5.4.1; transformers, integrations/mxfp4.py
(convert_moe_packed_tensors).
"""

from collections.abc import Mapping
from typing import Any

import torch

from quantlib.checkpoint.decoded import DecodedTensor
from quantlib.checkpoint.decoders.contracts import Found, ReadStored
from quantlib.checkpoint.decoders.e2m1 import values_of
from quantlib.checkpoint.decoders.scale_grid import exponents
from quantlib.checkpoint.header import TensorEntry
from quantlib.errors import CheckpointError

_BLOCKS, _SCALES = "_blocks", "_scales"


def find(quantization: Mapping[str, Any], stored: Mapping[str, TensorEntry], read: ReadStored) -> Found:  # noqa: ARG001 - one form
    """Every pair of blocks and scales; see `quantlib.checkpoint.decoders.contracts.FindDecoded`."""
    names = [name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS)]
    return Found(decoded={name: _decoded(name, stored) for name in names})


def _decoded(name: str, stored: Mapping[str, TensorEntry]) -> DecodedTensor:
    blocks, scales = stored[name + _BLOCKS], stored.get(name + _SCALES)
    if scales is None or len(blocks.shape) != 4 or blocks.shape[:3] != scales.shape:
        found = "missing" if scales is None else list(scales.shape)
        raise CheckpointError(
            f"{blocks.name} is {list(blocks.shape)} and {name}{_SCALES} is {found}; wanted [experts, rows,"
            " groups, bytes] and as many scales; the checkpoint is damaged",
            tensor=blocks.name,
        )
    experts, rows, groups, num_bytes = blocks.shape
    return DecodedTensor(
        shape=(experts, groups * num_bytes * 2, rows),
        parts={"blocks": blocks, "scales": scales},
        make_rows=_make_experts,
        row_step=1,
    )


def _make_experts(parts: Mapping[str, torch.Tensor], start: int, end: int) -> torch.Tensor:
    values = values_of(parts["blocks"][start:end]) * exponents(parts["scales"][start:end])[..., None]
    return values.flatten(2).transpose(1, 2)
