"""Opens a checkpoint as the weights it means: quantized ones appear as the dense tensors they stand for.

Whoever plans, builds and converts a model sees names, shapes and one dtype as in the original checkpoint;
`quantlib.checkpoint.reader` decodes what it reads.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial

from quantlib.checkpoint.decoders import DECODERS, Found
from quantlib.checkpoint.decoders.outliers import with_outliers
from quantlib.checkpoint.header import DTYPE_BYTES, TensorEntry
from quantlib.checkpoint.index import Checkpoint, list_folder, open_checkpoint, refuse_staged
from quantlib.checkpoint.reader import fetch
from quantlib.checkpoint.stated_quantization import quantization_of, without_quantization
from quantlib.errors import CheckpointError
from quantlib.storage import Store

GGUF_ENDING = ".gguf"
# Ends of names of weights, and of codes of weights.
_OF_CODES = ("weight", "weight_packed", "qweight", "_blocks")
_FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def open_source(store: Store, uri: str, *, levels_dtype: str | None = None) -> Checkpoint:
    """Open a checkpoint, quantized or not.

    Args:
        store: The store it lies in.
        uri: Normalized address of its folder, or of a GGUF file.
        levels_dtype: safetensors dtype of the weights that are made from codes; by default what config.json
            states as ``dtype``, or else what most tensors that are no codes are stored in.

    Raises:
        ObjectNotFoundError: There is nothing at the address.
        CheckpointError: It is damaged, or quantized in a way that is not understood.
    """
    checkpoint = open_stored(store, uri, levels_dtype=levels_dtype)
    quantization = quantization_of(checkpoint.config)
    if not quantization:
        return checkpoint
    method = str(quantization.get("quant_method"))
    if method not in DECODERS:
        raise CheckpointError(
            f"{uri} is quantized by {method}, which is not read; read are {', '.join(DECODERS)}:"
            " give one of these, or the original checkpoint",
            uri=uri,
        )
    found = DECODERS[method](quantization, checkpoint.tensors, partial(fetch, store, checkpoint))
    found = with_outliers(found, checkpoint.tensors)
    dtype = levels_dtype or _dtype(checkpoint)
    return replace(
        checkpoint,
        config=without_quantization(checkpoint.config),
        tensors=_meant(checkpoint, found, dtype),
        decoded=found.decoded,
        dropped={name: reason for name, reason in found.dropped.items() if name in checkpoint.tensors},
        source_format=method,
        quantization=quantization,
    )


def open_stored(store: Store, uri: str, *, levels_dtype: str | None = None) -> Checkpoint:
    """Open a checkpoint with its tensors as they are stored; of a GGUF file, those it means.

    Args:
        store: The store it lies in.
        uri: Normalized address of its folder, or of a GGUF file.
        levels_dtype: Of the tensors of a GGUF file.

    Raises:
        ObjectNotFoundError: There is nothing at the address.
        CheckpointError: It is damaged.
    """
    if uri.endswith(GGUF_ENDING):
        return _open_gguf(store, uri, levels_dtype)
    try:
        return open_checkpoint(store, uri)
    except CheckpointError:
        listing = list_folder(store, uri)
        refuse_staged(uri, listing)
        if not holds_gguf(listing):
            raise
        return _open_gguf(store, uri, levels_dtype)


def holds_gguf(names: Collection[str]) -> bool:
    """Whether files of these names hold weights in GGUF.

    >>> holds_gguf(["config.json", "model-00001-of-00002.gguf"]), holds_gguf(["model.safetensors", "x.gguf"])
    (True, False)
    """
    is_safetensors = any(name.endswith(".safetensors") for name in names)
    return not is_safetensors and any(name.endswith(GGUF_ENDING) for name in names)


def _open_gguf(store: Store, uri: str, levels_dtype: str | None) -> Checkpoint:
    # The gguf package and the readers of transformers take a while to import.
    from quantlib.checkpoint.gguf_files.source import open_gguf

    return open_gguf(store, uri, levels_dtype=levels_dtype)


def _meant(checkpoint: Checkpoint, found: Found, dtype: str) -> dict[str, TensorEntry]:
    parts = {part.name for made in found.decoded.values() for part in made.parts.values()}
    plain = {
        name: entry
        for name, entry in checkpoint.tensors.items()
        if name not in parts and name not in found.dropped
    }
    _refuse_unexplained_codes(checkpoint, plain)
    twice = sorted(plain.keys() & found.decoded.keys())
    if twice:
        raise CheckpointError(
            f"{checkpoint.uri} stores {twice[0]} both as it is and quantized;"
            " remove the one that is not meant",
            tensor=twice[0],
        )
    return plain | {name: made.entry(name, dtype) for name, made in found.decoded.items()}


def _refuse_unexplained_codes(checkpoint: Checkpoint, plain: Mapping[str, TensorEntry]) -> None:
    for name, entry in plain.items():
        if name.endswith(_OF_CODES) and entry.dtype not in _FLOATS and len(entry.shape) > 1:
            raise CheckpointError(
                f"{checkpoint.uri} stores {name} as {entry.dtype} {list(entry.shape)}, which its"
                " quantization_config does not explain; give the original checkpoint",
                tensor=name,
            )


def _dtype(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    text = config.get("text_config")
    for values in (config, text if isinstance(text, Mapping) else {}):
        stated = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
        if stated in _DTYPES:
            return _DTYPES[stated]
    return _most_common(checkpoint.tensors.values())


def _most_common(entries: Iterable[TensorEntry]) -> str:
    """Of the dtypes weights are kept in, the one of most bytes."""
    sizes = Counter({"BF16": 0})
    for entry in entries:
        if entry.dtype in _DTYPES.values() and not entry.name.endswith(("scale", "scale_inv", "scales")):
            sizes[entry.dtype] += entry.num_values * DTYPE_BYTES[entry.dtype]
    return sizes.most_common(1)[0][0]
