"""An output in GGUF opened by the names that its job knows: blocks as they are, the rest as it was copied."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gguf.constants import GGML_QUANT_SIZES

from quantlib.checkpoint.decoded import DecodedTensor
from quantlib.checkpoint.dtypes import torch_dtype
from quantlib.checkpoint.findings import limited
from quantlib.checkpoint.gguf_files.header import GgufHeader, GgufTensor, read_gguf_header
from quantlib.checkpoint.gguf_files.names import StoredName, all_names
from quantlib.checkpoint.gguf_files.rope_factors import TENSOR as ROPE_FACTORS
from quantlib.checkpoint.gguf_files.shard import KINDS
from quantlib.checkpoint.gguf_files.source import ENDING
from quantlib.checkpoint.header import TensorEntry
from quantlib.checkpoint.index import Checkpoint, read_config
from quantlib.errors import UnsupportedModelError
from quantlib.packing import gguf_format
from quantlib.storage import ObjectInfo, Store

_DTYPES = {kind: dtype for dtype, kind in KINDS.items()}
_WIDENED = ("BF16", "F16")
# Embedding and head, which may be in blocks that are rounded as llama.cpp does.
_ENDS = ("token_embd.weight", "output.weight")
# Read at a time to look at scales.
_PIECE_BYTES = 128 << 20


def open_output(
    uri: str,
    config: Mapping[str, Any],
    shards: Mapping[str, ObjectInfo],
    headers: Mapping[str, GgufHeader],
) -> Checkpoint:
    """What parts hold, by the names of a plan.

    A tensor that has no name there keeps that of the file.

    Args:
        uri: Of the folder.
        config: The output's config.json.
        shards: Its parts.
        headers: Of those that are intact.
    """
    names = _names_in_file(config)
    tensors: dict[str, TensorEntry] = {}
    decoded: dict[str, DecodedTensor] = {}
    for shard, header in headers.items():
        for tensor in header.tensors:
            if tensor.name == ROPE_FACTORS:
                continue
            name, place = names.get((tensor.name, tensor.kind in _DTYPES), (tensor.name, None))
            entry = _entry(name, shard, tensor)
            tensors[name] = entry
            if place is not None and place.order is not None and tensor.kind in _DTYPES:
                decoded[name] = DecodedTensor(
                    shape=entry.shape,
                    parts={"rows": entry},
                    make_rows=partial(_restored, place),
                    row_step=None,
                )
    return Checkpoint(
        uri=uri,
        config=dict(config),
        shards=dict(shards),
        tensors=tensors,
        side_files={},
        decoded=decoded,
        stored=tensors,
    )


def open_parts(store: Store, uri: str, listing: Mapping[str, ObjectInfo]) -> Checkpoint:
    """The same of a folder whose parts are all intact.

    Raises:
        CheckpointError: A part or config.json is not.
    """
    shards = {name: info for name, info in listing.items() if name.endswith(ENDING)}
    headers = {name: read_gguf_header(store, info) for name, info in sorted(shards.items())}
    return open_output(uri, read_config(store, uri, listing), shards, headers)


def with_wide_vectors(source: Checkpoint) -> Checkpoint:
    """A source whose vectors are in fp32, exactly, as GGUF holds them."""
    wide = {n: e for n, e in source.tensors.items() if len(e.shape) == 1 and e.dtype in _WIDENED}
    decoded = {name: _widened(entry, source.decoded.get(name)) for name, entry in wide.items()}
    tensors = {name: replace(entry, dtype="F32") for name, entry in wide.items()}
    return replace(source, tensors={**source.tensors, **tensors}, decoded={**source.decoded, **decoded})


def part_findings(headers: Mapping[str, GgufHeader]) -> Iterator[str]:
    """What is wrong with a set of parts: one that is missing, of another set, or holds too few tensors."""
    counts = {header.values.get("split.count", 1) for header in headers.values()}
    numbers = [header.values.get("split.no", 0) for header in headers.values()]
    for count in counts:
        missing = sorted(set(range(count)) - set(numbers))
        if len(counts) > 1 or missing or len(numbers) != count:
            yield (
                f"A GGUF file of {count} parts was begun, {len(numbers)} are there"
                f"{f' and number {missing[0] + 1} is missing' if missing else ''}."
            )
    found = sum(len(header.tensors) for header in headers.values())
    for promised in {header.values.get("split.tensors.count", found) for header in headers.values()}:
        if promised != found:
            yield f"The parts promise {promised} tensors and hold {found}."


def scale_findings(store: Store, info: ObjectInfo, header: GgufHeader) -> Iterator[str]:
    """Scales of blocks that are zero, infinite or NaN."""
    yield from limited(
        f"{wrong} of the scales of {tensor.name} are zero, infinite or NaN."
        for tensor in header.tensors
        if tensor.kind not in _DTYPES and (wrong := _unusable_scales(store, info, tensor))
    )


def _unusable_scales(store: Store, info: ObjectInfo, tensor: GgufTensor) -> int:
    _, size = GGML_QUANT_SIZES[tensor.kind]
    step = _PIECE_BYTES // size * size
    wrong = 0
    for start in range(tensor.start, tensor.end, step):
        end = min(start + step, tensor.end)
        (view,) = store.read_ranges(info, [(start, end)])
        block_BS = torch.frombuffer(bytearray(view), dtype=torch.uint8).view(-1, size)
        # The blocks that are written begin with their scale.
        scale_B = block_BS[:, :2].contiguous().view(torch.float16)[:, 0]
        # Rows of an embedding that were never learnt are zeros, or as good as.
        is_zero_B = (scale_B == 0) & (tensor.name not in _ENDS)
        wrong += int((~torch.isfinite(scale_B) | is_zero_B).sum())
    return wrong


def _names_in_file(config: Mapping[str, Any]) -> dict[tuple[str, bool], tuple[str, StoredName]]:
    """Name in the file, and whether it holds plain numbers there -> name in a plan, and its place."""
    try:
        # transformers knows no such quantization.
        places = all_names({n: value for n, value in config.items() if n != "quantization_config"})
    # Of an output without its config.json, which is a finding of its own.
    except UnsupportedModelError:
        return {}
    found = {}
    for name, place in places.items():
        found[place.name, True] = (name, place)
        if name.endswith(".weight"):
            found[place.name, False] = (f"{name.removesuffix('.weight')}{gguf_format.SUFFIX}", place)
    return found


def _entry(name: str, shard: str, tensor: GgufTensor) -> TensorEntry:
    values, size = GGML_QUANT_SIZES[tensor.kind]
    dtype, shape = _DTYPES.get(tensor.kind), tensor.shape
    if dtype is None:
        dtype, shape = "U8", (*shape[:-1], shape[-1] // values * size)
    return TensorEntry(name=name, dtype=dtype, shape=shape, shard=shard, start=tensor.start, end=tensor.end)


def _restored(
    place: StoredName,
    parts: Mapping[str, torch.Tensor],
    start: int,  # noqa: ARG001 - always all rows
    end: int,  # noqa: ARG001
) -> torch.Tensor:
    return place.restored(parts["rows"]).float()


def _widened(entry: TensorEntry, made: DecodedTensor | None) -> DecodedTensor:
    stored = {"values": entry} if made is None else made.parts

    def make_rows(parts: Mapping[str, torch.Tensor], start: int, end: int) -> torch.Tensor:
        values = parts["values"] if made is None else made.make_rows(parts, start, end)
        return values.to(torch_dtype(entry.dtype)).float()

    return DecodedTensor(shape=entry.shape, parts=stored, make_rows=make_rows, row_step=None)
