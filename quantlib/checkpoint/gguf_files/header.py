"""Reads the header of a GGUF file from its first bytes, and believes nothing before it is checked.

A file is: ``GGUF``, version (uint32), number of tensors, number of key-values (uint64 each); key-values
(name, type, value); tensors (name, dims with the fastest first, type, offset); padding; data. All is
little-endian. Values are skipped here except small numbers and texts: spans of them make a smaller header, of
which `quantlib.checkpoint.gguf_files.meaning` has transformers make sense.

Source: docs/gguf.md of ggml, version 3; gguf 0.19, constants.py (types and their sizes).
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from quantlib.errors import CheckpointError
from quantlib.storage import ObjectInfo, Store, uri_name

MAGIC = b"GGUF"
VERSIONS = (2, 3)
FIRST_READ_BYTES = 1 << 20
# Vocabularies take most of a header: the longest known have 262,144 tokens, in 7 MB.
MAX_HEADER_BYTES = 256 << 20
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_TOKENS = "tokenizer.ggml.tokens"
_LONG_VALUE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor.

    Attributes:
        name: As the file calls it (``blk.0.attn_q.weight``).
        shape: Dims, the fastest last.
        kind: How its values are stored.
        start: First byte in the file.
        end: One past the last byte.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a file says of itself.

    Attributes:
        values: Numbers and texts by key; of an array its length.
        spans: Key -> the bytes of the key-value.
        tensors: In the order of the header.
        tensor_spans: Of each of them, the bytes that describe it.
        version: Of the format.
    """

    values: Mapping[str, Any]
    spans: Mapping[str, bytes]
    tensors: tuple[GgufTensor, ...]
    tensor_spans: tuple[bytes, ...]
    version: int


class _ShortError(Exception):
    """The header goes on behind what was read."""


def read_gguf_header(store: Store, info: ObjectInfo) -> GgufHeader:
    """Read and check a header; twice as many bytes are asked for until it is whole.

    Raises:
        CheckpointError: The object is no intact GGUF file; the message says what is wrong with it.
    """
    text, size = b"", FIRST_READ_BYTES
    while True:
        end = min(size, info.size_bytes)
        if end > len(text):
            text += bytes(store.read_ranges(info, [(len(text), end)])[0])
        try:
            return parse_gguf_header(text, name=uri_name(info.uri), object_bytes=info.size_bytes)
        except _ShortError:
            if end == info.size_bytes or size >= MAX_HEADER_BYTES:
                raise _broken(uri_name(info.uri), f"its header does not end within {end:,} bytes") from None
        size *= 2


def parse_gguf_header(text: bytes, *, name: str, object_bytes: int) -> GgufHeader:
    """Check a header against itself and the size of its object.

    Args:
        text: The first bytes of the file.
        name: File name, for messages.
        object_bytes: Size of the whole file.

    Raises:
        CheckpointError: Anything is wrong with it.
    """
    cursor = _Cursor(text, name)
    if cursor.take(4) != MAGIC:
        raise _broken(name, "it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise _broken(name, f"it has version {version}; versions 2 and 3, little-endian, are read")
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    values: dict[str, Any] = {}
    spans: dict[str, bytes] = {}
    for _ in range(num_values):
        start = cursor.position
        key = cursor.text()
        if key in values:
            raise _broken(name, f"the key {key!r} appears twice")
        values[key] = cursor.value(cursor.number("I"))
        spans[key] = text[start : cursor.position]
    found: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]] = []
    tensor_spans = []
    for _ in range(num_tensors):
        start = cursor.position
        found.append(_tensor(cursor))
        tensor_spans.append(text[start : cursor.position])
    alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _broken(name, f"its alignment is {alignment!r}, a power of two is needed")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = tuple(_placed(*entry, data_start, name) for entry in found)
    _refuse_overlaps(tensors, name, object_bytes)
    return GgufHeader(
        values=values, spans=spans, tensors=tensors, tensor_spans=tuple(tensor_spans), version=version
    )


class _Cursor:
    """A place in a header, which moves on as values are taken."""

    def __init__(self, text: bytes, name: str) -> None:
        self._text, self._name = text, name
        self.position = 0

    def take(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise _broken(self._name, f"a value in its header has {size} bytes")
        end = self.position + size
        if end > len(self._text):
            raise _ShortError
        taken = self._text[self.position : end]
        self.position = end
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        content = self.take(self.number("Q"))
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise _broken(self._name, f"a text in its header is not UTF-8 ({error})") from error

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _broken(self._name, f"a value in its header is of the unknown type {kind}")
        inner, length = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take(length * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _TEXT:
            for _ in range(length):
                self.take(self.number("Q"))
        else:
            raise _broken(self._name, f"an array in its header is of the unknown type {inner}")
        return length


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.text()
    num_dims = cursor.number("I")
    if not name.isprintable() or not 0 < num_dims <= _MAX_DIMS:
        raise _broken(cursor._name, f"tensor {name[:60]!r} has {num_dims} dims, 1 to {_MAX_DIMS} are allowed")
    dims = tuple(cursor.number("Q") for _ in range(num_dims))
    kind, offset = cursor.number("I"), cursor.number("Q")
    try:
        return name, dims[::-1], GGMLQuantizationType(kind), offset
    except ValueError as error:
        raise _broken(cursor._name, f"tensor {name!r} is of the unknown type {kind}") from error


def _placed(
    name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int, data_start: int, file: str
) -> GgufTensor:
    values, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % values:
        raise _broken(
            file, f"tensor {name!r} has rows of {shape[-1]}, {kind.name} needs multiples of {values}"
        )
    start = data_start + offset
    return GgufTensor(
        name=name, shape=shape, kind=kind, start=start, end=start + math.prod(shape) // values * size
    )


def _refuse_overlaps(tensors: tuple[GgufTensor, ...], name: str, object_bytes: int) -> None:
    position, before = 0, ""
    names = set()
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.name in names:
            raise _broken(name, f"tensor {tensor.name!r} appears twice")
        if tensor.end > object_bytes:
            raise _broken(
                name, f"tensor {tensor.name!r} ends at byte {tensor.end}, the file has {object_bytes}"
            )
        if tensor.start < position:
            raise _broken(name, f"tensors {before!r} and {tensor.name!r} overlap")
        position, before = tensor.end, tensor.name
        names.add(tensor.name)


def bare_header(headers: tuple[GgufHeader, ...], *, keep_vocabulary: bool) -> tuple[bytes, int]:
    """One header of the key-values of the first and the tensors of all, and the size of a file it fits.

    Args:
        headers: Of the parts of a model.
        keep_vocabulary: Whether long values of the tokenizer stay, which take seconds to parse. Without them
            the size of the vocabulary takes their place.
    """
    first = headers[0]
    kept = [
        span
        for key, span in first.spans.items()
        if keep_vocabulary or not key.startswith("tokenizer.") or len(span) <= _LONG_VALUE_BYTES
    ]
    size_key = f"{first.values.get('general.architecture')}.vocab_size"
    if not keep_vocabulary and size_key not in first.values and _TOKENS in first.values:
        name = size_key.encode()
        kept.append(struct.pack("<Q", len(name)) + name + struct.pack("<II", 4, first.values[_TOKENS]))
    described = [span for header in headers for span in header.tensor_spans]
    start = MAGIC + struct.pack("<IQQ", first.version, len(described), len(kept))
    content = b"".join([start, *kept, *described])
    last = max((tensor.end for header in headers for tensor in header.tensors), default=0)
    return content, len(content) + last


def _broken(name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{name} is not an intact GGUF file: {reason}; fetch it again", shard=name)
