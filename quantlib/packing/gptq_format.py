"""The GPTQ layout, read by vLLM, SGLang, GPTQModel, AutoGPTQ, transformers and, at 4 bits, ExLlama.

Per linear (R out features, C in features, G groups along C, b bits, int32 words):
``qweight`` int32 [C*b/32, R], codes packed along the in features; ``qzeros`` int32 [G, R*b/32], zero points
packed along the out features; ``scales`` fp16 [G, R]; ``g_idx`` int32 [C], the group of each column.
The level of a code is ``scales[g, r] * (code - zero)``. Both sides are multiples of 32, so that also at 3
bits, where fields cross words, every run of 32 fields starts at a word.

Two conventions for zero points are in use. ``checkpoint_format: "gptq"`` stores zero - 1 and readers add 1
to each field, some without masking: a zero of 0 cannot be said in it. ``"gptq_v2"`` stores the zero.
Symmetric schemes (zero = 2**(b-1), field 2**(b-1) - 1) are written as "gptq", which everything reads;
asymmetric ones as "gptq_v2", which is exact for every zero, but which SGLang's GPU kernels (end of 2025)
and vLLM before October 2025 take for "gptq". One checkpoint declares one convention, so symmetric and
asymmetric schemes cannot be mixed in it.

The 3-bit qzeros of "gptq" hold zero - 1 field by field, across word borders: 3 for symmetric, which makes
the words 0xdb6db6db, 0xb6db6db6, 0x6db6db6d. vLLM, SGLang, AutoGPTQ and GPTQModel (with which transformers
reads) expect just that. GPTQModel up to the spring of 2026 added three constants to the wrong words: it
misreads such files (but not "gptq_v2"), and the 3-bit "gptq" files that it wrote hold other zeros for
everybody else, for which they are refused here.

Left out: ``desc_act`` (columns are stored in their own order, groups are consecutive); ragged last groups,
for which the layout has a place and GPTQModel a kernel, but which vLLM and SGLang refuse; asymmetric "gptq"
checkpoints of other tools; 5, 6 and 7 bits, which readers know as bit planes only (``gptq_p``); and biases,
which are copied like any other tensor.

Source: GPTQModel 7.7, gptqmodel/nn_modules/qlinear/__init__.py and utils/model.py (conventions); vLLM,
csrc/quantization/gptq (q_gemm.cu, matrix_view.cuh), quantization/gptq.py and utils/gptq_utils.py (how
``dynamic`` is matched).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from quantlib.errors import PackingError
from quantlib.packing.bits import BITS_PER_WORD, num_words, pack_words, transposed, unpack_words
from quantlib.packing.checks import (
    quantized_linears,
    require_consistent,
    require_integers,
    require_multiples,
    require_shape,
    require_whole_groups,
    take_tensor,
)
from quantlib.packing.module_names import modules_above
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WHOLE_ROW, WeightScheme

NAME = "gptq"
FORMAT_VERSION = "gptq 1"
WIDTHS = (2, 3, 4, 8)
_V1, _V2 = "gptq", "gptq_v2"


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:  # noqa: ARG001 - same form in every format
    """fp16, whatever the model's dtype."""
    return torch.float16


def check(name: str, rows: int, columns: int, scheme: WeightScheme) -> None:
    """Refuse what the layout cannot hold.

    Raises:
        PackingError: Bits, group size, or a side that is not a multiple of 32.
    """
    require_integers(name, scheme, format_name=NAME)
    require_whole_groups(name, columns, scheme, format_name=NAME, widths=WIDTHS)
    require_multiples(name, {"out": rows, "in": columns}, BITS_PER_WORD, format_name=NAME)


def pack(name: str, quantized: QuantizedLinear) -> dict[str, torch.Tensor]:
    """The four tensors of a linear, on the device of its codes.

    Raises:
        PackingError: `check` refuses it, or its parts contradict each other (a scale that is not fp16, ...).
    """
    scheme = quantized.scheme
    rows, columns = quantized.codes_RC.shape
    check(name, rows, columns, scheme)
    require_consistent(name, quantized, (torch.float16,))
    codes_RC, scale_RG = quantized.codes_RC, quantized.scale_RG
    stored_zero_GR = _stored_zeros(quantized)
    return {
        f"{name}.qweight": transposed(pack_words(codes_RC, bits=scheme.bits, dim=1)),
        f"{name}.qzeros": pack_words(stored_zero_GR, bits=scheme.bits, dim=1),
        f"{name}.scales": transposed(scale_RG),
        f"{name}.g_idx": _group_of_column(columns, scheme, codes_RC.device),
    }


