"""Reads the header of a safetensors shard, and believes nothing before it is checked.

A shard is: 8 bytes (little-endian length n of the header), n bytes of JSON, tensor data. The JSON maps each
tensor name to its dtype, shape and [begin, end) relative to the data. The ranges must cover the data exactly,
in some order, without overlap or hole. Source: the format section of the safetensors README (version 0.8).

Left out: the sub-byte dtypes F4 and F6, whose elements do not fill bytes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlib.errors import CheckpointError
from quantlib.storage import ObjectInfo, Store, uri_name

DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
LENGTH_BYTES = 8
# The limit of the reference implementation.
MAX_HEADER_BYTES = 100_000_000
# One request of this size holds the whole header of nearly every shard.
FIRST_READ_BYTES = 100_000
_MAX_DIMS = 64
_MAX_DIM = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        name: Its name in the checkpoint.
        dtype: safetensors dtype, a key of `DTYPE_BYTES`.
        shape: Its dims; empty for a scalar.
        shard: File name of the shard.
        start: First byte, counted from the beginning of the shard.
        end: One past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes that are stored of it."""
        return self.end - self.start

    @property
    def memory_bytes(self) -> int:
        """Bytes it takes in memory: more than are stored of codes that are decoded."""
        return self.num_values * DTYPE_BYTES[self.dtype]

    @property
    def num_values(self) -> int:
        """Elements it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a shard says of itself: its tensors in file order, and its free-form metadata."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(store: Store, info: ObjectInfo) -> Header:
    """Read and check a shard's header, with one request for most shards and a second for a long one.

    Raises:
        CheckpointError: The object is no intact safetensors file; the message says what is wrong with it.
    """
    shard = uri_name(info.uri)
    if info.size_bytes < LENGTH_BYTES:
        raise _broken(shard, f"it has {info.size_bytes} bytes, a safetensors file has at least 8")
    first = store.read_ranges(info, [(0, min(FIRST_READ_BYTES, info.size_bytes))])[0]
    end = LENGTH_BYTES + header_length(first[:LENGTH_BYTES], shard=shard, object_bytes=info.size_bytes)
    text = bytes(first[LENGTH_BYTES:end])
    if end > len(first):
        text += store.read_ranges(info, [(len(first), end)])[0]
    return parse_header(text, shard=shard, object_bytes=info.size_bytes)


def header_length(prefix: bytes | memoryview, *, shard: str, object_bytes: int) -> int:
    """The checked value of a shard's first 8 bytes.

    Raises:
        CheckpointError: Longer than the object or than the format allows.
    """
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _broken(shard, f"its header length is {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
    if length > object_bytes - LENGTH_BYTES:
        raise _broken(shard, f"its header length is {length} bytes, the whole object has {object_bytes}")
    return length


def parse_header(text: bytes, *, shard: str, object_bytes: int) -> Header:
    """Check a header's JSON against itself and against the size of its object.

    Args:
        text: The JSON bytes, without the length in front.
        shard: File name, for messages and entries.
        object_bytes: Size of the whole object.

    Raises:
        CheckpointError: Anything at all is wrong with it.
    """
    values = _parse_json(text, shard)
    metadata = _checked_metadata(values.pop("__metadata__", {}), shard)
    data_start = LENGTH_BYTES + len(text)
    data_bytes = object_bytes - data_start
    entries = [_entry(name, value, shard, data_start) for name, value in values.items()]
    # Empty tensors sort before the one that begins where they lie.
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_cover(entries, shard, data_start, data_bytes)
    return Header(tensors={entry.name: entry for entry in entries}, metadata=metadata)


def _parse_json(text: bytes, shard: str) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _broken(shard, "its header is not a JSON object")
    try:
        values = json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    # Python's parser gives up on deep nesting with RecursionError.
    except (ValueError, RecursionError) as error:
        raise _broken(shard, f"its header is not valid JSON ({error})") from error
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {_short(name)} appears twice")
        values[name] = value
    return values


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _checked_metadata(value: Any, shard: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _broken(shard, "its __metadata__ is not a map from text to text")
    return value


def _entry(name: str, value: Any, shard: str, data_start: int) -> TensorEntry:
    if not name.isprintable():
        raise _broken(shard, f"the tensor name {_short(name)} has characters that cannot be shown")
    if not isinstance(value, Mapping):
        raise _broken(shard, f"the entry of tensor {name!r} is not an object")
    dtype = value.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise _broken(shard, f"tensor {name!r} has the dtype {_short(dtype)}, known are {known}")
    shape = value.get("shape")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(_is_size(dim) for dim in shape):
        raise _broken(shard, f"tensor {name!r} has the shape {_short(shape)}, sizes of 0 or more are needed")
    offsets = value.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o) for o in offsets):
        raise _broken(
            shard, f"tensor {name!r} has the data_offsets {_short(offsets)}, [begin, end] is needed"
        )
    begin, end = offsets
    wanted = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != wanted:
        raise _broken(
            shard,
            f"tensor {name!r} ({dtype} {_short(shape)}) needs {_short(wanted)} bytes,"
            f" its data_offsets span {end - begin}",
        )
    return TensorEntry(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        shard=shard,
        start=data_start + begin,
        end=data_start + end,
    )


def _is_size(value: Any) -> bool:
    # A JSON true is an int to isinstance.
    return type(value) is int and 0 <= value <= _MAX_DIM


def _check_cover(entries: list[TensorEntry], shard: str, data_start: int, data_bytes: int) -> None:
    """The entries, in order of position, must follow each other from the first data byte to the last."""
    position, before = data_start, "the header"
    for entry in entries:
        if entry.end > data_start + data_bytes:
            raise _broken(
                shard,
                f"tensor {entry.name!r} ends at data byte {entry.end - data_start}, the object holds"
                f" {data_bytes}; the object is cut off, or its header is wrong",
            )
        if entry.start < position:
            raise _broken(shard, f"tensors {before!r} and {entry.name!r} overlap")
        if entry.start > position:
            raise _broken(
                shard, f"{entry.start - position} bytes before tensor {entry.name!r} belong to nothing"
            )
        position, before = entry.end, entry.name
    rest = data_start + data_bytes - position
    if rest:
        raise _broken(shard, f"the last {rest} bytes of the object belong to no tensor")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:
        # Python refuses to print an integer of thousands of digits.
        return "(a number too long to show)"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _broken(shard: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{shard} is not an intact safetensors file: {reason}; fetch or write it again", shard=shard
    )
