"""The layout of AutoAWQ's GEMM version, read by vLLM, SGLang, GPTQModel, AutoAWQ and transformers.

Per linear (R out features, C in features, G groups along C, codes of 4 bits, int32 words):
``qweight`` int32 [C, R/8], codes packed along the out features; ``qzeros`` int32 [G, R/8], zero points
packed alike; ``scales`` fp16 [G, R]. Codes lie in a word in the order of `quantlib.packing.awq_words`. The
level of a code is ``scales[g, r] * (code - zero)``; the zero is stored as it is.

Symmetric schemes are written with the zero 8 and, like asymmetric ones, with ``zero_point: true``: told
``false``, vLLM and SGLang take a slower kernel, made for fp16, and read the zero points all the same. That
the scheme was symmetric is kept under ``meta``. One checkpoint has one scheme.

Left out: what gave the layout its name, scaling the inputs of linears; ``gemv``, ``gemv_fast``, ``marlin``
and llm-awq files, which are other layouts; and biases, which are copied like any other tensor.

Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py; vLLM, quantization/awq.py and awq_marlin.py, and SGLang,
quantization/awq.py (which keys are read); transformers 5.23, utils/quantization_config.py (``AwqConfig``).
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from quantlib.errors import PackingError
from quantlib.packing.awq_words import in_plain_order, interleaved
from quantlib.packing.bits import pack_words, transposed, unpack_words
from quantlib.packing.checks import (
    only_scheme,
    quantized_linears,
    require_consistent,
    require_integers,
    require_multiples,
    require_shape,
    require_whole_groups,
    take_tensor,
)
from quantlib.packing.kept_names import is_kept, kept_entries
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WeightScheme

NAME = "awq"
FORMAT_VERSION = "awq gemm 1"
BITS = 4
WIDTHS = (BITS,)
CODES_PER_WORD = 8
_LAYOUT = "gemm"


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:  # noqa: ARG001 - same form in every format
    """fp16, whatever the model's dtype."""
    return torch.float16


def check(name: str, rows: int, columns: int, scheme: WeightScheme) -> None:
    """Refuse what the layout cannot hold.

    Raises:
        PackingError: Bits, group size, or out features that fill no whole words.
    """
    require_integers(name, scheme, format_name=NAME)
    require_whole_groups(name, columns, scheme, format_name=NAME, widths=WIDTHS)
    require_multiples(name, {"out": rows}, CODES_PER_WORD, format_name=NAME)


def pack(name: str, quantized: QuantizedLinear) -> dict[str, torch.Tensor]:
    """The three tensors of a linear, on the device of its codes.

    Raises:
        PackingError: `check` refuses it, or its parts contradict each other (a scale that is not fp16, ...).
    """
    rows, columns = quantized.codes_RC.shape
    check(name, rows, columns, quantized.scheme)
    require_consistent(name, quantized, (torch.float16,))
    return {
        f"{name}.qweight": _words(quantized.codes_RC),
        f"{name}.qzeros": _words(_zeros(quantized)),
        f"{name}.scales": transposed(quantized.scale_RG),
    }


def packed_names(name: str) -> tuple[str, ...]:
    """Full names of the tensors `pack` makes; all of them always exist."""
    return (f"{name}.qweight", f"{name}.qzeros", f"{name}.scales")


def unpack(name: str, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme) -> QuantizedLinear:
    """The linear that was packed.

    Raises:
        PackingError: A tensor is missing or of another dtype or shape, or zero points contradict the scheme.
    """
    qweight, qzeros = (take_tensor(tensors, n, torch.int32) for n in packed_names(name)[:2])
    scales = take_tensor(tensors, f"{name}.scales")
    if qweight.dim() != 2 or not qweight.numel():
        raise PackingError(
            f"tensor {name}.qweight must be a matrix of words, got {tuple(qweight.shape)}",
            tensor=f"{name}.qweight",
        )
    columns, num_words = qweight.shape
    rows = num_words * CODES_PER_WORD
    check(name, rows, columns, scheme)
    num_groups = scheme.num_groups(columns)
    require_shape(f"{name}.qzeros", qzeros, (num_groups, num_words))
    require_shape(f"{name}.scales", scales, (num_groups, rows))
    zero_RG = unpack_interleaved(qzeros)
    if scheme.is_symmetric:
        _require_symmetric_zeros(name, zero_RG, scheme)
    return QuantizedLinear(
        codes_RC=unpack_interleaved(qweight),
        scale_RG=transposed(scales),
        zero_RG=None if scheme.is_symmetric else zero_RG,
        scheme=scheme,
    )