def packed_names(name: str) -> tuple[str, ...]:
    """Full names of the tensors `pack` makes; all of them always exist."""
    return (f"{name}.qweight", f"{name}.qzeros", f"{name}.scales", f"{name}.g_idx")


def unpack(name: str, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme) -> QuantizedLinear:
    """The linear that was packed.

    A symmetric linear of another tool may hold its zero point in either convention; both mean the same.

    Raises:
        PackingError: A tensor is missing or has another shape, zero points contradict the scheme, or
            columns are not in groups of consecutive ones.
    """
    qweight, qzeros, scales, g_idx = (take_tensor(tensors, n) for n in packed_names(name))
    rows, columns = qweight.shape[-1], g_idx.shape[0]
    check(name, rows, columns, scheme)
    num_groups = scheme.num_groups(columns)
    require_shape(f"{name}.qweight", qweight, (num_words(columns, scheme.bits), rows))
    require_shape(f"{name}.qzeros", qzeros, (num_groups, num_words(rows, scheme.bits)))
    require_shape(f"{name}.scales", scales, (num_groups, rows))
    if not torch.equal(g_idx.to(torch.int32), _group_of_column(columns, scheme, g_idx.device)):
        raise PackingError(
            f"{name}: g_idx does not put consecutive columns into groups of {scheme.group_size};"
            " checkpoints made with desc_act are not read",
            linear=name,
        )
    zero_GR = unpack_words(qzeros, bits=scheme.bits, dim=1, length=rows)
    if scheme.is_symmetric:
        _require_symmetric_zeros(name, zero_GR, scheme)
    codes_CR = unpack_words(qweight, bits=scheme.bits, dim=0, length=columns)
    return QuantizedLinear(
        codes_RC=transposed(codes_CR),
        scale_RG=transposed(scales),
        zero_RG=None if scheme.is_symmetric else transposed(zero_GR),
        scheme=scheme,
    )


