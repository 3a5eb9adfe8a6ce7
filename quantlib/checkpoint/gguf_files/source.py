"""Opens a GGUF file, whole or in parts, as the checkpoint it was made from.

Every tensor appears under the name and in the orientation transformers gives it, in bf16 (fp16 and fp32 where
``general.file_type`` says that the file is stored so): levels are worked out in fp32 by the gguf package and
rounded once. K types and others have levels that bf16 does not hold exactly.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import gguf.quants
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from quantlib.checkpoint.decoded import ROW_STEP, DecodedTensor
from quantlib.checkpoint.gguf_files import rope_factors
from quantlib.checkpoint.gguf_files.header import GgufHeader, GgufTensor, read_gguf_header
from quantlib.checkpoint.gguf_files.meaning import Place, TokenizerFiles, config_of, places_of, with_biases
from quantlib.checkpoint.header import TensorEntry
from quantlib.checkpoint.index import Checkpoint, list_folder
from quantlib.checkpoint.reader import tensor_of
from quantlib.errors import CheckpointError, ObjectNotFoundError
from quantlib.storage import ObjectInfo, Store, uri_name

ENDING = ".gguf"
FORMAT = "gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def open_gguf(store: Store, uri: str, *, levels_dtype: str | None = None) -> Checkpoint:
    """Open a GGUF file.

    Args:
        store: The store it lies in.
        uri: Normalized address of the file, of any part of it, or of a folder that holds one model.
        levels_dtype: safetensors dtype of its tensors; by default by ``general.file_type``.

    Raises:
        ObjectNotFoundError: There is nothing at the address.
        CheckpointError: It is damaged, not of a family that transformers reads from GGUF, or a part is
            missing.
    """
    files = _files_at(store, uri)
    headers = tuple(read_gguf_header(store, info) for info in files.values())
    described = {t.name: t for header in headers for t in header.tensors}
    stored = _stored(files, headers)
    _refuse_unknown_kinds({tensor.kind for tensor in described.values()}, uri)
    config = with_biases(config_of(headers), described)
    divisors = described.pop(rope_factors.TENSOR, None)
    if divisors is not None:
        entry = stored[divisors.name]
        (view,) = store.read_ranges(files[entry.shard], [(entry.start, entry.end)])
        config = rope_factors.with_rope_factors(config, _values(tensor_of(view, entry), divisors).flatten())
    places = places_of(described.values(), headers[0], config)
    decoded: dict[str, DecodedTensor] = {}
    for name, place in places.items():
        decoded |= _decoded(described[name], stored[name], place)
    dtype = levels_dtype or _DTYPES[config["dtype"]]
    return Checkpoint(
        uri=uri,
        config=config,
        shards=files,
        tensors={name: made.entry(name, dtype) for name, made in decoded.items()},
        side_files={},
        decoded=decoded,
        dropped={} if divisors is None else {divisors.name: "config.json says it in rope_parameters"},
        source_format=FORMAT,
        stored=stored,
        made_files=TokenizerFiles(headers, uri),
    )


def _files_at(store: Store, uri: str) -> dict[str, ObjectInfo]:
    """The one file, or all parts in order."""
    is_file = uri.endswith(ENDING)
    folder = uri.rpartition("/")[0] if is_file else uri
    listing = list_folder(store, folder)
    names = [name for name in listing if name.endswith(ENDING)]
    if is_file and uri_name(uri) not in names:
        raise ObjectNotFoundError(f"nothing was found at {uri}", uri=uri)
    found = [uri_name(uri)] if is_file else names
    parts = _PART.fullmatch(found[0])
    if parts is not None:
        wanted = [
            f"{parts['stem']}-{number:05d}-of-{parts['total']}{ENDING}"
            for number in range(1, int(parts["total"]) + 1)
        ]
        missing = [name for name in wanted if name not in listing]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {missing[0]} ({len(missing)} of {len(wanted)} parts); fetch it again",
                uri=uri,
                shard=missing[0],
            )
        found = wanted if is_file or set(wanted) == set(names) else names
    if len(found) > 1 and (parts is None or found is names):
        raise CheckpointError(
            f"{folder} holds several models, {', '.join(sorted(names)[:5])}; name the file that is meant",
            uri=uri,
        )
    return {name: listing[name] for name in found}


def _stored(files: Mapping[str, ObjectInfo], headers: Sequence[GgufHeader]) -> dict[str, TensorEntry]:
    stored: dict[str, TensorEntry] = {}
    for file, header in zip(files, headers, strict=True):
        for tensor in header.tensors:
            if tensor.name in stored:
                raise CheckpointError(
                    f"tensor {tensor.name} is in both {stored[tensor.name].shard} and {file};"
                    " fetch the files again",
                    tensor=tensor.name,
                )
            stored[tensor.name] = _entry(tensor, file)
    return stored


def _refuse_unknown_kinds(kinds: set[GGMLQuantizationType], uri: str) -> None:
    for kind in sorted(kinds):
        values, size = GGML_QUANT_SIZES[kind]
        try:
            made = gguf.quants.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{uri} stores tensors as {kind.name}, which the gguf package does not decode;"
                " give another file of the model",
                uri=uri,
            ) from error
        assert made.shape == (1, values), "a block is decoded to its values"


def _entry(tensor: GgufTensor, file: str) -> TensorEntry:
    """The bytes of a tensor."""
    return TensorEntry(
        name=tensor.name,
        dtype="U8",
        shape=(tensor.end - tensor.start,),
        shard=file,
        start=tensor.start,
        end=tensor.end,
    )


def _decoded(tensor: GgufTensor, entry: TensorEntry, place: Place) -> dict[str, DecodedTensor]:
    """What a stored tensor is, by name: one tensor, or one for each expert."""
    if len(place.names) == 1:
        return {place.names[0]: _decoded_one(tensor, entry, place)}
    size = entry.size_bytes // len(place.names)
    made = {}
    for number, name in enumerate(place.names):
        start = entry.start + number * size
        own = replace(entry, name=f"{entry.name}[{number}]", shape=(size,), start=start, end=start + size)
        made[name] = _decoded_one(replace(tensor, shape=place.shape), own, place)
    return made


def _decoded_one(tensor: GgufTensor, entry: TensorEntry, place: Place) -> DecodedTensor:
    is_by_rows = place.process is None and len(tensor.shape) > 1
    return DecodedTensor(
        shape=place.shape,
        parts={"codes": entry},
        make_rows=partial(_rows, tensor) if is_by_rows else partial(_whole, tensor, place),
        row_step=ROW_STEP if is_by_rows else None,
    )


def _rows(tensor: GgufTensor, parts: Mapping[str, torch.Tensor], start: int, end: int) -> torch.Tensor:
    codes = parts["codes"].reshape(tensor.shape[0], -1)[start:end]
    return torch.from_numpy(_values(codes, tensor)).reshape(-1, *tensor.shape[1:])


def _whole(
    tensor: GgufTensor,
    place: Place,
    parts: Mapping[str, torch.Tensor],
    start: int,  # noqa: ARG001 - always all rows
    end: int,  # noqa: ARG001
) -> torch.Tensor:
    values = _values(parts["codes"], tensor).reshape(tensor.shape)
    return torch.from_numpy(np.ascontiguousarray(place.process(values) if place.process else values))


def _values(codes: torch.Tensor, tensor: GgufTensor) -> np.ndarray:
    """fp32 values of codes, a row of the last dim each."""
    values, size = GGML_QUANT_SIZES[tensor.kind]
    row_bytes = tensor.shape[-1] // values * size
    # A copy: what was fetched may lie unaligned.
    return gguf.quants.dequantize(codes.numpy().reshape(-1, row_bytes).copy(), tensor.kind)
