"""What vLLM rejects of outputs, read in the source of release 0.33.0; files are those below ``vllm/``.

On NVIDIA GPUs; W8A8 on those before Blackwell, where CUTLASS stops it ("Int8 not supported", its
scaled_mm_helper.hpp). Kernels pad tiles, so what a device has of a side need be no multiple of 64 or 128.
Earlier releases reject more: 0.19 asymmetric experts, for example, and those before the middle of 2026 such
sides.
"""

from collections.abc import Iterator

from quantlib.grids.formats import INTEGER
from quantlib.job.parallel_splits import IN, OUT
from quantlib.job.serving import EngineRule, Fault, ServedLinear, Serving, of_linears
from quantlib.schemes import WHOLE_ROW, WHOLE_TENSOR

RELEASE = "vLLM 0.33.0"
FORMATS = ("compressed-tensors", "gptq", "awq")
COMPRESSED_TENSORS = "model_executor/layers/quantization/compressed_tensors"
_GPTQ_BITS = (4, 8)
_GPTQ_GROUP_SIZES = (WHOLE_ROW, 32, 64, 128)
_SMALLEST_HALVED_GROUP = 32
_BITS_OF_WORD = 32
_AWQ_BITS, _AWQ_CODES_OF_WORD = 4, 8


def _gptq_scheme(linear: ServedLinear, _devices: int) -> str | None:
    good = linear.scheme.is_symmetric and linear.scheme.bits in _GPTQ_BITS
    return None if good else str(linear.scheme)


def _gptq_group_size(linear: ServedLinear, _devices: int) -> str | None:
    # Experts of other group sizes go to another method, which takes them.
    good = linear.is_expert or linear.scheme.group_size in _GPTQ_GROUP_SIZES
    return None if good else str(linear.scheme)


def _awq_bits(linear: ServedLinear, _devices: int) -> str | None:
    return None if linear.scheme.bits == _AWQ_BITS else str(linear.scheme)


def _grouped_expert(linear: ServedLinear, _devices: int) -> str | None:
    # Beside rounded inputs Triton's kernel takes a row: fused_moe/experts/triton_moe.py.
    is_row = _is_integer_alone(linear) and linear.scheme.group_size == WHOLE_ROW
    return str(linear.scheme) if linear.is_expert and is_row else None


def _is_integer_alone(linear: ServedLinear) -> bool:
    return linear.scheme.number == INTEGER and linear.scheme.inputs is None


def _integer_by_group(linear: ServedLinear, _devices: int) -> str | None:
    is_whole = linear.scheme.number == INTEGER and linear.scheme.group_size == WHOLE_TENSOR
    return str(linear.scheme) if is_whole else None


def _no_reader(serving: Serving) -> Iterator[Fault]:
    if serving.format not in FORMATS:
        for linear in serving.linears:
            yield linear, f"{serving.format} files"


def _even_side(linear: ServedLinear, devices: int) -> str | None:
    if linear.split == OUT and linear.rows % devices:
        return f"{linear.rows} out features over {devices} devices"
    if linear.split == IN and linear.columns % devices:
        return f"{linear.columns} in features over {devices} devices"
    return None


def _heads(serving: Serving) -> list[Fault]:
    devices, heads, kv_heads = serving.tensor_parallel, serving.heads, serving.kv_heads
    if heads is not None and heads % devices:
        return [(None, f"{heads} attention heads over {devices} devices")]
    if kv_heads and max(kv_heads, devices) % min(kv_heads, devices):
        return [(None, f"{kv_heads} heads of keys and values over {devices} devices")]
    return []


def _whole_groups(linear: ServedLinear, devices: int) -> str | None:
    return _straddling(linear, devices, linear.scheme.group_size)


def _whole_gptq_groups(linear: ServedLinear, devices: int) -> str | None:
    group_size = linear.scheme.group_size
    # Groups of experts that straddle are halved as they are loaded: both halves get the one scale.
    while linear.is_expert and group_size >= 2 * _SMALLEST_HALVED_GROUP and group_size % 2 == 0:
        if _straddling(linear, devices, group_size) is None:
            return None
        group_size //= 2
    return _straddling(linear, devices, group_size)


def _whole_awq_groups(linear: ServedLinear, devices: int) -> str | None:
    if linear.is_expert:
        return _whole_gptq_groups(linear, devices)
    # A row is taken to have as many columns as the whole matrix: on a device there would be less than one.
    if linear.scheme.group_size == WHOLE_ROW and linear.split == IN and devices > 1:
        return f"{linear.columns} in features over {devices} devices with one scale a row"
    return _whole_groups(linear, devices)


def _straddling(linear: ServedLinear, devices: int, group_size: int) -> str | None:
    each, rest = divmod(linear.columns, devices)
    # Sides that do not go evenly over the devices are another rule's.
    if linear.split != IN or group_size in (WHOLE_ROW, WHOLE_TENSOR) or rest or each % group_size == 0:
        return None
    return (
        f"{linear.columns} in features over {devices} devices, {each} each, in groups of"
        f" {linear.scheme.group_size}"
    )


