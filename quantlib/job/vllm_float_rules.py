"""What vLLM rejects of small floats, read in the source of release 0.33.0, as `quantlib.job.vllm_rules`.

Linears of every scheme are taken, but for FP8 by blocks whose inputs stay as they are. It rounds inputs where
a GPU multiplies in few bits and leaves them where it does not: FP8 before Ada, MXFP4 before Blackwell. Inputs
of MXFP4A16 and MXFP8A16 are rounded on Blackwell, too, as if the file asked for it.

Not read: which shapes single kernels of FlashInfer and DeepGEMM want of experts.
"""

from collections.abc import Iterator

from quantlib.grids.formats import DIVIDED_SCALES, FLOAT_FORMATS, POWER_SCALES
from quantlib.job.parallel_splits import HEADS, IN, OUT
from quantlib.job.serving import EngineRule, Fault, ServedLinear, Serving, of_linears
from quantlib.job.vllm_rules import COMPRESSED_TENSORS, RELEASE
from quantlib.schemes import WHOLE_TENSOR

# Marlin and Humming read codes of 8 bits in words.
_CODES_OF_WORD = 4
# Of the scales of MXFP4 experts, in rows and columns of weights.
_TILE = 128
_KEYS_OR_VALUES = ("k_proj", "v_proj")
_FUSED_HEADS = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
_FUSED_GATE_UP = "gate_up_proj"
# What stands before others in the matrix that is made of them, and what has as many rows.
_BEFORE_OTHERS = ("q_proj", "k_proj", "q_a_proj", "gate_proj", "up_proj", "w1", "w3")


def _is_fp8(linear: ServedLinear) -> bool:
    return linear.scheme.number == "e4m3" and linear.scheme.scales != POWER_SCALES


def _block_with_inputs(linear: ServedLinear, _devices: int) -> str | None:
    is_alone = linear.scheme.block_rows > 1 and linear.scheme.inputs is None
    return str(linear.scheme) if is_alone and not linear.is_expert else None


def _rounding_expert(linear: ServedLinear, _devices: int) -> str | None:
    good = linear.scheme.inputs is not None and linear.scheme.group_size != WHOLE_TENSOR
    return None if good or not linear.is_expert or not _is_fp8(linear) else str(linear.scheme)


def _fp8_words(linear: ServedLinear, devices: int) -> str | None:
    if not _is_fp8(linear) or linear.scheme.inputs is not None:
        return None
    each, rest = divmod(linear.columns, devices if linear.split == IN else 1)
    return None if rest or each % _CODES_OF_WORD == 0 else f"{each} in features on a device"


def _tiled_experts(linear: ServedLinear, devices: int) -> str | None:
    is_mxfp4 = linear.scheme.number == "e2m1" and linear.scheme.scales == POWER_SCALES
    if not is_mxfp4 or not linear.is_expert:
        return None
    # Gate and up are one above the other.
    rows = 2 * linear.rows // devices if linear.split == OUT else linear.rows
    columns = linear.columns // devices if linear.split == IN else linear.columns
    return None if rows % _TILE == columns % _TILE == 0 else f"{rows} x {columns} on a device"


def _half_precision(serving: Serving) -> Iterator[Fault]:
    if serving.dtype != "float16":
        return
    for linear in serving.linears:
        if linear.scheme.scales == DIVIDED_SCALES:
            yield linear, f"a model of {serving.dtype} in {linear.scheme}"


def _whole_blocks(serving: Serving) -> Iterator[Fault]:
    for linear in serving.linears:
        height = linear.scheme.block_rows
        if linear.scheme.number not in FLOAT_FORMATS or height == 1:
            continue
        broken = next((rows for rows in _rows_that_end_in_blocks(linear, serving) if rows % height), None)
        if broken is not None:
            yield linear, f"{broken} out features on a device in blocks of {height}"


def _rows_that_end_in_blocks(linear: ServedLinear, serving: Serving) -> tuple[int, ...]:
    """Rows on one device of every matrix that another one follows, or of which each device has a part."""
    devices, name = serving.tensor_parallel, linear.name.rpartition(".")[2]
    parts = _rows_of_parts(linear, name, serving)
    is_gate_or_up = linear.is_expert and linear.split == OUT
    if is_gate_or_up or (devices > 1 and linear.split in (OUT, HEADS)):
        return parts
    return parts if name in _BEFORE_OTHERS else parts[:-1]


def _rows_of_parts(linear: ServedLinear, name: str, serving: Serving) -> tuple[int, ...]:
    devices, heads, kv_heads = serving.tensor_parallel, serving.heads, serving.kv_heads
    # Where there are fewer of them than devices, each is on several.
    kv_devices = min(devices, kv_heads or devices)
    if name in _FUSED_HEADS and heads and kv_heads:
        size = linear.rows // (heads + 2 * kv_heads)
        keys = kv_heads * size // kv_devices
        return heads * size // devices, keys, keys
    if name == _FUSED_GATE_UP:
        return (linear.rows // 2 // devices,) * 2
    if linear.split == HEADS:
        return (linear.rows // (kv_devices if name in _KEYS_OR_VALUES else devices),)
    return (linear.rows // devices if linear.split == OUT else linear.rows,)


RULES = (
    EngineRule(
        wanted="FP8 by blocks with rounded inputs; by row or weight with or without",
        source=f"{RELEASE}, {COMPRESSED_TENSORS}/schemes/compressed_tensors_w8a16_fp8.py,"
        " process_weights_after_loading, where `is_static_input_scheme` is None",
        faults=of_linears(_block_with_inputs),
    ),
    EngineRule(
        wanted="routed experts in FP8 with rounded inputs, by row or block",
        source=f"{RELEASE}, {COMPRESSED_TENSORS}/compressed_tensors_moe/compressed_tensors_moe.py,"
        " get_moe_method, and compressed_tensors_moe_w8a8_fp8.py",
        faults=of_linears(_rounding_expert),
    ),
    EngineRule(
        wanted="in features of FP8 in multiples of 4 on every device, where inputs stay as they are",
        source=f"{RELEASE}, model_executor/layers/quantization/utils/marlin_utils_fp8.py, pack_fp8_to_int32,"
        " and utils/humming/linear.py",
        faults=of_linears(_fp8_words),
    ),
    EngineRule(
        wanted="whole blocks of rows on every device, and where another matrix follows in the same one",
        source=f"{RELEASE}, model_executor/layers/quantization/utils/fp8_utils.py, validate_fp8_block_shape"
        " and validate_fp8_block_shape_moe",
        faults=_whole_blocks,
    ),
    EngineRule(
        wanted=f"routed experts in MXFP4 whose sides are multiples of {_TILE} on every device, as Blackwell's"
        " kernel wants them",
        source=f"{RELEASE}, {COMPRESSED_TENSORS}/compressed_tensors_moe/compressed_tensors_moe_w4a4_mxfp4.py,"
        " process_weights_after_loading",
        faults=of_linears(_tiled_experts),
    ),
    EngineRule(
        wanted="NVFP4 in models of bfloat16, as Blackwell's kernel wants them",
        source=f"{RELEASE}, model_executor/kernels/linear/nvfp4/flashinfer.py,"
        " FlashInferCuteDslNvFp4W4A16LinearKernel",
        faults=_half_precision,
    ),
)
