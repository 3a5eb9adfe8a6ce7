"""The layouts of compressed-tensors, read by vLLM, SGLang and transformers.

Floats are in `compressed_floats`, integers beside rounded inputs in `compressed_int8`. Of other integers this
is ``pack-quantized``. Per linear (R out features, C in features, G groups along C, b bits, int32 words):
``weight_packed`` int32 [R, ceil(C*b/32)], codes packed along the in features; ``weight_scale`` [R, G] in the
model's dtype; ``weight_shape`` int64 [2] = (R, C); for asymmetric schemes ``weight_zero_point`` int32
[ceil(R*b/32), G], packed along the out features. A symmetric linear has no zero points: vLLM refuses them.
Codes and zero points are unsigned. The level of a code is ``weight_scale * (code - zero)``. With one scale
for the whole weight ``weight_scale`` is [1], and the zero point int8 [1], less 2**(b - 1).

3, 5 and 6 bits: codes cross words and nothing is left empty, as compressed-tensors and vLLM have it since
June 2026. Before, no code crossed a word (10 codes of 3 bits in one). ``weight_packed`` then has another
width for every row of more than 150 columns (90 at 5 bits, 75 at 6), so that either side refuses the other's
file by its shape instead of misreading it.

Left out: 7 bits; ``weight_g_idx``; ragged last groups, which compressed-tensors and vLLM refuse;
and biases, which are copied like any other tensor.

Source: compressed-tensors 0.20.0, compressors/pack_quantized and quantization/{quant_args,quant_config}.py;
utils/match.py (how targets and ignore are matched). The package itself is not needed to write or read.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantlib.errors import PackingError
from quantlib.grids.formats import CODEBOOKS, INTEGER
from quantlib.packing import compressed_int8
from quantlib.packing.bits import PACKED_BITS, num_words, pack_words, unpack_words
from quantlib.packing.checks import (
    quantized_linears,
    require_consistent,
    require_shape,
    require_whole_groups,
    take_tensor,
)
from quantlib.packing.compressed_floats import (
    layout_of,
    pack_floats,
    scheme_from_values,
    unpack_floats,
    weights_values,
)
from quantlib.packing.compressed_inputs import inputs_from_values, inputs_values
from quantlib.packing.compressed_int8 import pack_int8, scheme_of_int8, unpack_int8
from quantlib.packing.shared_scales import for_every_row, stored_once, stored_shape
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import ROUNDED_INPUTS_NAMES, WHOLE_ROW, WHOLE_TENSOR, ActivationScheme, WeightScheme

NAME = "compressed-tensors"
FORMAT_VERSION = "pack-quantized 1"
WIDTHS = PACKED_BITS
# The release whose config schema and layout are followed; readers record it and do not compare it.
_UPSTREAM_VERSION = "0.20.0"
_LAYOUT = "pack-quantized"
_SEVERAL_LAYOUTS = "mixed-precision"
_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """The model's own dtype.

    Raises:
        PackingError: It is none that readers take for scales.
    """
    if model_dtype not in _SCALE_DTYPES:
        raise PackingError(f"compressed-tensors scales are bf16, fp16 or fp32; the model is {model_dtype}")
    return model_dtype


def check(name: str, rows: int, columns: int, scheme: WeightScheme) -> None:  # noqa: ARG001 - one form
    """Refuse what the layout cannot hold; any number of rows and, without groups, of columns fits.

    Raises:
        PackingError: Bits, group size, or rounded inputs beside other weights than those of a named scheme.
    """
    if scheme.number in CODEBOOKS:
        raise PackingError(
            f"{name}: {NAME} output has no layout for {scheme}; use --format bitsandbytes", linear=name
        )
    if scheme.inputs is not None and _layout_name(scheme) == _LAYOUT:
        raise PackingError(
            f"{name}: {NAME} output rounds inputs beside weights of {', '.join(ROUNDED_INPUTS_NAMES)}, not of"
            f" {scheme}; choose one of these",
            linear=name,
        )
    if scheme.inputs is not None and scheme.inputs.group_size > 0 and columns % scheme.inputs.group_size:
        raise PackingError(
            f"{name}: inputs rounded in groups of {scheme.inputs.group_size} need whole groups, found"
            f" {columns} columns; keep this linear as it is, or choose another scheme for it",
            linear=name,
            columns=columns,
        )
    if scheme.block_rows == 1 and scheme.group_size != WHOLE_TENSOR:
        require_whole_groups(name, columns, scheme, format_name=NAME, widths=WIDTHS)


def pack(name: str, quantized: QuantizedLinear) -> dict[str, torch.Tensor]:
    """The tensors of a linear, on the device of its codes: two, or three or four of packed integers.

    Raises:
        PackingError: `check` refuses it, or its parts contradict each other.
    """
    bits = quantized.scheme.bits
    codes_RC, zero_RG = quantized.codes_RC, quantized.zero_RG
    rows, columns = codes_RC.shape
    check(name, rows, columns, quantized.scheme)
    require_consistent(name, quantized, _SCALE_DTYPES)
    if quantized.scheme == compressed_int8.SCHEME:
        return pack_int8(name, quantized)
    layout = layout_of(quantized.scheme)
    if layout is not None:
        return pack_floats(name, quantized, layout)
    tensors = {
        f"{name}.weight_packed": pack_words(codes_RC, bits=bits, dim=1),
        f"{name}.weight_scale": stored_once(name, quantized.scale_RG, quantized.scheme),
        f"{name}.weight_shape": torch.tensor([rows, columns], dtype=torch.int64, device=codes_RC.device),
    }
    if zero_RG is not None and quantized.scheme.group_size == WHOLE_TENSOR:
        zero = stored_once(name, zero_RG, quantized.scheme).to(torch.int16) - quantized.scheme.middle_code
        tensors[f"{name}.weight_zero_point"] = zero.to(torch.int8)
    elif zero_RG is not None:
        tensors[f"{name}.weight_zero_point"] = pack_words(zero_RG, bits=bits, dim=0)
    return tensors


def packed_names(name: str) -> tuple[str, ...]:
    """Full names of the tensors `pack` may make; ``weight`` is that of codes that are not packed."""
    endings = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_global_scale",
        "weight",
    )
    return tuple(f"{name}.{ending}" for ending in endings)


def unpack(name: str, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme) -> QuantizedLinear:
    """The linear that was packed.

    Raises:
        PackingError: A tensor is missing or has another shape than ``weight_shape`` and the scheme give.
    """
    if scheme == compressed_int8.SCHEME:
        return unpack_int8(name, tensors)
    layout = layout_of(scheme)
    if layout is not None:
        quantized = unpack_floats(name, tensors, layout)
        rows, columns = quantized.codes_RC.shape
        check(name, rows, columns, scheme)
        return quantized
    packed_RP, scale, shape = (take_tensor(tensors, n) for n in packed_names(name)[:3])
    require_shape(f"{name}.weight_shape", shape, (2,))
    rows, columns = (int(size) for size in shape.tolist())
    check(name, rows, columns, scheme)
    require_shape(f"{name}.weight_packed", packed_RP, (rows, num_words(columns, scheme.bits)))
    require_shape(f"{name}.weight_scale", scale, stored_shape(scheme, rows, columns))
    return QuantizedLinear(
        codes_RC=unpack_words(packed_RP, bits=scheme.bits, dim=1, length=columns),
        scale_RG=for_every_row(scale, scheme, rows).contiguous(),
        zero_RG=None if scheme.is_symmetric else _zeros(name, tensors, scheme, rows, columns),
        scheme=scheme,
    )


def _zeros(
    name: str, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme, rows: int, columns: int
) -> torch.Tensor:
    full_name = f"{name}.weight_zero_point"
    if scheme.group_size == WHOLE_TENSOR:
        zero = take_tensor(tensors, full_name, torch.int8)
        require_shape(full_name, zero, (1,))
        return for_every_row((zero.to(torch.int16) + scheme.middle_code).to(torch.uint8), scheme, rows)
    packed_PG = take_tensor(tensors, full_name)
    require_shape(full_name, packed_PG, (num_words(rows, scheme.bits), scheme.num_groups(columns)))
    return unpack_words(packed_PG, bits=scheme.bits, dim=0, length=rows)


def quantization_config(
    schemes: Mapping[str, WeightScheme | None], other_linears: Sequence[str] = ()
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    One scheme targets the class "Linear" and ``ignore`` lists every linear that is kept. Several schemes
    target their linears by full name, because readers that fuse projections would let "Linear" win over them.

    Raises:
        PackingError: Nothing is quantized.
    """
    by_scheme: dict[WeightScheme, list[str]] = {}
    for name, scheme in quantized_linears(schemes).items():
        by_scheme.setdefault(scheme, []).append(name)
    if len(by_scheme) == 1:
        by_scheme = {scheme: ["Linear"] for scheme in by_scheme}
    groups = {
        f"group_{i}": _group_values(scheme, targets) for i, (scheme, targets) in enumerate(by_scheme.items())
    }
    kept = [name for name, scheme in schemes.items() if scheme is None]
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": NAME,
        "version": _UPSTREAM_VERSION,
        "format": layouts.pop() if len(layouts) == 1 else _SEVERAL_LAYOUTS,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": groups,
        "ignore": [*kept, *other_linears],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def scheme_of(quantization_config: Mapping[str, Any], name: str) -> WeightScheme | None:
    """How ``name`` is stored; None when it is ignored or no group targets it.

    A full name wins over a regex and a regex over the class "Linear"; among equals the first group wins.

    Raises:
        PackingError: The group uses another layout, rounds inputs or outputs in another way than is known,
            another strategy than group, channel or tensor, or reordered columns.
    """
    if _is_ignored(quantization_config, name):
        return None
    group = group_of(quantization_config, name)
    return None if group is None else _scheme_from_group(group, quantization_config.get("format"), name)