def _whole_words(linear: ServedLinear, devices: int) -> str | None:
    if not _is_integer_alone(linear):
        # A byte a code, or two codes a byte in whole groups.
        return None
    if linear.split == IN and linear.columns % devices == 0:
        side, size = "in", linear.columns // devices
    elif linear.split == OUT and linear.rows % devices == 0 and not linear.scheme.is_symmetric:
        side, size = "out", linear.rows // devices
    else:
        return None
    bits = linear.scheme.bits
    if devices == 1 or size * bits % _BITS_OF_WORD == 0:
        return None
    return f"{size} {side} features of {bits} bits on each of {devices} devices"


def _whole_awq_words(linear: ServedLinear, devices: int) -> str | None:
    """Codes and zero points alike are packed along the out features."""
    each, rest = divmod(linear.rows, devices)
    if linear.split != OUT or rest or each % _AWQ_CODES_OF_WORD == 0:
        return None
    return f"{each} out features on each of {devices} devices"


RULES = (
    EngineRule(
        wanted=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} files",
        source=f"{RELEASE}, model_executor/layers/quantization/__init__.py, QuantizationMethods",
        faults=_no_reader,
        spares_kept=False,
    ),
    EngineRule(
        wanted="integers by group or row",
        source=f"{RELEASE}, {COMPRESSED_TENSORS}/compressed_tensors.py, _is_wNa16_group_channel",
        faults=of_linears(_integer_by_group, formats=("compressed-tensors",)),
    ),
    EngineRule(
        wanted="gptq files with symmetric 4 or 8 bits",
        source=f"{RELEASE}, model_executor/layers/quantization/auto_gptq.py, TYPE_MAP",
        faults=of_linears(_gptq_scheme, formats=("gptq",)),
    ),
    EngineRule(
        wanted="gptq files with groups of 32, 64 or 128 or one scale a row",
        source=f"{RELEASE}, model_executor/layers/quantization/utils/marlin_utils.py,"
        " verify_marlin_supported",
        faults=of_linears(_gptq_group_size, formats=("gptq",)),
    ),
    EngineRule(
        wanted="awq files with 4 bits",
        source=f"{RELEASE}, model_executor/layers/quantization/auto_awq.py, TYPE_MAP",
        faults=of_linears(_awq_bits, formats=("awq",)),
    ),
    EngineRule(
        wanted="routed experts with groups, not one scale a row",
        source=f"{RELEASE}, model_executor/layers/quantization/auto_awq.py, AutoAWQMoEMethod, which counts"
        " groups by their size",
        faults=of_linears(_grouped_expert, formats=("awq",)),
    ),
    # A row of experts is taken by Marlin alone, and on Hopper another kernel comes first.
    EngineRule(
        wanted="routed experts of integers with groups, not one scale a row, where inputs stay as they are",
        source=f"{RELEASE}, model_executor/layers/quantization/compressed_tensors/compressed_tensors_moe/"
        "compressed_tensors_moe_wna16.py, and utils/humming/priority.py",
        faults=of_linears(_grouped_expert, formats=("compressed-tensors",)),
    ),
    EngineRule(
        wanted="attention heads, and those of keys and values, that go evenly over the devices",
        source=f"{RELEASE}, config/model.py, verify_with_parallel_config, and"
        " model_executor/layers/linear.py, QKVParallelLinear",
        faults=_heads,
        spares_kept=False,
    ),
    EngineRule(
        wanted="sides that go evenly over the devices",
        source=f"{RELEASE}, model_executor/layers/linear.py and fused_moe/config.py",
        faults=of_linears(_even_side),
        spares_kept=False,
    ),
    EngineRule(
        wanted="whole groups on every device",
        source=f"{RELEASE}, distributed/utils.py, verify_group_size_divides_partition, of floats"
        " model_executor/parameter.py, RowvLLMParameter, and of experts"
        f" {COMPRESSED_TENSORS}/compressed_tensors_moe",
        faults=of_linears(_whole_groups, formats=("compressed-tensors",)),
    ),
    EngineRule(
        wanted="whole groups on every device",
        source=f"{RELEASE}, model_executor/kernels/linear/mixed_precision/marlin.py, and of experts"
        " model_executor/layers/quantization/moe_wna16.py, which halves groups down to 32",
        faults=of_linears(_whole_gptq_groups, formats=("gptq",)),
    ),
    EngineRule(
        wanted="whole groups on every device, and whole rows only where in features are not split",
        source=f"{RELEASE}, model_executor/layers/quantization/auto_awq.py, create_weights, and of experts"
        " model_executor/layers/quantization/moe_wna16.py, which halves groups down to 32",
        faults=of_linears(_whole_awq_groups, formats=("awq",)),
    ),
    EngineRule(
        wanted="whole 32-bit words of packed codes and zero points on every device",
        source=f"{RELEASE}, model_executor/parameter.py, _adjust_shard_indexes_for_packing",
        faults=of_linears(_whole_words, formats=("compressed-tensors", "gptq")),
    ),
    EngineRule(
        wanted="out features in multiples of 8 on every device",
        source=f"{RELEASE}, model_executor/layers/quantization/auto_awq.py, create_weights",
        faults=of_linears(_whole_awq_words, formats=("awq",)),
    ),
)