def unpack_interleaved(words: torch.Tensor) -> torch.Tensor:
    """Codes or zero points of some words of every line.

    Shapes:
        words: int32 [X, R/8].

    Returns:
        uint8 [R, X], contiguous.
    """
    length = words.shape[1] * CODES_PER_WORD
    return transposed(unpack_words(in_plain_order(words), bits=BITS, dim=1, length=length))


def quantization_config(
    schemes: Mapping[str, WeightScheme | None], other_linears: Sequence[str] = ()
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    Raises:
        PackingError: Nothing is quantized, there are several schemes, or a kept linear cannot be named.
    """
    quantized = quantized_linears(schemes)
    scheme = only_scheme(quantized, format_name=NAME)
    kept = [name for name, given in schemes.items() if given is None]
    return {
        "quant_method": NAME,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": _LAYOUT,
        "modules_to_not_convert": kept_entries([*kept, *other_linears], list(quantized), format_name=NAME),
        "meta": {
            "quantizer": [f"quantmill:{version('quantmill')}"],
            "symmetric": scheme.is_symmetric,
        },
    }


def scheme_of(quantization_config: Mapping[str, Any], name: str) -> WeightScheme | None:
    """How ``name`` is stored; None when it is kept.

    AutoAWQ's own names of the values (``w_bit``, ``q_group_size``) are known too. Routers are kept by some
    tools without being named: the presence of a ``qweight`` decides then.

    Raises:
        PackingError: Another layout or width, or values of other kinds.
    """
    if name.rpartition(".")[2] == "lm_head" and not quantization_config.get("lm_head"):
        return None
    entries = quantization_config.get("modules_to_not_convert") or []
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise PackingError(f"modules_to_not_convert must be a list of names, got {entries!r}")
    return None if is_kept(entries, name) else _scheme_from_values(quantization_config)


def side_files(quantization_config: Mapping[str, Any]) -> dict[str, bytes]:  # noqa: ARG001 - one form
    """None: config.json says everything."""
    return {}


def require_gemm(quantization_config: Mapping[str, Any]) -> None:
    """Refuse the other layouts that go by the name of AWQ.

    Raises:
        PackingError: Names what it is.
    """
    for key in ("version", "format", "checkpoint_format"):
        stated = quantization_config.get(key) or _LAYOUT
        if str(stated).lower() != _LAYOUT:
            raise PackingError(f"awq checkpoints with {key} {_LAYOUT} are read, got {stated!r}")
    if quantization_config.get("backend") == "llm-awq":
        raise PackingError(f"awq checkpoints with version {_LAYOUT} are read, got one of llm-awq")


def _words(codes_RX: torch.Tensor) -> torch.Tensor:
    """Words int32 [X, R/8]."""
    return interleaved(pack_words(codes_RX.transpose(0, 1), bits=BITS, dim=1))


def _zeros(quantized: QuantizedLinear) -> torch.Tensor:
    if quantized.zero_RG is not None:
        return quantized.zero_RG
    return torch.full_like(quantized.scale_RG, quantized.scheme.middle_code, dtype=torch.uint8)


def _require_symmetric_zeros(name: str, zero_RG: torch.Tensor, scheme: WeightScheme) -> None:
    smallest, largest = int(zero_RG.min()), int(zero_RG.max())
    if smallest != scheme.middle_code or largest != scheme.middle_code:
        raise PackingError(
            f"{name}: config says symmetric, but qzeros holds zero points {smallest} to {largest} where"
            f" {scheme.middle_code} is expected",
            linear=name,
        )


def _scheme_from_values(values: Mapping[str, Any]) -> WeightScheme:
    require_gemm(values)
    bits = values.get("bits", values.get("w_bit"))
    group_size = values.get("group_size", values.get("q_group_size"))
    has_zeros = values.get("zero_point", True)
    if bits != BITS or not isinstance(group_size, int) or not isinstance(has_zeros, bool):
        raise PackingError(
            f"awq checkpoints of {BITS} bits are read; got bits {bits!r}, group_size {group_size!r},"
            f" zero_point {has_zeros!r}"
        )
    meta = values.get("meta")
    was_symmetric = isinstance(meta, Mapping) and meta.get("symmetric") is True
    return WeightScheme(bits=BITS, is_symmetric=was_symmetric or not has_zeros, group_size=group_size)
