"""safetensors dtype names and the torch dtypes that hold them."""

import torch

from quantlib.errors import CheckpointError, PackingError

_TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name.

    Raises:
        CheckpointError: The name is not known.

    >>> torch_dtype("BF16")
    torch.bfloat16
    """
    if name not in _TORCH:
        raise CheckpointError(f"the dtype {name!r} is not known, known are {', '.join(_TORCH)}", dtype=name)
    return _TORCH[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype.

    Raises:
        PackingError: safetensors has no such dtype.

    >>> dtype_name(torch.int32)
    'I32'
    """
    if dtype not in _NAMES:
        raise PackingError(f"a tensor of {dtype} cannot be stored in safetensors", dtype=str(dtype))
    return _NAMES[dtype]
