"""Opens a checkpoint: config.json, the shards and where every tensor lies, from listing and headers alone.

Reads no weight. Every fault that would surface hours later in a run is told here, as one clear message. Only
safetensors is read here: unpickling a checkpoint runs code of its author.
"""

import fnmatch
import json
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from quantlib.checkpoint.decoded import DecodedTensor
from quantlib.checkpoint.header import Header, TensorEntry, read_header
from quantlib.errors import CheckpointError, ObjectNotFoundError
from quantlib.storage import ObjectInfo, Store, uri_name

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Lies beside shards that are not published yet.
STAGED_NAME = "quantmill_staged.json"
# Ends of the names of files that weights are read from.
WEIGHT_FILES = (".safetensors", ".gguf")
MAX_JSON_BYTES = 256 << 20
_HEADERS_IN_FLIGHT = 8
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SIDE_FILES = (
    "tokenizer*",
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "README*",
    "LICENSE*",
    "NOTICE*",
)
# Weights, code, indexes of other weight files, and what describes the quantization of the source.
_NOT_SIDE_FILES = (
    CONFIG_NAME,
    "*.index.json",
    "quantmill_*",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.safetensors",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "*.py",
    "*.pyc",
    "*.so",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose headers have been read and checked.

    Attributes:
        uri: Its folder.
        config: ``config.json``; of a source that was quantized, without what it says of that.
        shards: File name -> object, in order of name.
        tensors: Tensor name -> where it lies; of one that is made when it is read, where its codes lie.
        side_files: File name -> object: tokenizer, generation settings, licence and the like.
        decoded: Tensor name -> how it is made, of those that are.
        dropped: Stored tensor that is neither in ``tensors`` nor a part of one -> the reason.
        source_format: What the weights are stored as: ``safetensors``, ``fp8``, ``gguf``, ...
        quantization: The ``quantization_config`` that ``config`` lacks.
        stored: Every tensor that lies in the shards; ``tensors`` where nothing is made when it is read.
        made_files: File name -> content of side files that are not stored, but follow from what is.
    """

    uri: str
    config: dict[str, Any]
    shards: dict[str, ObjectInfo]
    tensors: dict[str, TensorEntry]
    side_files: dict[str, ObjectInfo]
    decoded: Mapping[str, DecodedTensor] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    source_format: str = "safetensors"
    quantization: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[str, TensorEntry]
    made_files: Mapping[str, bytes] = field(default_factory=dict)


def open_checkpoint(store: Store, uri: str) -> Checkpoint:
    """Open a checkpoint folder as it is stored; `quantlib.checkpoint.source` opens what it means.

    Args:
        store: The store the folder lies in.
        uri: Normalized address of the folder.

    Raises:
        ObjectNotFoundError: There is nothing at the address.
        CheckpointError: No config.json, no safetensors weights, a shard that is missing or damaged, or an
            index that does not fit its shards.
    """
    listing = list_folder(store, uri)
    config = read_config(store, uri, listing)
    weight_map = read_weight_map(store, uri, listing)
    shards = {name: listing[name] for name in shard_files(uri, listing, weight_map)}
    headers = read_headers(store, shards)
    tensors = _merge(headers)
    if weight_map is not None:
        _check_weight_map(weight_map, tensors, headers)
    return Checkpoint(
        uri=uri,
        config=config,
        shards=shards,
        tensors=tensors,
        side_files=find_side_files(listing),
        stored=tensors,
    )


def list_folder(store: Store, uri: str) -> dict[str, ObjectInfo]:
    """File name -> object, of what lies directly in a folder.

    Raises:
        ObjectNotFoundError: Nothing lies there.
    """
    listing = {uri_name(info.uri): info for info in store.list(uri, recursive=False)}
    if not listing:
        raise ObjectNotFoundError(
            f"nothing was found at {uri}; give the folder that holds {CONFIG_NAME}", uri=uri
        )
    return listing


def refuse_staged(uri: str, names: Container[str]) -> None:
    """Make sure that a folder is not that of an output whose publication is still to be decided.

    Raises:
        CheckpointError: It is.
    """
    if STAGED_NAME in names and CONFIG_NAME not in names:
        raise CheckpointError(
            f"{uri} is staged, not published: its shards are there, and it is no checkpoint until"
            f" quantmill publish {uri}, or the command that made it, has published it",
            uri=uri,
        )


def read_config(store: Store, uri: str, listing: Mapping[str, ObjectInfo]) -> dict[str, Any]:
    """The checkpoint's ``config.json``.

    Raises:
        CheckpointError: It is missing, or is no JSON object; or the folder is that of a staged output.
    """
    refuse_staged(uri, listing)
    if CONFIG_NAME not in listing:
        raise CheckpointError(
            f"{uri} holds no {CONFIG_NAME}, found {_some(listing)};"
            " give the folder of a Hugging Face checkpoint",
            uri=uri,
        )
    return read_json(store, listing[CONFIG_NAME])


def read_json(store: Store, info: ObjectInfo) -> dict[str, Any]:
    """A small JSON object.

    Raises:
        CheckpointError: Too large, not JSON, or another kind of JSON value.
    """
    if info.size_bytes > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{info.uri} has {info.size_bytes} bytes, too many for a JSON file", uri=info.uri
        )
    try:
        values = json.loads(store.read(info.uri))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{info.uri} is not valid JSON ({error}); repair it", uri=info.uri) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{info.uri} holds a JSON {type(values).__name__}, an object was expected; repair it",
            uri=info.uri,
        )
    return values


def read_weight_map(store: Store, uri: str, listing: Mapping[str, ObjectInfo]) -> dict[str, str] | None:
    """Tensor name -> shard file name, of the index; None when there is no index.

    Raises:
        CheckpointError: The index is malformed, or names a file that is not plainly beside it.
    """
    if INDEX_NAME not in listing:
        return None
    weight_map = read_json(store, listing[INDEX_NAME]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_NAME} of {uri} has no weight_map; write the index again", uri=uri)
    for tensor, shard in weight_map.items():
        if not is_shard_name(shard):
            raise CheckpointError(
                f"{INDEX_NAME} of {uri} places tensor {tensor!r} in {shard!r};"
                " only the name of a .safetensors file beside the index is allowed",
                uri=uri,
                tensor=tensor,
            )
    return weight_map


def is_shard_name(name: Any) -> bool:
    """True for the plain name of a safetensors file: no folder, no drive, nothing hidden.

    >>> [is_shard_name(n) for n in ("model.safetensors", "../x.safetensors", "a/b.safetensors")]
    [True, False, False]
    """
    if not isinstance(name, str) or not name.endswith(".safetensors") or name.startswith("."):
        return False
    return name.isprintable() and not set(name) & set('/\\:*?"<>|')


def shard_files(
    uri: str, listing: Mapping[str, ObjectInfo], weight_map: Mapping[str, str] | None
) -> tuple[str, ...]:
    """File names of the shards, sorted, all of them present.

    Raises:
        CheckpointError: There are no safetensors weights, or a shard of the index is missing.
    """
    if weight_map is None:
        if SINGLE_NAME in listing:
            return (SINGLE_NAME,)
        raise _no_weights(uri, listing)
    names = sorted(set(weight_map.values()))
    if SINGLE_NAME in listing and SINGLE_NAME not in names:
        raise CheckpointError(
            f"{uri} holds both {SINGLE_NAME} and an index of other shards; remove the one that is not meant",
            uri=uri,
        )
    missing = [name for name in names if name not in listing]
    if missing:
        raise CheckpointError(
            f"{INDEX_NAME} of {uri} names {len(names)} shards, {len(missing)} are missing: {_some(missing)};"
            " fetch the checkpoint again",
            uri=uri,
            shard=missing[0],
        )
    return tuple(names)


def _no_weights(uri: str, listing: Mapping[str, ObjectInfo]) -> CheckpointError:
    pickled = [name for name in sorted(listing) if any(fnmatch.fnmatchcase(name, p) for p in _PICKLED)]
    if pickled:
        return CheckpointError(
            f"{uri} holds its weights as {_some(pickled)}; only safetensors is read, because such files can"
            " run code: load the model with transformers once and save_pretrained it as safetensors",
            uri=uri,
        )
    return CheckpointError(
        f"{uri} holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME}, found {_some(listing)}", uri=uri
    )


def read_headers(store: Store, shards: Mapping[str, ObjectInfo]) -> dict[str, Header]:
    """The checked headers of several shards, read side by side.

    Raises:
        CheckpointError: One of them is not intact (the first by name).
    """
    with ThreadPoolExecutor(_HEADERS_IN_FLIGHT, thread_name_prefix="header") as executor:
        headers = executor.map(lambda info: read_header(store, info), shards.values())
        return dict(zip(shards, headers, strict=True))


def _merge(headers: Mapping[str, Header]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for shard, header in headers.items():
        for name, entry in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in both {tensors[name].shard} and {shard};"
                    " write the checkpoint again",
                    tensor=name,
                    shard=shard,
                )
            tensors[name] = entry
    return tensors


def _check_weight_map(
    weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry], headers: Mapping[str, Header]
) -> None:
    # Tensors the index does not name are kept: transformers loads them too.
    for name, shard in weight_map.items():
        if name not in headers[shard].tensors:
            place = f"it is in {tensors[name].shard}" if name in tensors else "no shard has it"
            raise CheckpointError(
                f"{INDEX_NAME} places tensor {name!r} in {shard}, but {place}; write the index again",
                tensor=name,
                shard=shard,
            )


def find_side_files(listing: Mapping[str, ObjectInfo]) -> dict[str, ObjectInfo]:
    """What is worth copying beside new weights; never weights, code or descriptions of a quantization."""
    return {
        name: info
        for name, info in sorted(listing.items())
        if _matches(name, _SIDE_FILES) and not _matches(name, _NOT_SIDE_FILES)
    }


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
