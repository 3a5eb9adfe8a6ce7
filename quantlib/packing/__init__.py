"""Output formats: quantized linears to the tensors that serving engines read, and back."""

from collections.abc import Mapping
from typing import Any

from quantlib.packing import (
    awq_format,
    bitsandbytes_format,
    compressed_tensors_format,
    gguf_format,
    gptq_format,
)
from quantlib.packing.contracts import PackingFormat
from quantlib.schemes import WeightScheme

FORMATS: dict[str, PackingFormat] = {
    compressed_tensors_format.NAME: compressed_tensors_format,
    gptq_format.NAME: gptq_format,
    awq_format.NAME: awq_format,
    bitsandbytes_format.NAME: bitsandbytes_format,
    gguf_format.NAME: gguf_format,
}


def format_of(config: Mapping[str, Any]) -> PackingFormat | None:
    """The format of a checkpoint, from its config.json.

    None when it is not quantized, and also when its ``quantization_config`` names a method that is not read
    here: whoever reads weights must tell these two apart.
    """
    block = config.get("quantization_config")
    # The names in the table are also the values of quant_method.
    return FORMATS.get(block.get("quant_method", "")) if isinstance(block, Mapping) else None


def held_scheme(format_name: str, scheme: WeightScheme) -> WeightScheme:
    """A scheme with scales as a format holds them, for which codes are chosen."""
    return gguf_format.held_scheme(scheme) if format_name == gguf_format.NAME else scheme


__all__ = ["FORMATS", "PackingFormat", "format_of", "held_scheme"]