def inputs_of(quantization_config: Mapping[str, Any], name: str) -> ActivationScheme | None:
    """What engines round the inputs of ``name`` to, in whatever layout its weight is.

    Raises:
        PackingError: That is not known here; ``inputs`` says what it is.
    """
    group = None if _is_ignored(quantization_config, name) else group_of(quantization_config, name)
    return None if group is None else inputs_from_values(group.get("input_activations"), name)


def group_of(quantization_config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The entry of ``config_groups`` that targets ``name``, whether it is ignored or not.

    A full name wins over a regex and a regex over the class "Linear"; among equals the first group wins.

    Raises:
        PackingError: An entry is a preset, or a regex is broken.
    """
    found = [
        (_specificity(target), group)
        for group in (quantization_config.get("config_groups") or {}).values()
        for target in _targets(group)
        if target == "Linear" or _matches(target, name)
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def side_files(quantization_config: Mapping[str, Any]) -> dict[str, bytes]:  # noqa: ARG001 - one form
    """None: config.json says everything."""
    return {}


def _group_values(scheme: WeightScheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": weights_values(scheme),
        "input_activations": inputs_values(scheme.inputs),
        "output_activations": None,
        "format": _layout_name(scheme),
    }


def _layout_name(scheme: WeightScheme) -> str:
    if scheme == compressed_int8.SCHEME:
        return compressed_int8.NAME
    layout = layout_of(scheme)
    return _LAYOUT if layout is None else layout.name


def _is_ignored(quantization_config: Mapping[str, Any], name: str) -> bool:
    return any(_matches(entry, name) for entry in quantization_config.get("ignore") or ())


def _targets(group: Any) -> Sequence[str]:
    if not isinstance(group, Mapping):
        raise PackingError(
            f"config_groups holds {group!r} where a scheme is expected; presets are not expanded here"
        )
    return group.get("targets") or ()


def _specificity(target: str) -> int:
    if target == "Linear":
        return 2
    return 1 if target.startswith("re:") else 0


def _matches(entry: str, name: str) -> bool:
    if not entry.startswith("re:"):
        return entry == name
    try:
        return re.match(entry.removeprefix("re:"), name) is not None
    except re.error as error:
        raise PackingError(f"quantization_config has a broken regex {entry!r}: {error}") from error


def _scheme_from_group(
    group: Mapping[str, Any], default_layout: str | None, name: str
) -> WeightScheme | None:
    weights = group.get("weights")
    if weights is None:
        return None
    if group.get("output_activations"):
        raise PackingError("compressed-tensors checkpoints with rounded outputs of linears are not read")
    inputs = inputs_from_values(group.get("input_activations"), name)
    layout = group.get("format") or default_layout
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if kind == "float":
        return scheme_from_values(str(layout), weights, inputs, name)
    if layout == compressed_int8.NAME:
        return scheme_of_int8(weights, inputs, name)
    if layout != _LAYOUT or kind != INTEGER or bits not in WIDTHS:
        raise PackingError(
            f"compressed-tensors checkpoints with {_LAYOUT} integers of"
            f" {', '.join(map(str, WIDTHS))} bits are read; got {layout!r}, {kind!r}, {bits!r} bits"
        )
    if inputs is not None:
        raise PackingError(
            f"{name} is stored as {_LAYOUT} integers with input_activations {inputs}, which is not read",
            linear=name,
        )
    if weights.get("actorder") in ("group", "dynamic", True):
        raise PackingError(
            f"compressed-tensors checkpoints with actorder {weights['actorder']!r} are not read: their"
            " columns are not in groups of consecutive ones"
        )
    return WeightScheme(
        bits=bits, is_symmetric=bool(weights.get("symmetric", True)), group_size=_group_size(weights)
    )


def _group_size(weights: Mapping[str, Any]) -> int:
    """Group size by strategy; a missing strategy follows from the group size, as upstream infers it."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "channel" or (strategy is None and size == WHOLE_ROW):
        return WHOLE_ROW
    if strategy == "tensor":
        return WHOLE_TENSOR
    if strategy in ("group", None) and isinstance(size, int) and size > 0:
        return size
    raise PackingError(
        f"compressed-tensors weights by group, channel or tensor are read, got strategy {strategy!r} with"
        f" group_size {size!r}"
    )
