"""Rows of 8 bits as LLM.int8 of bitsandbytes stores them.

Per linear (R out features, C in features): ``weight`` int8 [R, C], codes less 128; ``SCB`` fp32 [R], 127
times the scale; ``weight_format`` uint8 [], 0 for codes that lie row by row. The level of a code is
``weight * SCB / 127``. A scale has 8 significant bits (bf16), so that SCB holds it exactly.

Left out: how activations are quantized and which of their columns are not, which readers do as they run; and
the layouts of older GPUs, which have another ``weight_format``.

Source: bitsandbytes 0.50.2, nn/modules.py (``Linear8bitLt``) and functional.py
(``int8_vectorwise_dequant``).
"""

from collections.abc import Mapping

import torch

from quantlib.errors import PackingError
from quantlib.packing.checks import require_consistent, require_shape, take_tensor
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WHOLE_ROW, WeightScheme

ROWS = WeightScheme(bits=8, is_symmetric=True, group_size=WHOLE_ROW)
SCALE_DTYPE = torch.bfloat16
_REACH = 127.0
# The highest bit: with it turned, an unsigned code is itself less 128.
_SIGN = 0x80


def pack_int8(name: str, quantized: QuantizedLinear) -> dict[str, torch.Tensor]:
    """The three tensors of a linear.

    Raises:
        PackingError: Its parts contradict each other, or 127 times a scale is no finite number.
    """
    require_consistent(name, quantized, (SCALE_DTYPE,))
    codes_RC = quantized.codes_RC
    scb_R = quantized.scale_RG[:, 0].float() * _REACH
    if not scb_R.is_meta and not bool(scb_R.isfinite().all()):
        raise PackingError(
            f"{name}: 127 times a scale is infinite in fp32, as SCB would hold it", linear=name
        )
    return {
        f"{name}.weight": (codes_RC ^ _SIGN).contiguous().view(torch.int8),
        f"{name}.SCB": scb_R,
        f"{name}.weight_format": torch.zeros((), dtype=torch.uint8, device=codes_RC.device),
    }


def packed_names_int8(name: str) -> tuple[str, ...]:
    """Full names of the tensors `pack_int8` makes; all of them always exist."""
    return (f"{name}.weight", f"{name}.SCB", f"{name}.weight_format")


def unpack_int8(name: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedLinear:
    """The linear that was packed.

    Raises:
        PackingError: A tensor is missing or of another dtype, shape or layout, or an SCB is not 127 times a
            bf16 number, as those of other tools are.
    """
    weight_RC = take_tensor(tensors, f"{name}.weight", torch.int8)
    scb_R = take_tensor(tensors, f"{name}.SCB", torch.float32)
    layout = take_tensor(tensors, f"{name}.weight_format", torch.uint8)
    if weight_RC.dim() != 2:
        raise PackingError(
            f"tensor {name}.weight must be a matrix, got {tuple(weight_RC.shape)}", tensor=f"{name}.weight"
        )
    require_shape(f"{name}.SCB", scb_R, (len(weight_RC),))
    require_shape(f"{name}.weight_format", layout, ())
    if layout.item() != 0:
        raise PackingError(
            f"tensor {name}.weight_format must be 0 (row by row), got {layout.item()}",
            tensor=f"{name}.weight_format",
        )
    scale_R = (scb_R / _REACH).to(SCALE_DTYPE)
    if not torch.equal(scale_R.float() * _REACH, scb_R):
        raise PackingError(
            f"tensor {name}.SCB must be 127 times bf16 numbers, as it is in files of this tool",
            tensor=f"{name}.SCB",
        )
    return QuantizedLinear(
        codes_RC=weight_RC.contiguous().view(torch.uint8) ^ _SIGN,
        scale_RG=scale_R[:, None].contiguous(),
        zero_RG=None,
        scheme=ROWS,
    )
