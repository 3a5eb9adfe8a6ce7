"""What a checkpoint is: architecture, tensors, dtypes, sizes, quantization, from config and headers alone."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from quantlib.checkpoint.header import TensorEntry
from quantlib.checkpoint.source import open_stored
from quantlib.storage import Store

_PACKED_ENDINGS = (".weight_packed", ".qweight")
# Tensors that describe the codes of a quantized weight; they are no parameters of the model.
_DESCRIBING_ENDINGS = (
    ".weight_scale",
    ".weight_zero_point",
    ".weight_shape",
    ".weight_g_idx",
    ".scales",
    ".qzeros",
    ".g_idx",
)
_WORD_BITS = 32
_STATED = ("method", "format", "bits", "group_size", "symmetric")


def inspect_checkpoint(store: Store, uri: str) -> dict[str, Any]:
    """A checkpoint's description as JSON values.

    Raises:
        ObjectNotFoundError: There is nothing at the address.
        CheckpointError: The checkpoint cannot be opened.
    """
    checkpoint = open_stored(store, uri)
    config = checkpoint.config
    quantization = _quantization(config)
    if quantization is None and checkpoint.decoded:
        quantization = {**dict.fromkeys(_STATED), "method": checkpoint.source_format}
    bits = quantization["bits"] if quantization else None
    entries = checkpoint.tensors.values()
    return {
        "uri": uri,
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures") or [],
        "dims": {
            name: config[name]
            for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
            if name in config
        },
        "num_parameters": sum(_num_parameters(entry, bits) for entry in entries),
        "num_tensors": len(checkpoint.tensors),
        "tensor_bytes": sum(entry.size_bytes for entry in entries),
        "dtypes": _dtypes(checkpoint.tensors),
        "shards": [{"name": name, "size_bytes": info.size_bytes} for name, info in checkpoint.shards.items()],
        "side_files": list(checkpoint.side_files),
        "quantization": quantization,
    }


def _num_parameters(entry: TensorEntry, bits: int | None) -> int:
    """Weights the tensor stands for; several codes share a word where they are packed."""
    if entry.name.endswith(_DESCRIBING_ENDINGS):
        return 0
    if entry.name.endswith(_PACKED_ENDINGS) and bits and entry.dtype == "I32":
        return entry.num_values * _WORD_BITS // bits
    return entry.num_values


def _dtypes(tensors: Mapping[str, TensorEntry]) -> dict[str, dict[str, int]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for entry in tensors.values():
        counts[entry.dtype] += 1
        sizes[entry.dtype] += entry.size_bytes
    return {
        dtype: {"tensors": counts[dtype], "size_bytes": size_bytes}
        for dtype, size_bytes in sizes.most_common()
    }


def _quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Method, bits and group size of a ``quantization_config``, in whichever form it states them."""
    block = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(block, Mapping):
        return None
    scheme = _first_weights(block)
    return {
        "method": block.get("quant_method"),
        "format": block.get("format") or block.get("checkpoint_format") or _awq_version(block),
        "bits": _whole_number(scheme.get("num_bits", block.get("bits", block.get("w_bit")))),
        "group_size": _whole_number(
            scheme.get("group_size", block.get("group_size", block.get("q_group_size")))
        ),
        "symmetric": scheme.get("symmetric", block.get("sym")),
    }


def _awq_version(block: Mapping[str, Any]) -> Any:
    # Elsewhere this key holds the release of a tool.
    return block.get("version") if block.get("quant_method") == "awq" else None


def _first_weights(block: Mapping[str, Any]) -> Mapping[str, Any]:
    groups = block.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            return weights
    return {}


def _whole_number(value: Any) -> int | None:
    return value if type(value) is int else None


def format_inspection(description: Mapping[str, Any]) -> str:
    """The description of `inspect_checkpoint` as lines for a terminal."""
    architecture = ", ".join(description["architectures"]) or "unknown architecture"
    dims = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in description["dims"].items())
    shard_bytes = sum(shard["size_bytes"] for shard in description["shards"])
    lines = [
        ("checkpoint", description["uri"]),
        ("architecture", f"{architecture} ({description['model_type']})"),
        ("dims", dims or "not stated"),
        ("parameters", f"{description['num_parameters']:,} in {description['num_tensors']:,} tensors"),
        ("size", f"{_size_text(shard_bytes)} in {len(description['shards'])} shards"),
        ("quantization", _quantization_text(description["quantization"])),
    ]
    lines += [
        (dtype, f"{_size_text(found['size_bytes'])} in {found['tensors']:,} tensors")
        for dtype, found in description["dtypes"].items()
    ]
    lines.append(("side files", ", ".join(description["side_files"]) or "none"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _quantization_text(quantization: Mapping[str, Any] | None) -> str:
    if quantization is None:
        return "none"
    stated = {
        "": quantization["method"],
        "format ": quantization["format"],
        "bits ": quantization["bits"],
        "group size ": quantization["group_size"],
        "symmetric ": quantization["symmetric"],
    }
    return ", ".join(f"{label}{value}" for label, value in stated.items() if value is not None)


def _size_text(size_bytes: int) -> str:
    """A size with a binary unit.

    >>> [_size_text(n) for n in (512, 2048, 3 << 30)]
    ['512 B', '2.00 KiB', '3.00 GiB']
    """
    size, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size_bytes} B" if unit == "B" else f"{size:.2f} {unit}"
