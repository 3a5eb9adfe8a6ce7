"""The layout of AutoAWQ's GEMM version, as any tool writes it: 4 bits, columns in consecutive groups.

R out features, C in features, G groups. ``qweight`` int32 [C, R / 8], ``qzeros`` int32 [G, R / 8], ``scales``
[G, R]. Zero points are read whatever the config says of them. That AWQ scaled the inputs of linears does not
show: the layers before, which are stored as they are, undo it.

Left out: ``gemv``, ``gemv_fast``, ``marlin`` and llm-awq files; activations with scales of their own
(``act.scales``), which change what a linear's input is; configs that only a ``quant_config.json`` holds.

Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from collections.abc import Mapping
from typing import Any

import torch

from quantlib.checkpoint.decoded import DecodedTensor
from quantlib.checkpoint.decoders.contracts import Found, ReadStored
from quantlib.checkpoint.header import TensorEntry
from quantlib.errors import CheckpointError, PackingError
from quantlib.grouping import by_group
from quantlib.packing.awq_format import CODES_PER_WORD, require_gemm, unpack_interleaved

_ROLES = {"codes": ".qweight", "zeros": ".qzeros", "scales": ".scales"}


def find(quantization: Mapping[str, Any], stored: Mapping[str, TensorEntry], read: ReadStored) -> Found:  # noqa: ARG001 - one form
    """Every linear that has a ``qweight``; see `quantlib.checkpoint.decoders.contracts.FindDecoded`."""
    try:
        require_gemm(quantization)
    except PackingError as error:
        raise CheckpointError(f"{error}; give the original checkpoint") from error
    linears = {name.removesuffix(end) for end in _ROLES.values() for name in stored if name.endswith(end)}
    return Found(decoded={f"{linear}.weight": _decoded(linear, stored) for linear in sorted(linears)})


def _decoded(linear: str, stored: Mapping[str, TensorEntry]) -> DecodedTensor:
    parts = {role: stored[linear + end] for role, end in _ROLES.items() if linear + end in stored}
    if len(parts) < len(_ROLES):
        raise CheckpointError(
            f"{linear} has {' and '.join(parts)} of an awq linear, which is made of {', '.join(_ROLES)};"
            " complete the checkpoint, or give the original one",
            linear=linear,
        )
    codes, zeros, scales = (parts[role] for role in _ROLES)
    are_matrices = all(len(entry.shape) == 2 for entry in (codes, zeros, scales))
    if not are_matrices or codes.dtype != "I32" or zeros.dtype != "I32" or not _fit(codes, zeros, scales):
        found = ", ".join(f"{role} {entry.dtype} {list(entry.shape)}" for role, entry in parts.items())
        raise CheckpointError(
            f"{linear}: {found} do not fit each other as codes of 4 bits in I32 words;"
            " the checkpoint is damaged or of another layout",
            linear=linear,
        )
    return DecodedTensor(shape=(scales.shape[1], codes.shape[0]), parts=parts, make_rows=_make_rows)


def _fit(codes: TensorEntry, zeros: TensorEntry, scales: TensorEntry) -> bool:
    (columns, words), groups = codes.shape, zeros.shape[0]
    return (
        zeros.shape == (groups, words)
        and scales.shape == (groups, words * CODES_PER_WORD)
        and min(columns, words, groups) > 0
        and columns % groups == 0
    )


def _make_rows(parts: Mapping[str, torch.Tensor], start: int, end: int) -> torch.Tensor:
    words = slice(start // CODES_PER_WORD, end // CODES_PER_WORD)
    zero_RG = unpack_interleaved(parts["zeros"][:, words]).float()
    level_RC = unpack_interleaved(parts["codes"][:, words]).float()
    groups = zero_RG.shape[1]
    level_RGS = by_group(level_RC, level_RC.shape[1] // groups)
    scale_RG = parts["scales"][:, start:end].float().transpose(0, 1)
    level_RGS.sub_(zero_RG[..., None]).mul_(scale_RG[..., None])
    return level_RC
