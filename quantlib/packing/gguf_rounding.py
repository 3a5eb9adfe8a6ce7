"""Rounds a matrix to Q8_0 as llama.cpp itself does: bytes equal those of its own tools.

R rows, C columns, G groups of S = 32 columns. The step of a group is its largest magnitude over 127, in fp32;
codes are values times the inverse of the step, rounded half away from zero, and the step is rounded to fp16
only then. Groups of zeros, and of what is less than 4e-6, have the scale 0. What is solved has codes for the
scale that is stored instead; this is for embeddings and heads.

Source: ggml-quants.c of llama.cpp (quantize_row_q8_0_ref).
"""

import torch

from quantlib.errors import PackingError
from quantlib.packing import gguf_format
from quantlib.schemes import GGUF_GROUP_SIZE, WeightScheme

SCHEME = WeightScheme(bits=8, is_symmetric=True, group_size=GGUF_GROUP_SIZE)
_LARGEST_CODE = 127
# 16 MiB in fp32.
_RUN_VALUES = 4 << 20


def round_to_q8_0(name: str, weight_RC: torch.Tensor) -> torch.Tensor:
    """Blocks of a matrix, uint8 [R, C / 32 * 34].

    Args:
        name: Full module name.
        weight_RC: floating [R, C], on the CPU.

    Raises:
        PackingError: Columns fill no whole blocks, or a value is not finite or too large for a scale in fp16.

    Cost: beside the blocks a few buffers of 16 MiB.
    """
    rows, columns = weight_RC.shape
    gguf_format.check(name, rows, columns, SCHEME)
    size = gguf_format.block_bytes(SCHEME)
    blocks = torch.empty(rows, columns // GGUF_GROUP_SIZE * size, dtype=torch.uint8)
    for part in _runs(rows, columns):
        blocks[part] = _blocks(name, weight_RC[part].float())
    return blocks


def levels_of_q8_0(
    name: str, blocks: torch.Tensor, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What blocks mean, [R, C]: worked out in fp32 and rounded once, to a dtype.

    Raises:
        PackingError: They are no whole blocks.

    Cost: beside the levels a few buffers of 16 MiB.
    """
    rows = len(blocks)
    columns = blocks.shape[1] // gguf_format.block_bytes(SCHEME) * GGUF_GROUP_SIZE
    levels_RC = torch.empty(rows, columns, dtype=dtype, device=device)
    for part in _runs(rows, columns):
        quantized = gguf_format.unpack(name, {f"{name}{gguf_format.SUFFIX}": blocks[part]}, SCHEME)
        levels_RC[part] = quantized.dequantize().to(dtype)
    return levels_RC


def _runs(rows: int, columns: int) -> list[slice]:
    step = max(1, _RUN_VALUES // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _blocks(name: str, value_RC: torch.Tensor) -> torch.Tensor:
    value_RGS = value_RC.unflatten(1, (-1, GGUF_GROUP_SIZE))
    step_RG1 = value_RGS.abs().amax(dim=2, keepdim=True) / _LARGEST_CODE
    scale_RG1 = step_RG1.half()
    if not bool(torch.isfinite(scale_RG1).all()):
        raise PackingError(
            f"{name}: a value is not finite, or too large for a scale of Q8_0 (fp16); use embeddings keep",
            linear=name,
        )
    inverse_RG1 = 1 / step_RG1
    # Of zeros, and of values so small that their scale is 0 in any case.
    scaled_RGS = value_RGS * torch.where(inverse_RG1.isinf(), 0, inverse_RG1)
    size_RGS = scaled_RGS.abs()
    whole_RGS = size_RGS.floor()
    # Not floor(x + 0.5): that sum is rounded itself, and up for the largest fp32 below a half.
    whole_RGS += size_RGS - whole_RGS >= 0.5
    codes_RGS = (scaled_RGS.sign() * whole_RGS).to(torch.int8)
    return torch.cat((scale_RG1.view(torch.uint8), codes_RGS.view(torch.uint8)), dim=2).flatten(1)
