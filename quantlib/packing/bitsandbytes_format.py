"""The layouts of bitsandbytes, read by transformers; vLLM 0.33 has none of them.

Rows of 8 bits (LLM.int8) are in `bitsandbytes_int8`, blocks of 4 bits (NF4, FP4) in `bitsandbytes_four_bit`.
One checkpoint has one scheme: a reader makes every linear of a model a quantized one of the kind that
config.json names, but for those that ``llm_int8_skip_modules`` lists.

Left out: routed experts in transformers 5, which are no linears there and stay as they are; and biases,
which are copied like any other tensor.

Source: transformers 5.23, utils/quantization_config.py (``BitsAndBytesConfig``) and
integrations/bitsandbytes.py.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantlib.errors import PackingError
from quantlib.grids.formats import NESTED_SCALES, PLAIN_SCALES, PORTABLE_SCALES
from quantlib.packing.bitsandbytes_four_bit import (
    SCHEMES,
    check_four_bit,
    pack_four_bit,
    packed_names_four_bit,
    unpack_four_bit,
)
from quantlib.packing.bitsandbytes_int8 import (
    ROWS,
    SCALE_DTYPE,
    pack_int8,
    packed_names_int8,
    unpack_int8,
)
from quantlib.packing.checks import only_scheme, quantized_linears
from quantlib.packing.kept_names import kept_entries
from quantlib.quantized import QuantizedLinear
from quantlib.schemes import WeightScheme

NAME = "bitsandbytes"
FORMAT_VERSION = "bitsandbytes 1"
WIDTHS = (ROWS.bits,)
_HEAD = "lm_head"


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:  # noqa: ARG001 - same form in every format
    """bf16, of which fp32 holds 127 times every number; scales of 4 bits are fp32 by their schemes."""
    return SCALE_DTYPE


def check(name: str, rows: int, columns: int, scheme: WeightScheme) -> None:  # noqa: ARG001 - one form
    """Refuse what the layouts cannot hold; any number of rows fits.

    Raises:
        PackingError: Another scheme, or rows of 4 bits that are no whole blocks.
    """
    if scheme in SCHEMES.values():
        check_four_bit(name, columns)
    elif not _is_rows(scheme):
        raise PackingError(
            f"{name}: {NAME} output holds schemes W8A16 with group_size -1 and {', '.join(SCHEMES)}, not"
            f" {scheme}; use one of these, or another format",
            linear=name,
        )


def pack(name: str, quantized: QuantizedLinear) -> dict[str, torch.Tensor]:
    """The tensors of a linear, on the device of its codes: three of 8 bits, four or six of 4 bits.

    Raises:
        PackingError: `check` refuses it, or its parts contradict each other.
    """
    rows, columns = quantized.codes_RC.shape
    check(name, rows, columns, quantized.scheme)
    return pack_int8(name, quantized) if _is_rows(quantized.scheme) else pack_four_bit(name, quantized)


def packed_names(name: str) -> tuple[str, ...]:
    """Full names of all tensors a linear may consist of."""
    return tuple(dict.fromkeys((*packed_names_int8(name), *packed_names_four_bit(name))))


def unpack(name: str, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme) -> QuantizedLinear:
    """The linear that was packed.

    Raises:
        PackingError: A tensor is missing or contradicts the scheme.
    """
    if scheme in SCHEMES.values():
        return unpack_four_bit(name, tensors, scheme)
    quantized = dataclasses.replace(unpack_int8(name, tensors), scheme=scheme)
    rows, columns = quantized.codes_RC.shape
    check(name, rows, columns, scheme)
    return quantized


def _is_rows(scheme: WeightScheme) -> bool:
    # Scales are bf16 here, which portable ones are, too.
    is_portable = scheme.scales == PORTABLE_SCALES
    return (dataclasses.replace(scheme, scales=PLAIN_SCALES) if is_portable else scheme) == ROWS


def quantization_config(
    schemes: Mapping[str, WeightScheme | None], other_linears: Sequence[str] = ()
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, with the keys that ``BitsAndBytesConfig`` writes.

    Raises:
        PackingError: Nothing is quantized, there are several schemes, or a kept linear cannot be named.
    """
    quantized = quantized_linears(schemes)
    scheme = only_scheme(quantized, format_name=NAME)
    kept = [*(name for name, given in schemes.items() if given is None), *other_linears]
    # transformers calls the head so wherever the checkpoint has it.
    if any(name.endswith(f".{_HEAD}") for name in kept):
        kept.append(_HEAD)
    is_int8 = _is_rows(scheme)
    return {
        "quant_method": NAME,
        "_load_in_4bit": not is_int8,
        "_load_in_8bit": is_int8,
        "load_in_4bit": not is_int8,
        "load_in_8bit": is_int8,
        # It has the range of every dtype of a model.
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if is_int8 else scheme.number,
        "bnb_4bit_use_double_quant": scheme.scales == NESTED_SCALES,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept_entries(kept, list(quantized), format_name=NAME),
        "llm_int8_threshold": 6.0,
    }


def scheme_of(quantization_config: Mapping[str, Any], name: str) -> WeightScheme | None:
    """How ``name`` is stored; None when it is kept, by transformers' rule.

    Raises:
        PackingError: Another kind of quantization, or values of other kinds.
    """
    entries = quantization_config.get("llm_int8_skip_modules")
    if entries is None:
        # transformers then keeps the head by itself.
        entries = [_HEAD]
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise PackingError(f"llm_int8_skip_modules must be a list of names, got {entries!r}")
    return None if any(_keeps(entry, name) for entry in entries) else _scheme_from_values(quantization_config)


def side_files(quantization_config: Mapping[str, Any]) -> dict[str, bytes]:  # noqa: ARG001 - one form
    """None: config.json says everything."""
    return {}


def _keeps(entry: str, name: str) -> bool:
    try:
        # As transformers: a regular expression for the beginning of a name up to a dot, or its end.
        return name.endswith(entry) or re.match(rf"(?:{entry})(?:\.|$)", name) is not None
    except re.error as error:
        raise PackingError(
            f"quantization_config has a broken regex {entry!r} in llm_int8_skip_modules: {error}"
        ) from error


def _scheme_from_values(values: Mapping[str, Any]) -> WeightScheme:
    if values.get("load_in_8bit") is True:
        return ROWS
    number = values.get("bnb_4bit_quant_type", "fp4")
    is_nested = values.get("bnb_4bit_use_double_quant", False)
    found = (x for x in SCHEMES.values() if (x.number, x.scales == NESTED_SCALES) == (number, is_nested))
    scheme = next(found, None)
    if scheme is not None and values.get("load_in_4bit") is True:
        return scheme
    raise PackingError(
        f"{NAME} checkpoints with load_in_8bit, or load_in_4bit and nf4 or fp4, are read; got"
        f" load_in_4bit {values.get('load_in_4bit')!r}, bnb_4bit_quant_type {number!r},"
        f" bnb_4bit_use_double_quant {is_nested!r}"
    )
