"""Quantized sources: from what is stored to the weights that are meant, one module for each quant_method."""

from quantlib.checkpoint.decoders import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from quantlib.checkpoint.decoders.contracts import FindDecoded, Found

DECODERS: dict[str, FindDecoded] = {
    "fp8": fp8.find,
    "fbgemm_fp8": fp8.find,
    "compressed-tensors": compressed_tensors.find,
    "gptq": gptq.find,
    "awq": awq.find,
    "mxfp4": mxfp4.find,
    "bitsandbytes": bitsandbytes.find,
}

__all__ = ["DECODERS", "FindDecoded", "Found"]