def quantization_config(
    schemes: Mapping[str, WeightScheme | None], other_linears: Sequence[str] = ()
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    The most frequent scheme is the stated one; ``dynamic`` holds a ``+:`` regex for linears with another
    scheme and a ``-:`` regex for linears that are kept. A regex covers a whole module where everything in it
    is treated alike, so that it also matches the names of projections that a reader has fused.

    Raises:
        PackingError: Nothing is quantized, or symmetric and asymmetric schemes are mixed.
    """
    counted = Counter(quantized_linears(schemes).values())
    if len({scheme.is_symmetric for scheme in counted}) > 1:
        raise PackingError(
            "a gptq checkpoint has one convention for zero points and cannot mix symmetric and asymmetric"
            " schemes; use one of them, or --format compressed-tensors"
        )
    stated = counted.most_common(1)[0][0]
    return {
        "quant_method": "gptq",
        "bits": stated.bits,
        "group_size": stated.group_size,
        "desc_act": False,
        "sym": stated.is_symmetric,
        "checkpoint_format": _V1 if stated.is_symmetric else _V2,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": _dynamic_rules(schemes, other_linears, stated),
        "meta": {"quantizer": [f"quantmill:{version('quantmill')}"]},
    }


def scheme_of(quantization_config: Mapping[str, Any], name: str) -> WeightScheme | None:
    """How ``name`` is stored; None when it is kept.

    Whether a linear outside the decoder blocks is quantized is not always written down by other tools: the
    presence of its ``qweight`` decides then.

    Raises:
        PackingError: desc_act with groups, a width or convention that is not read here, a broken regex.
    """
    if name.rpartition(".")[2] == "lm_head" and not quantization_config.get("lm_head"):
        return None
    listed = quantization_config.get("modules_in_block_to_quantize")
    if listed and not any(f".{name}".endswith(f".{entry}") for entry in _flattened(listed)):
        return None
    values = dict(quantization_config)
    for rule, override in (quantization_config.get("dynamic") or {}).items():
        if _matches(rule, name):
            if rule.startswith("-:"):
                return None
            values.update(override)
            break
    return _scheme_from_values(values)


def side_files(quantization_config: Mapping[str, Any]) -> dict[str, bytes]:
    """``quantize_config.json`` with the same content, which older readers look for."""
    return {"quantize_config.json": (json.dumps(quantization_config, indent=2) + "\n").encode()}


def _stored_zeros(quantized: QuantizedLinear) -> torch.Tensor:
    """Fields of qzeros, uint8 [G, R]: the zero itself, or for symmetric schemes the middle code less 1."""
    if quantized.zero_RG is not None:
        return quantized.zero_RG.transpose(0, 1)
    rows, num_groups = quantized.scale_RG.shape
    field = quantized.scheme.middle_code - 1
    return torch.full((num_groups, rows), field, dtype=torch.uint8, device=quantized.scale_RG.device)


def _require_symmetric_zeros(name: str, zero_GR: torch.Tensor, scheme: WeightScheme) -> None:
    smallest, largest = int(zero_GR.min()), int(zero_GR.max())
    if smallest != largest or smallest not in (scheme.middle_code - 1, scheme.middle_code):
        raise PackingError(
            f"{name}: config says symmetric, but qzeros holds fields {smallest} to {largest} where"
            f" {scheme.middle_code - 1} (or {scheme.middle_code} in gptq_v2) is expected",
            linear=name,
        )


def _group_of_column(columns: int, scheme: WeightScheme, device: torch.device) -> torch.Tensor:
    width = scheme.columns_per_group(columns)
    return torch.arange(columns, dtype=torch.int32, device=device) // width


def _dynamic_rules(
    schemes: Mapping[str, WeightScheme | None], other_linears: Sequence[str], stated: WeightScheme
) -> dict[str, dict[str, int]]:
    by_scheme: dict[WeightScheme | None, list[str]] = {}
    for name, scheme in schemes.items():
        if scheme != stated:
            by_scheme.setdefault(scheme, []).append(name)
    # "lm_head": false already says that heads are kept.
    kept_outside = [name for name in other_linears if name.rpartition(".")[2] != "lm_head"]
    if kept_outside:
        by_scheme.setdefault(None, []).extend(kept_outside)
    everything = [*schemes, *kept_outside]
    rules: dict[str, dict[str, int]] = {}
    for scheme, names in by_scheme.items():
        sign = "-:" if scheme is None else "+:"
        override = {} if scheme is None else {"bits": scheme.bits, "group_size": scheme.group_size}
        rules |= {sign + pattern: override for pattern in _covering_patterns(names, everything)}
    return rules


def _covering_patterns(members: Sequence[str], everything: Sequence[str]) -> list[str]:
    """Regexes that match the members and nothing else of ``everything``, whole modules where possible.

    >>> _covering_patterns(["a.0.q", "a.0.k", "a.1.k"], ["a.0.q", "a.0.k", "a.1.k", "a.1.q"])
    ['^a\\\\.0\\\\..*', '^a\\\\.1\\\\.k$']
    """
    below = Counter(module for name in everything for module in modules_above(name))
    members_below = Counter(module for name in members for module in modules_above(name))
    patterns: dict[str, None] = {}
    for name in members:
        module = next((m for m in modules_above(name) if members_below[m] == below[m]), None)
        patterns[f"^{re.escape(name)}$" if module is None else f"^{re.escape(module)}\\..*"] = None
    return list(patterns)


def _flattened(listed: Iterable[Any]) -> list[str]:
    return [str(entry) for part in listed for entry in ([part] if isinstance(part, str) else part)]


def _matches(rule: str, name: str) -> bool:
    try:
        return re.match(rule.removeprefix("-:").removeprefix("+:"), name) is not None
    except re.error as error:
        raise PackingError(f"quantization_config has a broken regex {rule!r} in dynamic: {error}") from error


def _scheme_from_values(values: Mapping[str, Any]) -> WeightScheme:
    bits, group_size = values.get("bits"), values.get("group_size", WHOLE_ROW)
    is_symmetric = values.get("sym", True)
    if bits not in WIDTHS or not isinstance(group_size, int) or not isinstance(is_symmetric, bool):
        raise PackingError(
            f"gptq checkpoints of {', '.join(map(str, WIDTHS))} bits are read; got bits {bits!r},"
            f" group_size {group_size!r}, sym {is_symmetric!r}"
        )
    # Some writers say "format" for the same thing.
    convention = values.get("checkpoint_format") or values.get("format") or _V1
    if convention not in (_V1, _V2) or values.get("pack_dtype", "int32") != "int32":
        raise PackingError(
            f"gptq checkpoints with checkpoint_format {_V1} or {_V2} in int32 words are read; got"
            f" {convention!r} in {values.get('pack_dtype', 'int32')!r}"
        )
    if values.get("desc_act") and group_size != WHOLE_ROW:
        raise PackingError(
            "gptq checkpoints with desc_act and groups are not read: their columns are reordered"
        )
    if convention == _V1 and not is_symmetric:
        raise PackingError(
            f"asymmetric gptq checkpoints are read with checkpoint_format {_V2} only: {_V1} stores zero"
            " points shifted by one, in ways that differ between writers"
        )
    return WeightScheme(bits=bits, is_symmetric=is_symmetric, group_size=group_size)
