"""The GPTQ layout as any tool writes it: 2, 3, 4 or 8 bits, columns in groups of any order.

R out features, C in features, G groups. ``qweight`` int32 [C * b / 32, R], ``qzeros`` int32 [G, R * b / 32],
``scales`` [G, R], ``g_idx`` int32 [C], the group of each column; without it groups are consecutive. The
shapes tell the bits. `quantlib.packing.gptq_format` tells of the conventions for zero points.

``checkpoint_format: "gptq"`` stores zero - 1. One is added to whole words here, as GPTQModel does, with which
transformers reads: a zero of 0 was stored as a borrow from the field above. At 3 bits, where fields cross
words, one is added to each field. Symmetric weights have the middle as their zero, whatever convention
the config states: tools that state the wrong one exist.

Left out: bit planes (``gptq_p``), Marlin and other orders made for one kernel, words that are not int32.

Source: GPTQModel 7.7, gptqmodel/nn_modules/qlinear/__init__.py and utils/model.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from quantlib.checkpoint.decoded import DecodedTensor
from quantlib.checkpoint.decoders.contracts import Found, ReadStored
from quantlib.checkpoint.decoders.scale_grid import groups_of_columns
from quantlib.checkpoint.header import TensorEntry
from quantlib.errors import CheckpointError
from quantlib.packing.bits import BITS_PER_WORD, transposed, unpack_words
from quantlib.packing.gptq_format import WIDTHS

_V1, _V2 = "gptq", "gptq_v2"
_CODES = ".qweight"
_ROLES = {"codes": _CODES, "zeros": ".qzeros", "scales": ".scales", "g_idx": ".g_idx"}


def find(quantization: Mapping[str, Any], stored: Mapping[str, TensorEntry], read: ReadStored) -> Found:  # noqa: ARG001 - one form
    """Every linear that has a ``qweight``; see `quantlib.checkpoint.decoders.contracts.FindDecoded`."""
    convention = quantization.get("checkpoint_format") or quantization.get("format") or _V1
    words = quantization.get("pack_dtype", "int32")
    if convention not in (_V1, _V2) or words != "int32":
        raise CheckpointError(
            f"gptq sources with checkpoint_format {_V1} or {_V2} in int32 words are read, found"
            f" {convention!r} in {words!r}; give the original checkpoint"
        )
    is_symmetric = quantization.get("sym", True) is not False
    linears = [name.removesuffix(_CODES) for name in stored if name.endswith(_CODES)]
    return Found(
        decoded={
            f"{linear}.weight": _decoded(linear, stored, is_symmetric, convention == _V1)
            for linear in linears
        }
    )


def _decoded(
    linear: str, stored: Mapping[str, TensorEntry], is_symmetric: bool, is_shifted: bool
) -> DecodedTensor:
    parts = {role: stored[linear + end] for role, end in _ROLES.items() if linear + end in stored}
    if "zeros" not in parts or "scales" not in parts:
        raise CheckpointError(
            f"{linear}{_CODES} is there, its qzeros or scales are not; complete the checkpoint", linear=linear
        )
    words, rows = parts["codes"].shape
    groups, zero_words = parts["zeros"].shape
    bits = zero_words * BITS_PER_WORD // max(1, rows)
    columns = words * BITS_PER_WORD // bits if bits in WIDTHS else 0
    fits = columns and parts["scales"].shape == (groups, rows)
    if not fits or ("g_idx" in parts and parts["g_idx"].shape != (columns,)):
        shapes = ", ".join(f"{role} {list(entry.shape)}" for role, entry in parts.items())
        raise CheckpointError(
            f"{linear}: {shapes} do not fit each other as codes of {', '.join(map(str, WIDTHS))} bits;"
            " the checkpoint is damaged or of another layout",
            linear=linear,
        )
    return DecodedTensor(
        shape=(rows, columns),
        parts=parts,
        make_rows=partial(_make_rows, linear, bits, is_symmetric, is_shifted),
    )


def _make_rows(
    linear: str,
    bits: int,
    is_symmetric: bool,
    is_shifted: bool,
    parts: Mapping[str, torch.Tensor],
    start: int,
    end: int,
) -> torch.Tensor:
    columns = parts["codes"].shape[0] * BITS_PER_WORD // bits
    groups = parts["scales"].shape[0]
    codes_CR = unpack_words(parts["codes"][:, start:end], bits=bits, dim=0, length=columns)
    words = parts["zeros"][:, start * bits // BITS_PER_WORD : end * bits // BITS_PER_WORD]
    zero_GR = _zeros(linear, words, bits, end - start, is_symmetric, is_shifted)
    group_C = torch.arange(columns) // -(-columns // groups)
    if "g_idx" in parts:
        group_C = groups_of_columns(parts["g_idx"], groups, linear)
    scale_GR = parts["scales"][:, start:end].float()
    return transposed((codes_CR.float() - zero_GR[group_C]) * scale_GR[group_C])


def _zeros(
    linear: str, words: torch.Tensor, bits: int, rows: int, is_symmetric: bool, is_shifted: bool
) -> torch.Tensor:
    """Zero points [G, R], fp32."""
    stored = unpack_words(words, bits=bits, dim=1, length=rows)
    middle = 1 << bits - 1
    if is_symmetric:
        if not bool(((stored == middle) | (stored == middle - 1)).all()):
            raise CheckpointError(
                f"{linear}: the config says sym, but there are zero points other than {middle};"
                " correct quantization_config",
                linear=linear,
            )
        return torch.full(stored.shape, float(middle))
    if not is_shifted:
        return stored.float()
    if BITS_PER_WORD % bits:
        return ((stored + 1) & (1 << bits) - 1).float()
    ones = sum(1 << shift for shift in range(0, BITS_PER_WORD, bits))
    raised = (words.long() + ones) & 0xFFFF_FFFF
    return unpack_words(raised.to(torch.uint32).view(torch.int32), bits=bits, dim=1, length=rows).float()
